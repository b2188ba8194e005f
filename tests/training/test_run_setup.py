"""training/run_setup.py: what is made where."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_gfprune import GradientFlowPruner
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.training import run_setup
from diffusers_gfprune.training.arguments import parse_arguments
from helpers.architectures import build


@pytest.mark.parametrize("ratio", ["0.3", "0.5"])
def test_widths_are_planned_for_the_training_device(ratio: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that the plan that a run prints is its own; the model then returns, since images may still be encoded."""
    where = ["cpu"]

    @contextmanager
    def moving(models: list, device: torch.device):
        where.append(str(device))
        yield
        where.append("cpu")

    monkeypatch.setattr(run_setup, "moved", moving)
    monkeypatch.setattr(GradientFlowPruner, "_device_type", lambda self: torch.device(where[-1]).type)
    words = ["--pretrained_model_name_or_path", "x", "--dataset_name", "y", "--output_dir", str(tmp_path / "run")]
    args = parse_arguments([*words, "--ratio", ratio])
    accelerator = SimpleNamespace(device=torch.device("cuda", 0))
    unet, process = build("fine-units"), training_process(DDPMScheduler())
    pruner = run_setup.make_pruner(args, accelerator, unet, process, None)
    assert where == ["cpu", "cuda:0", "cpu"] and pruner.state_dict()["values"]["planned_for"] == "cuda"
