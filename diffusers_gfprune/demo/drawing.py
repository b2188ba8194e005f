"""Drawing images with stock pipelines: the same seed gives the images that the same call of Diffusers gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from ..argument_fields import check_fields
from ..diffusion.ddim import fit_spacing, latent_config
from ..diffusion.schedulers import training_process, training_scheduler
from ..errors import one_line
from ..families.lookup import FAMILIES
from ..metrics.quality import GUIDANCE
from ..metrics.sampling import to_uint8
from ..metrics.speed import seconds_of
from .models import Choices, Models, ShownModel, without_reference

__all__ = ["MAX_IMAGES", "Drawing", "Settings", "draw", "try_drawing"]

MAX_IMAGES = 16
# Schedulers that divide by the distance of successive timesteps; others repeat some of them by design
MULTISTEP = (
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"),
    "UniPCMultistepScheduler",
)
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Settings:
    """Settings of both models.

    Attributes:
        num_images: Number of images, from 1 to `MAX_IMAGES`.
        num_inference_steps: Number of steps, from 1 to the timesteps of the training.
        scheduler: Name of a scheduler, one of `Choices.schedulers`.
        seed: Seed for the noise (>= 0).
        prompts: Prompts of the images, in turn; for models of text.
        class_labels: Labels of the images, in turn (default: all); for models with class labels.
        guidance_scale: Scale of classifier-free guidance (>= 0; 1: none).
    """

    num_images: int = 4
    num_inference_steps: int = 50
    scheduler: str = "DDIMScheduler"
    seed: int = 0
    prompts: Sequence[str] = ("",)
    class_labels: Sequence[int] = ()
    guidance_scale: float = 1.0

    def check(self, choices: Choices) -> None:
        """Check all values.

        Raises:
            ValueError: A value is out of its range.
        """
        limits = {
            "num_images": (1, MAX_IMAGES),
            "num_inference_steps": (1, choices.num_train_timesteps),
            "seed": (0, MAX_SEED),
        }
        for name, (first, last) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not first <= value <= last or value != int(value):
                raise ValueError(f"{name}={value} must be a whole number from {first} to {last}")
        if self.scheduler not in choices.schedulers:
            raise ValueError(f"scheduler={self.scheduler} must be one of {', '.join(choices.schedulers)}")
        check_fields(self, GUIDANCE, "guidance_scale")
        for label in self.class_labels:
            if label not in choices.classes:
                labels = (
                    f"from {choices.classes[0]} to {choices.classes[-1]}" if choices.classes else "empty: the model takes none"
                )
                raise ValueError(f"class_labels={label} must be {labels}")


@dataclass(frozen=True)
class Drawing:
    """Images of a model.

    Attributes:
        images: Images in [0, 1], in steps of 1/255, float32 with shape `(n, channels, height, width)`.
        seconds: Time of the call of the pipeline.
        changes: Changes to the settings, one line each.
    """

    images: Tensor
    seconds: float
    changes: tuple[str, ...] = ()


def draw(model: ShownModel, settings: Settings, choices: Choices) -> Drawing:
    """Draw images of a model.

    Args:
        model: The model, whose pipeline keeps the scheduler of the settings.
        settings: The settings.
        choices: What can be chosen.

    Raises:
        ValueError: A setting is out of its range, or samples are not finite.
    """
    settings.check(choices)
    pipe, count = model.pipeline, int(settings.num_images)
    steps, changes = _set_scheduler(model, settings)
    taken = inspect.signature(type(pipe).__call__).parameters
    labels = settings.class_labels or choices.classes or (0,)
    of_images = {
        "prompt": _in_turn(settings.prompts, count),
        "class_labels": _in_turn(labels, count),
        "batch_size": count,
        "use_resolution_binning": False,  # PixArt's, which knows images of a few sizes only
        "guidance_scale": 1.0 if choices.guidance_scale is None else settings.guidance_scale,
    }
    given = {name: value for name, value in of_images.items() if name in taken}
    generator = torch.Generator().manual_seed(int(settings.seed))
    drawn, denoiser = [], _denoiser(pipe)
    labelled = choices.classes and "class_labels" not in taken
    with _finite(model, denoiser), _labelled(denoiser, of_images["class_labels"]) if labelled else nullcontext():
        seconds = seconds_of(
            lambda: drawn.append(pipe(**given, num_inference_steps=steps, generator=generator, output_type="np").images),
            pipe.device,
        )
    images = torch.from_numpy(drawn[0]).float().permute(0, 3, 1, 2)
    _check_finite(model, images, denoiser.dtype)  # of the autoencoder, too
    return Drawing(to_uint8(images).float() / 255, seconds, changes)


def try_drawing(models: Models, num_images: int = 1) -> Models:
    """Draw images of each model in one step: errors are found before the page opens, and the first call is often slow.

    Args:
        models: The models.
        num_images: Number of images.

    Returns:
        The models, without the reference if it cannot be sampled and was not requested.

    Raises:
        ValueError: A model cannot be sampled.
    """
    scale = models.choices.guidance_scale
    settings = Settings(num_images, 1, models.choices.schedulers[0], guidance_scale=1.0 if scale is None else scale)
    for model in filter(None, (models.pruned, models.reference)):
        try:
            draw(model, settings, models.choices)
        except Exception as error:  # whatever a pipeline raises
            failed = ValueError(f"{model.name} cannot be sampled: {one_line(error)}")
            if model is models.reference and not models.requested:
                return replace(models, reference=None, notice=without_reference(failed))
            raise failed from error
    return models


def _in_turn(values: Sequence, count: int) -> list:
    return [values[number % len(values)] for number in range(count)]


def _set_scheduler(model: ShownModel, settings: Settings) -> tuple[int, tuple[str, ...]]:
    """Give a pipeline the scheduler of the settings; returns the number of steps, and changes to the settings."""
    kind, config = getattr(diffusers, settings.scheduler), model.scheduler.config
    if model.in_latents and "clip_sample" in inspect.signature(kind).parameters:
        config = latent_config(config)
    scheduler = kind.from_config(config)
    spacing = scheduler.config.get("timestep_spacing", "leading")
    steps, fitted, changes = int(settings.num_inference_steps), spacing, ()
    discrete = training_process(training_scheduler(model.scheduler)).name == "ddpm"  # others may have negative timesteps
    if discrete:
        steps, fitted, changes = fit_spacing(scheduler, steps, spacing)
    if fitted != spacing:
        scheduler = kind.from_config(config, timestep_spacing=fitted)
    try:
        scheduler.set_timesteps(steps)
        if discrete:
            _check_timesteps(scheduler)
    except (ValueError, IndexError) as error:  # some need several steps
        raise ValueError(
            f"num_inference_steps={steps} is not possible with scheduler={settings.scheduler}: {one_line(error)}"
        ) from error
    model.pipeline.scheduler = scheduler
    return steps, changes


def _check_timesteps(scheduler) -> None:
    """Check the timesteps that Diffusers chose for a DDPM.

    Raises:
        ValueError: One is negative, or one is repeated where steps have no length of zero.
    """
    timesteps = scheduler.timesteps.tolist()
    if min(timesteps) < 0:
        raise ValueError(f"Diffusers rounds the last timestep to {min(timesteps):g}")
    if type(scheduler).__name__ in MULTISTEP and len({*timesteps}) < len(timesteps):
        repeated = next(timestep for timestep in timesteps if timesteps.count(timestep) > 1)
        raise ValueError(f"Diffusers takes timestep {repeated:g} twice")


def _denoiser(pipe: DiffusionPipeline) -> ModelMixin:
    return next(pipe.components[family.component] for family in FAMILIES if family.component in pipe.components)


def _check_finite(model: ShownModel, values: Tensor, dtype: torch.dtype) -> None:
    """Check values before pipelines and schedulers clip them, which hides infinite ones, or they are rounded to 8 bits.

    Raises:
        ValueError: A value is not finite.
    """
    if not torch.isfinite(values).all():
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"samples of {model.name} in {name} are not finite: check the model's weights and dtype")


@contextmanager
def _finite(model: ShownModel, denoiser: ModelMixin) -> Iterator[None]:
    """Context in which all predictions of a model are checked."""
    hook = denoiser.register_forward_hook(lambda module, args, output: _check_finite(model, output[0], module.dtype))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _labelled(denoiser: ModelMixin, labels: Sequence[int]) -> Iterator[None]:
    """Context in which a model has its class labels, for pipelines that do not take any."""
    placed = torch.tensor(labels, device=denoiser.device)
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "class_labels": placed}), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()
