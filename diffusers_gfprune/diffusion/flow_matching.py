"""The process of flow matching along straight lines (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003):

    x_t = (1 - sigma) x_0 + sigma eps,      t = T sigma is what the model is fed,      target: v = dx_t / dsigma = eps - x_0.

Levels of training are uniform in u, shifted as in Diffusers (Esser et al., arXiv 2403.03206, equation 23):

    sigma = s u / (1 + (s - 1) u),      s = `shift` of the scheduler; 1: uniform in sigma.
"""

from __future__ import annotations

import math

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .process import EulerProcess, per_image

__all__ = ["FlowMatchingProcess"]


class FlowMatchingProcess(EulerProcess):
    """The process of a `FlowMatchEulerDiscreteScheduler`.

    Args:
        scheduler: Scheduler of a trained pipeline.

    Raises:
        ValueError: The configuration of the scheduler is not valid, or depends on the size of images.
    """

    name, title = "flow matching", "a flow-matching model"
    target_square = 2.0  # of noise minus an image, with a mean square of up to 1 each
    sampler_class = FlowMatchEulerDiscreteScheduler

    def __init__(self, scheduler) -> None:
        config, kind = scheduler.config, type(scheduler).__name__
        steps = config.num_train_timesteps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_train_timesteps={steps} of the {kind} must be an integer of at least 1")
        for name in ("use_dynamic_shifting", "invert_sigmas"):
            if config.get(name):
                raise ValueError(f"{name}=True of the {kind} must be False: it is not supported")
        shift = config.get("shift", 1.0)
        if not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
            raise ValueError(f"shift={shift} of the {kind} must be greater than 0 and finite")
        super().__init__(scheduler)
        self.shift = shift

    # --- timesteps ---

    @property
    def timestep_range(self) -> tuple[float, float]:
        return 0.0, float(self.num_train_timesteps)

    def timesteps_at(self, times: Tensor) -> Tensor:
        sigmas = self.shift * times / (1 + (self.shift - 1) * times)
        return (self.num_train_timesteps * sigmas).float()

    # --- noise and targets ---

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = per_image(timesteps / self.num_train_timesteps, clean)
        return (1 - sigmas) * clean + sigmas * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - clean
