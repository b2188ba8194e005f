"""diffusion/edm.py: preconditioning and samples are those of Diffusers' scheduler."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.metrics.conditions import row_conditions
from diffusers_gfprune.metrics.model_size import spatial_size
from diffusers_gfprune.metrics.sampling import denoised, image_generators, sample_images
from diffusers_gfprune.trained_pipelines import load_pipeline
from helpers.consistency_models import SIZE, consistency_unet
from helpers.latent_pipelines import PIPELINES
from helpers.processes import edm


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_model_that_hits_its_target_denoises_perfectly(prediction_type: str) -> None:
    """By the scheduler's own preconditioning, at every level."""
    process, scheduler = edm(prediction_type=prediction_type), EDMEulerScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(12)
    clean, noise = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        batch = DiffusionBatch(clean, noise, timestep[None])
        noisy = clean + sigma * noise
        torch.testing.assert_close(process.add_noise(clean, noise, batch.timesteps), noisy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            batch.inputs(process).sample, scheduler.precondition_inputs(noisy, sigma), rtol=1e-4, atol=1e-4
        )
        found = scheduler.precondition_outputs(noisy, batch.target(process), sigma)
        torch.testing.assert_close(found, clean, rtol=1e-3, atol=2e-3 * max(1, float(sigma)))
        assert process.output_scale(batch.timesteps) is None


def test_targets_have_variance_one_for_data_of_sigma_data() -> None:
    clean, noise = 0.5 * torch.randn(4000, 1, 2, 2), torch.randn(4000, 1, 2, 2)
    target = edm().target(clean, noise, edm().random_timesteps(4000, torch.Generator().manual_seed(0)))
    assert target.var().item() == pytest.approx(1, abs=0.05)


def test_levels_are_those_of_the_paper() -> None:
    """log sigma ~ N(-1.2, 1.2^2)."""
    process = edm()
    logs = 4 * process.random_timesteps(20_000, torch.Generator().manual_seed(0))
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.05) and logs.std().item() == pytest.approx(1.2, abs=0.05)
    ends = process.timesteps_at(torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([math.log(0.002) / 4, math.log(80) / 4])
    grid = process.grid_timesteps(16)
    assert len(grid) == 16 and grid.diff().min() > 0
    process.check_timesteps(grid, 16)
    with pytest.raises(ValueError, match="timesteps have dtype torch.int64; they must be floating point from -1.55.* an EDM"):
        process.check_timesteps(torch.tensor([1]), 1)


def test_samples_are_those_of_the_scheduler() -> None:
    """In the loop of Diffusers' latent pipelines: noise and inputs scaled as the scheduler says."""
    unet, scheduler = consistency_unet(), EDMEulerScheduler()
    (found,) = denoised(unet, scheduler, range(3), (SIZE, SIZE), 4, seed=3)
    x = torch.stack([torch.randn(1, SIZE, SIZE, generator=g) for g in image_generators(3, range(3))])
    x = x * scheduler.init_noise_sigma
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, timestep), timestep).sample
            x = scheduler.step(output, timestep, x).prev_sample
    assert torch.equal(found, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_min": 0}, "sigma_min=0 of the EDMEulerScheduler must be greater than 0 and finite"),
        ({"sigma_max": 0.001}, "sigma_min=0.002 of the EDMEulerScheduler must be less than sigma_max=0.001"),
        (
            {"prediction_type": "sample"},
            "prediction_type=sample of the EDMEulerScheduler must be one of epsilon, v_prediction",
        ),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 of the EDMEulerScheduler must be an integer of at least 1"),
    ],
)
def test_configurations_that_are_none_are_refused(options: dict, message: str) -> None:
    scheduler = EDMEulerScheduler()
    scheduler.register_to_config(**options)
    with pytest.raises(ValueError, match=message):
        training_process(scheduler)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_text_pipelines_sample_as_diffusers_does(name: str, tmp_path: Path) -> None:
    """With and without guidance; images of measurements are rounded to 8 bits."""
    pipe = PIPELINES[name](tmp_path / "parts")
    pipe.scheduler = EDMEulerScheduler()
    pipe.save_pretrained(tmp_path / "dense")
    pipe.set_progress_bar_config(disable=True)
    found, prompts = load_pipeline(str(tmp_path / "dense")), ["a cat", "a dog", "a bird"]
    assert found.process.name == "edm"
    conditions = row_conditions(found.prompts.encode(prompts), found.prompts.null())
    for scale in (1.0, 3.0):
        options = {"guidance_scale": scale, "generator": image_generators(0, range(3)), "output_type": "pt"}
        expected = pipe(prompts, num_inference_steps=4, **options).images
        size = spatial_size(found.denoiser)
        images = sample_images(
            *(found.denoiser, found.scheduler, 3, size, 4, 0, 3, conditions), codec=found.codec, guidance_scale=scale
        )
        torch.testing.assert_close(images, expected, rtol=0, atol=0.6 / 255)
        assert expected.std() > 0.1
