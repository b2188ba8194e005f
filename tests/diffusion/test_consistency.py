"""diffusion/consistency.py: noise and scales are those of Diffusers' scheduler, samples those of its pipeline, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.metrics.conditions import SampleConditions
from diffusers_gfprune.metrics.quality import SamplingSettings
from diffusers_gfprune.metrics.sampling import denoised, image_generators
from helpers.consistency_models import SIZE, consistency_pipeline, trained_pipeline, wanted_images
from helpers.processes import consistency


def stock_samples(pipe, count: int, labels=None, **options) -> torch.Tensor:
    """Samples of the stock pipeline from the noise of the package, before rounding."""
    generators = image_generators(3, range(count))
    options = {"num_inference_steps": 1, **options}
    return pipe(count, class_labels=labels, generator=generators, output_type="pt", **options).images


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_samples_are_those_of_the_stock_pipeline(steps: int) -> None:
    """To the bit, in batches of any number of images; the scheduler is not changed."""
    pipe = consistency_pipeline()
    before = dict(pipe.scheduler.config)
    expected = stock_samples(pipe, 4, num_inference_steps=steps)
    for batch_size in (4, 3):
        parts = denoised(pipe.unet, pipe.scheduler, range(4), (SIZE, SIZE), steps, seed=3, batch_size=batch_size)
        found = torch.cat([part / 2 + 0.5 for part in parts]).clamp(0, 1)
        if batch_size == 4:
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected)
    assert dict(pipe.scheduler.config) == before


def test_samples_have_their_labels() -> None:
    pipe = consistency_pipeline(num_class_embeds=3)
    expected = stock_samples(pipe, 3, [0, 2, 1])
    conditions = SampleConditions({"class_labels": torch.tensor([0, 2, 1])})
    (found,) = denoised(pipe.unet, pipe.scheduler, range(3), (SIZE, SIZE), 1, seed=3, conditions=conditions)
    assert torch.equal((found / 2 + 0.5).clamp(0, 1), expected)
    assert not torch.equal(stock_samples(pipe, 3, [1, 1, 1]), expected)


@pytest.mark.slow
def test_a_trained_model_makes_the_images_it_was_trained_for() -> None:
    """In one step from pure noise."""
    pipe = trained_pipeline()
    (found,) = denoised(pipe.unet, pipe.scheduler, range(64), (SIZE, SIZE), 1, seed=3)
    noise = torch.stack([torch.randn(1, SIZE, SIZE, generator=g) for g in image_generators(3, range(64))])
    assert (found - wanted_images(noise)).abs().mean() < 0.25  # a guess has 0.46


def test_scales_are_those_of_the_scheduler() -> None:
    """At every level that sampling visits."""
    process, scheduler = consistency(), CMStochasticIterativeScheduler()
    scheduler.set_timesteps(10)
    x = torch.randn(1, 1, 4, 4)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        scheduler._step_index = None
        timesteps = timestep.float()[None]
        torch.testing.assert_close(process.scale_model_input(x, timesteps), scheduler.scale_model_input(x, timestep).float())
        _, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
        torch.testing.assert_close(process.output_scale(timesteps)[0], c_out.float(), rtol=1e-4, atol=1e-6)
        noise = torch.randn_like(x)
        torch.testing.assert_close(process.add_noise(x, noise, timesteps), x + sigma.float() * noise, rtol=1e-4, atol=1e-5)
    assert process.output_scale(torch.tensor([process.timestep_range[0]])).item() == pytest.approx(0, abs=1e-6)


def test_half_of_the_images_are_where_sampling_starts() -> None:
    process = consistency(num_train_timesteps=20)
    top = 250 * math.log(80)
    timesteps = process.timesteps_at(torch.arange(400, dtype=torch.float64) / 400)
    assert timesteps.dtype == torch.float32 and (timesteps == timesteps.max()).sum() == 200 + 10
    assert timesteps.max().item() == pytest.approx(top) and timesteps.min().item() == pytest.approx(250 * math.log(0.002))
    assert len(timesteps.unique()) == 20
    generator = torch.Generator().manual_seed(0)
    drawn = process.random_timesteps(1000, generator)
    assert abs((drawn == drawn.max()).float().mean().item() - 0.525) < 0.05
    process.check_timesteps(drawn, 1000)
    grid = process.grid_timesteps(16)
    assert len(grid) == 16 and grid.diff().min() > 0 and grid[-1].item() == pytest.approx(top)
    assert process.output_scale(grid).min() > 0
    assert len(process.grid_timesteps(100)) == 19


def test_levels_can_be_those_of_a_sampler() -> None:
    process = consistency().sampled_in(2)
    scheduler = CMStochasticIterativeScheduler()
    scheduler.set_timesteps(2)
    found = process.timesteps_at(torch.tensor([0.0, 0.49, 0.5, 0.99], dtype=torch.float64))
    expected = scheduler.timesteps.float()[[0, 0, 1, 1]]
    assert torch.equal(found, expected) and torch.equal(process.grid_timesteps(8), expected[[2, 0]])
    assert consistency().sampled_in(None).num_inference_steps is None
    with pytest.raises(ValueError, match="num_inference_steps=2 must be None: it is for consistency models.* a DDPM"):
        training_process(DDIMScheduler()).sampled_in(2)
    with pytest.raises(ValueError, match="num_inference_steps=41 must be from 1 to 40"):
        consistency().sampled_in(41)


def test_settings_of_samples_are_fitted() -> None:
    """One step unless said otherwise; what DDIM has is refused by name."""
    process = consistency()
    settings, changes = SamplingSettings().fitted(process)
    assert settings.identity()["sampler"] == "multistep consistency sampling" and changes == ()
    assert (settings.num_inference_steps, settings.timestep_spacing) == (1, None)
    settings, changes = SamplingSettings(num_inference_steps=50).fitted(process)
    assert settings.num_inference_steps == 40 and "num_inference_steps=50 is more than the 40 timesteps" in changes[0]
    with pytest.raises(ValueError, match="timestep_spacing=trailing must be left out: .* a consistency model"):
        SamplingSettings(timestep_spacing="trailing").fitted(process)
    with pytest.raises(ValueError, match="eta=0.5 must be 0: .* a consistency model"):
        SamplingSettings(eta=0.5).fitted(process)
    with pytest.raises(ValueError, match="eta=0.5 must be 0"):
        process.sampler(eta=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": torch.tensor([1, 2])}, "timesteps have dtype torch.int64; they must be floating point from -1553.65"),
        ({"timesteps": torch.tensor([0.0, 1200.0])}, "timesteps range from 0 to 1200; they must be .* a consistency model"),
        ({"timesteps": torch.tensor([0.0])}, r"timesteps have shape \(1,\), not \(2,\)"),
        ({"timesteps": torch.tensor([0.0, math.nan])}, "timesteps range from"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    images = torch.zeros(2, 1, 4, 4)
    batch = DiffusionBatch(images, images, change["timesteps"])
    with pytest.raises(ValueError, match=message):
        batch.check(1, consistency())


def test_there_is_no_target() -> None:
    images = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="a consistency model has no target but the output of a dense model"):
        DiffusionBatch(images, images, torch.zeros(2)).target(consistency())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_min": 0}, "sigma_min=0 of the CMStochasticIterativeScheduler must be greater than 0"),
        ({"sigma_data": math.inf}, "sigma_data=inf of the CMStochasticIterativeScheduler must be greater than 0 and finite"),
        ({"sigma_min": 80.0}, "sigma_min=80.0 of the CMStochasticIterativeScheduler must be less than sigma_max=80.0"),
        ({"num_train_timesteps": 1}, "num_train_timesteps=1 of the CMStochasticIterativeScheduler must be .* at least 2"),
    ],
)
def test_configurations_that_are_none_are_refused(options: dict, message: str) -> None:
    scheduler = CMStochasticIterativeScheduler()
    scheduler.register_to_config(**options)
    with pytest.raises(ValueError, match=message):
        training_process(scheduler)
