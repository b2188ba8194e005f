"""Images for training: anything `datasets.load_dataset` takes, cropped, scaled to [-1, 1] and batched.

Both scripts read their images here, so that a pruned model sees what its dense parent saw. The channels come from the
model (1: greyscale, 3: RGB), the resolution from the model's `sample_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

__all__ = ["DataArguments", "ImageRows", "endless_batches", "load_images", "stack_rows", "train_dataloader"]

PIL_MODES = {1: "L", 3: "RGB"}


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
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that load images (0: load in the training process)."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded data sets are kept."})

    def __post_init__(self) -> None:
        if self.validation_images < 1:
            raise ValueError(f"validation_images={self.validation_images} must be at least 1")
        if self.dataloader_num_workers < 0:
            raise ValueError(f"dataloader_num_workers={self.dataloader_num_workers} must not be negative")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution={self.resolution} must be at least 1 pixel")


class ImageRows(Dataset):
    """Rows of a `datasets.Dataset` as training tensors.

    An item is a dictionary with `pixel_values`, float32 with shape `(channels, height, width)` in [-1, 1], and, where
    `label_column` is given, `class_labels`, an int64 scalar. An image that cannot be read, or is smaller than the model's,
    is a `ValueError` that says which.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        label_column: str | None,
        unet_config,
        augmentation: Sequence[Callable] = (),
    ) -> None:
        self.rows = rows
        self.image_column, self.label_column = image_column, label_column
        self.unet_config = unet_config
        self.size = _size(unet_config.sample_size)
        steps = augmentation or [transforms.CenterCrop(self.size)]
        self.transform = transforms.Compose(
            [_CoverResize(self.size), *steps, transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        try:
            row = self.rows[index]
            image = row[self.image_column]
            if image is None:
                raise ValueError("there is none")
            if image.size[1] < self.size[0] or image.size[0] < self.size[1]:
                raise ValueError(
                    f"{image.size[1]}x{image.size[0]} pixels are smaller than the model's "
                    f"sample_size={self.size[0]}x{self.size[1]}"
                )
            item = {"pixel_values": self.transform(image.convert(PIL_MODES[self.unet_config.in_channels]))}
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"image {index} of column {self.image_column}: {error}") from error
        if self.label_column is not None:
            label, classes = row[self.label_column], self.unet_config.num_class_embeds
            if not isinstance(label, int) or not 0 <= label < classes:
                raise ValueError(f"label {label} of image {index} is none of the model's num_class_embeds={classes}")
            item["class_labels"] = torch.tensor(label)
        return item

    def without_augmentation(self) -> ImageRows:
        """The same rows, cropped at the centre."""
        return ImageRows(self.rows, self.image_column, self.label_column, self.unet_config)


def _size(sample_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


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


def _load_splits(args: DataArguments) -> datasets.DatasetDict:
    if args.train_data_dir is not None:
        return datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, cache_dir=args.cache_dir)
    return datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)


def _column(rows: datasets.Dataset, wanted: str | None, kind: type, argument: str) -> str | None:
    if wanted is not None:
        if wanted not in rows.column_names:
            raise ValueError(f"{argument}={wanted} is not a column of the data set, which has {rows.column_names}")
        if kind is datasets.Image and not isinstance(rows.features[wanted], datasets.Image):
            raise ValueError(f"{argument}={wanted} holds no images")
        return wanted
    return next((name for name, feature in rows.features.items() if isinstance(feature, kind)), None)


