"""Images for training: anything `datasets.load_dataset` takes, cropped, scaled to [-1, 1] and batched.

Both scripts read their images here, so that a pruned model sees what its dense parent saw. The channels come from the
model (1: greyscale, 3: RGB), the resolution from the model's `sample_size`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

__all__ = ["DataArguments", "ImageFolderDataset", "endless_batches", "load_images", "stack_rows", "train_dataloader"]

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
        default=None, metadata={"help": "Side of the training images in pixels (default: the model's sample_size)."}
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


class ImageFolderDataset(Dataset):
    """Rows of a `datasets.Dataset` as training tensors.

    An item is a dictionary with `pixel_values`, float32 with shape `(channels, height, width)` in [-1, 1], and, where
    `label_column` is given, `class_labels`, an int64 scalar.
    """

    def __init__(self, rows: datasets.Dataset, image_column: str, label_column: str | None, mode: str, transform) -> None:
        self.rows = rows
        self.image_column = image_column
        self.label_column = label_column
        self.mode = mode
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        item = {"pixel_values": self.transform(row[self.image_column].convert(self.mode))}
        if self.label_column is not None:
            item["class_labels"] = torch.tensor(row[self.label_column])
        return item


def _size(sample_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def _load_splits(args: DataArguments) -> datasets.DatasetDict:
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError(
            f"give the images either as dataset_name or as train_data_dir, not both or none "
            f"(dataset_name={args.dataset_name}, train_data_dir={args.train_data_dir})"
        )
    if args.train_data_dir is not None:
        if not Path(args.train_data_dir).is_dir():
            raise ValueError(f"train_data_dir={args.train_data_dir} is not a folder")
        return datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, cache_dir=args.cache_dir)
    if args.dataset_name.startswith((".", "/")) and not Path(args.dataset_name).is_dir():
        raise ValueError(f"dataset_name={args.dataset_name} is not a folder")
    return datasets.load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)


def _column(rows: datasets.Dataset, wanted: str | None, kind: type, argument: str) -> str | None:
    if wanted is not None:
        if wanted not in rows.column_names:
            raise ValueError(f"{argument}={wanted} is not a column of the data set, which has {rows.column_names}")
        return wanted
    return next((name for name, feature in rows.features.items() if isinstance(feature, kind)), None)


def load_images(
    args: DataArguments, sample_size: int | tuple[int, int], channels: int, class_conditional: bool = False
) -> tuple[ImageFolderDataset, ImageFolderDataset]:
    """Training and held-out images for a model.

    Args:
        args: Where the images are and how they are cropped.
        sample_size: Height and width that the model was built for, in pixels.
        channels: `in_channels` of the model: 1 (greyscale) or 3 (RGB).
        class_conditional: Whether items carry `class_labels`.

    Returns:
        The training set (random crop and flip as asked) and the held-out set (centre crop, no flip).

    Raises:
        ValueError: No such data or column, images that do not fit the model, or too few of them.
    """
    size = _size(sample_size)
    if args.resolution is not None and size != (args.resolution, args.resolution):
        raise ValueError(f"resolution={args.resolution} but the model was built for sample_size={size[0]}x{size[1]}")
    if channels not in PIL_MODES:
        raise ValueError(f"in_channels={channels} of the model: images have 1 (greyscale) or 3 (RGB) channels")

    try:
        splits = _load_splits(args)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        source = args.dataset_name or args.train_data_dir
        raise ValueError(f"no images could be loaded from {source}: {str(error).splitlines()[0]}") from error
    train_name = "train" if "train" in splits else next(iter(splits))
    train_rows = splits[train_name]
    image_column = _column(train_rows, args.image_column, datasets.Image, "image_column")
    if image_column is None:
        raise ValueError(f"the data set has no column of images, only {train_rows.column_names}; name it with image_column")
    label_column = None
    if class_conditional:
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
                f"the data set has {len(train_rows)} images, too few to hold out validation_images={args.validation_images}"
            )
        shuffled = train_rows.shuffle(seed=0)
        held_out_rows = shuffled.select(range(args.validation_images))
        train_rows = shuffled.select(range(args.validation_images, len(shuffled)))

    image = train_rows[0][image_column]
    if min(image.size[0] / size[1], image.size[1] / size[0]) < 1:
        raise ValueError(
            f"images of {image.size[1]}x{image.size[0]} pixels are smaller than the model's "
            f"sample_size={size[0]}x{size[1]}: use the images it was trained on, or larger ones"
        )
    if channels == 1 and image.mode not in ("L", "1", "I;16", "LA"):
        raise ValueError(f"images have mode {image.mode} but the model takes in_channels=1 (greyscale)")

    mode = PIL_MODES[channels]
    to_tensor = [transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    # The shorter side is scaled to the sample, as in Diffusers' train_unconditional.py.
    resize = [] if image.size == (size[1], size[0]) else [_CoverResize(size)]
    crop = transforms.CenterCrop(size) if args.center_crop else transforms.RandomCrop(size)
    flip = [transforms.RandomHorizontalFlip()] if args.random_flip else []
    train_transform = transforms.Compose([*resize, crop, *flip, *to_tensor])
    held_out_transform = transforms.Compose([*resize, transforms.CenterCrop(size), *to_tensor])
    return (
        ImageFolderDataset(train_rows, image_column, label_column, mode, train_transform),
        ImageFolderDataset(held_out_rows, image_column, label_column, mode, held_out_transform),
    )


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
