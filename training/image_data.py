"""Images for training: which ones, and whether they fit the model.

Both scripts load their images here, so that a pruned model sees what its dense parent saw: anything that
`datasets.load_dataset` takes, from the disk or as a stream. The channels come from the model (1: greyscale, 3: RGB), the
resolution from its `sample_size`. Decoding is in `image_decoding`, order and batches in `batches`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
from torch import Tensor

from image_decoding import GREYSCALE_MODES, NETWORK_ERRORS, BrokenImage, BrokenImages, EncodedImage, ImageDecoder, sample_size
from image_sources import ImageRows, ImageStream

__all__ = ["DataArguments", "load_images"]

logger = logging.getLogger(__name__)

# What `datasets` raises
LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException),
    *NETWORK_ERRORS,
)


@dataclass
class DataArguments:
    """Which images to train on."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Images: a data set id on the Hub, or a local folder that `load_dataset` reads (parquet)."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_data_dir: str | None = field(default=None, metadata={"help": "Images: a local folder of image files."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the images as a stream, for a data set that does not fit on the disk."}
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={"help": "With --streaming: images, not decoded, that each loading process holds to draw from (>= 1)."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column that holds the images (default: the first column of type Image)."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of class labels, for conditional models (default: the first ClassLabel)."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Checked against the model's sample_size, in pixels: images are scaled to that."}
    )
    center_crop: bool = field(
        default=False, metadata={"help": "Crop non-square images at the centre instead of at random places."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Flip half of the images left to right."})
    validation_images: int = field(
        default=256,
        metadata={"help": "Held-out images for the step loss (>= 1): of the validation or test split, else of train."},
    )
    max_broken_images: int = field(
        default=100,
        metadata={
            "help": "Images that cannot be read, or are smaller than the model's, are replaced by others and counted; more "
            "than this are an error (0: the first one is)."
        },
    )
    dataloader_num_workers: int = field(
        default=0,
        metadata={
            "help": "Processes that load images, for each training process (0: load in that). With --streaming they share "
            "out its shards, and another number gives other batches."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded data sets are kept."})

    def __post_init__(self) -> None:
        for name in ("shuffle_buffer_size", "validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_broken_images", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution={self.resolution} must be at least 1 pixel")


def load_images(args: DataArguments, unet_config) -> tuple[ImageRows | ImageStream, tuple[Tensor, Tensor | None]]:
    """Training and held-out images for a model.

    Args:
        args: Where the images are and how they are cropped.
        unet_config: Configuration of the model: size, channels (1: greyscale, 3: RGB), and whether it is class conditional.

    Returns:
        The training images, and the held-out ones (centre crop, no flip) in memory: pixel values, float32 with shape
        `(n, channels, height, width)` in [-1, 1], and class labels, int64 with shape `(n,)`, or None. Held-out images are
        the first ones of the validation or test split. Without these they are taken from the training images, which are
        then without them: at random from a data set on the disk, the first ones of a stream.

    Raises:
        ValueError: No such data or column, images that do not fit the model, too few of them, too many broken ones.
    """
    _check_model(args, unet_config)
    _check_source(args)
    source = f"dataset_name={args.dataset_name}" if args.dataset_name else f"train_data_dir={args.train_data_dir}"
    with _one_line(source):
        splits = _load_splits(args)
    train_name = "train" if "train" in splits else next(iter(splits))
    held_out_name = next((name for name in ("validation", "test") if name in splits and name != train_name), None)
    train_rows = splits[train_name]
    if train_rows.features is None:
        raise ValueError(f"{source} does not tell its columns before it is read: load it without streaming")
    if not args.streaming and len(train_rows) == 0:
        raise ValueError(f"{source} has no training images")
    image_column = _column(train_rows, args.image_column, datasets.Image, "image_column")
    if image_column is None:
        raise ValueError(f"{source} has no column of images, only {train_rows.column_names}; name it with image_column")
    label_column = None
    if unet_config.num_class_embeds is not None:
        label_column = _column(train_rows, args.label_column, datasets.ClassLabel, "label_column")
        if label_column is None:
            raise ValueError(f"the model is class conditional, but {train_rows.column_names} holds no class labels")

    feature = train_rows.features[image_column]
    decoder = ImageDecoder(image_column, feature, unet_config, center_crop=args.center_crop, random_flip=args.random_flip)
    columns = [image_column, label_column] if label_column else [image_column]
    with _one_line(source):
        rows, held_out_rows = (
            None if name is None else _not_decoded(splits[name], columns, feature) for name in (train_name, held_out_name)
        )
    make_sources = _stream_sources if args.streaming else _row_sources
    train, held_out = make_sources(args, source, rows, held_out_rows, decoder, label_column)
    _check_first(train, args.max_broken_images)
    return train, _decode_all(held_out, decoder, args.max_broken_images)


def _row_sources(
    args: DataArguments, source: str, rows, held_out_rows, decoder: ImageDecoder, label_column: str | None
) -> tuple[ImageRows, Iterable[EncodedImage]]:
    count = args.validation_images
    if held_out_rows is not None:
        held_out = np.arange(min(count, len(held_out_rows)))
        train = ImageRows(rows, decoder, label_column, np.arange(len(rows)))
        return train, ImageRows(held_out_rows, decoder, label_column, held_out).in_order()
    if len(rows) < 2 * count:
        raise ValueError(f"{source} has {len(rows)} images, too few to hold out validation_images={count}")
    order = np.random.default_rng(0).permutation(len(rows))
    held_out = ImageRows(rows, decoder, label_column, order[:count])
    return ImageRows(rows, decoder, label_column, order[count:]), held_out.in_order()


def _stream_sources(
    args: DataArguments, source: str, rows, held_out_rows, decoder: ImageDecoder, label_column: str | None
) -> tuple[ImageStream, Iterable[EncodedImage]]:
    count, common = args.validation_images, (decoder, label_column, args.shuffle_buffer_size)
    with _one_line(source):
        train = ImageStream(rows, *common, num_held_out=0 if held_out_rows is not None else count)
        other = train if held_out_rows is None else ImageStream(held_out_rows, *common, num_held_out=count)
    if not train.spares:
        if not train.held_out:
            raise ValueError(f"{source} has no training images")
        raise ValueError(f"{source} has {len(train.held_out)} images, too few to hold out validation_images={count}")
    held_out, other.held_out = other.held_out, []  # loading processes need no copy
    return train, held_out


def _check_first(images: ImageRows | ImageStream, max_broken_images: int) -> None:
    """An early word on images or labels that do not fit the model, from the first image that can be read."""
    broken = BrokenImages(max_broken_images)
    for image in islice(images.spares if isinstance(images, ImageStream) else images.in_order(), 10):
        try:
            picture = images.decoder.open(image)
        except BrokenImage as error:
            broken.add([image.name])
            reason = error
            continue
        images.decoder(image)
        if images.decoder.channels == 3 and picture.mode in GREYSCALE_MODES:
            logger.warning("images have mode %s: they are converted to RGB, which the model takes", picture.mode)
        return
    raise ValueError(f"none of the first {len(broken)} images can be read, the last one: {reason}")


def _decode_all(images: Iterable[EncodedImage], decoder: ImageDecoder, max_broken_images: int) -> tuple[Tensor, Tensor | None]:
    """Pixel values and class labels of all images that can be read."""
    pixels, labels, broken = [], [], BrokenImages(max_broken_images)
    for image in images:
        try:
            pixels.append(decoder(image))
            labels.append(image.label)
        except BrokenImage as error:
            broken.add([image.name])
            reason = error
    if not pixels:
        raise ValueError(f"there are no held-out images that can be read ({len(broken)} are broken)")
    if broken:
        logger.warning("%d held-out images are left out, the last one: %s", len(broken), reason)
    return torch.stack(pixels), None if labels[0] is None else torch.tensor(labels)


def _check_model(args: DataArguments, unet_config) -> None:
    size, channels = sample_size(unet_config), unet_config.in_channels
    if args.resolution is not None and size != (args.resolution, args.resolution):
        raise ValueError(f"resolution={args.resolution} but the model was built for sample_size={size[0]}x{size[1]}")
    if channels not in (1, 3):
        raise ValueError(f"in_channels={channels} of the model: images have 1 (greyscale) or 3 (RGB) channels")
    if unet_config.class_embed_type is not None:
        raise ValueError(f"class_embed_type={unet_config.class_embed_type}: this script knows class labels only")


def _check_source(args: DataArguments) -> None:
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError(
            f"give the images either as dataset_name or as train_data_dir, not both or none "
            f"(dataset_name={args.dataset_name}, train_data_dir={args.train_data_dir})"
        )
    if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
        raise ValueError(f"train_data_dir={args.train_data_dir} is not a folder")
    if args.dataset_name is not None and args.dataset_name.startswith((".", "/")) and not Path(args.dataset_name).is_dir():
        raise ValueError(f"dataset_name={args.dataset_name} is not a folder")


def _load_splits(args: DataArguments) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    options = {"cache_dir": args.cache_dir, "streaming": args.streaming}
    if args.train_data_dir is not None:
        return datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, **options)
    return datasets.load_dataset(args.dataset_name, args.dataset_config_name, **options)


def _not_decoded(rows, columns: list[str], feature: datasets.Image):
    """Some columns of a split, the first of which are images that stay as they are."""
    if isinstance(rows, datasets.IterableDataset):  # which may have been set up to decode in threads
        return rows.decode(False).select_columns(columns)
    return rows.select_columns(columns).cast_column(columns[0], datasets.Image(mode=feature.mode, decode=False))


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Whatever `datasets` raises, as one line."""
    try:
        yield
    except LOAD_ERRORS as error:
        raise ValueError(f"{source} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _column(rows, wanted: str | None, kind: type, argument: str) -> str | None:
    if wanted is not None:
        if wanted not in rows.column_names:
            raise ValueError(f"{argument}={wanted} is not a column of the data set, which has {rows.column_names}")
        if kind is datasets.Image and not isinstance(rows.features[wanted], datasets.Image):
            raise ValueError(f"{argument}={wanted} holds no images")
        return wanted
    return next((name for name, feature in rows.features.items() if isinstance(feature, kind)), None)
