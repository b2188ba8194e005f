"""From an encoded image to a training tensor, and what becomes of images that cannot be read.

Images are decoded here, one by one, and not by `datasets`: there, one broken file ends a stream or a loading process.
Preprocessing is that of Diffusers' `train_unconditional.py`: scaled so that the image just covers the model's size
(bilinear), cropped at random or at the centre, flipped left to right if asked, scaled to [-1, 1]. Modes are those of
`diffusers_gfprune.pixel_values`. Images that are smaller than the model's are misfits, unless the whole set is small
(`adapt_decoder`): then they are enlarged, as that script does it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import datasets
from huggingface_hub.errors import HTTPError
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from ..diffusion.class_labels import LabelDropout
from ..diffusion.pixel_values import is_deep, is_greyscale, pixel_values, unused_range, with_channels
from ..errors import one_line
from ..metrics.model_size import spatial_size

__all__ = ["BrokenImage", "BrokenImages", "EncodedImage", "ImageDecoder", "NETWORK_ERRORS", "adapt_decoder"]

logger = logging.getLogger(__name__)

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
        label_dropout: How labels are dropped; None: the model has no null label.

    Attributes:
        enlarge: Scale images up that are smaller than the model's, which else do not fit it.
    """

    def __init__(
        self,
        column: str,
        feature: datasets.Image,
        unet_config,
        *,
        center_crop: bool = False,
        random_flip: bool = False,
        label_dropout: LabelDropout | None = None,
    ) -> None:
        self.column = column
        self.feature, self.mode = datasets.Image(), feature.mode
        self.size = spatial_size(unet_config)
        self.channels, self.num_classes = unet_config.in_channels, unet_config.num_class_embeds
        self.center_crop, self.random_flip, self.label_dropout = center_crop, random_flip, label_dropout
        self.enlarge = False

    @property
    def null_label(self) -> int | None:
        """What stands for no label, if the model knows such a label."""
        return None if self.label_dropout is None else self.label_dropout.null_label

    def dropped(self, label: int | None, uniform: float) -> int | None:
        """The label that a model is trained with, after a random number in [0, 1) has decided whether it is dropped."""
        return label if self.label_dropout is None or label is None else self.label_dropout.one(label, uniform)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a decoded image: `(channels, height, width)`."""
        return (self.channels, *self.size)

    def open(self, image: EncodedImage) -> Image.Image:
        """Decode an image as it is, in the mode that the data set names, if any.

        Raises:
            BrokenImage: It cannot be read.
            ValueError: It cannot be fetched: there may be nothing wrong with it.
        """
        if image.encoded is None:
            raise self._broken(image, "there is none")
        try:
            picture = self.feature.decode_example(image.encoded)
            return picture if self.mode is None or is_deep(picture) else picture.convert(self.mode)
        except NETWORK_ERRORS as error:
            raise ValueError(f"{image.name} cannot be fetched: {one_line(error)}") from error
        except Exception as error:  # broken bytes make Pillow raise anything
            raise self._broken(image, one_line(error)) from error

    def is_small(self, picture: Image.Image) -> bool:
        """Whether an image would have to be enlarged for the model."""
        return picture.height < self.size[0] or picture.width < self.size[1]

    def fitted(self, image: EncodedImage, picture: Image.Image) -> Image.Image:
        """An image with the model's channels (`with_channels`), of any size that will do.

        Raises:
            BrokenImage: It does not fit the model.
            ValueError: Its label is none of the model's.
        """
        if self.is_small(picture) and not self.enlarge:
            wanted = f"the model's sample_size={self.size[0]}x{self.size[1]}"
            raise self._broken(image, f"{picture.height}x{picture.width} pixels are smaller than {wanted}")
        try:
            picture = with_channels(picture, self.channels)
        except ValueError as error:
            raise self._broken(image, str(error)) from error
        if self.num_classes is not None:
            self._check_label(image)
        return picture

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
        picture = _cover_resize(self.fitted(image, self.open(image)), self.size)
        if uniforms is None or self.center_crop:
            picture = F.center_crop(picture, list(self.size))
        else:
            top = int(uniforms[0] * (picture.height - self.size[0] + 1))
            left = int(uniforms[1] * (picture.width - self.size[1] + 1))
            picture = F.crop(picture, top, left, *self.size)
        if uniforms is not None and self.random_flip and uniforms[2] < 0.5:
            picture = F.hflip(picture)
        return pixel_values(picture, self.channels)

    def _check_label(self, image: EncodedImage) -> None:
        if not isinstance(image.label, int) or not 0 <= image.label < self.num_classes:
            raise ValueError(f"label {image.label} of {image.name} is none of the model's num_class_embeds={self.num_classes}")
        if image.label == self.null_label:
            raise ValueError(f"label {image.label} of {image.name} is null_label={self.null_label}, which no image may have")

    def _broken(self, image: EncodedImage, reason: str) -> BrokenImage:
        return BrokenImage(f"{image.name} of column {self.column}: {reason}")


def adapt_decoder(decoder: ImageDecoder, images: Sequence[EncodedImage], max_broken_images: int) -> None:
    """An early look at a few images of a data set: do they fit the model, and is the whole set smaller than its images?

    They are looked at one by one, up to the first one that fits. If all that can be read are smaller than the model's, the set
    counts as small: images are enlarged from now on. If a single one of them is not, images that are smaller are misfits,
    like all others that do not fit, and it does not matter where they stand. A function of the images alone.

    Args:
        decoder: Its `enlarge` is set.
        images: A few of the data set, always the same ones.
        max_broken_images: More misfits than this are an error.

    Raises:
        ValueError: None of them fits, more than `max_broken_images` do not, or one has a label that the model lacks.
    """
    looked: list[tuple[EncodedImage, Image.Image | BrokenImage]] = []
    for image in images:
        looked.append((image, _opened(decoder, image)))
        if _misfit(decoder, *looked[-1]) is None:
            break
    pictures = [found for _, found in looked if not isinstance(found, BrokenImage)]
    decoder.enlarge = len(pictures) > 0 and all(map(decoder.is_small, pictures))
    misfits = {image.name: misfit for image, found in looked if (misfit := _misfit(decoder, image, found)) is not None}
    if len(misfits) == len(looked):
        last = list(misfits.values())[-1]
        raise ValueError(f"none of the {len(looked)} images that were looked at fits the model, the last one: {last}")
    BrokenImages(max_broken_images).add(misfits)
    picture = next(found for image, found in looked if image.name not in misfits)
    if decoder.enlarge:
        logger.warning(
            "the images are smaller (%dx%d pixels and the like) than the model's sample_size=%dx%d: they are enlarged, as "
            "Diffusers' train_unconditional.py does it",
            *(picture.height, picture.width, *decoder.size),
        )
    if (reason := unused_range(picture)) is not None:
        logger.warning(reason)
    if decoder.channels == 3 and is_greyscale(picture):
        logger.warning("images have mode %s: they are converted to RGB, which the model takes", picture.mode)


def _opened(decoder: ImageDecoder, image: EncodedImage) -> Image.Image | BrokenImage:
    try:
        return decoder.open(image)
    except BrokenImage as error:
        return error


def _misfit(decoder: ImageDecoder, image: EncodedImage, found: Image.Image | BrokenImage) -> BrokenImage | None:
    """Why an image is not one for the model, if it is not."""
    if isinstance(found, BrokenImage):
        return found
    try:
        decoder.fitted(image, found)
    except BrokenImage as error:
        return error
    return None


def _cover_resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image so that it just covers `size` (height, width), keeping its aspect ratio."""
    scale = max(size[0] / picture.height, size[1] / picture.width)
    target = [max(size[0], round(picture.height * scale)), max(size[1], round(picture.width * scale))]
    return F.resize(picture, target, interpolation=InterpolationMode.BILINEAR)
