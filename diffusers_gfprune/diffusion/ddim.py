"""DDIM (Song et al., arXiv 2010.02502, equation 12) with every spacing of its timesteps.

DDIM steps through a falling sequence of timesteps t_S > ... > t_1,

    x_(s-1) = sqrt(abar_(s-1)) x0 + sqrt(1 - abar_(s-1) - sigma^2) eps + sigma z,    sigma = eta sigma_DDPM

with x0 and eps predicted at t_s, and z fresh noise. With eta = 0 sampling is deterministic, so two models that start from the
same noise can be compared image by image. Timesteps are spaced evenly (`"leading"`, `"trailing"`, `"linspace"`, as in
Diffusers) or as squares, denser at low noise (`"quadratic"`: t_s = (sqrt(0.8 T) (s - 1) / (S - 1))^2, the setting of Song et
al. for CIFAR-10, appendix D.2, and of the diffusion pruning papers).

Leading spacing takes timesteps from 0 upwards in steps of T // S. If S does not divide T, it may end far below T (501 of 1,000
steps have gaps of 1 and end at timestep 500). Sampling would then start from noise at a timestep of half-denoised images.
`fit_spacing` finds valid timesteps instead; `make_sampler` raises an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from .process import TIMESTEP_SPACINGS

__all__ = ["SpacedDDIMScheduler", "fit_spacing", "latent_config", "make_sampler"]

# Minimum share of the timesteps that leading spacing must span; it spans all if their number is divisible by the steps.
# After 0.9 of the linear schedule of Ho et al., 1.7 % of the image is left.
LEADING_SHARE = 0.9
# Beta schedules that DDIMScheduler implements
DDIM_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Share of the timesteps that quadratic spacing spans (from Song et al.'s code)
QUADRATIC_SHARE = 0.8


def _misses(timestep_spacing: str, num_train_timesteps: int, num_inference_steps: int, steps_offset: int) -> str | None:
    """The problem with the timesteps of a spacing, if there is one."""
    if num_inference_steps == 1 and num_train_timesteps > 1 and timestep_spacing != "trailing":
        return "would take timestep 0 alone, where there is next to no noise"
    if timestep_spacing != "leading":
        return None
    gap = num_train_timesteps // num_inference_steps
    first = (num_inference_steps - 1) * gap + steps_offset
    starts = f"would start at timestep {first} of {num_train_timesteps}"
    if first >= num_train_timesteps:
        return f"{starts}, because of steps_offset={steps_offset} of the scheduler"
    if num_inference_steps * gap < LEADING_SHARE * num_train_timesteps:
        return f"{starts} and leave out the noisier ones"
    return None


def fit_spacing(scheduler, num_inference_steps: int, timestep_spacing: str) -> tuple[int, str, tuple[str, ...]]:
    """Replace requested timesteps that cannot be sampled by valid ones.

    Args:
        scheduler: Scheduler of the model, with T timesteps.
        num_inference_steps: Requested number of steps S (>= 1), limited to T.
        timestep_spacing: One of `TIMESTEP_SPACINGS`. Leading spacing is replaced by trailing spacing if it would leave out
            the noisiest timesteps or exceed the last one. So are all others with a single step, which would be timestep 0.

    Returns:
        Number and spacing of the timesteps, and the changes to the requested ones, one line each.
    """
    changes = []
    num_train_timesteps, steps_offset = scheduler.config.num_train_timesteps, scheduler.config.get("steps_offset", 0)
    if num_inference_steps > num_train_timesteps:
        changes.append(
            f"num_inference_steps={num_inference_steps} is more than the {num_train_timesteps} timesteps that the model was "
            f"trained with: {num_train_timesteps} are used"
        )
        num_inference_steps = num_train_timesteps
    if wrong := _misses(timestep_spacing, num_train_timesteps, num_inference_steps, steps_offset):
        changes.append(
            f"timestep_spacing={timestep_spacing} with num_inference_steps={num_inference_steps} {wrong}: trailing spacing is "
            f"used"
        )
        timestep_spacing = "trailing"
    return num_inference_steps, timestep_spacing, tuple(changes)


class SpacedDDIMScheduler(DDIMScheduler):
    """DDIM with quadratic spacing, in which every step goes to the next timestep of the sequence.

    Diffusers always steps down by T // S. That is the next timestep for leading spacing, and for trailing spacing if S
    divides T, but not for linspace.

    Quadratic spacing is an argument of `set_timesteps`, since the configuration does not allow this value.
    """

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, quadratic: bool = False
    ) -> None:
        """Choose the timesteps.

        Args:
            num_inference_steps: Number of timesteps. With quadratic spacing the lowest squares round to the same timesteps,
                which are used once: `len(self.timesteps)` is then slightly smaller, and the samples are the same.
            device: Device of the timesteps.
            quadratic: Space the timesteps quadratically and ignore the configured spacing.
        """
        super().set_timesteps(num_inference_steps, device)
        # For some numbers of steps, such as 201 of 1,000, rounding gives trailing spacing one more, which is -1
        self.timesteps = self.timesteps[self.timesteps >= 0]
        if quadratic:
            top = np.sqrt(self.config.num_train_timesteps * QUADRATIC_SHARE)
            rising = np.unique((np.linspace(0, top, num_inference_steps) ** 2).astype(np.int64))
            rising = rising[rising < self.config.num_train_timesteps]
            self.timesteps = torch.from_numpy(rising[::-1].copy()).to(device)
        falling = self.timesteps.tolist()
        self.previous = dict(zip(falling, [*falling[1:], -1]))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        variance_noise: Tensor | None = None,
    ) -> DDIMSchedulerOutput:
        """One step to the next timestep of the sequence. The arguments are those of `DDIMScheduler.step`.

        Raises:
            ValueError: `eta` is positive and `variance_noise` is None.
        """
        if eta > 0 and variance_noise is None:
            raise ValueError(f"variance_noise=None must be a tensor of noise with eta={eta}")
        timestep = int(timestep)
        previous = self.previous[timestep]
        abar = self.alphas_cumprod[timestep]
        abar_previous = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        if self.config.prediction_type == "epsilon":
            clean, noise = (sample - (1 - abar) ** 0.5 * model_output) / abar**0.5, model_output
        elif self.config.prediction_type == "sample":
            clean, noise = model_output, (sample - abar**0.5 * model_output) / (1 - abar) ** 0.5
        else:
            clean = abar**0.5 * sample - (1 - abar) ** 0.5 * model_output
            noise = abar**0.5 * model_output + (1 - abar) ** 0.5 * sample
        if self.config.thresholding:
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        sigma = eta * self._get_variance(timestep, previous) ** 0.5
        moved = abar_previous**0.5 * clean + (1 - abar_previous - sigma**2).clamp(min=0) ** 0.5 * noise
        if eta > 0:
            moved = moved + sigma * variance_noise
        return DDIMSchedulerOutput(prev_sample=moved, pred_original_sample=clean)


def latent_config(config: Mapping) -> dict:
    """The configuration of a scheduler of latents: they have no range to clip to, unless it says so.

    `DDIMScheduler` and `DDPMScheduler` clip samples to [-1, 1] by default, as is right for pixels.
    """
    return {"clip_sample": False, **config}


def make_sampler(
    process, num_inference_steps: int, timestep_spacing: str = "leading", latents: bool = False
) -> SpacedDDIMScheduler:
    """DDIM for a trained model, with its timesteps set.

    Args:
        process: The `DDPMProcess` of the model. DDIM takes over the configuration of its scheduler, and its betas.
        num_inference_steps: Number of steps S (>= 1, at most the model's timesteps).
        timestep_spacing: One of `TIMESTEP_SPACINGS`.
        latents: Whether samples are latents (`latent_config`).

    Raises:
        ValueError: DDIM cannot sample with this scheduler, or not with these timesteps.
    """
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(f"timestep_spacing={timestep_spacing} must be one of {', '.join(TIMESTEP_SPACINGS)}")
    scheduler, training = process.model_scheduler, process.scheduler
    steps = process.num_train_timesteps
    if not 1 <= num_inference_steps <= steps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} must be from 1 to {steps}, the timesteps the model was trained with"
        )
    offset = scheduler.config.get("steps_offset", 0)
    if wrong := _misses(timestep_spacing, steps, num_inference_steps, offset):
        told = f"timestep_spacing={timestep_spacing} with num_inference_steps={num_inference_steps}"
        raise ValueError(f"{told} {wrong}: use trailing")
    quadratic = timestep_spacing == "quadratic"
    options: dict = {} if quadratic else {"timestep_spacing": timestep_spacing}
    if latents:
        options["clip_sample"] = latent_config(scheduler.config)["clip_sample"]
    if training.config.trained_betas is None and training.config.beta_schedule not in DDIM_BETA_SCHEDULES:
        options |= {"trained_betas": training.betas.tolist(), "beta_schedule": "linear", "rescale_betas_zero_snr": False}
    ddim = SpacedDDIMScheduler.from_config(scheduler.config, **options)
    ddim.set_timesteps(num_inference_steps, quadratic=quadratic)
    first = int(ddim.timesteps[0])
    if ddim.alphas_cumprod[first] <= 0 and training.config.prediction_type == "epsilon":
        cause = (
            "rescale_betas_zero_snr=True" if training.config.rescale_betas_zero_snr else f"beta_end={training.config.beta_end}"
        )
        raise ValueError(
            f"timestep_spacing={timestep_spacing} starts at timestep {first}, where {cause} of the scheduler leaves only "
            f"noise, which prediction_type=epsilon cannot denoise: use leading with at most {steps // 2} steps"
        )
    return ddim
