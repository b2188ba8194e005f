"""Loading of training and held-out images, and checks that they fit the model.

All scripts load their images here, so a pruned model is trained on the same images as its dense parent. Images can be
anything that `datasets.load_dataset` reads, from disk or as a stream. Channels (1: greyscale, 3: RGB) and resolution are those
of the model, or of its VAE. `folders` reads local folders, `splits` chooses splits, `decoding` decodes images, `latents` and
`encoding` make latents of them, `captions` finds captions, and `batches` makes batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch

from ..argument_fields import FRACTION, NOT_NEGATIVE, argument, at_least, check_fields, expand_home
from ..diffusion.class_labels import check_labels, label_dropout_of
from ..metrics.cache import default_cache_dir
from ..model_spec import ModelSpec
from .captions import CAPTION_DROPOUT
from .columns import Columns, find_columns, load_errors, usable_split
from .decoding import BrokenImage, BrokenImages, EncodedImage, ImageDecoder, adapt_decoder
from .folders import load_folder
from .latents import make_latents
from .sources import HeldOut, ImageRows, ImageSource, ImageStream
from .splits import DataSummary, held_out_candidates, train_split

__all__ = ["DataArguments", "check_drawn", "check_source", "load_images"]

logger = logging.getLogger(__name__)

# Arguments that say nothing about images which a model draws
OF_DATA_SETS = (
    *("dataset_config_name", "train_split_name", "validation_split_name", "streaming"),
    *("image_column", "label_column", "caption_column", "center_crop"),
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
        "Local folder of image files. All except hidden files are used, with any names. Only sub-folders train/ with "
        "validation/ or test/ define splits; every image must then lie in one of them.",
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
        "than the data set has classes; a diffusion transformer has its own).",
    )
    label_dropout: float | None = argument(
        None,
        "Share of the labels replaced by the null label in training and scoring, in [0, 1) (default: 0.1 if there is a null "
        "label).",
    )
    resolution: int | None = argument(
        None, "Expected sample_size of the model in pixels (>= 1), only checked: images are resized to the model's."
    )
    caption_column: str | None = argument(
        None,
        "Column of captions, for text-conditional models: a text, or a list of texts, of which a random one is used (default: "
        "a column named caption, text or prompt, else the only column of texts).",
    )
    caption_dropout: float | None = argument(
        None,
        "Share of the captions replaced by the empty prompt in training and scoring, for classifier-free guidance, in [0, 1) "
        "(default: 0.1 for text-conditional models).",
    )
    center_crop: bool = argument(
        False,
        "Crop non-square images at the centre instead of at random places. Images of latent models are always cropped at the "
        "centre, since they are encoded only once.",
    )
    random_flip: bool = argument(False, "Flip half of the images left to right; latent models encode both versions.")
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
        "Number of processes that load images for each training process (0: load in the training process), and of threads "
        "that read images while they are encoded. With --streaming processes divide the shards, so batches depend on it.",
    )
    cache_dir: str | None = argument(None, "Folder for downloaded data sets.")
    encoding_cache_dir: str | None = argument(
        None,
        "Folder for encoded images and captions of latent models. Encoding that was stopped resumes from it, and later runs "
        "on the same data reuse it (default: next to the Hub's cache).",
    )

    def __post_init__(self) -> None:
        check_fields(self, at_least(1), "shuffle_buffer_size", "validation_images")
        check_fields(self, NOT_NEGATIVE, "max_broken_images", "dataloader_num_workers")
        check_fields(self, FRACTION, "label_dropout", "caption_dropout")
        expand_home(self, "train_data_dir", "cache_dir", "encoding_cache_dir")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution={self.resolution} must be at least 1 pixel")


def load_images(args: DataArguments, spec: ModelSpec) -> tuple[ImageSource, HeldOut]:
    """Training and held-out images for a model.

    Images and captions of a latent model are only found here. The method `prepare` of the training images encodes them, which
    may take hours; held-out images can be used after it.

    Args:
        args: Source and preprocessing of the images.
        spec: Images and conditioning that the model takes.

    Returns:
        The training images, with a `summary` for the plan, and the held-out images (centre crop, no flip), with class labels
        or captions if the model takes them. Held-out images are the first ones of the requested split, or of the validation
        or test split. If there is none, they are removed from the training images: at random from a data set on disk, the
        first ones of a stream. A split without the labels or captions that the model needs, such as the test splits of many
        data sets, is skipped with a warning.

        If all images are smaller than the model's size, they are enlarged with a warning (see `adapt_decoder`).

    Raises:
        ValueError: Data, split or column do not exist, images do not fit the model, or there are too few or too many broken
            images.
    """
    _check_model(args, spec)
    check_source(args)
    source = f"dataset_name={args.dataset_name}" if args.dataset_name else f"train_data_dir={args.train_data_dir}"
    with load_errors(source):
        splits = _load_splits(args)
    train_name = train_split(splits, args.train_split_name, source)
    candidates = held_out_candidates(splits, args.validation_split_name, train_name, source)
    train_rows = splits[train_name]
    if train_rows.features is None:
        raise ValueError(f"{source} has unknown columns until it is read: load it without streaming")
    if not args.streaming and len(train_rows) == 0:
        raise ValueError(f"{source} has no training images")
    requested = Columns(args.image_column, args.label_column, args.caption_column)
    columns = find_columns(train_rows, requested, source, spec)
    feature = train_rows.features[columns.image]
    # Unknown if labels are plain numbers
    num_classes = getattr(train_rows.features.get(columns.label), "num_classes", None)
    decoder = ImageDecoder(
        columns.image,
        feature,
        spec,
        label_column=columns.label,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        label_dropout=label_dropout_of(spec.labels, args.null_label, args.label_dropout, num_classes),
    )
    held_out_name = usable_split(splits, candidates, columns, args.validation_images, source, train_name)
    with load_errors(source):
        rows = _not_decoded(train_rows, columns, feature)
        held_out_rows = None if held_out_name == train_name else _not_decoded(splits[held_out_name], columns, feature)
    make_sources = _stream_sources if args.streaming else _row_sources
    train, held_out, first = make_sources(args, source, rows, held_out_rows, decoder)
    if decoder.null_label is not None and isinstance(train, ImageRows):  # labels of a stream are checked as they are read
        with _in_split(train_name):
            check_labels(train.rows.unique(columns.label), decoder.null_label, f"column {columns.label}")
    with _in_split(train_name):
        adapt_decoder(decoder, first, args.max_broken_images)
    if spec.codec is not None:
        dropout = CAPTION_DROPOUT if args.caption_dropout is None else args.caption_dropout
        train, kept = make_latents(
            train,
            held_out,
            spec,
            columns.caption,
            caption_dropout=dropout,
            folder=default_cache_dir() / "encoded" if args.encoding_cache_dir is None else Path(args.encoding_cache_dir),
            max_broken_images=args.max_broken_images,
            num_threads=max(1, args.dataloader_num_workers),
        )
    else:
        with _in_split(held_out_name):
            kept = _decode_all(held_out, decoder, args.max_broken_images)
    train.summary = DataSummary(
        source=source + (" (a stream)" if args.streaming else ""),
        splits={name: None if args.streaming else len(split) for name, split in splits.items()},
        train=train_name,
        held_out=held_out_name,
        num_train=train.num_images,
        num_held_out=len(kept),
        enlarged=decoder.enlarge,
        label_dropout=decoder.label_dropout,
        notes=train.notes(),
    )
    return train, kept


@contextmanager
def _in_split(name: str) -> Iterator[None]:
    """Add the name of the split to errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"split {name}: {error}") from error


