"""export: models of continuous noise levels take timesteps that are no integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from diffusers_gfprune.export import export_pipeline, load_exported
from helpers.consistency_models import SIZE, consistency_pipeline

pytestmark = pytest.mark.slow  # a runtime has threads of its own


def test_a_consistency_model_samples_as_before(tmp_path: Path) -> None:
    """In a stock pipeline, in two steps, from the same noise."""
    pipe = consistency_pipeline()
    description = export_pipeline(pipe, tmp_path / "export", format="onnx")
    assert description.max_relative_error < 1e-3 and description.inputs["timestep"].dtype == "float32"
    scheduler = CMStochasticIterativeScheduler.from_pretrained(tmp_path / "export", subfolder="scheduler")
    exported = ConsistencyModelPipeline(load_exported(tmp_path / "export"), scheduler)
    exported.set_progress_bar_config(disable=True)
    found, expected = (
        each(2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for each in (exported, pipe)
    )
    assert found.shape == (2, 1, SIZE, SIZE)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
