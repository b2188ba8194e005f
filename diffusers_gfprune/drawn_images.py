"""Calibration images that the dense model draws itself, for pruning without data and without training.

The samples are those of `data.teacher_images`, for a handful of images: with number i a function of the seed and i.
"""

from __future__ import annotations

from torch import Tensor, nn

from .argument_fields import at_least, check_range
from .diffusion.latents import LatentCodec
from .diffusion.schedulers import training_process
from .metrics.conditions import SampleConditions
from .metrics.model_size import spatial_size
from .metrics.sampling import sample_images

__all__ = ["NUM_TEACHER_IMAGES", "draw_images"]

NUM_TEACHER_IMAGES = 128


def draw_images(
    denoiser: nn.Module,
    scheduler,
    num_images: int,
    conditions: SampleConditions | None = None,
    codec: LatentCodec | None = None,
    seed: int = 0,
    num_inference_steps: int | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Draw images.

    Args:
        denoiser: The dense model.
        scheduler: Scheduler of its pipeline.
        num_images: Number of images (>= 1).
        conditions: Class labels or prompts of the images; None: the model is unconditional.
        codec: Decodes latents; None: samples are pixels.
        seed: Seed of the noise (>= 0).
        num_inference_steps: Number of steps (>= 1), limited to the timesteps of the model; None: 50 DDIM steps for DDPMs,
            one step for consistency models.
        batch_size: Number of images in one forward pass (>= 1).

    Returns:
        float32 in [-1, 1] with shape `(num_images, channels, height, width)`, on the CPU.

    Raises:
        ValueError: A number is out of range, or the model or its scheduler cannot be sampled.
    """
    check_range(at_least(1), num_teacher_images=num_images, batch_size=batch_size)
    process = training_process(scheduler)
    steps, spacing, _ = process.fit_sampling(num_inference_steps or process.default_drawing_steps)
    images = sample_images(
        *(denoiser, process, num_images, spatial_size(denoiser), steps, seed, batch_size, conditions, "drawing images"),
        codec=codec,
        timestep_spacing=spacing,
    )
    return images * 2 - 1
