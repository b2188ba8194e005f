"""Loading of training and held-out images, and checks that they fit the model.

All scripts load their images here, so a pruned model is trained on the same images as its dense parent. Images can be
anything that `datasets.load_dataset` reads, from disk or as a stream. Channels (1: greyscale, 3: RGB) and resolution
(`sample_size`) are those of the model. `folders` reads local folders, `splits` chooses splits, `decoding` decodes images, and
`batches` makes batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
from torch import Tensor

from ..argument_fields import FRACTION, NOT_NEGATIVE, argument, at_least, check_fields
from ..diffusion.class_labels import LabelDropout, check_labels, make_label_dropout
from ..errors import first_line
from ..metrics.model_size import spatial_size
from .decoding import NETWORK_ERRORS, BrokenImage, BrokenImages, EncodedImage, ImageDecoder, adapt_decoder
from .folders import load_folder
from .sources import ImageRows, ImageStream
from .splits import DataSummary, held_out_candidates, train_split

__all__ = ["DataArguments", "load_images"]

logger = logging.getLogger(__name__)

# Errors of `datasets`
LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException),
    *NETWORK_ERRORS,
)


@dataclass
class DataArguments:
    """Training and held-out images."""

    _argument_group_name = "data"

    dataset_name: str | None = argument(
        None,
        "Data set of images: an id on the Hub, or a local folder, readable by `load_dataset` (parquet) or written by "
        "`save_to_disk`.",
    )
    dataset_config_name: str | None = argument(None, "Configuration of the data set.")
    train_data_dir: str | None = argument(
        None,
        "Local folder of image files. All except hidden files are used, with any names; only sub-folders train/ with "
        "validation/ or test/ define splits.",
    )
    train_split_name: str | None = argument(None, "Split of the data set to train on (default: train, else the first one).")
    validation_split_name: str | None = argument(
        None,
        "Split to take held-out images from (default: validation or test, if it has the labels that the model needs, else "
        "the training split, which then loses these images).",
    )
    streaming: bool = argument(False, "Read the images as a stream, for a data set that does not fit on disk.")
    shuffle_buffer_size: int = argument(
        1000, "With --streaming: number of encoded images in each loading process's shuffle buffer (>= 1)."
    )
    image_column: str | None = argument(None, "Column of images (default: the first column of type Image).")
    label_column: str | None = argument(
        None, "Column of class labels, for conditional models (default: the first ClassLabel)."
    )
    null_label: int | None = argument(
        None,
        "Label that means 'no label', for classifier-free guidance (default: the last one, if the model has one label more "
        "than the data set has classes).",
    )
    label_dropout: float | None = argument(
        None,
        "Share of the labels replaced by the null label in training and scoring, in [0, 1) (default: 0.1 if there is a null "
        "label).",
    )
    resolution: int | None = argument(
        None, "Expected sample_size of the model in pixels, only checked: images are resized to the model's."
    )
    center_crop: bool = argument(False, "Crop non-square images at the centre instead of at random places.")
    random_flip: bool = argument(False, "Flip half of the images left to right.")
    validation_images: int = argument(
        256, "Number of held-out images for the step loss (>= 1), from the split of --validation_split_name."
    )
    max_broken_images: int = argument(
        100,
        "Maximum number of broken images, which are replaced by others (>= 0). Broken are images that cannot be read, colour "
        "images for a greyscale model, and images smaller than the model's (unless all are: then they are enlarged).",
    )
    dataloader_num_workers: int = argument(
        0,
        "Number of processes that load images for each training process (0: load in the training process). With --streaming "
        "they divide the shards, so batches depend on this number.",
    )
    cache_dir: str | None = argument(None, "Folder for downloaded data sets.")

    def __post_init__(self) -> None:
        check_fields(self, at_least(1), "shuffle_buffer_size", "validation_images")
        check_fields(self, NOT_NEGATIVE, "max_broken_images", "dataloader_num_workers")
        check_fields(self, FRACTION, "label_dropout")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution={self.resolution} must be at least 1 pixel")

    def with_labels(self, label_dropout: LabelDropout | None) -> DataArguments:
        """The arguments with the null label and the share of dropped labels that `load_images` chose."""
        if label_dropout is None:
            return self
        return replace(self, null_label=label_dropout.null_label, label_dropout=label_dropout.probability)


def load_images(args: DataArguments, unet_config) -> tuple[ImageRows | ImageStream, tuple[Tensor, Tensor | None]]:
    """Training and held-out images for a model.

    Args:
        args: Source and preprocessing of the images.
        unet_config: Configuration of the model: size, channels (1: greyscale, 3: RGB), and whether it is class conditional.

    Returns:
        The training images, with a `summary` for the plan, and the held-out images (centre crop, no flip) in memory: pixel
        values, float32 with shape `(n, channels, height, width)` in [-1, 1], and class labels, int64 with shape `(n,)`, or
        None. Held-out images are the first ones of the requested split, or of the validation or test split. If there is none,
        they are removed from the training images: at random from a data set on disk, the first ones of a stream. A split
        without the labels that the model needs, such as the test splits of many data sets, is skipped with a warning.

        If all images are smaller than the model's size, they are enlarged with a warning (see `adapt_decoder`).

    Raises:
        ValueError: Data, split or column do not exist, images do not fit the model, or there are too few or too many broken
            images.
    """
    _check_model(args, unet_config)
    _check_source(args)
    source = f"dataset_name={args.dataset_name}" if args.dataset_name else f"train_data_dir={args.train_data_dir}"
    with _one_line(source):
        splits = _load_splits(args)
    train_name = train_split(splits, args.train_split_name, source)
    candidates = held_out_candidates(splits, args.validation_split_name, train_name, source)
    train_rows = splits[train_name]
    if train_rows.features is None:
        raise ValueError(f"{source} has unknown columns until it is read: load it without streaming")
    if not args.streaming and len(train_rows) == 0:
        raise ValueError(f"{source} has no training images")
    image_column = _column(train_rows, args.image_column, datasets.Image, "image_column")
    if image_column is None:
        raise ValueError(f"{source} has no column of type Image, only {train_rows.column_names}: cast it with `datasets`")
    label_column = None
    if unet_config.num_class_embeds is not None:
        label_column = _column(train_rows, args.label_column, datasets.ClassLabel, "label_column")
        if label_column is None:
            raise ValueError(f"the model is class conditional, but {train_rows.column_names} holds no class labels")

    num_classes = getattr(train_rows.features.get(label_column), "num_classes", None)  # unknown if labels are plain numbers
    feature = train_rows.features[image_column]
    decoder = ImageDecoder(
        image_column,
        feature,
        unet_config,
        label_column=label_column,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        label_dropout=make_label_dropout(unet_config.num_class_embeds, args.null_label, args.label_dropout, num_classes),
    )
    columns = [image_column, label_column] if label_column else [image_column]
    held_out_name = _labelled_split(args, source, splits, candidates, train_name, label_column)
    with _one_line(source):
        rows = _not_decoded(train_rows, columns, feature)
        held_out_rows = None if held_out_name == train_name else _not_decoded(splits[held_out_name], columns, feature)
    make_sources = _stream_sources if args.streaming else _row_sources
    train, held_out, first = make_sources(args, source, rows, held_out_rows, decoder)
    if decoder.null_label is not None and isinstance(train, ImageRows):  # labels of a stream are checked as they are read
        with _in_split(train_name):
            check_labels(train.rows.unique(label_column), decoder.null_label, f"column {label_column}")
    with _in_split(train_name):
        adapt_decoder(decoder, first, args.max_broken_images)
    with _in_split(held_out_name):
        pixels, labels = _decode_all(held_out, decoder, args.max_broken_images)
    train.summary = DataSummary(
        source=source + (" (a stream)" if args.streaming else ""),
        splits={name: None if args.streaming else len(split) for name, split in splits.items()},
        train=train_name,
        held_out=held_out_name,
        num_train=train.num_images,
        num_held_out=len(pixels),
        enlarged=decoder.enlarge,
        label_dropout=decoder.label_dropout,
    )
    return train, (pixels, labels)


def _labelled_split(
    args: DataArguments, source: str, splits, candidates: Sequence[str], train_name: str, label_column: str | None
) -> str:
    """The first candidate split for held-out images; if the model needs labels, the first one with labels."""
    for name in candidates:
        if name == train_name or label_column is None:
            return name
        with _one_line(source):
            labelled = _has_labels(splits[name], label_column, args.validation_images)
        if labelled:
            return name
        lacking = f"split {name} has no class labels in column {label_column}"
        if args.validation_split_name is not None:
            raise ValueError(f"validation_split_name={name}: {lacking} of {source}, and the model needs them")
        logger.warning("%s of %s, but the model needs them: another split is used for held-out images", lacking, source)
    return train_name


def _has_labels(rows, column: str, count: int) -> bool:
    """Whether any of the first images has a label; test splits of many data sets have -1 instead."""
    if column not in (rows.column_names or [column]):
        return False
    rows = rows.select_columns([column])
    labels = rows[:count][column] if isinstance(rows, datasets.Dataset) else [row[column] for row in islice(rows, count)]
    return not labels or any(label is not None and label != -1 for label in labels)


@contextmanager
def _in_split(name: str) -> Iterator[None]:
    """Add the name of the split to errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"split {name}: {error}") from error


