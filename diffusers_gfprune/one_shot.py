"""One-shot pruning of a pipeline's UNet from calibration images, without training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from .argument_fields import at_least, check_range
from .configuration import GFPruneConfig
from .criteria import find_criterion
from .diffusion.batch import DiffusionBatch
from .diffusion.class_labels import LabelDropout, check_labels, make_label_dropout
from .diffusion.pixel_values import image_values, unused_range
from .diffusion.repeats import repeated_batches
from .diffusion.schedulers import training_process
from .drawn_images import NUM_TEACHER_IMAGES, draw_images
from .families.lookup import family_of
from .loading.pipeline_layouts import check_process
from .metrics.conditions import SampleConditions, conditions_of_vectors, label_conditions
from .metrics.model_size import spatial_size
from .precision import usual_modes
from .pruner import GradientFlowPruner
from .pruning.dependencies import check_unhooked

__all__ = [
    *("calibration_batches", "drawn_conditions", "images_to_tensor", "one_shot_config", "prune_unet", "recovery_batches"),
    "with_vectors",
]

# Noisy images for recovery: images are used repeatedly, with other noise. A large one has many rows for every layer, so that
# fewer do
RECOVERY_SAMPLES, FEWEST_RECOVERY_SAMPLES, RECOVERY_POSITIONS = 512, 32, 2**19

logger = logging.getLogger(__name__)


def images_to_tensor(images, channels: int) -> Tensor:
    """Calibration images as float32 in [-1, 1] with shape `(images, channels, height, width)`, on the CPU.

    Args:
        images: One of

            - a float tensor with this shape and range, a uint8 tensor, or a list of tensors of shape
              `(channels, height, width)`;
            - a list of PIL images of the same size, in the modes of `pixel_values`;
            - an array of shape `(images, height, width[, 1 or 3])`, or a list of its rows: uint8, uint16 (greyscale only) or
              floating point in [0, 1], as returned by pipelines with `output_type="np"`.
        channels: `in_channels` of the model: 1 (greyscale) or 3 (RGB), for tensors any number.

    Raises:
        ValueError: Images have a wrong shape, range or type, differ in size, or the list is empty.
    """
    if not isinstance(images, Tensor):
        images = _stack(images, channels)
    if images.ndim != 4 or images.shape[1] != channels or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}, not (images, {channels}, height, width)")
    if images.dtype == torch.uint8:
        return images.cpu().float().div_(255).mul_(2).sub_(1).contiguous()  # other strides round differently
    if not images.is_floating_point():
        raise ValueError(f"images are a tensor of {images.dtype}, not uint8 or floating point in [-1, 1]")
    least, most = images.min().item(), images.max().item()
    if not (least >= -1.001 and most <= 1.001):  # also raises for NaN
        raise ValueError(f"images have values from {least:g} to {most:g}, not floating point in [-1, 1]")
    if least >= 0:
        logger.warning(
            "images have values from %.3g to %.3g and are used unchanged, although models expect [-1, 1]. If they are in "
            "[0, 1], pass images * 2 - 1",
            least,
            most,
        )
    return images.cpu().float().contiguous()


def _stack(images, channels: int) -> Tensor:
    """Stack images of the same size into a tensor."""
    try:
        images = list(images)
    except TypeError:
        raise ValueError(f"images is a {type(images).__name__}, not a list of images or a tensor") from None
    if not images:
        raise ValueError("images is empty: pruning needs at least one calibration image")
    if not all(isinstance(image, Tensor) for image in images):
        if channels not in (1, 3):
            raise ValueError(f"the model has in_channels={channels}: pass images as a tensor")
        given, images = images, [image_values(image, channels, f"images[{i}]") for i, image in enumerate(images)]
        reasons = [unused_range(image) for image in given if isinstance(image, Image.Image)]
        if reasons and None not in reasons:
            logger.warning(reasons[0])
    for index, image in enumerate(images):
        if (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
            described = [f"images[{i}] has shape {tuple(images[i].shape)} of {images[i].dtype}" for i in (0, index)]
            raise ValueError(f"images differ in size or type: {', '.join(described)}")
    return torch.stack(images)


def calibration_batches(
    images: Tensor,
    scheduler,
    batch_size: int = 32,
    class_labels: Tensor | None = None,
    seed: int = 0,
    label_dropout: LabelDropout | None = None,
) -> list[DiffusionBatch]:
    """Batches with noise and timesteps drawn from `seed`.

    Args:
        images: Images in [-1, 1] with shape `(images, channels, height, width)`.
        scheduler: Scheduler of the model, or its process; timesteps are those of its training.
        batch_size: Number of images in a batch (>= 1).
        class_labels: Labels with shape `(images,)`, or vectors with shape `(images, size)`.
        seed: Seed for noise, timesteps and label dropout.
        label_dropout: Label dropout, if any.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator)
    timesteps = training_process(scheduler).random_timesteps(len(images), generator)
    if label_dropout is not None:
        class_labels = label_dropout.several(class_labels, generator)
    conditioning = {} if class_labels is None else {"class_labels": class_labels}
    return DiffusionBatch(images, noise, timesteps, conditioning).split(batch_size)


