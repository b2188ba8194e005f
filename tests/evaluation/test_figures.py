"""evaluation/figures.py: figures of a model that need no samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from diffusers_gfprune.data.sources import HeldOut
from diffusers_gfprune.evaluation import figures
from diffusers_gfprune.evaluation.figures import describe_model, describe_plan
from diffusers_gfprune.metrics.quality import SamplingSettings
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


@pytest.mark.parametrize(("num_images", "tried"), [(0, 3), (2, 2), (70, 3)])
def test_the_trial_has_the_largest_batch(num_images: int, tried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the step loss, where nothing is sampled."""
    batches = []

    def record(name: str, unet, scheduler, settings: SamplingSettings, codec) -> float:
        batches.append(min(settings.batch_size, settings.num_images))
        return 0.0

    monkeypatch.setattr(figures, "try_sampling", record)
    args = SimpleNamespace(
        model=SimpleNamespace(model="dense"),
        data=SimpleNamespace(validation_images=8),
        cost=SimpleNamespace(step_loss_timesteps=2),
    )
    inputs = SimpleNamespace(
        models={"model": SimpleNamespace(denoiser=build("base"), scheduler=DDPMScheduler(), codec=None)},
        folder_images=None,
        images=SimpleNamespace(summary=SimpleNamespace(lines=list)),
        networks=[],
        num_images=num_images,
        settings=SamplingSettings(max(1, num_images), 10, batch_size=3),
    )
    describe_plan(args, inputs, SimpleNamespace(unsampled=lambda: [num_images]), SimpleNamespace(count=0), 1)
    assert batches == [tried]
