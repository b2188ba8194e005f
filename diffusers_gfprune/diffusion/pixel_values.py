"""Conversion of pictures in Pillow's modes to pixel values, for the library and the scripts.

| modes | content | input of the model |
|---|---|---|
| 1, L, LA | greyscale of up to 8 bits | these 8 bits |
| P, RGB, CMYK and other colours | 8 bits per channel | these 8 bits; for greyscale models all channels must be equal |
| I;16, I;16B, I;16L, I;16N | greyscale, unsigned 16 bits | value / 65535 |
| I | greyscale, 32 bits, from PNG and PPM files with 16 bits | value / 65535; other files and arrays raise an error |
| F | greyscale, floating point | the value in [0, 1]; other values raise an error |

Pillow's conversion of the last three clips to [0, 255] without a warning. Transparency is ignored, as in Pillow.
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
# Formats with 16 bits whose greyscale pictures Pillow opens as 32-bit integers (PGM; PNG in older versions)
SIXTEEN_BIT_FORMATS = frozenset({"PNG", "PPM"})


def is_deep(picture: Image.Image) -> bool:
    """Whether Pillow would clip the values of a picture when it converts them to 8 bits."""
    return picture.mode in SIXTEEN_BIT_MODES or picture.mode in ("I", "F")


def is_greyscale(picture: Image.Image) -> bool:
    """Whether a picture is stored as greyscale."""
    return picture.mode in GREYSCALE_MODES or is_deep(picture)


def unused_range(picture: Image.Image) -> str | None:
    """A warning for a 16-bit picture that uses less than an eighth of the range, such as 12 bits stored in 16; else None."""
    if picture.mode == "F" or not is_deep(picture):
        return None
    most = int(np.asarray(picture).max())
    if most > 65535 // 8:
        return None
    return f"images have mode {picture.mode} with values up to {most} of 65535 and are nearly black: scale them up"


def needs_pixels(picture: Image.Image, channels: int) -> bool:
    """Whether `with_channels` depends on the values of a picture, and not only on its mode."""
    return picture.mode not in GREYSCALE_MODES | SIXTEEN_BIT_MODES | (COLOUR_MODES if channels == 3 else frozenset())


def with_channels(picture: Image.Image, channels: int) -> Image.Image:
    """Convert a picture to the channels of a model.

    Args:
        picture: A picture of any size and mode.
        channels: 1 (greyscale) or 3 (RGB).

    Returns:
        An 8-bit picture in mode L for one channel or RGB for three. Greyscale of more than 8 bits becomes mode F with values
        in [0, 1] for all channels.

    Raises:
        ValueError: The picture is in colour but the model is greyscale, or the range of its values is unknown.
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
        raise ValueError(f"mode {picture.mode} is in colour, but the model is greyscale (in_channels=1)")
    return Image.fromarray(np.ascontiguousarray(colours[..., 0]))


def _deep_values(picture: Image.Image) -> np.ndarray:
    """Values of a greyscale picture with more than 8 bits: float32 in [0, 1] with shape `(height, width)`."""
    values = np.asarray(picture)
    least, most = values.min(), values.max()
    if picture.mode == "F":
        if not (least >= 0 and most <= 1):  # also raises for NaN
            raise ValueError(f"mode F (floating point) has values from {least:g} to {most:g}, not in [0, 1]")
        return values
    if picture.mode == "I" and (picture.format not in SIXTEEN_BIT_FORMATS or least < 0 or most > 65535):
        raise ValueError(
            f"mode I (32-bit integers, here from {least} to {most}) has no known range: save images with 8 or 16 bits, "
            f"or as floating point in [0, 1]"
        )
    return values.astype(np.float32) / np.float32(65535)


def pixel_values(picture: Image.Image, channels: int) -> Tensor:
    """Convert the output of `with_channels` to a tensor.

    Returns:
        float32 with shape `(channels, height, width)` in [-1, 1].
    """
    values = torch.from_numpy(np.array(picture))
    values = values.reshape(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()
    if values.dtype == torch.uint8:
        values = values.float().div_(255)
    return values.expand(channels, -1, -1).mul(2).sub_(1)


def image_values(image, channels: int, name: str) -> Tensor:
    """Convert a picture or an array to pixel values.

    Args:
        image: A PIL image, or an array of shape `(height, width)` or `(height, width, 1 or 3)`: uint8, uint16 (greyscale only)
            or floating point in [0, 1].
        channels: 1 (greyscale) or 3 (RGB).
        name: Name of the image in error messages.

    Returns:
        float32 with shape `(channels, height, width)` in [-1, 1].

    Raises:
        ValueError: The image has another type or shape, or does not fit the channels (see `with_channels`).
    """
    try:
        pictures = [image] if isinstance(image, Image.Image) else _planes(image, channels)
        each = channels if len(pictures) == 1 else 1
        return torch.cat([pixel_values(with_channels(picture, each), each) for picture in pictures])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _planes(image, channels: int) -> list[Image.Image]:
    """Convert an array to a picture, or to one per channel for floating-point colours, which Pillow does not support."""
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
        raise ValueError(f"an array of shape {image.shape} is in colour, but the model is greyscale (in_channels=1)")
    return [Image.fromarray(np.ascontiguousarray(values[..., c], dtype=np.float32)) for c in range(channels)]
