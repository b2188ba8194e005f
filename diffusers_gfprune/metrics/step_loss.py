"""Step loss: the noise-prediction error on held-out images, with fixed noise and a fixed timestep grid.

    L(theta) = mean over images x, grid timesteps t of  || eps - eps_theta(sqrt(abar_t) x + sqrt(1 - abar_t) eps, t) ||^2

Ho et al., "Denoising Diffusion Probabilistic Models", equation 14, https://arxiv.org/abs/2006.11239. Noise and timesteps
are drawn once from `seed`, so that two evaluations differ only by the model: a curve of this loss over training shows
jumps that the training loss hides in its noise.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ..diffusion.process import training_process
from .eval_mode import evaluating

__all__ = ["StepLoss", "noise_target"]


def noise_target(noise_scheduler, clean_images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model is trained to output: the noise, the clean images or the velocity, as `prediction_type` says.

    Args:
        noise_scheduler: A Diffusers scheduler with `add_noise`.
        clean_images: Images in [-1, 1], with shape `(batch, channels, height, width)`.
        noise: Gaussian noise of the same shape.
        timesteps: Integer timesteps, with shape `(batch,)`.

    Returns:
        The target, of the shape of `noise`.

    Raises:
        ValueError: The scheduler's `prediction_type` is not one of these.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean_images
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(clean_images, noise, timesteps)
    raise ValueError(f"prediction_type={prediction_type} must be 'epsilon', 'sample' or 'v_prediction'")


class StepLoss:
    """Step loss of a model on fixed images, noise and timesteps.

    Args:
        images: Held-out images in [-1, 1], with shape `(images, channels, height, width)`.
        noise_scheduler: Of the model (see `diffusion_process`); its timesteps span the grid.
        class_labels: Labels with shape `(images,)`, for conditional models.
        grid: Number of timesteps (>= 1; at most those there are), spread evenly. Every timestep meets as many images as every
            other (give or take one); with fewer than 1,024 images, each image is used at several timesteps.
        seed: Seed of the noise.
        batch_size: Images in one forward.
    """

    def __init__(
        self,
        images: Tensor,
        noise_scheduler,
        class_labels: Tensor | None = None,
        grid: int = 16,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if grid < 1:
            raise ValueError(f"grid={grid} must be at least 1 timestep")
        self.noise_scheduler = training_process(noise_scheduler)
        steps = noise_scheduler.config.num_train_timesteps
        grid = min(grid, steps)
        timesteps = ((torch.arange(grid) + 0.5) * steps / grid).long()  # (grid,)
        # Repetition r of image i takes timestep i + r * grid // repeats of the grid, round and round.
        number = max(1, len(images))
        repeats = max(min(grid, 1024 // number), -(-grid // number))
        self.images = images
        self.image_of = torch.arange(len(images)).repeat(repeats)  # image of each of the errors that are averaged
        shifts = torch.arange(repeats) * grid // repeats
        index = torch.arange(len(images)).repeat(repeats) + shifts.repeat_interleave(len(images))
        self.timesteps = timesteps[index % grid]
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(len(self.image_of), *images.shape[1:], generator=generator)
        self.class_labels = class_labels
        self.batch_size = batch_size

    def with_label(self, label: int) -> StepLoss:
        """The same loss with one label in place of all, such as the null label."""
        other = copy.copy(self)
        other.class_labels = torch.full((len(self.images),), label, dtype=torch.long)
        return other

    def __call__(self, model: nn.Module) -> float:
        """Mean squared error of `model`, in evaluation mode for the time being."""
        errors = self._errors(model)
        return math.fsum(errors.tolist()) / len(errors)

    def by_timestep(self, model: nn.Module) -> dict[int, float]:
        """Mean squared error of `model` at each timestep of the grid, each over its own images.

        Returns:
            Errors by timestep, rising. Their mean is the step loss wherever all timesteps meet as many images.
        """
        errors = self._errors(model)
        grid = sorted(set(self.timesteps.tolist()))
        return {timestep: errors[self.timesteps == timestep].mean().item() for timestep in grid}

    @torch.no_grad()
    def _errors(self, model: nn.Module) -> Tensor:
        """Squared error of each image at its timestep: float64 with shape `(len(self.image_of),)`."""
        parameter = next(model.parameters())
        errors = []
        with evaluating(model):
            for start in range(0, len(self.image_of), self.batch_size):
                chunk = slice(start, start + self.batch_size)
                chosen = self.image_of[chunk]
                images, noise = self.images[chosen].to(parameter.device), self.noise[chunk].to(parameter.device)
                timesteps = self.timesteps[chunk].to(parameter.device)
                labels = None if self.class_labels is None else self.class_labels[chosen].to(parameter.device)
                noisy = self.noise_scheduler.add_noise(images, noise, timesteps).to(parameter.dtype)
                prediction = model(noisy, timesteps, class_labels=labels).sample.float()
                target = noise_target(self.noise_scheduler, images, noise, timesteps)
                errors.append(((prediction - target) ** 2).mean(dim=(1, 2, 3)).double().cpu())
        return torch.cat(errors)
