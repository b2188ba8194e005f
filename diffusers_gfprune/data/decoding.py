"""Decoding of images into training tensors, and handling of unreadable images.

Images are decoded here one by one, because with `datasets` one broken file ends a stream or a loading process. Preprocessing
is that of Diffusers' `train_unconditional.py`: images are resized to just cover the model's size (bilinear), cropped at random
or at the centre, optionally flipped left to right, and scaled to [-1, 1]. Modes are those of
`diffusers_gfprune.diffusion.pixel_values`. Images smaller than the model's size do not fit, unless the whole data set is small
(`adapt_decoder`); then they are enlarged, as in that script.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from huggingface_hub.errors import HTTPError
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from ..diffusion.class_labels import LabelDropout
from ..diffusion.pixel_values import is_deep, is_greyscale, pixel_values, unused_range, with_channels
from ..errors import one_line
from ..model_spec import ModelSpec

__all__ = [
    *("BrokenImage", "BrokenImages", "EncodedImage", "ImageDecoder", "NETWORK_ERRORS"),
    *("adapt_decoder", "content_digest"),
]

logger = logging.getLogger(__name__)

# Errors of the Hub's client after its own retries
NETWORK_ERRORS = (ConnectionError, TimeoutError, HTTPError)


class BrokenImage(ValueError):
    """An image cannot be read, or does not fit the model."""


class BrokenImages:
    """Broken images of a run, each counted once.

    Args:
        limit: Maximum number of broken images.
        names: Images counted before, as returned by `to_list`.

    Raises:
        ValueError: There are more `names` than the limit.
    """

    def __init__(self, limit: int, names: Iterable[str] = ()) -> None:
        self.limit = limit
        self._names: dict[str, None] = {}  # a set in order of arrival
        self.add(names)

    def __len__(self) -> int:
        return len(self._names)

    def add(self, names: Iterable[str]) -> list[str]:
        """Count images.

        Args:
            names: Path or row of each image.

        Returns:
            Names that were not counted before.

        Raises:
            ValueError: The limit is exceeded.
        """
        new = [name for name in dict.fromkeys(names) if name not in self._names]
        self._names.update(dict.fromkeys(new))
        if len(self) > self.limit:
            first = ", ".join(list(self._names)[:3])
            raise ValueError(
                f"max_broken_images={self.limit} is exceeded: {len(self)} images cannot be read or do not fit the model: "
                f"{first}{', ...' if len(self) > 3 else ''}"
            )
        return new

    def to_list(self) -> list[str]:
        """Names in the order in which they were added."""
        return list(self._names)


class EncodedImage(NamedTuple):
    """A row of a data set, not decoded yet.

    Attributes:
        encoded: Bytes and path, one of which may be None; None if the row has no image.
        label: Class label, or conditioning vector as a list of numbers; None unless the model takes one.
        position: Row number; for a stream, shard number and row number in the shard.
    """

    encoded: dict | None
    label: int | list[float] | None
    position: tuple[int, ...]

    @property
    def is_path(self) -> bool:
        """Whether this is only the path of the image file."""
        return self.encoded is not None and self.encoded["bytes"] is None and self.encoded["path"] is not None

    @property
    def name(self) -> str:
        """Name of the image in messages: its file if it has one, else its row."""
        if self.is_path:
            return self.encoded["path"]
        row = f"row {self.position[-1]}"
        return row if len(self.position) == 1 else f"{row} of shard {self.position[0]}"


class ImageDecoder:
    """Decodes images for a model.

    Args:
        column: Name of the image column, for messages.
        feature: Type of the column.
        spec: Size and channels of the model's images, and its labels.
        label_column: Name of the column of class labels or vectors; None if the model takes none.
        center_crop: Crop at the centre, not at random.
        random_flip: Flip half of the images left to right.
        label_dropout: Rule for dropping labels; None: the model has no null label.

    Attributes:
        enlarge: Whether to enlarge images that are smaller than the model's size. Otherwise they do not fit the model.
    """

    def __init__(
        self,
        column: str,
        feature: datasets.Image,
        spec: ModelSpec,
        *,
        label_column: str | None = None,
        center_crop: bool = False,
        random_flip: bool = False,
        label_dropout: LabelDropout | None = None,
    ) -> None:
        self.column, self.label_column = column, label_column
        self.feature, self.mode = datasets.Image(), feature.mode
        self.size, self.channels, self.labels, self.vector_size = spec.size, spec.channels, spec.labels, spec.vector_size
        self.center_crop, self.random_flip, self.label_dropout = center_crop, random_flip, label_dropout
        self.enlarge = False

    @property
    def null_label(self) -> int | None:
        """The null label, if the model has one."""
        return None if self.label_dropout is None else self.label_dropout.null_label

    def dropped(self, label: int | list[float] | None, uniform: float) -> int | list[float] | None:
        """The label, or the null label if a random number in [0, 1) decides to drop it."""
        return label if self.label_dropout is None or label is None else self.label_dropout.one(label, uniform)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a decoded image: `(channels, height, width)`."""
        return (self.channels, *self.size)

    def open(self, image: EncodedImage) -> Image.Image:
        """Decode an image, and convert it to the mode in the data set's features, if any.

        Raises:
            BrokenImage: The image cannot be read.
            ValueError: The image cannot be downloaded, so it may be intact.
        """
        if image.encoded is None:
            raise self._broken(image, "there is no image")
        try:
            picture = self.feature.decode_example(image.encoded)
            return picture if self.mode is None or is_deep(picture) else picture.convert(self.mode)
        except NETWORK_ERRORS as error:
            raise ValueError(f"{image.name} cannot be downloaded: {one_line(error)}") from error
        except Exception as error:  # Pillow raises many types for broken files
            raise self._broken(image, one_line(error)) from error

    def is_small(self, picture: Image.Image) -> bool:
        """Whether an image is smaller than the model's size."""
        return picture.height < self.size[0] or picture.width < self.size[1]

    def fitted(self, image: EncodedImage, picture: Image.Image) -> Image.Image:
        """Convert an image to the model's channels (`with_channels`), and check its size and label.

        Raises:
            BrokenImage: The image does not fit the model.
            ValueError: The label is not one of the model's.
        """
        if self.is_small(picture) and not self.enlarge:
            size = f"the model's sample_size={self.size[0]}x{self.size[1]}"
            raise self._broken(image, f"{picture.height}x{picture.width} pixels are smaller than {size}")
        try:
            picture = with_channels(picture, self.channels)
        except ValueError as error:
            raise self._broken(image, str(error)) from error
        if self.labels is not None:
            self.check_label(image)
        if self.vector_size is not None:
            self.check_vector(image)
        return picture

    def __call__(self, image: EncodedImage, uniforms: Sequence[float] | None = None) -> Tensor:
        """Decode, resize and crop an image.

        Args:
            image: The image.
            uniforms: Three random numbers in [0, 1): position of the crop from the top and from the left, and flip. Without
                them the image is cropped at the centre and not flipped.

        Returns:
            float32 with shape `(channels, height, width)` in [-1, 1].

        Raises:
            BrokenImage: The image cannot be read or does not fit the model.
            ValueError: The label is not one of the model's, or the image cannot be downloaded.
        """
        picture = _cover_resize(self.fitted(image, self.open(image)), self.size)
        if uniforms is None or self.center_crop:
            top, left = self._centre(picture)
        else:
            top = int(uniforms[0] * (picture.height - self.size[0] + 1))
            left = int(uniforms[1] * (picture.width - self.size[1] + 1))
        picture = F.crop(picture, top, left, *self.size)
        if uniforms is not None and self.flips(uniforms):
            picture = F.hflip(picture)
        return pixel_values(picture, self.channels)

    def flips(self, uniforms: Sequence[float]) -> bool:
        """Whether the random numbers of a draw flip the image."""
        return self.random_flip and uniforms[2] < 0.5

    def centred(self, image: EncodedImage) -> tuple[Tensor, tuple[int, ...]]:
        """An image, cropped at the centre and not flipped, and its sizes as SDXL's `time_ids`.

        Returns:
            Pixel values as those of a call, and six numbers: height and width of the original, top and left of the crop in
            the resized image, height and width of the crop.

        Raises:
            BrokenImage, ValueError: As in a call.
        """
        original = self.fitted(image, self.open(image))
        picture = _cover_resize(original, self.size)
        top, left = self._centre(picture)
        pixels = pixel_values(F.crop(picture, top, left, *self.size), self.channels)
        return pixels, (original.height, original.width, top, left, *self.size)

    def _centre(self, picture: Image.Image) -> tuple[int, int]:
        """Top and left of a crop at the centre."""
        return round((picture.height - self.size[0]) / 2), round((picture.width - self.size[1]) / 2)

    def check_label(self, image: EncodedImage) -> None:
        """Check that the label of an image is one of the model's.

        Raises:
            ValueError: It is not, or it is the null label.
        """
        count, argument = self.labels.count, self.labels.argument
        if not isinstance(image.label, int) or not 0 <= image.label < count:
            raise ValueError(f"label {image.label} of {image.name} must be at least 0 and less than {argument}={count}")
        if image.label == self.null_label:
            raise ValueError(f"label {image.label} of {image.name} must not be null_label={self.null_label}")

    def check_vector(self, image: EncodedImage) -> None:
        """Check that the vector of an image fits the model.

        Raises:
            ValueError: It does not.
        """
        vector = image.label
        if not isinstance(vector, Sequence) or len(vector) != self.vector_size or not np.isfinite(vector).all():
            given = f"{len(vector)} values" if isinstance(vector, Sequence) else f"{vector}"
            raise ValueError(f"the vector of {image.name} has {given}, but must have {self.vector_size} finite values")

    def _broken(self, image: EncodedImage, reason: str) -> BrokenImage:
        return BrokenImage(f"{image.name} of column {self.column}: {reason}")