def load_images(args: DataArguments, unet_config) -> tuple[ImageRows, ImageRows]:
    """Training and held-out images for a model.

    Args:
        args: Where the images are and how they are cropped.
        unet_config: Configuration of the model: size, channels (1: greyscale, 3: RGB), and whether it is class conditional.

    Returns:
        The training set (random crop and flip as asked) and the held-out set (centre crop, no flip).

    Raises:
        ValueError: No such data or column, images that do not fit the model, or too few of them.
    """
    size, channels = _size(unet_config.sample_size), unet_config.in_channels
    if args.resolution is not None and size != (args.resolution, args.resolution):
        raise ValueError(f"resolution={args.resolution} but the model was built for sample_size={size[0]}x{size[1]}")
    if channels not in PIL_MODES:
        raise ValueError(f"in_channels={channels} of the model: images have 1 (greyscale) or 3 (RGB) channels")
    if unet_config.class_embed_type is not None:
        raise ValueError(f"class_embed_type={unet_config.class_embed_type}: this script knows class labels only")

    source = f"dataset_name={args.dataset_name}" if args.dataset_name else f"train_data_dir={args.train_data_dir}"
    _check_source(args)
    try:
        splits = _load_splits(args)
    except (OSError, ValueError, LookupError, TypeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(f"{source} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    train_name = "train" if "train" in splits else next(iter(splits))
    train_rows = splits[train_name]
    if len(train_rows) == 0:
        raise ValueError(f"{source} has no training images")
    image_column = _column(train_rows, args.image_column, datasets.Image, "image_column")
    if image_column is None:
        raise ValueError(f"{source} has no column of images, only {train_rows.column_names}; name it with image_column")
    label_column = None
    if unet_config.num_class_embeds is not None:
        label_column = _column(train_rows, args.label_column, datasets.ClassLabel, "label_column")
        if label_column is None:
            raise ValueError(f"the model is class conditional, but {train_rows.column_names} holds no class labels")

    held_out_name = next((name for name in ("validation", "test") if name in splits and name != train_name), None)
    if held_out_name is not None:
        held_out_rows = splits[held_out_name]
        held_out_rows = held_out_rows.select(range(min(args.validation_images, len(held_out_rows))))
    else:
        if len(train_rows) < 2 * args.validation_images:
            raise ValueError(
                f"{source} has {len(train_rows)} images, too few to hold out validation_images={args.validation_images}"
            )
        shuffled = train_rows.shuffle(seed=0)
        held_out_rows = shuffled.select(range(args.validation_images))
        train_rows = shuffled.select(range(args.validation_images, len(shuffled)))

    crop = transforms.CenterCrop(size) if args.center_crop else transforms.RandomCrop(size)
    augmentation = [crop, transforms.RandomHorizontalFlip()] if args.random_flip else [crop]
    train = ImageRows(train_rows, image_column, label_column, unet_config, augmentation)
    held_out = ImageRows(held_out_rows, image_column, label_column, unet_config)
    _ = train.without_augmentation()[0]  # an early word on images or labels that do not fit
    mode = train_rows[0][image_column].mode
    if channels == 1 and mode not in ("L", "1", "LA"):
        raise ValueError(f"images have mode {mode} but the model takes in_channels=1 (greyscale)")
    return train, held_out


class _CoverResize:
    """Scale a PIL image so that it just covers `size` (height, width), keeping its aspect ratio."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image):
        scale = max(self.size[0] / image.size[1], self.size[1] / image.size[0])
        target = [max(self.size[0], round(image.size[1] * scale)), max(self.size[1], round(image.size[0] * scale))]
        return transforms.functional.resize(image, target, interpolation=InterpolationMode.BILINEAR)


def train_dataloader(dataset: Dataset, batch_size: int, num_workers: int, seed: int) -> DataLoader:
    """Shuffled full batches, in an order that `seed` alone decides."""
    if len(dataset) < batch_size:
        raise ValueError(f"train_batch_size={batch_size} is larger than the {len(dataset)} training images")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=num_workers, generator=generator)


def endless_batches(dataloader: DataLoader):
    """Batches of one epoch after another, for ever."""
    while True:
        yield from dataloader


def stack_rows(rows: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images of some items with shape `(n, channels, height, width)`, and their labels with shape `(n,)`, if any."""
    labels = torch.stack([row["class_labels"] for row in rows]) if "class_labels" in rows[0] else None
    return torch.stack([row["pixel_values"] for row in rows]), labels
