"""The process of consistency models (Song et al., arXiv 2303.01469), with continuous noise levels.

A consistency model maps a noisy image of any level to an image in one step,

    x_t = x_0 + sigma eps,      f(x_t, t) = c_skip(sigma) x_t + c_out(sigma) F(x_t / sqrt(sigma^2 + sigma_data^2), t),

where t = 250 log sigma is what the network F is fed, and (appendix C of the paper, with sigma_min as its epsilon)

    c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2)
    c_out  = sigma_data (sigma - sigma_min) / sqrt(sigma^2 + sigma_data^2).

The image and its noise do not say what F should predict: f is the end of a path through x_t, not the mean of all images that
x_t may come from. A pruned model is therefore trained by the output of the dense one alone, and every error is one of images:
F enters with the factor c_out, by which sampling multiplies it.

Levels of training are Karras' (arXiv 2206.00364, equation 5): sigma_i^(1/rho) is evenly spaced from sigma_max to sigma_min.
Every sample passes sigma_max first, and with one step nothing else; images of further steps pass a few of the other levels.
So half of the images here are at sigma_max, and the others are spread over all levels. With `num_inference_steps`, all of them
are at the levels of a sampler with so many steps.
"""

from __future__ import annotations

import math

import torch
from diffusers import CMStochasticIterativeScheduler
from torch import Tensor

from .process import DEFAULT_SPACING, DiffusionProcess, Sampler, SchedulerSampler, check_noise_levels, per_image

__all__ = ["ConsistencyProcess"]

FIRST_SHARE = 0.5  # of the images that are at sigma_max
TIME_SCALE = 250.0


class ConsistencyProcess(DiffusionProcess):
    """The process of a `CMStochasticIterativeScheduler`.

    Args:
        scheduler: Scheduler of a trained pipeline.
        num_inference_steps: Steps that the model is to be sampled with (>= 1): the only levels that are used; None: all.

    Raises:
        ValueError: The configuration of the scheduler is not valid.
    """

    name, title, sampler_title = "consistency", "a consistency model", "multistep consistency sampling"
    default_steps = default_drawing_steps = 1
    has_target = False

    def __init__(self, scheduler, num_inference_steps: int | None = None) -> None:
        check_noise_levels(scheduler, least_steps=2)
        super().__init__(scheduler)
        config = scheduler.config
        self.sigma_min, self.sigma_max, self.sigma_data = config.sigma_min, config.sigma_max, config.sigma_data
        self.num_inference_steps = num_inference_steps
        if num_inference_steps is not None:
            self._levels = self.sampler(num_inference_steps).timesteps.float()
        else:
            self._levels = self._stock().timesteps.float()  # from sigma_max to sigma_min

    def sampled_in(self, num_inference_steps: int | None) -> ConsistencyProcess:
        return self if num_inference_steps is None else ConsistencyProcess(self.scheduler, num_inference_steps)

    def _stock(self) -> CMStochasticIterativeScheduler:
        """A new scheduler: Diffusers' counts its steps."""
        return CMStochasticIterativeScheduler.from_config(self.scheduler.config)

    # --- timesteps ---

    @property
    def timestep_range(self) -> tuple[float, float]:
        return TIME_SCALE * math.log(self.sigma_min), TIME_SCALE * math.log(self.sigma_max)

    def timesteps_at(self, times: Tensor) -> Tensor:
        places = times
        if self.num_inference_steps is None:
            places = (times - FIRST_SHARE).clamp(min=0) / (1 - FIRST_SHARE)
        index = (places * len(self._levels)).long().clamp(max=len(self._levels) - 1)
        return self._levels[index]

    def grid_timesteps(self, count: int) -> Tensor:
        """Levels at which a model is measured, spread evenly from sigma_max down; not sigma_min, where c_out is 0."""
        levels = self._levels[:-1] if self.num_inference_steps is None else self._levels
        places = torch.linspace(0, len(levels) - 1, min(count, len(levels))).round().long()
        return levels[places].flip(0)

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        return (timesteps.double() / TIME_SCALE).exp().clamp(self.sigma_min, self.sigma_max)

    # --- noise, inputs, outputs ---

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return clean + per_image(self._sigmas(timesteps), clean) * noise

    def scale_model_input(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return noisy / per_image((self._sigmas(timesteps) ** 2 + self.sigma_data**2).sqrt(), noisy)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        raise ValueError("a consistency model has no target but the output of a dense model: pass a teacher")

    def output_scale(self, timesteps: Tensor) -> Tensor:
        """c_out, with shape `(batch,)`."""
        sigmas = self._sigmas(timesteps)
        return ((sigmas - self.sigma_min) * self.sigma_data / (sigmas**2 + self.sigma_data**2).sqrt()).float()

    # --- sampling ---

    def sampler(
        self,
        num_inference_steps: int | None = None,
        timestep_spacing: str | None = DEFAULT_SPACING,
        eta: float = 0.0,
        latents: bool = False,
    ) -> Sampler:
        steps, scheduler = self._checked_steps(num_inference_steps, timestep_spacing, eta), self._stock()
        scheduler.set_timesteps(steps)
        return SchedulerSampler(scheduler)