def _row_sources(
    args: DataArguments, source: str, rows, held_out_rows, decoder: ImageDecoder
) -> tuple[ImageRows, ImageRows, Iterable[EncodedImage]]:
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
    return train, ImageRows(held_out_rows, decoder, held_out), ImageRows(rows, decoder, spread).in_order()


def _stream_sources(
    args: DataArguments, source: str, rows, held_out_rows, decoder: ImageDecoder
) -> tuple[ImageStream, Iterable[EncodedImage], Iterable[EncodedImage]]:
    """As `_row_sources`; the images to check are the first ones."""
    count, common = args.validation_images, (decoder, args.shuffle_buffer_size)
    with load_errors(source):
        train = ImageStream(rows, *common, num_held_out=0 if held_out_rows is not None else count)
        other = train if held_out_rows is None else ImageStream(held_out_rows, *common, num_held_out=count)
    if not train.spares:
        if not train.held_out:
            raise ValueError(f"{source} has no training images")
        raise ValueError(f"{source} has {len(train.held_out)} images, too few to hold out validation_images={count}")
    first = [*train.held_out, *train.spares][: ImageStream.num_spares]
    held_out, other.held_out = other.held_out, []  # loading processes need no copy
    return train, held_out, first


def _decode_all(images: ImageRows | Sequence[EncodedImage], decoder: ImageDecoder, max_broken_images: int) -> HeldOut:
    """Pixel values and class labels of the images that fit the model."""
    pixels, labels, broken, reason = [], [], BrokenImages(max_broken_images), None
    for image in images.in_order() if isinstance(images, ImageRows) else images:
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
    return HeldOut(torch.stack(pixels), {} if labels[0] is None else {"class_labels": torch.tensor(labels)})


def _check_model(args: DataArguments, spec: ModelSpec) -> None:
    if args.resolution is not None and spec.size != (args.resolution, args.resolution):
        size = f"{spec.size[0]}x{spec.size[1]}"
        built = f"was built for sample_size={size}" if spec.codec is None else f"makes images of {size} pixels with its VAE"
        raise ValueError(f"resolution={args.resolution} but the model {built}")
    if args.streaming and spec.codec is not None:
        raise ValueError("streaming=True must be False for a latent model, whose images are encoded once, before training")
    if spec.prompts is None:
        for name in ("caption_column", "caption_dropout"):
            if (value := getattr(args, name)) not in (None, 0):
                raise ValueError(f"{name}={value} needs a text-conditional model")
    if args.label_column is not None and spec.labels is None and spec.vector_size is None:
        raise ValueError(f"label_column={args.label_column} needs a class-conditional model")


def check_drawn(args: DataArguments, spec: ModelSpec) -> None:
    """Check the data arguments of a run whose images are drawn by the model, without a data set.

    Raises:
        ValueError: An argument is about a data set, or does not fit the model.
    """
    for name in OF_DATA_SETS:
        if (value := getattr(args, name)) not in (None, False):
            raise ValueError(f"{name}={value} needs a data set: give dataset_name or train_data_dir")
    _check_model(args, spec)


def check_source(args: DataArguments) -> None:
    """Check that the arguments name one data set.

    Raises:
        ValueError: They name none or two, or one that is not a folder.
    """
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


def _not_decoded(rows, used: Columns, feature: datasets.Image):
    """The used columns of a split; images are not decoded."""
    columns = used.names()
    if isinstance(rows, datasets.IterableDataset):  # it may have been set to decode in threads
        return rows.decode(False).select_columns(columns)
    return rows.select_columns(columns).cast_column(used.image, datasets.Image(mode=feature.mode, decode=False))
