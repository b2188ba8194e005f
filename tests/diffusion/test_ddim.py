"""diffusion/ddim.py: every timestep spacing against a known answer, and steps against those of Diffusers."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_gfprune.diffusion.ddim import SpacedDDIMScheduler, fit_spacing, make_sampler
from diffusers_gfprune.diffusion.ddpm import DDPMProcess
from diffusers_gfprune.diffusion.schedulers import TRAINABLE_SCHEDULERS
from diffusers_gfprune.metrics.sampling import sample_images
from helpers.zero_model import Zero

DDPM = [name for name, process in TRAINABLE_SCHEDULERS.items() if process is DDPMProcess]


def sampler_of(scheduler, *options) -> SpacedDDIMScheduler:
    """DDIM for a model with this scheduler."""
    return make_sampler(DDPMProcess(scheduler), *options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    "limit",
    [
        *({}, {"clip_sample": False}, {"clip_sample_range": 0.25}),
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    ],
    ids=str,
)
def test_steps_are_those_of_diffusers(prediction_type: str, spacing: str, eta: float, limit: dict) -> None:
    """Where the number of steps divides the timesteps, every step is that of Diffusers, to rounding."""
    options = {"prediction_type": prediction_type, "timestep_spacing": spacing, **limit}
    ours, theirs = SpacedDDIMScheduler(**options), DDIMScheduler(**options)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    generator = torch.Generator().manual_seed(0)
    for timestep in ours.timesteps:
        x, prediction, noise = (torch.randn(2, 1, 4, 4, generator=generator) for _ in range(3))
        moved, expected = (
            scheduler.step(prediction, timestep, x, eta=eta, variance_noise=noise) for scheduler in (ours, theirs)
        )
        torch.testing.assert_close(moved.prev_sample, expected.prev_sample)
        torch.testing.assert_close(moved.pred_original_sample, expected.pred_original_sample)


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 501), ("trailing", 7), ("leading", 7)])
def test_every_step_goes_to_the_next_timestep(spacing: str, steps: int) -> None:
    """Diffusers 0.42.1 goes from timestep 999 to 899 with linspace of 10 steps, and next predicts at 888."""
    scheduler = SpacedDDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    visited = scheduler.timesteps.tolist()
    assert len(visited) == steps and [scheduler.previous[t] for t in visited] == [*visited[1:], -1]
    x = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    clean, noise = torch.full_like(x, 0.3), x
    first, second = visited[:2]
    moved = scheduler.step(noise, first, scheduler.add_noise(clean, noise, torch.tensor([first]))).prev_sample
    torch.testing.assert_close(moved, scheduler.add_noise(clean, noise, torch.tensor([second])), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("timesteps", [7, 50, 1000])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_every_number_of_steps_has_as_many_timesteps(spacing: str, timesteps: int) -> None:
    """Diffusers 0.42.1 adds timestep -1 to 62 numbers of trailing steps, such as 201 of 1,000."""
    scheduler = SpacedDDIMScheduler(num_train_timesteps=timesteps, timestep_spacing=spacing)
    for steps in range(1, timesteps + 1):
        scheduler.set_timesteps(steps)
        visited = scheduler.timesteps
        assert len(visited) == steps and visited[-1] >= 0 and (visited.diff() < 0).all()


def test_what_is_advised_for_zero_terminal_snr_works() -> None:
    """Also with an offset, which shifts the first of T / 2 leading timesteps to the last one."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, steps_offset=1)
    with pytest.raises(ValueError, match="use leading with at most 333 steps"):
        sampler_of(scheduler, 500, "leading")
    assert sampler_of(scheduler, 333, "leading").timesteps[0] < 999


@pytest.mark.parametrize(
    ("timesteps", "steps", "spacing", "expected", "said"),
    [
        (1000, 100, "leading", (100, "leading"), []),
        (1000, 1000, "leading", (1000, "leading"), []),
        (1000, 300, "leading", (300, "leading"), []),  # spans 900
        (1000, 501, "leading", (501, "trailing"), ["would start at timestep 500 of 1000"]),
        (1000, 750, "leading", (750, "trailing"), ["would start at timestep 749 of 1000"]),
        (1000, 501, "linspace", (501, "linspace"), []),
        (50, 100, "leading", (50, "leading"), ["num_inference_steps=100 is more than the 50 timesteps"]),
        (50, 100, "quadratic", (50, "quadratic"), ["50 are used"]),
        (1, 1, "leading", (1, "leading"), []),
        (1000, 1, "leading", (1, "trailing"), ["would take timestep 0 alone"]),
        (1000, 1, "quadratic", (1, "trailing"), ["would take timestep 0 alone"]),
        (1000, 1, "linspace", (1, "trailing"), ["would take timestep 0 alone"]),
    ],
)
def test_spacing_is_made_to_fit(timesteps: int, steps: int, spacing: str, expected: tuple, said: list[str]) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=timesteps)
    *fitted, changes = fit_spacing(scheduler, steps, spacing)
    assert tuple(fitted) == expected and len(changes) == len(said)
    assert all(text in change for text, change in zip(said, changes))
    sampler = sampler_of(scheduler, *expected)
    if timesteps > 1 == steps or (steps > 10 and spacing != "quadratic"):
        assert sampler.timesteps[0] >= 0.89 * timesteps