def _row_sources(
    args: DataArguments, source: str, rows, held_out_rows, decoder: ImageDecoder
) -> tuple[ImageRows, Iterable[EncodedImage], Iterable[EncodedImage]]:
    """Training images, held-out images, and a few images of the training split to check."""
    count, order = args.validation_images, np.arange(len(rows))
    spread = np.linspace(0, len(rows) - 1, min(len(rows), ImageStream.num_spares)).astype(int)
    if held_out_rows is not None:
        held_out = np.arange(min(count, len(held_out_rows)))
    elif len(rows) < 2 * count:
        raise ValueError(f"{source} has {len(rows)} images, too few to hold out validation_images={count}")
    else:
        order = np.random.default_rng(0).permutation(len(rows))
        held_out_rows, held_out, order = rows, order[:count], order[count:]
    train = ImageRows(rows, decoder, order)
    return train, ImageRows(held_out_rows, decoder, held_out).in_order(), ImageRows(rows, decoder, spread).in_order()


def _stream_sources(
    args: DataArguments, source: str, rows, held_out_rows, decoder: ImageDecoder
) -> tuple[ImageStream, Iterable[EncodedImage], Iterable[EncodedImage]]:
    """As `_row_sources`; the images to check are the first ones."""
    count, common = args.validation_images, (decoder, args.shuffle_buffer_size)
    with _one_line(source):
        train = ImageStream(rows, *common, num_held_out=0 if held_out_rows is not None else count)
        other = train if held_out_rows is None else ImageStream(held_out_rows, *common, num_held_out=count)
    if not train.spares:
        if not train.held_out:
            raise ValueError(f"{source} has no training images")
        raise ValueError(f"{source} has {len(train.held_out)} images, too few to hold out validation_images={count}")
    first = [*train.held_out, *train.spares][: ImageStream.num_spares]
    held_out, other.held_out = other.held_out, []  # loading processes need no copy
    return train, held_out, first


