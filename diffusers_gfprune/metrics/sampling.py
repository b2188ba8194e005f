"""Samples to measure a model by: image number i is a function of the model, the seed and i, and of nothing else.

DDIM (Song et al., arXiv 2010.02502, equation 12) goes down a sequence of timesteps t_S > ... > t_1,

    x_(s-1) = sqrt(abar_(s-1)) x0 + sqrt(1 - abar_(s-1) - sigma^2) eps + sigma z,    sigma = eta sigma_DDPM

with x0 and eps predicted at t_s, and z fresh noise; eta = 0 is deterministic, so that two models that start from the same
noise can be compared image by image. Timesteps are spaced evenly (`"leading"`, `"trailing"`, `"linspace"`, as in Diffusers) or
as squares, denser where there is little noise (`"quadratic"`: t_s = (sqrt(0.8 T) (s - 1) / (S - 1))^2, the setting of Song et
al. for CIFAR-10, appendix D.2, and of the diffusion pruning papers).

Leading spacing goes up from 0 in gaps of T // S. Where S does not divide T, it may end far below T (501 of 1,000 steps have
gaps of 1 and end at timestep 500), and sampling would start from noise that the model takes for a half denoised image.
`fit_spacing` finds what can be sampled instead; `make_sampler` refuses what cannot come out right.

Images are rounded to 8 bits, as files would hold them: what is measured is what is seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..diffusion.batch import ModelInputs
from ..diffusion.process import training_process
from ..families.lookup import family_of
from .eval_mode import evaluating

__all__ = [
    "TIMESTEP_SPACINGS",
    "Spacing",
    "SpacedDDIMScheduler",
    "fit_spacing",
    "image_generators",
    "make_sampler",
    "sample_images",
    "to_uint8",
]

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "quadratic")
# Share of the timesteps that leading spacing must span: it is 1 where the number of steps divides them. After 0.9 of the
# linear schedule of Ho et al., 1.7 % of the image is left.
LEADING_SHARE = 0.9
# Beta schedules that DDIMScheduler makes itself
DDIM_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# The share of the timesteps that a quadratic sequence reaches up to (Song et al.'s code)
QUADRATIC_SHARE = 0.8


class Spacing(NamedTuple):
    """Timesteps that can be sampled.

    Attributes:
        num_inference_steps: How many.
        timestep_spacing: One of `TIMESTEP_SPACINGS`.
        changes: What is not as it was asked for, a line each.
    """

    num_inference_steps: int
    timestep_spacing: str
    changes: tuple[str, ...] = ()


def _leading_misses(num_train_timesteps: int, num_inference_steps: int, steps_offset: int) -> str | None:
    """What is wrong with the timesteps of leading spacing, if anything is."""
    gap = num_train_timesteps // num_inference_steps
    first = (num_inference_steps - 1) * gap + steps_offset
    starts = f"would start at timestep {first} of {num_train_timesteps}"
    if first >= num_train_timesteps:
        return f"{starts}, because of steps_offset={steps_offset} of the scheduler"
    if num_inference_steps * gap < LEADING_SHARE * num_train_timesteps:
        return f"{starts} and leave out the noisier ones"
    return None


def fit_spacing(scheduler, num_inference_steps: int, timestep_spacing: str) -> Spacing:
    """What can be sampled in place of what was asked for, where that is not possible.

    Args:
        scheduler: Of the model, with T timesteps.
        num_inference_steps: S as asked for (>= 1): at most T of them are taken.
        timestep_spacing: One of `TIMESTEP_SPACINGS`. Leading spacing that would leave out the noisiest timesteps, or go past
            the last one, becomes trailing.
    """
    changes = []
    num_train_timesteps, steps_offset = scheduler.config.num_train_timesteps, scheduler.config.get("steps_offset", 0)
    if num_inference_steps > num_train_timesteps:
        changes.append(
            f"num_inference_steps={num_inference_steps} is more than the {num_train_timesteps} timesteps that the model was "
            f"trained with: samples take {num_train_timesteps}"
        )
        num_inference_steps = num_train_timesteps
    if timestep_spacing == "leading" and (wrong := _leading_misses(num_train_timesteps, num_inference_steps, steps_offset)):
        changes.append(
            f"timestep_spacing=leading with num_inference_steps={num_inference_steps} {wrong}: samples take trailing spacing"
        )
        timestep_spacing = "trailing"
    return Spacing(num_inference_steps, timestep_spacing, tuple(changes))


class SpacedDDIMScheduler(DDIMScheduler):
    """DDIM that also knows quadratic spacing, and where every step goes to the next timestep of the sequence.

    Diffusers goes down by T // S whatever the spacing. That is the next timestep with leading spacing, and with trailing
    spacing where S divides T; with linspace it is another one.

    `timestep_spacing="quadratic"` is an argument of `set_timesteps`, since the configuration does not know the word.
    """

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None, quadratic: bool = False
    ) -> None:
        """Choose the timesteps.

        Args:
            num_inference_steps: How many. With quadratic spacing the lowest squares round to the same timesteps, which are
                taken once: `len(self.timesteps)` is then somewhat smaller, and the samples are the same.
            device: Where the timesteps lie.
            quadratic: Space them as squares, whatever the configuration says.
        """
        super().set_timesteps(num_inference_steps, device)
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
        """One step, to the timestep that follows in the sequence; `DDIMScheduler.step` always goes down by the same number.

        Arguments are as there.

        Raises:
            ValueError: `eta` is positive and there is no `variance_noise`.
        """
        if eta > 0 and variance_noise is None:
            raise ValueError(f"variance_noise=None: eta={eta} needs it")
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


def image_generators(seed: int, numbers: range) -> list[torch.Generator]:
    """A random generator for each image, seeded by (seed, number)."""
    seeds = [int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1)) for number in numbers]
    return [torch.Generator().manual_seed(value) for value in seeds]


def _noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit values."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def make_sampler(scheduler, num_inference_steps: int, timestep_spacing: str = "leading") -> SpacedDDIMScheduler:
    """DDIM for a trained model, set to its timesteps.

    Args:
        scheduler: Of the model (see `diffusion_process`): DDIM takes its configuration, and its betas, over.
        num_inference_steps: S (>= 1, at most the model's timesteps).
        timestep_spacing: One of `TIMESTEP_SPACINGS`.

    Raises:
        ValueError: The scheduler cannot be sampled by DDIM, or not with these timesteps.
    """
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(f"timestep_spacing={timestep_spacing} must be one of {', '.join(TIMESTEP_SPACINGS)}")
    process = training_process(scheduler)
    steps = process.config.num_train_timesteps
    if not 1 <= num_inference_steps <= steps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} must be from 1 to the {steps} timesteps of the model's training"
        )
    offset = scheduler.config.get("steps_offset", 0)
    if timestep_spacing == "leading" and (wrong := _leading_misses(steps, num_inference_steps, offset)):
        raise ValueError(f"timestep_spacing=leading with num_inference_steps={num_inference_steps} {wrong}: take trailing")
    quadratic = timestep_spacing == "quadratic"
    options: dict = {} if quadratic else {"timestep_spacing": timestep_spacing}
    if process.config.trained_betas is None and process.config.beta_schedule not in DDIM_BETA_SCHEDULES:
        options |= {"trained_betas": process.betas.tolist(), "beta_schedule": "linear", "rescale_betas_zero_snr": False}
    ddim = SpacedDDIMScheduler.from_config(scheduler.config, **options)
    ddim.set_timesteps(num_inference_steps, quadratic=quadratic)
    first = int(ddim.timesteps[0])
    if ddim.alphas_cumprod[first] <= 0 and process.config.prediction_type == "epsilon":
        cause = (
            "rescale_betas_zero_snr=True" if process.config.rescale_betas_zero_snr else f"beta_end={process.config.beta_end}"
        )
        raise ValueError(
            f"timestep_spacing={timestep_spacing} starts at timestep {first}, where {cause} of the scheduler leaves nothing "
            f"but noise, from which prediction_type=epsilon makes no image: take leading, with at most {steps // 2} steps"
        )
    return ddim


@torch.no_grad()
def sample_images(
    unet: nn.Module,
    scheduler,
    num_images: int,
    size: tuple[int, int],
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int = 128,
    class_labels: Tensor | None = None,
    progress: str | None = None,
    *,
    timestep_spacing: str = "leading",
    eta: float = 0.0,
    first: int = 0,
) -> Tensor:
    """Sample with DDIM. Two models given the same seed start from the same noise, and images do not depend on the batch size.

    Args:
        unet: Noise-prediction model.
        scheduler: Its scheduler, whose configuration DDIM takes over.
        num_images: How many (>= 1).
        size: Height and width in pixels.
        num_inference_steps: DDIM steps (>= 1; see `make_sampler`).
        seed: Of the noise (>= 0).
        batch_size: Images in one forward (>= 1).
        class_labels: With shape `(num_images,)`, for conditional models.
        progress: Text of a progress bar, if any.
        timestep_spacing: One of `TIMESTEP_SPACINGS`.
        eta: Share of the noise of DDPM that is added in each step, in [0, 1].
        first: Number of the first image.

    Returns:
        Images in [0, 1], in steps of 1/255, float32 on the CPU, with shape `(num_images, channels, height, width)`.

    Raises:
        ValueError: An argument is out of its range, the scheduler is of another process, or samples are not finite.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be in [0, 1]")
    family, parameter = family_of(unet), next(unet.parameters())
    ddim = make_sampler(scheduler, num_inference_steps, timestep_spacing)
    shape = (unet.config.in_channels, *size)
    images = []
    with evaluating(unet):
        for start in tqdm(range(0, num_images, batch_size), desc=progress, disable=progress is None):
            numbers = range(first + start, first + min(start + batch_size, num_images))
            generators = image_generators(seed, numbers)

            x = _noise(shape, generators).to(parameter.device)
            labels = None if class_labels is None else class_labels[start : start + batch_size].to(parameter.device)
            conditioning = {} if labels is None else {"class_labels": labels}
            for timestep in ddim.timesteps:
                prediction = family.predict(unet, ModelInputs(x.to(parameter.dtype), timestep, conditioning)).float()
                fresh = _noise(shape, generators).to(parameter.device) if eta > 0 else None
                x = ddim.step(prediction, timestep, x, eta=eta, variance_noise=fresh).prev_sample
            if not torch.isfinite(x).all():  # 8 bits would make black pixels of it
                raise ValueError(
                    f"samples {numbers.start} to {numbers.stop - 1} are not finite: the model's weights, or its dtype"
                )
            images.append(to_uint8(x / 2 + 0.5).float().cpu() / 255)
    return torch.cat(images)
