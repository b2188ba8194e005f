"""One-shot pruning of a pipeline's UNet: calibration images in, small model out, no training in between."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .configuration import GFPruneConfig
from .evaluation.cost import spatial_size
from .pruner import GradientFlowPruner
from .remote.unet_2d_gfpruned import GFPrunedUNet2DModel

__all__ = ["calibration_batches", "images_to_tensor", "prune_unet"]


def images_to_tensor(images, channels: int) -> Tensor:
    """Calibration images as float32 in [-1, 1] with shape `(images, channels, height, width)`.

    Args:
        images: A tensor of that kind, or a list of PIL images of one size.
        channels: What the model takes: 1 (greyscale) or 3 (RGB).

    Raises:
        ValueError: The tensor has another shape or range, or there are no images.
    """
    if not isinstance(images, Tensor):
        images = list(images)
        if not images:
            raise ValueError("images is empty: pruning needs at least one calibration image")
        mode = {1: "L", 3: "RGB"}.get(channels)
        if mode is None:
            raise ValueError(f"the model takes {channels} channels: pass images as a tensor")
        pixels = np.stack([np.asarray(image.convert(mode), dtype=np.float32) for image in images])
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    if images.ndim != 4 or images.shape[1] != channels or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}, not (images, {channels}, height, width)")
    if not images.is_floating_point() or images.min() < -1.001 or images.max() > 1.001:
        raise ValueError(f"images have values from {images.min():g} to {images.max():g}, not floating point in [-1, 1]")
    return images.float()


def calibration_batches(
    images: Tensor,
    noise_scheduler,
    batch_size: int = 32,
    class_labels: Tensor | None = None,
    seed: int = 0,
) -> list[tuple[Tensor, ...]]:
    """Batches `(clean_images, noise, timesteps[, class_labels])` with noise and timesteps drawn from `seed`.

    Args:
        images: In [-1, 1] with shape `(images, channels, height, width)`.
        noise_scheduler: A Diffusers scheduler; timesteps are uniform over its training timesteps.
        batch_size: Images in a batch (>= 1).
        class_labels: With shape `(images,)`.
        seed: Of noise and timesteps.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(images),), generator=generator)
    columns: Sequence[Tensor] = (
        (images, noise, timesteps) if class_labels is None else (images, noise, timesteps, class_labels)
    )
    return list(zip(*(column.split(batch_size) for column in columns)))


def prune_unet(
    unet,
    noise_scheduler,
    images,
    batch_size: int = 32,
    class_labels: Tensor | None = None,
    seed: int = 0,
    **options,
) -> GFPrunedUNet2DModel:
    """Prune a copy of a dense UNet in one shot.

    Args:
        unet: The dense model; it is left as it was.
        noise_scheduler: Its scheduler.
        images: Calibration images (`images_to_tensor`).
        batch_size: Images in a calibration batch.
        class_labels: With shape `(images,)`, for conditional models.
        seed: Of calibration noise and timesteps.
        **options: Fields of `GFPruneConfig`.

    Returns:
        The small model.

    Raises:
        ValueError: An option is out of range, the budget cannot be met, or images and labels do not fit the model.
    """
    for name in ("preset", "total_steps", "soft_fraction", "hard_fraction", "update_interval"):
        if name in options:
            raise ValueError(f"{name}={options[name]}: pruning in one call has no schedule; train with GradientFlowPruner")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    config = GFPruneConfig.from_preset("one-shot", total_steps=1, **options)
    pixels = images_to_tensor(images, unet.config.in_channels)
    if unet.config.sample_size is not None and tuple(pixels.shape[2:]) != spatial_size(unet):
        wanted = "x".join(map(str, spatial_size(unet)))
        raise ValueError(f"images are {pixels.shape[2]}x{pixels.shape[3]} pixels, the model's sample_size is {wanted}")
    if class_labels is not None and len(class_labels) != len(pixels):
        raise ValueError(f"class_labels has {len(class_labels)} labels for {len(pixels)} images")
    pruner = GradientFlowPruner(copy.deepcopy(unet), config, noise_scheduler, sample_size=tuple(pixels.shape[2:]))
    pruner.step(0, calibration_batches(pixels, noise_scheduler, batch_size, class_labels, seed))
    return pruner.compact()
