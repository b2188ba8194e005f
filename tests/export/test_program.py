"""program.py: what all formats are made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_gfprune.export.program import random_inputs, to_tensors
from diffusers_gfprune.export.verification import sampled_reference
from diffusers_gfprune.pipeline_parts import PipelineParts
from helpers.latent_pipelines import PIPELINES


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_recorded_inputs_are_those_of_the_program(name: str, tmp_path: Path) -> None:
    """However the family calls its model; they calibrate int8."""
    parts = PipelineParts.of(PIPELINES[name](tmp_path / name))
    reference = sampled_reference(parts, None, 2, 1, ("a cat",))
    wanted = to_tensors(random_inputs(parts, 2))
    assert len(reference.recorded) == 1 and reference.recorded[0].keys() == wanted.keys()
    for key, values in reference.recorded[0].items():
        assert (values.shape, values.dtype) == (wanted[key].shape, wanted[key].dtype)
