"""Pixel values of pictures: what each of Pillow's modes holds, and what a model gets of it. Library and scripts share it.

| modes | hold | a model gets |
|---|---|---|
| 1, L, LA | greyscale of up to 8 bits | these 8 bits |
| P, RGB, CMYK and other colours | 8 bits per channel | these 8 bits; a greyscale model only if all channels are equal |
| I;16, I;16B, I;16L, I;16N | greyscale, unsigned 16 bits | value / 65535 |
| I | greyscale, 32 bits: of PNG and PPM files, whose range is 16 bits | value / 65535; any other file or array is refused |
| F | greyscale, floating point | the value, if the picture lies in [0, 1]; else it is refused |

Pillow's own conversion of the last three clips to [0, 255] without a word. Transparency is left out, as Pillow does it.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["image_values", "is_deep", "is_greyscale", "needs_pixels", "pixel_values", "unused_range", "with_channels"]

GREYSCALE_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"})
SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
# Formats whose greyscale pictures Pillow opens as 32-bit integers (PGM; PNG in older versions) though they hold 16 bits
SIXTEEN_BIT_FORMATS = frozenset({"PNG", "PPM"})


def is_deep(picture: Image.Image) -> bool:
    """Whether Pillow would clip the values of a picture to make 8 bits of them."""
    return picture.mode in SIXTEEN_BIT_MODES or picture.mode in ("I", "F")


def is_greyscale(picture: Image.Image) -> bool:
    """Whether a picture is stored as greyscale."""
    return picture.mode in GREYSCALE_MODES or is_deep(picture)


def unused_range(picture: Image.Image) -> str | None:
    """A word on a picture of 16 bits that uses less than an eighth of them, as where 12 bits are stored in 16."""
    if picture.mode == "F" or not is_deep(picture):
        return None
    most = int(np.asarray(picture).max())
    if most > 65535 // 8:
        return None
    return f"images have mode {picture.mode} with values up to {most} of 65535, which makes them nearly black: scale them up"


def needs_pixels(picture: Image.Image, channels: int) -> bool:
    """Whether `with_channels` has to see the values of a picture, and not only its mode, to know if it takes it."""
    return picture.mode not in GREYSCALE_MODES | SIXTEEN_BIT_MODES | (COLOUR_MODES if channels == 3 else frozenset())


def with_channels(picture: Image.Image, channels: int) -> Image.Image:
    """A picture as a model of so many channels takes it.

    Args:
        picture: Of any size and mode.
        channels: 1 (greyscale) or 3 (RGB).

    Returns:
        A picture of 8 bits, of mode L for one channel and RGB for three; or, for greyscale of more than 8 bits, of mode F with
        values in [0, 1], which stand for all channels alike.

    Raises:
        ValueError: The picture is in colour and the model is not, or what its values mean is not known.
    """
    if is_deep(picture):
        return Image.fromarray(_deep_values(picture))
    if picture.mode not in GREYSCALE_MODES | COLOUR_MODES:
        raise ValueError(f"mode {picture.mode} is neither greyscale nor colour with 8 bits per channel")
    if channels == 3:
        return picture.convert("RGB")
    if picture.mode in GREYSCALE_MODES:
        return picture.convert("L")
    colours = np.asarray(picture.convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise ValueError(f"mode {picture.mode} is in colour where greyscale (in_channels=1) is wanted")
    return Image.fromarray(np.ascontiguousarray(colours[..., 0]))


def _deep_values(picture: Image.Image) -> np.ndarray:
    """Values of greyscale of more than 8 bits: float32 in [0, 1] with shape `(height, width)`."""
    values = np.asarray(picture)
    least, most = values.min(), values.max()
    if picture.mode == "F":
        if not (least >= 0 and most <= 1):  # NaN is refused, too
            raise ValueError(f"mode F (floating point) has values from {least:g} to {most:g}, not in [0, 1]")
        return values
    if picture.mode == "I" and (picture.format not in SIXTEEN_BIT_FORMATS or least < 0 or most > 65535):
        raise ValueError(
            f"mode I (32-bit integers, here from {least} to {most}) has no known range: save images with 8 or 16 bits, "
            f"or as floating point in [0, 1]"
        )
    return values.astype(np.float32) / np.float32(65535)


def pixel_values(picture: Image.Image, channels: int) -> Tensor:
    """What `with_channels` gave, as a tensor.

    Returns:
        float32 with shape `(channels, height, width)` in [-1, 1].
    """
    values = torch.from_numpy(np.array(picture))
    values = values.reshape(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()
    if values.dtype == torch.uint8:
        values = values.float().div_(255)
    return values.expand(channels, -1, -1).mul(2).sub_(1)


def image_values(image, channels: int, name: str) -> Tensor:
    """Pixel values of a picture or an array.

    Args:
        image: A PIL image, or an array of shape `(height, width)` or `(height, width, 1 or 3)`: uint8, uint16 (greyscale only)
            or floating point in [0, 1].
        channels: 1 (greyscale) or 3 (RGB).
        name: What to call the image in messages.

    Returns:
        float32 with shape `(channels, height, width)` in [-1, 1].

    Raises:
        ValueError: It is nothing of that kind, or does not fit the channels (`with_channels`).
    """
    try:
        pictures = [image] if isinstance(image, Image.Image) else _planes(image, channels)
        each = channels if len(pictures) == 1 else 1
        return torch.cat([pixel_values(with_channels(picture, each), each) for picture in pictures])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _planes(image, channels: int) -> list[Image.Image]:
    """An array as a picture; in floating-point colours, which Pillow does not know, as one for each channel."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"a {type(image).__name__} is not a PIL image or an array")
    values = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    colour = values.ndim == 3
    if values.size == 0 or values.ndim not in (2, 3) or (colour and values.shape[2] != 3):
        raise ValueError(f"an array of shape {image.shape} is not (height, width) or (height, width, 1 or 3)")
    floating = np.issubdtype(values.dtype, np.floating)
    if not (floating or values.dtype == np.uint8 or values.dtype == np.uint16 and not colour):
        raise ValueError(f"an array of {values.dtype}: use uint8, uint16 (greyscale only) or floating point in [0, 1]")
    if not (floating and colour):
        return [Image.fromarray(np.ascontiguousarray(values, dtype=np.float32 if floating else None))]
    if channels == 1 and (values != values[..., :1]).any():
        raise ValueError(f"an array of shape {image.shape} is in colour where greyscale (in_channels=1) is wanted")
    return [Image.fromarray(np.ascontiguousarray(values[..., c], dtype=np.float32)) for c in range(channels)]
