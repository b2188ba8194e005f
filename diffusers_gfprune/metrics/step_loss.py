"""Step loss: the prediction error on held-out images, with fixed noise and a fixed timestep grid. For DDPMs,

    L(theta) = mean over images x, grid timesteps t of  || eps - eps_theta(sqrt(abar_t) x + sqrt(1 - abar_t) eps, t) ||^2

Ho et al., "Denoising Diffusion Probabilistic Models", equation 14, https://arxiv.org/abs/2006.11239. Noise and timesteps
are drawn once from `seed`, so evaluations differ only by the model. A curve of this loss over training shows jumps that are
hidden by the noise of the training loss.

Where images and noise determine no target, as for consistency models, the loss is the distance to the outputs of a reference
model, the dense one. It is then 0 for that model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..diffusion.batch import DiffusionBatch
from ..diffusion.process import per_image
from ..diffusion.schedulers import training_process
from ..families.lookup import family_of
from ..precision import ieee_float32
from .eval_mode import evaluating

__all__ = ["StepLoss"]


class StepLoss:
    """Step loss of a model on fixed images, noise and timesteps.

    Args:
        images: Held-out images in [-1, 1], or latents as the model denoises them, with shape
            `(images, channels, height, width)`.
        scheduler: Scheduler of the model, or its process; its timesteps span the grid.
        conditioning: Conditioning of each image by name, for conditional models, such as `class_labels` with shape
            `(images,)`.
        grid: Number of evenly spread timesteps (>= 1; limited to the scheduler's). The numbers of images per timestep differ
            by at most one. With 512 images or fewer, each is used at several timesteps.
        seed: Seed for the noise.
        batch_size: Number of images in one forward pass.
        reference: Model whose outputs are the targets, for processes without any other; ignored if the process has targets.

    Raises:
        ValueError: A number is out of range, or the process needs a reference model.
    """

    def __init__(
        self,
        images: Tensor,
        scheduler,
        conditioning: Mapping[str, Tensor] | None = None,
        grid: int = 16,
        seed: int = 0,
        batch_size: int = 256,
        reference: nn.Module | None = None,
    ) -> None:
        if grid < 1:
            raise ValueError(f"grid={grid} must be at least 1 timestep")
        self.process = training_process(scheduler)
        self.reference = None if self.process.has_target else reference
        if not self.process.has_target and reference is None:
            raise ValueError(f"reference=None must be the dense model: {self.process.title} has no other target")
        timesteps = self.process.grid_timesteps(grid)
        grid = len(timesteps)
        # Repetition r of image i uses timestep (i + r * grid // repeats) mod grid of the grid.
        number = max(1, len(images))
        repeats = max(min(grid, 1024 // number), -(-grid // number))
        self.images = images
        self.image_of = torch.arange(len(images)).repeat(repeats)  # image of each averaged error
        shifts = torch.arange(repeats) * grid // repeats
        index = torch.arange(len(images)).repeat(repeats) + shifts.repeat_interleave(len(images))
        self.timesteps = timesteps[index % grid]
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(len(self.image_of), *images.shape[1:], generator=generator)
        self.conditioning = dict(conditioning or {})
        self.batch_size = batch_size

    def with_conditioning(self, row: Mapping[str, Tensor]) -> StepLoss:
        """The same loss with one row of conditioning for all images, such as that of the null label."""
        other, count = copy.copy(self), len(self.images)
        rows = {name: values.expand(count, *values.shape[1:]) for name, values in row.items()}
        other.conditioning = self.conditioning | rows
        return other

    def __call__(self, model: nn.Module) -> float:
        """Mean squared error of `model`, run in evaluation mode."""
        errors = self._errors(model)
        return math.fsum(errors.tolist()) / len(errors)

    def by_timestep(self, model: nn.Module) -> dict[float, float]:
        """Mean squared error of `model` at each timestep of the grid, over the images of that timestep.

        Returns:
            Errors by timestep, integers or floating point, in ascending order. Their mean is the step loss if all timesteps
            have equally many images.
        """
        errors = self._errors(model)
        grid = sorted(set(self.timesteps.tolist()))
        return {timestep: errors[self.timesteps == timestep].mean().item() for timestep in grid}

    @torch.no_grad()
    def _errors(self, model: nn.Module) -> Tensor:
        """Squared error of each image at its timestep: float64 with shape `(len(self.image_of),)`."""
        family, parameter = family_of(model), next(model.parameters())
        errors = []
        with evaluating(model), ieee_float32():
            for start in range(0, len(self.image_of), self.batch_size):
                batch = self._batch(slice(start, start + self.batch_size)).to(parameter.device)
                gap = family.predict(model, batch.inputs(self.process, parameter.dtype)).float() - self._target(batch)
                if (scale := self.process.output_scale(batch.timesteps)) is not None:
                    gap = gap * per_image(scale, gap)
                errors.append((gap**2).mean(dim=(1, 2, 3)).double().cpu())
        return torch.cat(errors)

    def _target(self, batch: DiffusionBatch) -> Tensor:
        if self.reference is None:
            return batch.target(self.process)
        family, parameter = family_of(self.reference), next(self.reference.parameters())
        with evaluating(self.reference):
            inputs = batch.to(parameter.device).inputs(self.process, parameter.dtype)
            return family.predict(self.reference, inputs).float().to(batch.clean.device)

    def _batch(self, chunk: slice) -> DiffusionBatch:
        """A batch of pairs of an image and a timestep."""
        chosen = self.image_of[chunk]
        conditioning = {name: values[chosen] for name, values in self.conditioning.items()}
        return DiffusionBatch(self.images[chosen], self.noise[chunk], self.timesteps[chunk], conditioning)
