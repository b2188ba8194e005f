"""Samples to measure a model by: image number i is a function of the model, the seed and i, and of nothing else.

DDIM (Song et al., arXiv 2010.02502, equation 12) goes down a sequence of timesteps t_S > ... > t_1,

    x_(s-1) = sqrt(abar_(s-1)) x0 + sqrt(1 - abar_(s-1) - sigma^2) eps + sigma z,    sigma = eta sigma_DDPM

with x0 and eps predicted at t_s, and z fresh noise; eta = 0 is deterministic, so that two models that start from the same
noise can be compared image by image. Timesteps are spaced evenly (`"leading"`, `"trailing"`, `"linspace"`, as in Diffusers) or
as squares, denser where there is little noise (`"quadratic"`: t_s = (sqrt(0.8 T) (s - 1) / (S - 1))^2, the setting of Song et
al. for CIFAR-10, appendix D.2, and of the diffusion pruning papers).

Images are rounded to 8 bits, as files would hold them: what is measured is what is seen.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor, nn
from tqdm.auto import tqdm

from .eval_mode import evaluating

__all__ = ["TIMESTEP_SPACINGS", "SpacedDDIMScheduler", "default_labels", "image_generators", "sample_images", "to_uint8"]

TIMESTEP_SPACINGS = ("leading", "trailing", "linspace", "quadratic")
# The share of the timesteps that a quadratic sequence reaches up to (Song et al.'s code)
QUADRATIC_SHARE = 0.8


class SpacedDDIMScheduler(DDIMScheduler):
    """DDIM that also knows quadratic spacing, where every step goes to the next timestep of the sequence.

    With the other spacings a step goes down by T // S, as in Diffusers, which is the next timestep wherever spacing allows.

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
        gap = self.config.num_train_timesteps // num_inference_steps
        self.previous = {int(t): int(t) - gap for t in self.timesteps}
        if quadratic:
            top = np.sqrt(self.config.num_train_timesteps * QUADRATIC_SHARE)
            rising = np.unique((np.linspace(0, top, num_inference_steps) ** 2).astype(np.int64))
            rising = rising[rising < self.config.num_train_timesteps]
            self.timesteps = torch.from_numpy(rising[::-1].copy()).to(device)
            self.previous = dict(zip(rising.tolist(), [-1, *rising[:-1].tolist()]))

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


def default_labels(unet: nn.Module, numbers: range) -> Tensor | None:
    """Class labels for samples of a conditional model: the classes in turn. None for an unconditional one."""
    classes = unet.config.num_class_embeds
    return None if classes is None else torch.tensor(list(numbers)) % classes


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as 8-bit values."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


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
        num_inference_steps: DDIM steps (>= 1).
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
        ValueError: An argument is out of its range, or samples are not finite.
    """
    if timestep_spacing not in TIMESTEP_SPACINGS:
        raise ValueError(f"timestep_spacing={timestep_spacing} must be one of {', '.join(TIMESTEP_SPACINGS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be in [0, 1]")
    parameter = next(unet.parameters())
    quadratic = timestep_spacing == "quadratic"
    spacing = {} if quadratic else {"timestep_spacing": timestep_spacing}
    ddim = SpacedDDIMScheduler.from_config(scheduler.config, **spacing)
    ddim.set_timesteps(num_inference_steps, quadratic=quadratic)
    shape = (unet.config.in_channels, *size)
    images = []
    with evaluating(unet):
        for start in tqdm(range(0, num_images, batch_size), desc=progress, disable=progress is None):
            numbers = range(first + start, first + min(start + batch_size, num_images))
            generators = image_generators(seed, numbers)

            x = _noise(shape, generators).to(parameter.device)
            labels = None if class_labels is None else class_labels[start : start + batch_size].to(parameter.device)
            for timestep in ddim.timesteps:
                prediction = unet(x.to(parameter.dtype), timestep, class_labels=labels).sample.float()
                fresh = _noise(shape, generators).to(parameter.device) if eta > 0 else None
                x = ddim.step(prediction, timestep, x, eta=eta, variance_noise=fresh).prev_sample
            if not torch.isfinite(x).all():  # 8 bits would make black pixels of it
                raise ValueError(
                    f"samples {numbers.start} to {numbers.stop - 1} are not finite: the model's weights, or its dtype"
                )
            images.append(to_uint8(x / 2 + 0.5).float().cpu() / 255)
    return torch.cat(images)
