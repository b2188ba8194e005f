"""Helpers for tests of training images: numbered images, which can be distinguished after decoding, in files of all kinds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_gfprune.data.images import DataArguments, load_images
from diffusers_gfprune.diffusion.class_labels import ClassLabels
from diffusers_gfprune.model_spec import ModelSpec


def random_images(count: int, channels: int = 1, side: int = 8, seed: int = 0) -> Tensor:
    """Images in [0, 1] with shape `(count, channels, side, side)`."""
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def model_spec(size: int | tuple[int, int] = 8, channels: int = 1, classes: int | None = None) -> ModelSpec:
    """What the images need to know of a model; one number means a square, two are height and width."""
    size = (size, size) if isinstance(size, int) else size
    return ModelSpec(size, channels, None if classes is None else ClassLabels(classes))


def encode(pixels: np.ndarray | Image.Image, form: str = "png") -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, form)
    return buffer.getvalue()


def numbered(number: int) -> bytes:
    """A greyscale image of 8x8 pixels, all of which are `number`, as a file."""
    return encode(np.full((8, 8), number, dtype=np.uint8))


def numbers_of(pixel_values: Tensor) -> list[int]:
    """Numbers of a batch of numbered images."""
    return ((pixel_values[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def write_parquet(folder: Path, shards: Sequence[Sequence[bytes | None]], split: str = "train", classes: int = 4) -> Path:
    """A data set of parquet files, with labels that count up to `classes` again and again."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=classes))
    for shard, images in enumerate(shards):
        columns = {
            "image": [None if image is None else {"bytes": image, "path": None} for image in images],
            "label": [number % classes for number in range(len(images))],
        }
        path = folder / f"{split}-{shard:05d}-of-{len(shards):05d}.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return folder


def write_folder(folder: Path, images: Sequence[bytes]) -> Path:
    """A folder of image files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        (folder / f"{number:03d}.png").write_bytes(image)
    return folder


def load(folder: Path, spec: ModelSpec | None = None, **arguments):
    """`load_images`, of parquet files or image files: training images, and held-out images with their labels."""
    files = "train_data_dir" if any(path.suffix == ".png" for path in folder.rglob("*")) else "dataset_name"
    arguments = {"validation_images": 2, "cache_dir": str(folder.parent / "cache"), files: str(folder), **arguments}
    train, held_out = load_images(DataArguments(**arguments), spec or model_spec())
    return train, (held_out.samples, held_out.conditioning.get("class_labels"))