def adapt_decoder(decoder: ImageDecoder, images: Sequence[EncodedImage], max_broken_images: int) -> None:
    """Check a few images of a data set, and decide whether the set is smaller than the model's size.

    The images are checked one by one, up to the first one that fits. If all readable ones are smaller than the model's size,
    the set is small, and images are enlarged from now on. Otherwise smaller images do not fit. The result depends only on the
    images.

    Args:
        decoder: The decoder, whose `enlarge` is set.
        images: A fixed selection of images from the data set.
        max_broken_images: Maximum number of images that do not fit.

    Raises:
        ValueError: No image fits, more than `max_broken_images` do not fit, or a label is not one of the model's.
    """
    looked: list[tuple[EncodedImage, Image.Image | BrokenImage]] = []
    for image in images:
        looked.append((image, _opened(decoder, image)))
        if _misfit(decoder, *looked[-1]) is None:
            break
    pictures = [picture for _, picture in looked if not isinstance(picture, BrokenImage)]
    decoder.enlarge = len(pictures) > 0 and all(map(decoder.is_small, pictures))
    misfits = {image.name: misfit for image, opened in looked if (misfit := _misfit(decoder, image, opened)) is not None}
    if len(misfits) == len(looked):
        last = list(misfits.values())[-1]
        raise ValueError(f"none of the {len(looked)} checked images fits the model, the last one: {last}")
    BrokenImages(max_broken_images).add(misfits)
    picture = next(opened for image, opened in looked if image.name not in misfits)
    if decoder.enlarge:
        logger.warning(
            "the images (such as one of %dx%d pixels) are smaller than the model's sample_size=%dx%d: they are enlarged, as "
            "in Diffusers' train_unconditional.py",
            *(picture.height, picture.width, *decoder.size),
        )
    if (reason := unused_range(picture)) is not None:
        logger.warning(reason)
    if decoder.channels == 3 and is_greyscale(picture):
        logger.warning("images have mode %s: they are converted to RGB for the model", picture.mode)


