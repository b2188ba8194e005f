"""evaluation/figures.py: figures of a model that need no samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDPMPipeline, DDPMScheduler

from diffusers_gfprune.data.sources import HeldOut
from diffusers_gfprune.evaluation.figures import describe_model
from helpers.architectures import build
from helpers.processes import ddpm


def test_the_step_loss_is_measured_in_batches_of_the_given_size(tmp_path: Path) -> None:
    """A model of large images does not fit 256 of them at a time."""
    unet, seen = build("base").eval(), []
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    args = SimpleNamespace(
        samples=SimpleNamespace(eval_batch_size=3),
        cost=SimpleNamespace(step_loss_timesteps=2),
        model=SimpleNamespace(model=str(tmp_path), revision=None, dtype="float32"),
    )
    pipeline = SimpleNamespace(denoiser=unet, scheduler=DDPMScheduler(), process=ddpm(1000))
    held_out, images = HeldOut(torch.zeros(600, 1, 8, 8), {}), SimpleNamespace(null_conditioning=dict)
    describe_model(args, "model", SimpleNamespace(models={"model": pipeline}, held_out=held_out, images=images))
    assert max(seen) == 3 and sum(seen) >= 600
