"""The process of EDM (Karras et al., arXiv 2206.00364), with continuous noise levels and preconditioning:

    x_t = x_0 + sigma eps,      D(x_t, t) = c_skip x_t + c_out F(c_in x_t, t),      t = log(sigma) / 4

    c_in = 1 / sqrt(sigma^2 + sigma_data^2)      c_skip = sigma_data^2 c_in^2      c_out = +- sigma sigma_data c_in

D is the denoised image, so that the target of the network F is (x_0 - c_skip x_t) / c_out, which has variance 1. c_out is
negative for `prediction_type="v_prediction"`. Errors of F count alike at all levels, as in the paper (its weight of errors of
D is 1 / c_out^2). Levels of training are those of its table 1, log sigma ~ N(-1.2, 1.2^2), from sigma_min to sigma_max.
"""

from __future__ import annotations

import math

import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from .process import EulerProcess, check_noise_levels, per_image

__all__ = ["EDMProcess"]

LOG_MEAN, LOG_DEVIATION = -1.2, 1.2
PREDICTION_TYPES = ("epsilon", "v_prediction")
TIME_SCALE = 0.25


class EDMProcess(EulerProcess):
    """The process of an `EDMEulerScheduler`.

    Args:
        scheduler: Scheduler of a trained pipeline.

    Raises:
        ValueError: The configuration of the scheduler is not valid.
    """

    name, title = "edm", "an EDM"
    sampler_class = EDMEulerScheduler

    def __init__(self, scheduler) -> None:
        config, kind = scheduler.config, type(scheduler).__name__
        check_noise_levels(scheduler)
        if config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={config.prediction_type} of the {kind} must be one of {', '.join(PREDICTION_TYPES)}"
            )
        super().__init__(scheduler)
        self.sigma_min, self.sigma_max, self.sigma_data = config.sigma_min, config.sigma_max, config.sigma_data
        self.sign = 1.0 if config.prediction_type == "epsilon" else -1.0

    # --- timesteps ---

    @property
    def timestep_range(self) -> tuple[float, float]:
        return TIME_SCALE * math.log(self.sigma_min), TIME_SCALE * math.log(self.sigma_max)

    def timesteps_at(self, times: Tensor) -> Tensor:
        logs = LOG_MEAN + LOG_DEVIATION * torch.special.ndtri(times)
        return (TIME_SCALE * logs).clamp(*self.timestep_range).float()

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        return (timesteps.double() / TIME_SCALE).exp()

    # --- noise, inputs, targets ---

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return clean + per_image(self._sigmas(timesteps), clean) * noise

    def scale_model_input(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return noisy / per_image((self._sigmas(timesteps) ** 2 + self.sigma_data**2).sqrt(), noisy)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        # (x_0 - c_skip (x_0 + sigma eps)) / c_out = +- (sigma x_0 - sigma_data^2 eps) c_in / sigma_data
        sigmas = self._sigmas(timesteps)
        scale = self.sign / (self.sigma_data * (sigmas**2 + self.sigma_data**2).sqrt())
        return per_image(scale * sigmas, clean) * clean - per_image(scale * self.sigma_data**2, clean) * noise
