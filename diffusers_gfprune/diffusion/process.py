"""The protocol of a *process*: all that training, scoring and sampling need to know of how noise is added and removed.

A process is made from the scheduler of a trained pipeline (`schedulers.training_process`). With an image x_0, Gaussian noise
eps and a timestep t, it says

    noisy image        x_t = add_noise(x_0, eps, t)
    input              the model is called with scale_model_input(x_t, t) and with t itself
    target             what the model predicts, as far as it follows from x_0 and eps
    sampling           a Diffusers scheduler for measurements

| process | timesteps | scales its input | target | sampled by |
|---|---|---|---|---|
| `ddpm.DDPMProcess` | integers | no | eps, x_0 or v | DDIM |
| `consistency.ConsistencyProcess` | 250 log sigma | yes | none: the teacher's output | its own multistep rule |
| `edm.EDMProcess` | log(sigma) / 4 | yes | the preconditioned x_0 | Euler's method |
| `flow_matching.FlowMatchingProcess` | 1000 sigma | no | eps - x_0 | Euler's method |

A batch keeps timesteps as the model takes them, so that processes of discrete and of continuous noise levels look alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    *("TIMESTEP_SPACINGS", "DiffusionProcess", "EulerProcess", "Sampler", "SchedulerSampler"),
    *("check_noise_levels", "gaussian_noise", "per_image"),
]

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "quadratic")
DEFAULT_SPACING = TIMESTEP_SPACINGS[0]


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """One value for each image, with shape `(batch,)`, shaped and typed to multiply images like `like`."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


