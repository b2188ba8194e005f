"""Metrics: every figure has a known answer, is reproducible, and does not change the model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.metrics.fidelity import (
    feature_moments,
    frechet_distance,
    frechet_distance_pixels,
    kernel_distance,
    psnr_to_reference,
    ssim_to_reference,
)
from diffusers_gfprune.metrics.model_size import count_macs, spatial_size
from diffusers_gfprune.metrics.step_loss import StepLoss
from helpers.architectures import build
from helpers.zero_model import Zero


def random_images(count: int, channels: int = 1, side: int = 8, seed: int = 0) -> Tensor:
    """Images in [0, 1] with shape `(count, channels, side, side)`."""
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


# --- step loss ---------------------------------------------------------------------------------------------------------


def test_step_loss_of_a_zero_prediction_is_the_power_of_the_noise() -> None:
    """With eps_theta = 0 the loss is the mean of eps^2, over noise that comes from the seed alone."""
    images = random_images(6) * 2 - 1
    loss = StepLoss(images, DDPMScheduler(), grid=16, seed=5, batch_size=7)
    noise = torch.randn(6 * 16, 1, 8, 8, generator=torch.Generator().manual_seed(5))  # every image at every timestep
    assert loss(Zero()) == pytest.approx((noise**2).mean().item(), rel=1e-6)


def test_step_loss_of_a_zero_prediction_of_the_images_is_their_power() -> None:
    """Models that predict the clean image are measured by it."""
    images = random_images(6) * 2 - 1
    loss = StepLoss(images, DDPMScheduler(prediction_type="sample"))
    assert loss(Zero()) == pytest.approx((images**2).mean().item(), rel=1e-6)


def test_step_loss_shows_the_model_noisy_images_on_an_even_grid() -> None:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps at the middle of each of `grid` spans of timesteps, equally often."""
    scheduler, images = DDPMScheduler(), random_images(4) * 2 - 1
    loss, model = StepLoss(images, scheduler, grid=8, seed=2, batch_size=5), Zero()
    loss(model)
    timesteps = model.seen(1)
    expected = [62, 187, 312, 437, 562, 687, 812, 937]
    assert timesteps.unique(return_counts=True)[0].tolist() == expected
    assert timesteps.unique(return_counts=True)[1].tolist() == [4] * 8
    abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    noisy = abar.sqrt() * images.repeat(8, 1, 1, 1) + (1 - abar).sqrt() * noise
    torch.testing.assert_close(model.seen(0), noisy)


def test_step_loss_with_many_images_still_covers_the_grid() -> None:
    """One timestep for each image then, to keep an evaluation short; together they cover the grid evenly."""
    model = Zero()
    StepLoss(torch.zeros(1600, 1, 1, 1), DDPMScheduler(), grid=16)(model)
    assert model.seen(1).unique(return_counts=True)[1].tolist() == [100] * 16


@pytest.mark.parametrize(("images", "grid"), [(10, 16), (100, 16), (10, 1000), (600, 1000), (3, 7), (1, 16)])
def test_step_loss_meets_all_timesteps_alike(images: int, grid: int) -> None:
    timesteps = StepLoss(torch.zeros(images, 1, 2, 2), DDPMScheduler(), grid=grid).timesteps
    _, met = timesteps.unique(return_counts=True)
    assert len(met) == grid and met.max() - met.min() <= 1


def test_step_loss_of_few_timesteps_takes_them_all() -> None:
    few = StepLoss(torch.zeros(2, 1, 2, 2), DDPMScheduler(num_train_timesteps=5), grid=16)
    assert few.timesteps.unique().tolist() == [0, 1, 2, 3, 4]


def test_step_loss_gives_each_image_its_label() -> None:
    """Labels follow their images through repetition and batching."""
    images = torch.arange(3.0).view(3, 1, 1, 1)
    noiseless = DDPMScheduler(beta_start=1e-8, beta_end=1e-8)
    model = Zero()
    StepLoss(images, noiseless, conditioning={"class_labels": torch.tensor([10, 11, 12])}, grid=4, batch_size=5)(model)
    assert (model.seen(0).flatten().round() + 10).tolist() == model.seen(2).tolist()


def test_step_loss_repeats_exactly_and_depends_on_the_seed() -> None:
    """Two evaluations differ only by the model."""
    unet, images = build("base"), random_images(5) * 2 - 1
    loss = StepLoss(images, DDPMScheduler(), grid=4)
    first = loss(unet)
    torch.rand(10)
    assert loss(unet) == first
    assert StepLoss(images, DDPMScheduler(), grid=4)(unet) == first
    assert StepLoss(images, DDPMScheduler(), grid=4, seed=1)(unet) != first
    assert StepLoss(images, DDPMScheduler(), grid=4, batch_size=3)(unet) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_step_loss_restores_the_mode(training: bool) -> None:
    """Evaluated in the middle of training, without dropout and without gradients."""
    model = Zero().train(training)
    StepLoss(random_images(2), DDPMScheduler())(model)
    assert model.modes == {False}
    assert model.training is training
    assert model.anchor.grad is None


