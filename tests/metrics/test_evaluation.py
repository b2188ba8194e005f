"""Metrics: every figure has a known answer, is reproducible, and does not change the model."""

from __future__ import annotations

import pytest
import torch

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.metrics.step_loss import StepLoss
from helpers.architectures import build
from helpers.images import random_images
from helpers.processes import ddpm
from helpers.zero_model import Zero

# --- step loss ---------------------------------------------------------------------------------------------------------


def test_step_loss_of_a_zero_prediction_is_the_power_of_the_noise() -> None:
    """With eps_theta = 0 the loss is the mean of eps^2, over noise that comes from the seed alone."""
    images = random_images(6) * 2 - 1
    loss = StepLoss(images, ddpm(), grid=16, seed=5, batch_size=7)
    noise = torch.randn(6 * 16, 1, 8, 8, generator=torch.Generator().manual_seed(5))  # every image at every timestep
    assert loss(Zero()) == pytest.approx((noise**2).mean().item(), rel=1e-6)


def test_step_loss_of_a_zero_prediction_of_the_images_is_their_power() -> None:
    """Models that predict the clean image are measured by it."""
    images = random_images(6) * 2 - 1
    loss = StepLoss(images, ddpm(prediction_type="sample"))
    assert loss(Zero()) == pytest.approx((images**2).mean().item(), rel=1e-6)


def test_step_loss_shows_the_model_noisy_images_on_an_even_grid() -> None:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps at the middle of each of `grid` spans of timesteps, equally often."""
    scheduler, images = ddpm(), random_images(4) * 2 - 1
    loss, model = StepLoss(images, scheduler, grid=8, seed=2, batch_size=5), Zero()
    loss(model)
    timesteps = model.seen(1)
    expected = [62, 187, 312, 437, 562, 687, 812, 937]
    assert timesteps.unique(return_counts=True)[0].tolist() == expected
    assert timesteps.unique(return_counts=True)[1].tolist() == [4] * 8
    abar = scheduler.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    noisy = abar.sqrt() * images.repeat(8, 1, 1, 1) + (1 - abar).sqrt() * noise
    torch.testing.assert_close(model.seen(0), noisy)


def test_step_loss_with_many_images_still_covers_the_grid() -> None:
    """One timestep for each image then, to keep an evaluation short; together they cover the grid evenly."""
    model = Zero()
    StepLoss(torch.zeros(1600, 1, 1, 1), ddpm(), grid=16)(model)
    assert model.seen(1).unique(return_counts=True)[1].tolist() == [100] * 16


@pytest.mark.parametrize(("images", "grid"), [(10, 16), (100, 16), (10, 1000), (600, 1000), (3, 7), (1, 16)])
def test_step_loss_meets_all_timesteps_alike(images: int, grid: int) -> None:
    timesteps = StepLoss(torch.zeros(images, 1, 2, 2), ddpm(), grid=grid).timesteps
    _, met = timesteps.unique(return_counts=True)
    assert len(met) == grid and met.max() - met.min() <= 1


def test_step_loss_of_few_timesteps_takes_them_all() -> None:
    few = StepLoss(torch.zeros(2, 1, 2, 2), ddpm(num_train_timesteps=5), grid=16)
    assert few.timesteps.unique().tolist() == [0, 1, 2, 3, 4]


def test_step_loss_gives_each_image_its_label() -> None:
    """Labels follow their images through repetition and batching."""
    images = torch.arange(3.0).view(3, 1, 1, 1)
    noiseless = ddpm(beta_start=1e-8, beta_end=1e-8)
    model = Zero()
    StepLoss(images, noiseless, conditioning={"class_labels": torch.tensor([10, 11, 12])}, grid=4, batch_size=5)(model)
    assert (model.seen(0).flatten().round() + 10).tolist() == model.seen(2).tolist()


def test_step_loss_repeats_exactly_and_depends_on_the_seed() -> None:
    """Two evaluations differ only by the model."""
    unet, images = build("base"), random_images(5) * 2 - 1
    loss = StepLoss(images, ddpm(), grid=4)
    first = loss(unet)
    torch.rand(10)
    assert loss(unet) == first
    assert StepLoss(images, ddpm(), grid=4)(unet) == first
    assert StepLoss(images, ddpm(), grid=4, seed=1)(unet) != first
    assert StepLoss(images, ddpm(), grid=4, batch_size=3)(unet) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_step_loss_restores_the_mode(training: bool) -> None:
    """Evaluated in the middle of training, without dropout and without gradients."""
    model = Zero().train(training)
    StepLoss(random_images(2), ddpm())(model)
    assert model.modes == {False}
    assert model.training is training
    assert model.anchor.grad is None


def test_step_loss_by_timestep_splits_the_mean() -> None:
    """Each timestep has the error of its own images, and together they have the step loss."""
    unet, images = build("base"), random_images(4) * 2 - 1
    loss = StepLoss(images, ddpm(), grid=4, batch_size=5)
    buckets = loss.by_timestep(unet)
    assert list(buckets) == [125, 375, 625, 875]
    assert sum(buckets.values()) / 4 == pytest.approx(loss(unet), rel=1e-9)
    one = StepLoss(images, ddpm(), grid=4)
    chosen = one.timesteps == 375
    noisy = ddpm().add_noise(one.images[one.image_of[chosen]], one.noise[chosen], one.timesteps[chosen])
    with torch.no_grad():
        prediction = unet.eval()(noisy, one.timesteps[chosen]).sample
    assert buckets[375] == pytest.approx(((prediction - one.noise[chosen]) ** 2).mean().item(), rel=1e-5)


def test_step_loss_without_timesteps_is_refused() -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match="grid=0"):
        StepLoss(random_images(2), ddpm(), grid=0)


def test_noise_target_of_each_prediction_type() -> None:
    """eps, x, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x (Salimans and Ho, arXiv 2202.00512)."""
    clean, noise, timesteps = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 500, 999])
    batch = DiffusionBatch(clean, noise, timesteps)
    assert torch.equal(batch.target(ddpm(prediction_type="epsilon")), noise)
    assert torch.equal(batch.target(ddpm(prediction_type="sample")), clean)
    scheduler = ddpm(prediction_type="v_prediction")
    abar = scheduler.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * clean
    torch.testing.assert_close(batch.target(scheduler), velocity)
