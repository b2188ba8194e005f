"""The process of DDPMs, with discrete noise levels (Ho et al., arXiv 2006.11239, equation 4):

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    abar_t = prod_(s <= t) (1 - beta_s),    t = 0, ..., T - 1 an integer.

The model predicts eps, x_0 or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans and Ho, arXiv 2202.00512), depending on
`prediction_type`. A Diffusers scheduler is of this process if it has these betas and passes x_t to the model without scaling.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..errors import one_line
from .batch import check_integers
from .ddim import fit_spacing, make_sampler
from .process import DEFAULT_SPACING, DiffusionProcess, Sampler, gaussian_noise

__all__ = ["DDPMProcess", "check_variance_type", "process_entries"]

LEARNED_VARIANCES = ("learned", "learned_range")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# Entries of a scheduler's configuration that define the process
_PROCESS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    "rescale_betas_zero_snr",
)


def process_entries(config: Mapping) -> dict:
    """Entries of a scheduler's configuration that define the process, with Diffusers' defaults for those that it lacks.

    Args:
        config: Configuration of a scheduler with discrete noise levels.
    """
    known = inspect.signature(DDPMScheduler).parameters
    return {name: config.get(name, known[name].default) for name in _PROCESS}


class DDPMProcess(DiffusionProcess):
    """The process of a scheduler with discrete noise levels.

    Args:
        scheduler: Scheduler of a trained pipeline.

    Attributes:
        scheduler: A `DDPMScheduler` with the same timesteps, betas and `prediction_type`. Some samplers only add noise at
            their current timesteps.

    Raises:
        ValueError: The configuration of the scheduler defines another process.
    """

    name, title, sampler_title = "ddpm", "a DDPM", "DDIM"
    default_steps, default_drawing_steps = 100, 50
    has_integer_timesteps = True

    def __init__(self, scheduler) -> None:
        config = scheduler.config
        if config.get("use_flow_sigmas"):
            raise ValueError(
                "use_flow_sigmas=True of the scheduler is not supported, it is for flow matching: it must be False"
            )
        if config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={config.prediction_type} of the scheduler is not supported: it must be one of "
                f"{', '.join(PREDICTION_TYPES)}"
            )
        steps = config.num_train_timesteps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_train_timesteps={steps} of the scheduler must be an integer of at least 1")
        try:
            process = DDPMScheduler(**process_entries(config))
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"the betas of the scheduler cannot be computed: {one_line(error)}") from error
        _check_noise_levels(process, scheduler)
        super().__init__(process)
        self.model_scheduler, self.prediction_type = scheduler, process.config.prediction_type

    # --- timesteps ---

    @property
    def timestep_range(self) -> tuple[float, float]:
        return 0, self.num_train_timesteps - 1

    def timesteps_at(self, times: Tensor) -> Tensor:
        return (times * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def random_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, self.num_train_timesteps, (count,), generator=generator)

    def grid_timesteps(self, count: int) -> Tensor:
        """As in the base class; fewer than `count` if there are fewer timesteps."""
        count = min(count, self.num_train_timesteps)
        return ((torch.arange(count) + 0.5) * self.num_train_timesteps / count).long()

    def check_timesteps(self, timesteps: Tensor, size: int) -> None:
        check_integers("timesteps", timesteps, size, self.num_train_timesteps)

    # --- noise and targets ---

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        return clean if self.prediction_type == "sample" else self.scheduler.get_velocity(clean, noise, timesteps)

    # --- sampling ---

    def fit_sampling(
        self, num_inference_steps: int | None, timestep_spacing: str | None = DEFAULT_SPACING
    ) -> tuple[int, str | None, tuple[str, ...]]:
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        return fit_spacing(self.model_scheduler, steps, timestep_spacing or DEFAULT_SPACING)

    def sampler(
        self,
        num_inference_steps: int | None = None,
        timestep_spacing: str | None = DEFAULT_SPACING,
        eta: float = 0.0,
        latents: bool = False,
    ) -> Sampler:
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        return DDIMSampler(make_sampler(self, steps, timestep_spacing or DEFAULT_SPACING, latents), eta)


class DDIMSampler(Sampler):
    """DDIM with the noise of each image from its own generator.

    Args:
        ddim: A `SpacedDDIMScheduler` with its timesteps set.
        eta: Share of DDPM's noise in each step, in [0, 1].
    """

    def __init__(self, ddim, eta: float) -> None:
        self.ddim, self.eta, self.timesteps = ddim, eta, ddim.timesteps

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, generators) -> Tensor:
        fresh = gaussian_noise(sample.shape[1:], generators).to(sample.device) if self.eta > 0 else None
        return self.ddim.step(model_output, timestep, sample, eta=self.eta, variance_noise=fresh).prev_sample


def check_variance_type(scheduler, learned_variance: bool, pipeline_splits: bool) -> None:
    """Check that a scheduler and a model agree on learned variances.

    Args:
        scheduler: Scheduler of a trained pipeline.
        learned_variance: Whether the model outputs twice the channels of its sample.
        pipeline_splits: Whether the pipeline gives the scheduler only the first half of these channels, as `DiTPipeline` does.

    Raises:
        ValueError: The scheduler needs variances that the model does not have, or cannot read its output.
    """
    kind = scheduler.config.get("variance_type")
    if kind in LEARNED_VARIANCES and not learned_variance:
        raise ValueError(
            f"variance_type={kind} of the scheduler needs a model with learned variances, whose out_channels are twice its "
            f"in_channels"
        )
    if learned_variance and not pipeline_splits and kind not in LEARNED_VARIANCES:
        raise ValueError(
            f"the model has learned variances, which variance_type={kind} of the scheduler does not read: it must be "
            f"{' or '.join(LEARNED_VARIANCES)}"
        )


def _check_noise_levels(process: DDPMScheduler, scheduler) -> None:
    """Check that betas are valid, and that the scheduler has the corresponding noise levels."""
    betas, abar, steps = process.betas, process.alphas_cumprod, process.config.num_train_timesteps
    if len(betas) != steps:
        raise ValueError(f"trained_betas of the scheduler has {len(betas)} values, not num_train_timesteps={steps}")
    if not (torch.isfinite(betas).all() and (betas > 0).all() and (betas <= 1).all()):
        ends = f"beta_start={process.config.beta_start}, beta_end={process.config.beta_end}"
        raise ValueError(f"the betas of the scheduler ({ends}) must be greater than 0 and at most 1")
    theirs = getattr(scheduler, "alphas_cumprod", None)
    if theirs is None or theirs.shape != abar.shape or not torch.allclose(theirs.cpu().float(), abar, rtol=1e-4, atol=1e-6):
        raise ValueError(f"scheduler={type(scheduler).__name__} has other noise levels than those of a DDPM with its betas")
