"""Distances of samples to real images, and similarity to the dense model's samples.

- Fréchet distance between Gaussians fitted to features (Heusel et al., arXiv 1706.08500), by clean-fid's function:

      d^2 = ||mu_1 - mu_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

  of a network (see `features`), or raw pixels in [0, 1] ("FD-pixels"), suitable only for images of a few hundred pixels.
- Kernel distance between features, by clean-fid's function.
- SSIM (Wang et al., 2004) and PSNR between pairs of samples from the same noise, by scikit-image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "SSIM_WINDOW",
    "feature_moments",
    "frechet_distance",
    "frechet_distance_pixels",
    "kernel_distance",
    "psnr",
    "psnr_to_reference",
    "ssim_of_pairs",
    "ssim_to_reference",
]


SSIM_WINDOW = 7  # pixels along each side
# Features with a standard deviation below this over the reference are constant up to rounding.
CONSTANT = 1e-3


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features.

    Args:
        features: Features with shape `(n, d)`, n >= 2.
        reference: Features with shape `(m, d)`, m >= 2. With fewer vectors than dimensions the covariance is singular; the
            distance is still defined, but biased far upwards.

    Returns:
        The squared distance d^2 >= 0 (up to rounding), computed in float64.

    Raises:
        ValueError: There are fewer than two vectors, or their lengths differ.
    """
    from cleanfid.fid import frechet_distance as distance

    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of shape {tuple(features.shape)} must be vectors as in {tuple(reference.shape)}")
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"{len(features)} and {len(reference)} feature vectors are too few for a covariance: 2 at least")
    return float(distance(*feature_moments(features), *feature_moments(reference)))


def feature_moments(features: Tensor, chunk: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance of feature vectors, accumulated in float64 from deviations from the mean.

    Args:
        features: Features with shape `(n, d)`.
        chunk: Number of vectors converted to float64 at a time.

    Returns:
        Arrays of shape `(d,)` and `(d, d)`.
    """
    mean = torch.zeros(features.shape[1], dtype=torch.float64)
    for part in features.split(chunk):
        mean += part.double().sum(dim=0)
    mean /= len(features)
    scatter = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for part in features.split(chunk):
        centred = part.double() - mean
        scatter += centred.T @ centred
    return mean.numpy(), (scatter / (len(features) - 1)).numpy()


def kernel_distance(
    features: Tensor, reference: Tensor, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Kernel distance (KID on Inception features; Binkowski et al., arXiv 1801.01401), by clean-fid's function.

    Unlike the Fréchet distance, it has no bias that depends on the number of images.

    Args:
        features: Features with shape `(n, d)`.
        reference: Features with shape `(m, d)`.
        num_subsets: Number of random subsets to average over.
        subset_size: Maximum number of vectors in a subset.
        seed: Seed for the choice of subsets.

    Returns:
        The squared maximum mean discrepancy, which may be slightly negative.
    """
    from cleanfid.fid import kernel_distance as distance

    state = np.random.get_state()  # clean-fid draws from the global generator
    np.random.seed(seed)
    try:
        return distance(features.double().numpy(), reference.double().numpy(), num_subsets, subset_size)
    finally:
        np.random.set_state(state)


def frechet_distance_pixels(images: Tensor, reference: Tensor) -> float:
    """Fréchet distance between raw pixels, over the pixels that vary in the reference.

    A pixel that is constant in the reference (such as an always black corner) would make the covariance singular.

    Args:
        images: Images in [0, 1] with shape `(images, channels, height, width)`; more images than pixels.
        reference: Images of the same range and size.

    Returns:
        The squared distance d^2 >= 0 (up to rounding).

    Raises:
        ValueError: No pixel varies in the reference, or there are not more images than pixel values, so that the covariance
            would be singular.
    """
    varies = reference.flatten(1).double().std(dim=0) > CONSTANT
    if not varies.any():
        raise ValueError(
            f"reference: no pixel of its {len(reference)} images varies by more than {CONSTANT:g}, but a distance needs "
            f"images that differ"
        )
    pixels = [batch.flatten(1)[:, varies] for batch in (images, reference)]
    for values in pixels:
        if len(values) <= values.shape[1]:
            raise ValueError(f"{len(values)} images are too few for the covariance of {values.shape[1]} pixel values")
    return frechet_distance(*pixels)


def ssim_to_reference(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity, window 7x7, of pairs of images in [0, 1] with shape `(n, channels, height, width)`."""
    return float(np.mean(ssim_of_pairs(images, reference)))


def ssim_of_pairs(images: Tensor, reference: Tensor) -> np.ndarray:
    """Structural similarity of each pair of images (see `ssim_to_reference`), float64 with shape `(n,)`."""
    from skimage.metrics import structural_similarity

    pairs = zip(images.double().numpy(), reference.double().numpy())
    return np.array([structural_similarity(a, b, data_range=1.0, channel_axis=0) for a, b in pairs])


def psnr_to_reference(images: Tensor, reference: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB over all pixels of pairs of images in [0, 1] (see `psnr`)."""
    return psnr(((images.double() - reference.double()) ** 2).mean().item())


def psnr(squared_error: float) -> float | None:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; None if the error is zero."""
    return None if squared_error == 0 else float(-10 * np.log10(squared_error))