def content_digest(images: Iterable[EncodedImage]) -> str | None:
    """Hash of image files; None if one of them is not a local file."""
    digest = hashlib.sha256()
    for image in images:
        encoded = image.encoded or {"bytes": b"", "path": None}
        if image.is_path:
            if not os.path.isfile(encoded["path"]):
                return None
            encoded = {"bytes": Path(encoded["path"]).read_bytes()}
        digest.update(len(encoded["bytes"] or b"").to_bytes(8, "little") + (encoded["bytes"] or b""))
    return digest.hexdigest()


def _opened(decoder: ImageDecoder, image: EncodedImage) -> Image.Image | BrokenImage:
    try:
        return decoder.open(image)
    except BrokenImage as error:
        return error


def _misfit(decoder: ImageDecoder, image: EncodedImage, opened: Image.Image | BrokenImage) -> BrokenImage | None:
    """The reason why an image does not fit the model, if it does not."""
    if isinstance(opened, BrokenImage):
        return opened
    try:
        decoder.fitted(image, opened)
    except BrokenImage as error:
        return error
    return None


def _cover_resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image so that it just covers `size` (height, width), keeping its aspect ratio."""
    scale = max(size[0] / picture.height, size[1] / picture.width)
    target = [max(size[0], round(picture.height * scale)), max(size[1], round(picture.width * scale))]
    return F.resize(picture, target, interpolation=InterpolationMode.BILINEAR)