def test_step_loss_by_timestep_splits_the_mean() -> None:
    """Each timestep has the error of its own images, and together they have the step loss."""
    unet, images = build("base"), random_images(4) * 2 - 1
    loss = StepLoss(images, DDPMScheduler(), grid=4, batch_size=5)
    buckets = loss.by_timestep(unet)
    assert list(buckets) == [125, 375, 625, 875]
    assert sum(buckets.values()) / 4 == pytest.approx(loss(unet), rel=1e-9)
    one = StepLoss(images, DDPMScheduler(), grid=4)
    chosen = one.timesteps == 375
    noisy = DDPMScheduler().add_noise(one.images[one.image_of[chosen]], one.noise[chosen], one.timesteps[chosen])
    with torch.no_grad():
        prediction = unet.eval()(noisy, one.timesteps[chosen]).sample
    assert buckets[375] == pytest.approx(((prediction - one.noise[chosen]) ** 2).mean().item(), rel=1e-5)


def test_step_loss_without_timesteps_is_refused() -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match="grid=0"):
        StepLoss(random_images(2), DDPMScheduler(), grid=0)


def test_noise_target_of_each_prediction_type() -> None:
    """eps, x, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x (Salimans and Ho, arXiv 2202.00512)."""
    clean, noise, timesteps = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 500, 999])
    batch = DiffusionBatch(clean, noise, timesteps)
    assert torch.equal(batch.target(DDPMScheduler(prediction_type="epsilon")), noise)
    assert torch.equal(batch.target(DDPMScheduler(prediction_type="sample")), clean)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * clean
    torch.testing.assert_close(batch.target(scheduler), velocity)


def test_unknown_prediction_type_is_refused() -> None:
    """Flow matching, for one, is not trained on any of these targets."""
    scheduler = SimpleNamespace(config=SimpleNamespace(prediction_type="flow"))
    with pytest.raises(ValueError, match="prediction_type=flow must be 'epsilon'"):
        DiffusionBatch(torch.zeros(1), torch.zeros(1), torch.zeros(1)).target(scheduler)


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    """A small UNet that no test changes."""
    return build("base")


# --- distances ---------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    """Up to the rounding of a matrix square root."""
    images = random_images(400, side=4)
    assert frechet_distance_pixels(images, images) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_shifted_means_is_the_squared_shift() -> None:
    """Equal covariances leave ||mu_1 - mu_2||^2: 16 pixels shifted by 0.1."""
    images = random_images(400, side=4)
    assert frechet_distance_pixels(images + 0.1, images) == pytest.approx(16 * 0.01, rel=1e-4)


def test_frechet_distance_of_scaled_spread() -> None:
    """Covariances S and 4 S leave tr(S + 4 S - 2 (4 S^2)^(1/2)) = tr(S)."""
    images = random_images(400, side=4)
    images = images - images.mean(dim=0)
    trace = images.flatten(1).double().var(dim=0).sum().item()
    assert frechet_distance_pixels(2 * images, images) == pytest.approx(trace, rel=1e-4)


def test_frechet_distance_leaves_out_pixels_that_never_vary() -> None:
    """A row that is black in every reference image would make the covariance singular: 12 of 16 pixels are left.

    14 images are enough for 12 pixels, and would be too few for 16.
    """
    images = random_images(14, side=4)
    images[:, :, 0, :] = 0
    shifted = images.clone()
    shifted[:, :, 1:, :] += 0.1
    assert frechet_distance_pixels(shifted, images) == pytest.approx(12 * 0.01, rel=1e-4)


@pytest.mark.parametrize(("count", "reference_count"), [(16, 400), (400, 16), (2, 400)])
def test_too_few_images_for_a_covariance_are_refused(count: int, reference_count: int) -> None:
    """A singular covariance gives a number, but a meaningless one."""
    with pytest.raises(ValueError, match=f"{min(count, reference_count)} images are too few .* 16 pixel values"):
        frechet_distance_pixels(random_images(count, side=4), random_images(reference_count, side=4, seed=1))


