"""verification.py: errors have known values."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

from diffusers_gfprune.export.verification import relative_errors, sampled_reference
from diffusers_gfprune.pipeline_parts import PipelineParts
from helpers.architectures import BASE
from helpers.tiny_pipelines import tiny_pipeline


class Scaled(nn.Module):
    """A model whose output is too large by a share, at one batch size only."""

    def __init__(self, model: nn.Module, share: float, batch_size: int) -> None:
        super().__init__()
        self.model, self.share, self.batch_size = model, share, batch_size

    def forward(self, sample, timestep):
        output = self.model(sample, timestep)
        output.sample = output.sample * (1 + self.share * (len(sample) == self.batch_size))
        return output


def test_the_error_is_relative_to_the_largest_output() -> None:
    parts = PipelineParts.of(tiny_pipeline())
    rows = relative_errors(parts, Scaled(parts.denoiser, 0.25, batch_size=3), None)
    assert [(row["batch_size"], row["timestep"]) for row in rows] == [(n, t) for n in (1, 3) for t in (0, 333, 666, 999)]
    for row in rows:
        assert row["max_relative_error"] == pytest.approx(0.25 if row["batch_size"] == 3 else 0, abs=1e-6)


def test_errors_that_are_not_finite_are_not_hidden() -> None:
    parts = PipelineParts.of(tiny_pipeline())
    rows = relative_errors(parts, Scaled(parts.denoiser, float("nan"), batch_size=2), 2)
    assert all(row["max_relative_error"] != row["max_relative_error"] for row in rows)


def test_the_reference_records_what_calibrates() -> None:
    parts = PipelineParts.of(tiny_pipeline())
    reference = sampled_reference(parts, 2, num_images=3, num_inference_steps=5, prompts=("",))
    assert reference.samples.shape == (4, 1, 8, 8)  # whole batches
    assert len(reference.recorded) == 2 * 5
    assert [entry["timestep"].tolist() for entry in reference.recorded[:5]] == [[t, t] for t in (800, 600, 400, 200, 0)]
    assert all(entry["sample"].shape == (2, 1, 8, 8) for entry in reference.recorded)
    first, last = reference.recorded[0]["sample"], reference.recorded[4]["sample"]
    assert not torch.equal(first, last)
    same = reference.similarity(parts.denoiser)
    assert same["ssim_to_fp32"] == pytest.approx(1) and same["psnr_to_fp32"] is None
    other = reference.similarity(tiny_pipeline(seed=1).unet)
    assert other["ssim_to_fp32"] < 0.9 and other["psnr_to_fp32"] < 30


def test_flow_matching_is_sampled_in_the_steps_asked_for() -> None:
    parts = PipelineParts.of(tiny_pipeline())._replace(scheduler=FlowMatchEulerDiscreteScheduler())
    reference = sampled_reference(parts, None, num_images=2, num_inference_steps=3, prompts=("",))
    assert len(reference.recorded) == reference.settings["num_inference_steps"] == 3


def test_models_with_vectors_are_sampled_with_some() -> None:
    unet = UNet2DModel(**{**BASE, "class_embed_type": "identity"}).eval()
    parts = PipelineParts.of(DDPMPipeline(unet, DDPMScheduler()))
    reference = sampled_reference(parts, None, num_images=2, num_inference_steps=3, prompts=("",))
    vectors = reference.recorded[0]["class_labels"]
    assert vectors.shape == (2, unet.config.block_out_channels[0] * 4) and not torch.equal(*vectors)