def recovery_batches(
    batches: Sequence[DiffusionBatch], scheduler, seed: int = 0, samples: int | None = None
) -> list[DiffusionBatch]:
    """Batches for recovery: calibration batches, then their images again with other noise and timesteps.

    Args:
        batches: Calibration batches, at least one; with several processes, the rows of this rank.
        scheduler: Scheduler of the model, or its process; timesteps are those of its training.
        seed: Seed for noise and timesteps.
        samples: Number of images (>= 1; default: `RECOVERY_SAMPLES`).

    Returns:
        Batches with this number of images or slightly more, over all processes; fewer of large images, or the given ones if
        these are more.
    """
    fitting = RECOVERY_POSITIONS // batches[0].clean[0, 0].numel()
    wanted = min(samples or RECOVERY_SAMPLES, max(FEWEST_RECOVERY_SAMPLES, fitting))
    return repeated_batches(batches, scheduler, wanted, seed)


def one_shot_config(batch_size: int, recovery: bool, options: Mapping[str, Any]) -> GFPruneConfig:
    """The configuration of pruning in one shot, with the ranking that keeps samples nearest without training.

    With recovery, these are widths by sensitivity, as in training runs. Without it, or where blocks may go, units are chosen
    together: recovery mends what the choice together avoids (benchmarks/FINDINGS.md).

    Args:
        batch_size: Number of images in a calibration batch, which is checked.
        recovery: Whether least squares follow.
        options: Fields of `GFPruneConfig`.

    Raises:
        ImportError: The runtime of `latency_backend` is not installed.
        ValueError: An option is out of range, or has no meaning without training.
    """
    options = dict(options)
    for name in ("preset", "total_steps", "soft_fraction", "hard_fraction", "update_interval"):
        if name in options:
            raise ValueError(
                f"{name}={options[name]}: one-shot pruning has no schedule; use GradientFlowPruner to prune during training"
            )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not isinstance(recovery, bool):  # in training runs it is a name, and "none" is true
        raise ValueError(f"recovery={recovery!r} must be True or False")
    together = not recovery or options.get("depth", GFPruneConfig.depth) != "none"
    criterion = find_criterion(options.get("criterion", GFPruneConfig.criterion))
    if options.get("ranking") is None and together and criterion.joint is not None:
        options["ranking"] = "joint"
    config = GFPruneConfig.from_preset("one-shot", total_steps=1, **options)
    config.check_installed()
    for doubt in config.doubts():
        logger.warning(doubt)
    return config