def features(count: int, dimensions: int = 6, seed: int = 0) -> Tensor:
    """Correlated Gaussian features, float32 with shape `(count, dimensions)`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=generator)
    return torch.randn(count, dimensions, generator=generator) @ mixing + torch.arange(dimensions)


def test_moments_are_those_of_numpy_in_chunks_of_any_size() -> None:
    found = feature_moments(features(500), chunk=64)
    values = features(500).double().numpy()
    np.testing.assert_allclose(found[0], values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found[1], np.cov(values, rowvar=False), rtol=1e-10)


def test_moments_keep_their_precision_far_from_zero() -> None:
    """Sums of squares would lose a variance of 1 beside a mean of 10^6, in float32 and nearly so in float64."""
    values = features(1000) + 1e6
    assert feature_moments(values)[1][0, 0] == pytest.approx(np.cov(values.double().numpy(), rowvar=False)[0, 0], rel=1e-9)


def test_frechet_distance_is_clean_fids() -> None:
    from cleanfid.fid import frechet_distance as cleanfid_distance

    a, b = features(400).double().numpy(), features(300, seed=1).double().numpy()
    expected = cleanfid_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert frechet_distance(features(400), features(300, seed=1)) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_clean_fids_and_leaves_the_global_generator_alone() -> None:
    from cleanfid.fid import kernel_distance as cleanfid_distance

    a, b = features(200), features(150, seed=1)
    np.random.seed(7)
    expected = cleanfid_distance(a.double().numpy(), b.double().numpy(), 20, 100)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    assert kernel_distance(a, b, 20, 100, seed=7) == pytest.approx(expected, rel=1e-12)
    assert np.array_equal(np.random.get_state()[1], before)


def test_kernel_distance_of_one_distribution_is_about_zero() -> None:
    near, far = (kernel_distance(features(1000)[:500], features(1000)[500:] + shift, 20) for shift in (0, 2))
    assert abs(near) < 0.05 * far


@pytest.mark.parametrize("shapes", [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5, 3, 2), (5, 3, 2))])
def test_features_that_have_no_distance_are_refused(shapes: tuple) -> None:
    with pytest.raises(ValueError, match="too few for a covariance|must be vectors"):
        frechet_distance(*(torch.zeros(shape) for shape in shapes))


def test_ssim_is_one_for_identical_images_and_less_for_others() -> None:
    """Larger noise, lower similarity; the mean over pairs."""
    images = random_images(3, channels=3, side=12)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert ssim_to_reference(images, images) == pytest.approx(1)
    near, far = (ssim_to_reference((images + scale * noise).clamp(0, 1), images) for scale in (0.05, 0.5))
    assert far < near < 0.999
    half = torch.cat([images[:1], (1 - images)[:1]])
    inverted = ssim_to_reference((1 - images)[:1], images[:1])
    assert ssim_to_reference(half, images[[0, 0]]) == pytest.approx((1 + inverted) / 2)


def test_ssim_of_constant_images_by_hand() -> None:
    """Without variance, SSIM = (2 a b + c) / (a^2 + b^2 + c) with c = 0.01^2 (Wang et al., 2004, equation 6)."""
    first, second = torch.full((1, 1, 8, 8), 0.25), torch.full((1, 1, 8, 8), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim_to_reference(first, second) == pytest.approx(expected, rel=1e-6)


def test_psnr_by_hand() -> None:
    """An error of 0.1 everywhere is 20 dB; of 0.1 on half of all pixels, 10 log10(2) dB more; none, infinitely many."""
    images = random_images(4) * 0.5
    assert psnr_to_reference(images + 0.1, images) == pytest.approx(20, rel=1e-5)
    assert psnr_to_reference(torch.cat([images[:2] + 0.1, images[2:]]), images) == pytest.approx(23.0103, rel=1e-5)
    assert psnr_to_reference(images, images) is None


# --- cost --------------------------------------------------------------------------------------------------------------


def test_spatial_size_is_that_of_the_model_or_the_argument() -> None:
    """One number means a square; an argument wins over the model."""
    assert spatial_size(build("base")) == (8, 8)
    assert spatial_size(build("non-square")) == (8, 16)
    assert spatial_size(build("base"), 16) == (16, 16)
    assert spatial_size(build("non-square"), (32, 24)) == (32, 24)


def test_unknown_spatial_size_is_refused(unet: UNet2DModel) -> None:
    """Without a size there are no MACs; guessing one would give a wrong figure."""
    sizeless = UNet2DModel.from_config({**unet.config, "sample_size": None})
    for measure in (spatial_size, count_macs):
        with pytest.raises(ValueError, match="sample_size=None: pass sample_size"):
            measure(sizeless)
    assert count_macs(sizeless, 8) == count_macs(unet)


def test_counting_leaves_the_model_alone(unet: UNet2DModel) -> None:
    """Counting hooks are attached to a copy without memory."""
    assert count_macs(unet) > 0
    assert not any(module._forward_hooks for module in unet.modules())
    assert next(unet.parameters()).device.type == "cpu"
