"""Sampling for measurements: image number i depends only on the model, the sampler's settings, the seed and i.

The sampler is that of the model's process: DDIM for DDPMs. Latents are decoded. Images are rounded to 8 bits, as in files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..argument_fields import SHARE, check_range
from ..diffusion.batch import ModelInputs
from ..diffusion.latents import LatentCodec
from ..diffusion.process import gaussian_noise
from ..diffusion.schedulers import training_process
from ..families.lookup import family_of
from .conditions import SampleConditions, guided
from .eval_mode import evaluating
from .model_size import spatial_size

__all__ = ["denoised", "image_shape", "sample_images", "to_uint8"]


def image_shape(unet: nn.Module, codec: LatentCodec | None = None) -> tuple[int, int, int]:
    """Shape `(channels, height, width)` of a model's images, decoded if its samples are latents."""
    size = spatial_size(unet)
    return (unet.config.in_channels, *size) if codec is None else codec.image_shape(*size)


def image_generators(seed: int, numbers: range) -> list[torch.Generator]:
    """A random generator for each image, seeded by (seed, number)."""
    seeds = [int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1)) for number in numbers]
    return [torch.Generator().manual_seed(value) for value in seeds]


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit values."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def denoised(
    unet: nn.Module,
    scheduler,
    numbers: range,
    size: tuple[int, int],
    num_inference_steps: int | None = 50,
    seed: int = 0,
    batch_size: int = 128,
    conditions: SampleConditions | None = None,
    progress: str | None = None,
    *,
    latents: bool = False,
    guidance_scale: float = 1.0,
    timestep_spacing: str | None = "leading",
    eta: float = 0.0,
) -> Iterator[Tensor]:
    """Samples of a model in batches, before they are decoded or rounded.

    Args:
        numbers: Numbers of the images.
        latents: Whether samples are latents.
        unet, scheduler, size, num_inference_steps, seed, batch_size, conditions, progress, guidance_scale, timestep_spacing,
            eta: As in `sample_images`.

    Yields:
        float32 with shape `(n, channels, height, width)`, on the model's device.

    Raises:
        ValueError: As `sample_images`.
    """
    check_range(SHARE, eta=eta)
    conditions = SampleConditions() if conditions is None else conditions
    conditions.check_guidance(guidance_scale)
    family, parameter = family_of(unet), _placed_like(unet)
    process = training_process(scheduler)
    settings = (num_inference_steps, timestep_spacing, eta, latents)
    process.sampler(*settings)  # checks
    shape = (unet.config.in_channels, *size)

    def placed(conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: values.to(parameter.device, parameter.dtype if values.is_floating_point() else None)
            for name, values in conditioning.items()
        }

    def predict(inputs: ModelInputs) -> Tensor:
        return family.predict(unet, inputs)

    with evaluating(unet):
        for start in tqdm(range(0, len(numbers), batch_size), desc=progress, disable=progress is None):
            some = numbers[start : start + batch_size]
            generators, sampler = image_generators(seed, some), process.sampler(*settings)

            x = gaussian_noise(shape, generators).to(parameter.device) * sampler.init_noise_sigma
            conditioning, null = placed(conditions.of(some)), placed(conditions.without(len(some)))
            for timestep in sampler.timesteps:
                scaled = sampler.scale_model_input(x, timestep).to(parameter.dtype)
                inputs = ModelInputs(scaled, timestep.to(parameter.device).expand(len(x)), conditioning)
                prediction = guided(predict, inputs, null, guidance_scale).float()
                x = sampler.step(prediction, timestep, x, generators)
            check_finite(x, some)
            yield x


def _placed_like(unet: nn.Module) -> Tensor | nn.Module:
    """What has the device and the dtype of a model: a parameter, or the model itself if it was exported and has none."""
    return next(unet.parameters(), unet)


def check_finite(samples: Tensor, numbers: range) -> None:
    """Check samples before they are rounded to 8 bits, which would turn other values into black pixels.

    Raises:
        ValueError: A sample is not finite.
    """
    if not torch.isfinite(samples).all():
        raise ValueError(f"samples {numbers[0]} to {numbers[-1]} are not finite: check the model's weights and dtype")


@torch.no_grad()
def sample_images(
    unet: nn.Module,
    scheduler,
    num_images: int,
    size: tuple[int, int],
    num_inference_steps: int | None = 50,
    seed: int = 0,
    batch_size: int = 128,
    conditions: SampleConditions | None = None,
    progress: str | None = None,
    *,
    codec: LatentCodec | None = None,
    guidance_scale: float = 1.0,
    timestep_spacing: str | None = "leading",
    eta: float = 0.0,
    first: int = 0,
) -> Tensor:
    """Sample a model by the sampler of its process.

    Models sampled with the same seed start from the same noise; images do not depend on the batch size.

    Args:
        unet: Denoiser of any family.
        scheduler: Scheduler of the model, or its process.
        num_images: Number of images (>= 1).
        size: Height and width of the model's samples: pixels or latents.
        num_inference_steps: Number of steps (>= 1); None: the default of the process.
        seed: Seed for the noise (>= 0).
        batch_size: Number of images in one forward pass (>= 1).
        conditions: Class labels or prompts of the images; None: the model is unconditional.
        progress: Label of a progress bar; None: no bar.
        codec: Decodes latents, meanwhile on the model's device; None: samples are pixels.
        guidance_scale: Scale of classifier-free guidance; 1: none.
        timestep_spacing: One of `TIMESTEP_SPACINGS`, for DDIM; None: the default.
        eta: Share of DDPM's noise in each step, in [0, 1]; for DDIM.
        first: Number of the first image.

    Returns:
        Images in [0, 1], in steps of 1/255, float32 on the CPU, with shape `(num_images, channels, height, width)`.

    Raises:
        ValueError: An argument is out of its range, the scheduler is not supported, or samples are not finite.
    """
    numbers, images = range(first, first + num_images), []
    options = {"guidance_scale": guidance_scale, "timestep_spacing": timestep_spacing, "eta": eta}
    with nullcontext() if codec is None else codec.on(_placed_like(unet).device):
        for x in denoised(
            *(unet, scheduler, numbers, size, num_inference_steps, seed, batch_size, conditions, progress),
            latents=codec is not None,
            **options,
        ):
            decoded = x if codec is None else codec.decode(x)
            check_finite(decoded, numbers[len(images) * batch_size :][: len(x)])
            images.append(to_uint8(decoded / 2 + 0.5).float().cpu() / 255)
    return torch.cat(images)
