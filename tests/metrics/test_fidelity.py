"""metrics/fidelity.py: distances and similarities have known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_gfprune.metrics.fidelity import (
    feature_moments,
    frechet_distance,
    frechet_distance_pixels,
    kernel_distance,
    psnr_to_reference,
    ssim_to_reference,
)
from helpers.images import random_images


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


@pytest.mark.parametrize("reference", [torch.zeros(400, 1, 4, 4), torch.rand(1, 1, 4, 4)], ids=["constant", "one image"])
def test_a_reference_that_does_not_vary_is_refused(reference: Tensor) -> None:
    message = f"^reference: no pixel of its {len(reference)} images varies by more than 0.001, but a distance needs images"
    with pytest.raises(ValueError, match=message):
        frechet_distance_pixels(random_images(400, side=4), reference)


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


def test_moments_of_more_vectors_than_a_chunk() -> None:
    """All chunks have the same weight."""
    values = features(4096 + 700, 2)
    values[4096:] += 10
    mean, covariance = feature_moments(values)
    np.testing.assert_allclose(mean, values.double().numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(values.double().numpy(), rowvar=False), rtol=1e-10)


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
