"""From an encoded image to a training tensor, and what becomes of images that cannot be read.

Images are decoded here, one by one, and not by `datasets`: there, one broken file ends a stream or a loading process.
Preprocessing is that of Diffusers' `train_unconditional.py`: scaled so that the image just covers the model's size
(bilinear), cropped at random or at the centre, flipped left to right if asked, scaled to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import datasets
from huggingface_hub.errors import HTTPError
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

__all__ = ["BrokenImage", "BrokenImages", "EncodedImage", "ImageDecoder", "NETWORK_ERRORS", "sample_size"]

GREYSCALE_MODES = {"1", "L", "LA"}
# Whatever else Pillow has (16 bits, floats) it converts to 8 bits by clipping.
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"}
# What the Hub's client raises, after many attempts of its own
NETWORK_ERRORS = (ConnectionError, TimeoutError, HTTPError)


class BrokenImage(ValueError):
    """An image that cannot be read, or does not fit the model."""


class BrokenImages:
    """The broken images that a run has met, each counted once.

    Args:
        limit: More than so many are an error (0: the first one is).
        names: Those met before, as `to_list` gave them.

    Raises:
        ValueError: `names` are too many.
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
            names: What each is called: its path or its row.

        Returns:
            Those that were not counted before.

        Raises:
            ValueError: There are now more than the limit.
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
        """Their names, in the order in which they were met."""
        return list(self._names)


class EncodedImage(NamedTuple):
    """A row of a data set, not decoded yet.

    Attributes:
        encoded: Bytes and path, of which one may be None; None if the row has no image.
        label: Class label, None unless the model is class conditional.
        position: Row number, or shard number and row number in the shard for a stream.
    """

    encoded: dict | None
    label: int | None
    position: tuple[int, ...]

    @property
    def is_path(self) -> bool:
        """Whether this is only the path of the image file."""
        return self.encoded is not None and self.encoded["bytes"] is None and self.encoded["path"] is not None

    @property
    def name(self) -> str:
        """What the image is called in messages: its file if it has one of its own, else its row."""
        if self.is_path:
            return self.encoded["path"]
        row = f"row {self.position[-1]}"
        return row if len(self.position) == 1 else f"{row} of shard {self.position[0]}"


class ImageDecoder:
    """Decodes images for a model.

    Args:
        column: Name of the column of images, for messages.
        feature: Its type.
        unet_config: Configuration of the model: `sample_size`, `in_channels` (1: greyscale, 3: RGB), `num_class_embeds`.
        center_crop: Crop at the centre, not at random.
        random_flip: Flip half of the images left to right.
    """

    def __init__(
        self, column: str, feature: datasets.Image, unet_config, *, center_crop: bool = False, random_flip: bool = False
    ) -> None:
        self.column = column
        self.feature = datasets.Image(mode=feature.mode)
        self.size = sample_size(unet_config)
        self.channels, self.num_classes = unet_config.in_channels, unet_config.num_class_embeds
        self.center_crop, self.random_flip = center_crop, random_flip

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a decoded image: `(channels, height, width)`."""
        return (self.channels, *self.size)

    def open(self, image: EncodedImage) -> Image.Image:
        """Decode an image as it is.

        Raises:
            BrokenImage: It cannot be read.
            ValueError: It cannot be fetched: there may be nothing wrong with it.
        """
        if image.encoded is None:
            raise self._broken(image, "there is none")
        try:
            return self.feature.decode_example(image.encoded)
        except NETWORK_ERRORS as error:
            raise ValueError(f"{image.name} cannot be fetched: {' '.join(str(error).split())}") from error
        except Exception as error:  # broken bytes make Pillow raise anything
            raise self._broken(image, " ".join(str(error).split()) or type(error).__name__) from error

    def misfit(self, picture: Image.Image) -> str | None:
        """Why an image is not one for this model, or None if it is."""
        if picture.height < self.size[0] or picture.width < self.size[1]:
            return (
                f"{picture.height}x{picture.width} pixels are smaller than the model's "
                f"sample_size={self.size[0]}x{self.size[1]}"
            )
        if self.channels == 1 and picture.mode not in GREYSCALE_MODES:
            return f"images have mode {picture.mode} but the model takes in_channels=1 (greyscale)"
        if picture.mode not in GREYSCALE_MODES | COLOUR_MODES:
            return f"images have mode {picture.mode}, which is neither greyscale nor colour with 8 bits per channel"
        return None

    def __call__(self, image: EncodedImage, uniforms: Sequence[float] | None = None) -> Tensor:
        """Decode, scale and crop an image.

        Args:
            image: The image.
            uniforms: Three random numbers in [0, 1) that place the crop (from the top, from the left) and decide the flip.
                Without them the image is cropped at the centre and not flipped.

        Returns:
            float32 with shape `(channels, height, width)` in [-1, 1].

        Raises:
            BrokenImage: The image cannot be read or does not fit the model.
            ValueError: Its label is none of the model's, or it cannot be fetched.
        """
        picture = self.open(image)
        reason = self.misfit(picture)
        if reason is not None:
            raise self._broken(image, reason)
        if self.num_classes is not None:
            self._check_label(image)
        picture = _cover_resize(picture.convert("L" if self.channels == 1 else "RGB"), self.size)
        if uniforms is None or self.center_crop:
            picture = F.center_crop(picture, list(self.size))
        else:
            top = int(uniforms[0] * (picture.height - self.size[0] + 1))
            left = int(uniforms[1] * (picture.width - self.size[1] + 1))
            picture = F.crop(picture, top, left, *self.size)
        if uniforms is not None and self.random_flip and uniforms[2] < 0.5:
            picture = F.hflip(picture)
        return F.to_tensor(picture).mul_(2).sub_(1)

    def _check_label(self, image: EncodedImage) -> None:
        if not isinstance(image.label, int) or not 0 <= image.label < self.num_classes:
            raise ValueError(f"label {image.label} of {image.name} is none of the model's num_class_embeds={self.num_classes}")

    def _broken(self, image: EncodedImage, reason: str) -> BrokenImage:
        return BrokenImage(f"{image.name} of column {self.column}: {reason}")


def sample_size(unet_config) -> tuple[int, int]:
    """Height and width, in pixels, of the images that a model makes."""
    size = unet_config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _cover_resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image so that it just covers `size` (height, width), keeping its aspect ratio."""
    scale = max(size[0] / picture.height, size[1] / picture.width)
    target = [max(size[0], round(picture.height * scale)), max(size[1], round(picture.width * scale))]
    return F.resize(picture, target, interpolation=InterpolationMode.BILINEAR)