@usual_modes()
def prune_unet(
    unet,
    scheduler,
    images=None,
    batch_size: int = 32,
    class_labels: Tensor | Callable[[range], Tensor] | None = None,
    seed: int = 0,
    label_dropout: float | None = None,
    null_label: int | None = None,
    recovery: bool = True,
    num_teacher_images: int = NUM_TEACHER_IMAGES,
    num_inference_steps: int | None = None,
    pipeline: str | None = None,
    **options,
) -> ModelMixin:
    """Prune a copy of a dense UNet in one shot.

    Args:
        unet: The dense model; it is not modified.
        scheduler: Its scheduler.
        images: Calibration images (see `images_to_tensor`); None: the dense model draws them, with its classes in turn.
        batch_size: Number of images in a calibration batch.
        class_labels: Labels, integers with shape `(images,)` or a list, for conditional models; not with `images=None`. For
            models with `class_embed_type="identity"`: vectors with shape `(images, size)`, or a function that maps a range of
            image numbers to them; with `images=None`, drawn images have the vectors in turn.
        seed: Seed for calibration noise, timesteps and label dropout.
        label_dropout: Share of labels replaced by `null_label`, in [0, 1) (default: 0.1 with a null label): at least one
            label if it is not 0, and never all. Use the value of the model's training.
        null_label: Label for "no label", in models trained for classifier-free guidance.
        recovery: Whether layers that read pruned channels make up for them by least squares (`pruning.recovery`).
        num_teacher_images: Number of images that are drawn with `images=None` (>= 1).
        num_inference_steps: For consistency models, the steps that the pruned model will be sampled with: only their noise
            levels are used (default: all levels, half of the images at the highest).
        pipeline: Name of the pipeline that the model is sampled with, to check that it can; None: it is not checked.
        **options: Fields of `GFPruneConfig`. With the default criterion, the default of `ranking` is `"sensitivity"`, and
            `"joint"` without recovery or with another `depth` than `"none"`.

    Returns:
        The pruned model.

    Raises:
        ImportError: The runtime of `latency_backend` is not installed.
        ValueError: An option is out of range, the budget cannot be met, or images and labels do not fit the model.
    """
    config = one_shot_config(batch_size, recovery, options)
    process = training_process(scheduler)
    if pipeline is not None:
        check_process(pipeline, process)
    family_of(unet).check_process(unet.config, process)
    check_unhooked(unet)
    process = process.sampled_in(num_inference_steps)
    dropout = make_label_dropout(unet.config.num_class_embeds, null_label, label_dropout)
    pruner = None
    if images is None:
        check_range(at_least(1), num_teacher_images=num_teacher_images)
        conditions = drawn_conditions(unet, class_labels, num_teacher_images, null_label)
        pruner = GradientFlowPruner(copy.deepcopy(unet), config, process)  # checks the budget before images are drawn
        class_labels = conditions.of(range(num_teacher_images)).get("class_labels")
        images = draw_images(unet, process, num_teacher_images, conditions, None, seed, num_inference_steps, batch_size)
    pixels = images_to_tensor(images, unet.config.in_channels)
    class_labels = with_vectors(unet, class_labels, len(pixels))
    if unet.config.sample_size is not None and tuple(pixels.shape[2:]) != spatial_size(unet):
        size = "x".join(map(str, spatial_size(unet)))
        raise ValueError(f"images have {pixels.shape[2]}x{pixels.shape[3]} pixels, but the model's sample_size is {size}")
    if class_labels is not None and len(class_labels) != len(pixels):
        raise ValueError(f"class_labels has {len(class_labels)} labels for {len(pixels)} images")
    if dropout is not None:
        if class_labels is None:
            raise ValueError(f"null_label={null_label} needs class_labels for the images")
        check_labels(class_labels.tolist(), dropout.null_label)
    conditioning = {} if class_labels is None else {"class_labels": class_labels}
    family_of(unet).check_conditioning(unet, conditioning, len(pixels))
    if unet.config.sample_size is None and not family_of(unet).is_pruned(unet):
        try:
            family_of(unet).check_sample_size(unet.config, tuple(pixels.shape[2:]))
        except ValueError as error:
            raise ValueError(f"images have {pixels.shape[2]}x{pixels.shape[3]} pixels: {error}") from None
    if pruner is None:  # it may time layers for minutes: everything else was checked
        pruner = GradientFlowPruner(copy.deepcopy(unet), config, process, sample_size=tuple(pixels.shape[2:]))
    batches = calibration_batches(pixels, process, batch_size, class_labels, seed, dropout)
    pruner.step(0, batches)
    if recovery:
        pruner.recover(unet, recovery_batches(batches, process, seed))
    return pruner.compact()


def drawn_conditions(
    unet: ModelMixin, class_labels: Tensor | Callable[[range], Tensor] | None, count: int, null_label: int | None
) -> SampleConditions:
    """Conditions of `count` images that a model draws: its classes in turn, or the given vectors.

    Raises:
        ValueError: Labels are given, or vectors are missing or do not fit the model.
    """
    family = family_of(unet)
    if (size := family.vector_size(unet.config)) is not None:
        return conditions_of_vectors(class_labels, count, size)
    labels = family.class_labels(unet.config)
    if class_labels is not None:
        drawn = "the model takes no labels" if labels is None else "the model draws images of its classes in turn"
        raise ValueError(f"class_labels must be None with images=None: {drawn}")
    return label_conditions(labels, null_label)


def with_vectors(unet: ModelMixin, class_labels: Tensor | Callable[[range], Tensor] | None, count: int) -> Tensor | None:
    """Class labels as given, or the vectors of `count` images for models that take them.

    Raises:
        ValueError: Vectors are missing or do not fit the model, or a function is given to a model that takes none.
    """
    size = family_of(unet).vector_size(unet.config)
    if size is not None:
        vectors = conditions_of_vectors(class_labels, count, size).rows["class_labels"]
        if len(vectors) != count:
            raise ValueError(f"class_labels has {len(vectors)} vectors for {count} images")
        return vectors
    if callable(class_labels) and not isinstance(class_labels, Tensor):
        raise ValueError("class_labels must be labels of the images: functions are for models that take vectors")
    if class_labels is None:
        return None
    labels = torch.as_tensor(class_labels)
    if labels.ndim != 1 or labels.is_floating_point():
        given = f"shape {tuple(labels.shape)} and dtype {labels.dtype}"
        raise ValueError(f"class_labels has {given}: it must be integers with shape (images,)")
    return labels