def check_noise_levels(scheduler, least_steps: int = 1) -> None:
    """Check the continuous noise levels of a scheduler.

    Raises:
        ValueError: It has fewer timesteps than `least_steps`, or sigmas that are not positive, finite and in order.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    steps = config.num_train_timesteps
    if not isinstance(steps, int) or steps < least_steps:
        raise ValueError(f"num_train_timesteps={steps} of the {kind} must be an integer of at least {least_steps}")
    for name in ("sigma_min", "sigma_max", "sigma_data", "rho"):
        value = config[name]
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value} of the {kind} must be greater than 0 and finite")
    if config.sigma_min >= config.sigma_max:
        raise ValueError(f"sigma_min={config.sigma_min} of the {kind} must be less than sigma_max={config.sigma_max}")


def gaussian_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Noise of images with a shape `(channels, height, width)`, each from its own generator; float32 on the CPU."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


class Sampler(ABC):
    """Samples one batch of images, step by step, from noise with the standard deviation `init_noise_sigma`.

    Attributes:
        timesteps: Timesteps in the order of the steps, with shape `(steps,)`, on the CPU.
        init_noise_sigma: Standard deviation of the noise that sampling starts from.
    """

    timesteps: Tensor
    init_noise_sigma: float = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The model's input for noisy images at one of `timesteps`."""
        return sample

    @abstractmethod
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Noisy images at the next timestep, or images after the last one.

        Args:
            model_output: Output of the model, float32 with the shape of `sample`.
            timestep: One of `timesteps`.
            sample: Noisy images, float32 with shape `(batch, channels, height, width)`.
            generators: Random generators on the CPU, one for each image.
        """


class SchedulerSampler(Sampler):
    """A Diffusers scheduler with its timesteps set, used as pipelines use it.

    Args:
        scheduler: The scheduler. It counts its steps, so that it samples one batch.
    """

    def __init__(self, scheduler) -> None:
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        self.init_noise_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        scale = getattr(self.scheduler, "scale_model_input", None)
        return sample if scale is None else scale(sample, timestep)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return self.scheduler.step(model_output, timestep, sample, generator=list(generators), return_dict=False)[0]


class DiffusionProcess(ABC):
    """How a model was trained and is sampled. It is a function of the scheduler's configuration, and has no state.

    Attributes:
        name: Name in reports.
        title: What a model of this process is, for messages.
        sampler_title: Sampler of measurements, for plans and cards.
        default_steps: Steps of the sampler in measurements, unless others are requested.
        default_drawing_steps: Likewise for images that the dense model draws to train on.
        has_target: Whether an image and its noise determine what the model should predict. Otherwise only the output of a
            dense model does, and losses are distances to it.
        target_square: Mean square of the target, about: the loss of predicting zero.
        has_integer_timesteps: Whether timesteps are integers from 0 to `num_train_timesteps - 1`.
        scheduler: Scheduler that defines the process.
        model_scheduler: Scheduler of the model's pipeline.
        num_train_timesteps: Number of timesteps of the training.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    sampler_title: ClassVar[str]
    default_steps: ClassVar[int]
    default_drawing_steps: ClassVar[int]
    has_target: ClassVar[bool] = True
    target_square: ClassVar[float] = 1.0
    has_integer_timesteps: ClassVar[bool] = False

    def __init__(self, scheduler) -> None:
        self.scheduler = self.model_scheduler = scheduler
        self.num_train_timesteps = scheduler.config.num_train_timesteps

    def sampled_in(self, num_inference_steps: int | None) -> DiffusionProcess:
        """The process at the noise levels of a sampler with so many steps; None: at those of the training.

        Raises:
            ValueError: Models of this process are sampled at all noise levels.
        """
        if num_inference_steps is not None:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} must be None: it is for consistency models, and the model is "
                f"{self.title}"
            )
        return self

    # --- timesteps ---

    @abstractmethod
    def timesteps_at(self, times: Tensor) -> Tensor:
        """Timesteps of a training at given places of its distribution.

        Args:
            times: Values in [0, 1), float64. Uniform values give the timesteps of the training.

        Returns:
            Timesteps with the shape of `times`: int64 or float32.
        """

    @property
    @abstractmethod
    def timestep_range(self) -> tuple[float, float]:
        """The lowest and the highest timestep."""

    def random_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps of a training with shape `(count,)`, from a generator on the CPU."""
        return self.timesteps_at(torch.rand(count, generator=generator, dtype=torch.float64))

    def grid_timesteps(self, count: int) -> Tensor:
        """Evenly spread timesteps with shape `(count,)`, from low to high noise."""
        return self.timesteps_at((torch.arange(count, dtype=torch.float64) + 0.5) / count)

    def check_timesteps(self, timesteps: Tensor, size: int) -> None:
        """Check the timesteps of `size` images.

        Raises:
            ValueError: Shape, dtype or range are wrong.
        """
        low, high = self.timestep_range
        wanted = f"they must be floating point from {low:g} to {high:g}, for {self.title}"
        if not timesteps.is_floating_point():
            raise ValueError(f"timesteps have dtype {timesteps.dtype}; {wanted}")
        if timesteps.shape != (size,):
            raise ValueError(f"timesteps have shape {tuple(timesteps.shape)}, not {(size,)}; {wanted}")
        slack = 1e-4 * (high - low)  # rounding
        if not bool(((timesteps >= low - slack) & (timesteps <= high + slack)).all()):
            raise ValueError(f"timesteps range from {timesteps.min():g} to {timesteps.max():g}; {wanted}")

    # --- noise, inputs, outputs ---

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy images.

        Args:
            clean: Images with shape `(batch, channels, height, width)`.
            noise: Gaussian noise of the same shape.
            timesteps: Timesteps with shape `(batch,)`.
        """

    def scale_model_input(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The model's input for noisy images; shapes are those of `add_noise`."""
        return noisy

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict; shapes are those of `add_noise`.

        Raises:
            ValueError: The process has no target.
        """

    def output_scale(self, timesteps: Tensor) -> Tensor | None:
        """Factors of outputs in losses and damage, with shape `(batch,)`; None: outputs are compared as they are."""
        return None

    # --- sampling ---

    def fit_sampling(
        self, num_inference_steps: int | None, timestep_spacing: str | None = DEFAULT_SPACING
    ) -> tuple[int, str | None, tuple[str, ...]]:
        """Settings of the sampler that the process can do.

        Args:
            num_inference_steps: Requested number of steps (>= 1); None: the default.
            timestep_spacing: Requested spacing, one of `TIMESTEP_SPACINGS`.

        Returns:
            Number of steps, spacing (None if the sampler has only one), and the changes to what was requested, one line each.

        Raises:
            ValueError: The process has another spacing.
        """
        self._check_spacing(timestep_spacing)
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        if steps <= self.num_train_timesteps:
            return steps, None, ()
        change = (
            f"num_inference_steps={steps} is more than the {self.num_train_timesteps} timesteps that the model was trained "
            f"with: {self.num_train_timesteps} are used"
        )
        return self.num_train_timesteps, None, (change,)

    @abstractmethod
    def sampler(
        self,
        num_inference_steps: int | None = None,
        timestep_spacing: str | None = DEFAULT_SPACING,
        eta: float = 0.0,
        latents: bool = False,
    ) -> Sampler:
        """A sampler for one batch.

        Args:
            num_inference_steps: Number of steps (>= 1); None: the default.
            timestep_spacing: One of `TIMESTEP_SPACINGS`, or None, for processes that have a choice.
            eta: Share of DDPM's noise in each step, in [0, 1].
            latents: Whether samples are latents, which have no range to clip to.

        Raises:
            ValueError: The process cannot be sampled with these settings.
        """

    def _check_spacing(self, timestep_spacing: str | None) -> None:
        if timestep_spacing not in (None, DEFAULT_SPACING):
            raise ValueError(
                f"timestep_spacing={timestep_spacing} must be left out: it is for DDIM, and the model is {self.title}"
            )

    def _checked_steps(self, num_inference_steps: int | None, timestep_spacing: str | None, eta: float) -> int:
        """The number of steps of a sampler without DDIM's options."""
        self._check_spacing(timestep_spacing)
        if eta:
            raise ValueError(f"eta={eta:g} must be 0: it is for DDIM, and the model is {self.title}")
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={steps} must be from 1 to {self.num_train_timesteps}, the timesteps the model was "
                f"trained with"
            )
        return steps


class EulerProcess(DiffusionProcess):
    """A process of continuous noise levels that is sampled by Euler's method.

    Attributes:
        sampler_class: Diffusers' scheduler of this method, made from the configuration of the model's.
    """

    sampler_title = "Euler's method"
    default_steps = default_drawing_steps = 50
    sampler_class: ClassVar[type]

    def sampler(
        self,
        num_inference_steps: int | None = None,
        timestep_spacing: str | None = DEFAULT_SPACING,
        eta: float = 0.0,
        latents: bool = False,
    ) -> Sampler:
        steps = self._checked_steps(num_inference_steps, timestep_spacing, eta)
        scheduler = self.sampler_class.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        return SchedulerSampler(scheduler)
