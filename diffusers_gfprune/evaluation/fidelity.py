"""How close samples are to real images, and to the dense model's samples.

- Fréchet distance between Gaussians fitted to features (Heusel et al., arXiv 1706.08500), by clean-fid's function:

      d^2 = ||mu_1 - mu_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))

  Features here are the raw pixels in [0, 1] ("FD-pixels"), which suits images of a few hundred pixels only.
- SSIM (Wang et al., 2004) and PSNR between pairs of samples from the same noise, by scikit-image.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from .eval_mode import evaluating

__all__ = ["frechet_distance_pixels", "psnr_to_reference", "sample_images", "ssim_to_reference"]


@torch.no_grad()
def sample_images(
    unet: nn.Module,
    scheduler,
    num_images: int,
    size: tuple[int, int],
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int = 128,
    class_labels: Tensor | None = None,
    progress: str | None = None,
) -> Tensor:
    """Sample with deterministic DDIM (Song et al., arXiv 2010.02502, eta = 0).

    Image `i` depends on the seed and on `i` only, whatever the batch size; two models given the same seed start from the
    same noise.

    Args:
        unet: Noise-prediction model.
        scheduler: Its scheduler, whose configuration DDIM takes over.
        num_images: How many (>= 1).
        size: Height and width in pixels.
        num_inference_steps: DDIM steps.
        seed: Of the initial noise.
        batch_size: Images in one forward.
        class_labels: With shape `(num_images,)`, for conditional models.
        progress: Text of a progress bar, if any.

    Returns:
        Images in [0, 1], float32 on the CPU, with shape `(num_images, channels, height, width)`.
    """
    parameter = next(unet.parameters())
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(num_inference_steps)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.stack([torch.randn(unet.config.in_channels, *size, generator=generator) for _ in range(num_images)])
    images = []
    with evaluating(unet):
        for start in tqdm(range(0, num_images, batch_size), desc=progress, disable=progress is None):
            x = noise[start : start + batch_size].to(parameter.device)
            labels = None if class_labels is None else class_labels[start : start + batch_size].to(parameter.device)
            for timestep in ddim.timesteps:
                prediction = unet(x.to(parameter.dtype), timestep, class_labels=labels).sample.float()
                x = ddim.step(prediction, timestep, x, eta=0.0).prev_sample
            images.append((x / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(images)


def frechet_distance_pixels(images: Tensor, reference: Tensor) -> float:
    """Fréchet distance between raw pixels, over the pixels that vary in the reference.

    A pixel that is the same in every reference image (a corner that is always black) would make its covariance singular.

    Args:
        images: In [0, 1] with shape `(images, channels, height, width)`; more images than pixels.
        reference: Likewise, of the same size.

    Returns:
        The squared distance d^2 >= 0 (up to rounding).

    Raises:
        ValueError: Fewer images than pixel values, whose covariance would be singular.
    """
    from cleanfid.fid import frechet_distance

    varies = reference.flatten(1).double().std(dim=0) > 1e-3

    def moments(batch: Tensor) -> tuple[np.ndarray, np.ndarray]:
        features = batch.flatten(1)[:, varies].double().numpy()
        if len(features) <= features.shape[1]:
            raise ValueError(f"{len(features)} images are too few for the covariance of {features.shape[1]} pixel values")
        return features.mean(axis=0), np.cov(features, rowvar=False)

    return float(frechet_distance(*moments(images), *moments(reference)))


def ssim_to_reference(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity of pairs of images in [0, 1], window 7x7, each with shape `(n, channels, H, W)`."""
    from skimage.metrics import structural_similarity

    pairs = zip(images.double().numpy(), reference.double().numpy())
    return float(np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=0) for a, b in pairs]))


def psnr_to_reference(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of pairs of images in [0, 1]."""
    error = ((images.double() - reference.double()) ** 2).mean().item()
    return float("inf") if error == 0 else float(-10 * np.log10(error))
