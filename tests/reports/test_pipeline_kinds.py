"""reports/pipeline_kinds.py: what a card says about each kind of pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline

from diffusers_gfprune.loading.pipeline_layouts import LAYOUTS
from diffusers_gfprune.remote.pipeline_prune_ddpm import PIPELINES
from diffusers_gfprune.reports.pipeline_kinds import KINDS, example_of, kind_of, pipeline_of, task_of
from helpers.architectures import build


def test_earlier_reports_are_of_ddpms() -> None:
    pipeline = pipeline_of({"format_version": 3})
    assert (kind_of(pipeline), task_of(pipeline)) == ("ddpm", "unconditional-image-generation")
    assert example_of(pipeline) == "pipe().images.pop()" and pipeline["component"] == "unet"


def test_every_latent_pipeline_has_its_tag() -> None:
    assert set(KINDS) == set(LAYOUTS) - set(PIPELINES)


@pytest.mark.parametrize(
    ("pipeline", "task", "example"),
    [
        ({"class_name": "StableDiffusionPipeline", "condition": "text"}, "text-to-image", 'pipe("a prompt")'),
        (
            {"class_name": "PixArtSigmaPipeline", "condition": "text"},
            *("text-to-image", 'pipe("a prompt", use_resolution_binning=False)'),
        ),
        ({"class_name": "LDMPipeline", "condition": None}, "unconditional-image-generation", "pipe()"),
        (
            {"class_name": "DiTPipeline", "condition": "class labels", "num_classes": 1000},
            *("unconditional-image-generation", "pipe(class_labels=[0])"),
        ),
        (
            {"class_name": "DiTPipeline", "condition": "class labels", "num_classes": 10},
            *("unconditional-image-generation", "pipe(class_labels=[0], guidance_scale=1)"),
        ),
    ],
)
def test_examples_and_tasks(pipeline: dict, task: str, example: str) -> None:
    assert task_of(pipeline) == task
    assert example_of(pipeline) == f"{example}.images.pop()"


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_examples_of_labels_run(kind: type[DiffusionPipeline]) -> None:
    """These pipelines do not pass labels to their model, and raise without."""
    scheduler = DDPMScheduler() if kind is DDPMPipeline else DDIMScheduler()
    pipe, timesteps = kind(build("class-embedding"), scheduler), torch.tensor([3, 3])
    labels, noisy_images = torch.tensor([0, 1]), torch.randn(2, pipe.unet.config.in_channels, 8, 8)
    with pytest.raises(ValueError, match="class_labels"):
        pipe(num_inference_steps=1)
    described = {"class_name": kind.__name__, "condition": "class labels", "num_classes": 10}
    known = {"pipe": pipe, "noisy_images": noisy_images, "timesteps": timesteps, "labels": labels}
    assert eval(example_of(described), known).shape == noisy_images.shape
