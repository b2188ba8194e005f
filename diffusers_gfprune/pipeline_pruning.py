"""One-shot pruning of a whole pipeline from calibration images, without training.

    pipe = DiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
    small = prune_pipeline(pipe, images, class_labels=labels, target="macs", ratio=0.2)
    small = prune_pipeline(pipe, target="macs", ratio=0.2)  # the dense model draws the images

It works for every pipeline that the training script prunes. Images are encoded by the VAE of the pipeline, and prompts by its
text encoders. A share of labels or prompts is replaced by the null label or the empty prompt, as in training, so that
classifier-free guidance keeps working.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from .argument_fields import FRACTION, at_least, check_range
from .diffusion.batch import DiffusionBatch
from .diffusion.class_labels import LabelDropout, check_labels, label_dropout_of, number_dropped
from .diffusion.schedulers import training_process
from .drawn_images import NUM_TEACHER_IMAGES, draw_images
from .metrics.conditions import SampleConditions
from .model_spec import ModelSpec
from .one_shot import drawn_conditions, images_to_tensor, one_shot_config, recovery_batches, with_vectors
from .pipeline_parts import PipelineParts
from .precision import usual_modes
from .pruner import GradientFlowPruner

__all__ = ["prune_pipeline"]

CAPTION_DROPOUT = 0.1


@usual_modes()
def prune_pipeline(
    pipe: DiffusionPipeline,
    images=None,
    *,
    class_labels: Tensor | Callable[[range], Tensor] | None = None,
    prompts: Sequence[str] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    label_dropout: float | None = None,
    null_label: int | None = None,
    caption_dropout: float = CAPTION_DROPOUT,
    recovery: bool = True,
    num_teacher_images: int = NUM_TEACHER_IMAGES,
    num_inference_steps: int | None = None,
    **options,
) -> DiffusionPipeline:
    """Prune the denoiser of a pipeline in one shot.

    Args:
        pipe: A dense pipeline; it is not modified.
        images: Calibration images of the size that the pipeline generates (see `images_to_tensor`); None: the dense model
            draws them, with its classes in turn, or with `prompts`.
        class_labels: Labels, integers with shape `(images,)` or a list, for models with class labels; not with
            `images=None`. For models with `class_embed_type="identity"`: vectors with shape `(images, size)`, or a function
            that maps a range of image numbers to them; with `images=None`, drawn images have the vectors in turn.
        prompts: One prompt for each image, for models of text; with `images=None`, images have them in turn.
        batch_size: Number of images in a calibration batch, and of those that are drawn at a time (>= 1).
        seed: Seed of latents, noise, timesteps and dropout.
        label_dropout: Share of labels replaced by the null label, in [0, 1) (default: 0.1 with a null label): at least one
            label if it is not 0, and never all.
        null_label: Label for "no label" (default: that of the architecture, if it has one).
        caption_dropout: Share of prompts replaced by the empty prompt, in [0, 1): at least one prompt if it is not 0, and
            never all.
        recovery: Whether layers that read pruned channels make up for them by least squares (`pruning.recovery`).
        num_teacher_images: Number of images that are drawn with `images=None` (>= 1).
        num_inference_steps: For consistency models, the steps that the pruned model will be sampled with: only their noise
            levels are used (default: all levels, half of the images at the highest).
        **options: Fields of `GFPruneConfig`, such as `target="macs", ratio=0.3`.

    Returns:
        A pipeline of the same class, with the same other components. Names of local folders that these were loaded from are
        left out of its configurations, so that they are not published.

    Raises:
        ImportError: The runtime of `latency_backend` is not installed.
        ValueError: The pipeline is not supported, the budget cannot be met, or images, labels or prompts do not fit.
    """
    check_range(FRACTION, caption_dropout=caption_dropout)
    config = one_shot_config(batch_size, recovery, options)
    parts = PipelineParts.of(pipe)
    family, denoiser = parts.family, parts.denoiser
    family.check_trainable(denoiser.config)
    parts.check_process()
    process = training_process(parts.scheduler).sampled_in(num_inference_steps)
    spec = ModelSpec.of(denoiser, parts.codec, parts.prompts)
    # What is given is checked before layers are timed, and the budget before images are drawn or encoded
    dropout = label_dropout_of(spec.labels, null_label, label_dropout)
    if images is None:
        check_range(at_least(1), num_teacher_images=num_teacher_images)
        conditions = drawn_conditions(denoiser, class_labels, num_teacher_images, null_label)
        prompts = _in_turn(prompts, num_teacher_images)
        _check_prompts(spec, prompts, num_teacher_images)
    else:
        pixels = images_to_tensor(images, spec.channels)
        _check_size(spec, pixels)
        class_labels = with_vectors(denoiser, class_labels, len(pixels))
        _check_labels(spec, class_labels, len(pixels), dropout)
        if class_labels is not None and spec.prompts is None:
            family.check_conditioning(denoiser, {"class_labels": class_labels}, len(pixels))
        _check_prompts(spec, prompts, len(pixels))
    pruner = GradientFlowPruner(copy.deepcopy(denoiser), config, process)
    if images is None:
        options_of_images = {"seed": seed, "num_inference_steps": num_inference_steps, "batch_size": batch_size}
        pixels = _drawn(parts, spec, num_teacher_images, conditions, prompts, options_of_images)
        class_labels = conditions.of(range(num_teacher_images)).get("class_labels")
    generator = torch.Generator().manual_seed(seed)
    conditioning = _labels(class_labels, dropout, generator)
    conditioning |= _texts(spec, prompts, len(pixels), caption_dropout, generator, denoiser.device)
    clean = pixels
    if spec.codec is not None:
        with spec.codec.on(denoiser.device):
            moments = spec.codec.encode(pixels)
        shape = (len(pixels), *spec.codec.latent_shape(*spec.size))
        clean = spec.codec.draw(moments, torch.randn(shape, generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = process.random_timesteps(len(clean), generator)
    batches = DiffusionBatch(clean, noise, timesteps, conditioning).split(batch_size)
    pruner.step(0, batches)
    if recovery:
        pruner.recover(denoiser, recovery_batches(batches, process, seed))
    small = copy.copy(pipe)
    parts_of_small = {name: _without_folder(part) for name, part in vars(pipe).items() if _is_local(part)}
    small.register_modules(**{**parts_of_small, family.component: pruner.compact()})
    return _without_folder(small) if _is_local(small) else small


def _is_local(part: object) -> bool:
    """Whether the configuration of a pipeline or a component names the local folder that it was loaded from."""
    return isinstance(part, ConfigMixin) and os.path.isdir(part.config.get("_name_or_path") or "")


def _without_folder(part: ConfigMixin) -> ConfigMixin:
    """The same without this name. Everything else is shared."""
    other = copy.copy(part)
    other._internal_dict = FrozenDict({name: value for name, value in part.config.items() if name != "_name_or_path"})
    return other


def _drawn(
    parts: PipelineParts,
    spec: ModelSpec,
    count: int,
    conditions: SampleConditions,
    prompts: Sequence[str] | None,
    options: Mapping[str, int | None],
) -> Tensor:
    """Images that the dense model draws with their labels or prompts; `options` of `draw_images`."""
    if prompts is not None:
        conditions = SampleConditions(_texts(spec, prompts, count, 0.0, torch.Generator(), parts.denoiser.device))
    return draw_images(parts.denoiser, parts.scheduler, count, conditions, codec=spec.codec, **options)


def _in_turn(prompts: Sequence[str] | None, count: int) -> list[str] | None:
    """As many prompts as images."""
    if isinstance(prompts, str) or (prompts is not None and len(prompts) == 0):
        raise ValueError("prompts must be a list of texts, at least one")
    return None if prompts is None else [prompts[number % len(prompts)] for number in range(count)]


def _check_size(spec: ModelSpec, pixels: Tensor) -> None:
    if tuple(pixels.shape[2:]) != spec.size:
        size = "x".join(map(str, spec.size))
        raise ValueError(f"images have {pixels.shape[2]}x{pixels.shape[3]} pixels, but the pipeline makes images of {size}")


def _check_labels(spec: ModelSpec, labels: Tensor | None, count: int, dropout: LabelDropout | None) -> None:
    if spec.vector_size is not None:
        return
    if (labels is None) != (spec.labels is None):
        raise ValueError(
            "class_labels=None must be labels of the images: the model is class conditional"
            if labels is None
            else "class_labels must be None: the model takes no labels"
        )
    if labels is not None and len(labels) != count:
        raise ValueError(f"class_labels has {len(labels)} labels for {count} images")
    if labels is not None and dropout is not None:
        check_labels(labels.tolist(), dropout.null_label)


def _check_prompts(spec: ModelSpec, prompts: Sequence[str] | None, count: int) -> None:
    if (prompts is None) != (spec.prompts is None):
        raise ValueError(
            "prompts=None must be a prompt for each image: the model takes text"
            if prompts is None
            else "prompts must be None: the model takes no text"
        )
    if prompts is not None and (isinstance(prompts, str) or len(prompts) != count):
        raise ValueError(f"prompts must be a list of {count} texts, one for each image")


def _labels(labels: Tensor | None, dropout: LabelDropout | None, generator: torch.Generator) -> dict[str, Tensor]:
    """Class labels as conditioning, some of them replaced by the null label, or vectors."""
    if labels is None:
        return {}
    return {"class_labels": labels if dropout is None else dropout.several(labels, generator)}


def _texts(
    spec: ModelSpec,
    prompts: Sequence[str] | None,
    count: int,
    dropout: float,
    generator: torch.Generator,
    device: torch.device,
) -> dict[str, Tensor]:
    """Embeddings of prompts as conditioning, some of them replaced by those of the empty prompt."""
    if prompts is None:
        return {}
    spec.prompts.warn_of_long(prompts)
    with spec.prompts.on(device):
        encoded, null = spec.prompts.encode(prompts), spec.prompts.null()
    dropped = torch.randperm(count, generator=generator)[: number_dropped(dropout, count)]
    for name, values in null.items():
        encoded[name] = encoded[name].clone()
        encoded[name][dropped] = values
    return encoded