def test_an_offset_that_goes_past_the_last_timestep_is_made_to_fit() -> None:
    """With leading spacing over all timesteps, Diffusers adds the offset to the last one, too."""
    scheduler = DDIMScheduler(num_train_timesteps=100, steps_offset=1)
    steps, spacing, changes = fit_spacing(scheduler, 100, "leading")
    assert (steps, spacing) == (100, "trailing") and "steps_offset=1" in changes[0]
    assert sampler_of(scheduler, 100, "trailing").timesteps.tolist() == list(range(99, -1, -1))
    assert fit_spacing(scheduler, 50, "leading") == (50, "leading", ())


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace", "linear"])
def test_the_sampler_has_the_betas_of_the_model(schedule: str) -> None:
    """DDIMScheduler of Diffusers 0.42.1 makes only some of DDPMScheduler's beta schedules."""
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_schedule=schedule, clip_sample=False)
    sampler = sampler_of(scheduler, 10)
    torch.testing.assert_close(sampler.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-6, atol=1e-8)
    assert not sampler.config.clip_sample


@pytest.mark.parametrize("name", DDPM)
def test_every_accepted_scheduler_can_be_sampled(name: str) -> None:
    """With the same timesteps and betas, whatever the model was saved with."""
    options = {"num_train_timesteps": 50, "beta_end": 0.1, "prediction_type": "v_prediction"}
    sampler = sampler_of(getattr(diffusers, name)(**options), 10)
    torch.testing.assert_close(sampler.alphas_cumprod, DDPMScheduler(**options).alphas_cumprod)
    assert sampler.timesteps.tolist() == list(range(45, -1, -5)) and sampler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("options", "steps", "spacing", "message"),
    [
        ({}, 101, "leading", "num_inference_steps=101 must be from 1 to 100, the timesteps"),
        ({}, 0, "leading", "num_inference_steps=0 must be from 1"),
        ({}, 51, "leading", "num_inference_steps=51 would start at timestep 50 of 100 and leave out .*: use trailing"),
        (
            {"rescale_betas_zero_snr": True},
            10,
            "trailing",
            "starts at timestep 99, where rescale_betas_zero_snr=True .*epsilon",
        ),
        ({}, 1, "quadratic", "num_inference_steps=1 would take timestep 0 alone, .*: use trailing"),
        ({"rescale_betas_zero_snr": True}, 10, "linspace", "timestep_spacing=linspace starts at timestep 99"),
        ({"steps_offset": 1}, 100, "leading", "would start at timestep 100 of 100, because of steps_offset=1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(options: dict, steps: int, spacing: str, message: str) -> None:
    """In one line that names the arguments."""
    with pytest.raises(ValueError, match=message):
        sampler_of(DDPMScheduler(num_train_timesteps=100, **options), steps, spacing)


def test_zero_terminal_snr_is_sampled_where_it_can_be() -> None:
    """By leading spacing, which leaves out the last timestep, and by any spacing where the model predicts v."""
    options = {"num_train_timesteps": 100, "rescale_betas_zero_snr": True}
    model = Zero()
    model.config = SimpleNamespace(in_channels=1)
    for scheduler, spacing in (
        (DDPMScheduler(**options), "leading"),
        (DDPMScheduler(**options, prediction_type="v_prediction"), "trailing"),
    ):
        assert sample_images(model, scheduler, 2, (4, 4), num_inference_steps=10, timestep_spacing=spacing).isfinite().all()


def test_quadratic_timesteps_are_squares() -> None:
    """Those of Song et al., without the lowest ones that round to the same."""
    scheduler = SpacedDDIMScheduler()
    scheduler.set_timesteps(10, quadratic=True)
    assert scheduler.timesteps.tolist() == [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]
    assert scheduler.previous[800] == 632 and scheduler.previous[9] == 0 and scheduler.previous[0] == -1
    scheduler.set_timesteps(100, quadratic=True)
    published = [int(t) for t in np.linspace(0, np.sqrt(800), 100) ** 2]
    assert sorted(scheduler.timesteps.tolist()) == sorted(set(published)) and len(set(published)) == 96


def test_quadratic_spacing_recovers_a_known_image() -> None:
    """A model that always points at one image leads there by any sequence of timesteps."""
    target = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)

    class Pointing(Zero):
        def forward(self, sample, timestep, class_labels=None):
            return SimpleNamespace(sample=target.expand_as(sample))

    model = Pointing()
    model.config = SimpleNamespace(in_channels=1)
    scheduler = DDPMScheduler(prediction_type="sample")
    images = sample_images(model, scheduler, 2, (4, 4), num_inference_steps=7, timestep_spacing="quadratic")
    torch.testing.assert_close(images, (target / 2 + 0.5).expand(2, -1, -1, -1), rtol=0, atol=0.5001 / 255)


def test_a_stochastic_step_without_noise_is_refused() -> None:
    scheduler = SpacedDDIMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="variance_noise=None must be a tensor of noise with eta=0.5"):
        scheduler.step(torch.zeros(1, 1, 2, 2), 900, torch.zeros(1, 1, 2, 2), eta=0.5)