def _decode_all(images: Iterable[EncodedImage], decoder: ImageDecoder, max_broken_images: int) -> tuple[Tensor, Tensor | None]:
    """Pixel values and class labels of the images that fit the model."""
    pixels, labels, broken, reason = [], [], BrokenImages(max_broken_images), None
    for image in images:
        try:
            pixels.append(decoder(image))
            labels.append(image.label)
        except BrokenImage as error:
            broken.add([image.name])
            reason = error
    if not pixels:
        cause = f"none of {len(broken)} fits the model, the last one: {reason}" if broken else "there are none"
        raise ValueError(f"there are no held-out images: {cause}")
    if broken:
        logger.warning("%d held-out images do not fit the model and are left out, the last one: %s", len(broken), reason)
    return torch.stack(pixels), None if labels[0] is None else torch.tensor(labels)


def _check_model(args: DataArguments, unet_config) -> None:
    size, channels = spatial_size(unet_config), unet_config.in_channels
    if args.resolution is not None and size != (args.resolution, args.resolution):
        raise ValueError(f"resolution={args.resolution} but the model was built for sample_size={size[0]}x{size[1]}")
    if channels not in (1, 3):
        raise ValueError(f"in_channels={channels} of the model must be 1 (greyscale) or 3 (RGB)")
    if unet_config.class_embed_type is not None:
        raise ValueError(f"class_embed_type={unet_config.class_embed_type} must be None: only class labels are supported")


def _check_source(args: DataArguments) -> None:
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError(
            f"give the images either as dataset_name or as train_data_dir, not both or none "
            f"(dataset_name={args.dataset_name}, train_data_dir={args.train_data_dir})"
        )
    if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
        raise ValueError(f"train_data_dir={args.train_data_dir} is not a folder")
    name = args.dataset_name
    if name is not None and (Path(name).is_file() or (name.startswith((".", "/")) and not Path(name).is_dir())):
        raise ValueError(f"dataset_name={name} is not a folder")


def _load_splits(args: DataArguments) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    folder, options = args.train_data_dir or args.dataset_name, {"cache_dir": args.cache_dir, "streaming": args.streaming}
    if Path(folder).is_dir():
        return load_folder(folder, args.dataset_config_name, images_only=args.train_data_dir is not None, **options)
    return datasets.load_dataset(folder, args.dataset_config_name, **options)


def _not_decoded(rows, columns: list[str], feature: datasets.Image):
    """Some columns of a split; images, in the first column, are not decoded."""
    if isinstance(rows, datasets.IterableDataset):  # it may have been set to decode in threads
        return rows.decode(False).select_columns(columns)
    return rows.select_columns(columns).cast_column(columns[0], datasets.Image(mode=feature.mode, decode=False))


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Raise errors of `datasets` as a ValueError of one line."""
    try:
        yield
    except LOAD_ERRORS as error:
        chain = [error] if error.__cause__ is None else [error, error.__cause__]  # the cause often has the details
        reasons = [first_line(each) for each in chain]
        raise ValueError(f"{source} cannot be loaded: {': '.join(dict.fromkeys(reasons))}") from error


def _column(rows, requested: str | None, kind: type, argument: str) -> str | None:
    if requested is not None:
        if requested not in rows.column_names:
            raise ValueError(f"{argument}={requested} is not a column of the data set, which has {rows.column_names}")
        if kind is datasets.Image and not isinstance(rows.features[requested], datasets.Image):
            raise ValueError(f"{argument}={requested} must be a column of images")
        return requested
    columns = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(columns) > 1:
        logger.warning(
            "%s=%s is used, the first of the columns %s: pass another one if it is wrong", argument, columns[0], columns
        )
    return columns[0] if columns else None
