"""diffusion/pixel_values.py and one_shot.images_to_tensor: accepted images have the right values, others are refused."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_gfprune.diffusion.pixel_values import needs_pixels, pixel_values, with_channels
from diffusers_gfprune.one_shot import images_to_tensor

GREY = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (8, 8), dtype=np.uint16)
COLOUR = np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8)
UNIT = np.random.default_rng(3).random((8, 8, 3), dtype=np.float32)


def stored(values: np.ndarray, form: str) -> Image.Image:
    """Written to a file and read again."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return Image.open(buffer)


def wanted(values: np.ndarray, scale: float, channels: int) -> torch.Tensor:
    """One image in [-1, 1] with shape `(1, channels, 8, 8)`."""
    planes = torch.from_numpy(values.astype(np.float64) / scale * 2 - 1).float().reshape(8, 8, -1).permute(2, 0, 1)
    return planes.expand(channels, 8, 8)[None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("image", "values", "scale"),
    [
        (Image.fromarray(GREY), GREY, 255),
        (Image.fromarray(GREY).convert("LA"), GREY, 255),
        (Image.fromarray(GREY > 127), GREY > 127, 1),
        (Image.fromarray(GREY).convert("RGB"), GREY, 255),
        (Image.fromarray(GREY).convert("P"), GREY, 255),
        (Image.fromarray(DEEP), DEEP, 65535),
        (Image.fromarray(DEEP.astype(">u2")), DEEP, 65535),
        (stored(DEEP, "png"), DEEP, 65535),
        (stored(DEEP, "tiff"), DEEP, 65535),
        (stored(DEEP, "ppm"), DEEP, 65535),  # mode I
        (Image.fromarray(UNIT[..., 0]), UNIT[..., 0], 1),
        (GREY, GREY, 255),
        (GREY[..., None], GREY, 255),
        (np.repeat(GREY[..., None], 3, axis=2), GREY, 255),
        (DEEP, DEEP, 65535),
        (UNIT[..., 0], UNIT[..., 0], 1),
        (UNIT[..., :1].astype(np.float64), UNIT[..., :1], 1),
        (np.repeat(UNIT[..., :1], 3, axis=2), UNIT[..., 0], 1),
    ],
)
def test_greyscale_of_every_kind_has_its_right_value(image, values: np.ndarray, scale: float, channels: int) -> None:
    found = images_to_tensor([image], channels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted(values, scale, channels), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("images", "values", "scale"),
    [
        ([Image.fromarray(COLOUR)], COLOUR, 255),
        ([Image.fromarray(COLOUR).convert("RGBA")], COLOUR, 255),
        (COLOUR[None], COLOUR, 255),
        (UNIT[None], UNIT, 1),
        (torch.from_numpy(COLOUR).permute(2, 0, 1)[None], COLOUR, 255),
        ([torch.from_numpy(COLOUR).permute(2, 0, 1)], COLOUR, 255),
        ([wanted(COLOUR, 255, 3)[0]], COLOUR, 255),
    ],
)
def test_colour_of_every_kind_has_its_right_value(images, values: np.ndarray, scale: float) -> None:
    torch.testing.assert_close(images_to_tensor(images, 3), wanted(values, scale, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([Image.fromarray(GREY), Image.fromarray(COLOUR)], r"images\[1\]: mode RGB is in colour, but the model is greyscale"),
        (UNIT[None], r"images\[0\]: an array of shape \(8, 8, 3\) is in colour"),
        ([Image.fromarray(DEEP.astype(np.int32))], r"images\[0\]: mode I .* has no known range"),
        ([Image.fromarray(GREY.astype(np.float32))], r"mode F .* has values from [0-9]+ to 2[0-9]+, not in \[0, 1\]"),
        ([Image.fromarray(np.full((8, 8), np.nan, np.float32))], r"mode F .* has values from nan to nan"),
        ([UNIT[..., 0] * 2 - 1], r"has values from -0\.9.* to 0\.9.*, not in \[0, 1\]"),
        ([GREY.astype(np.int64)], "an array of int64: use uint8, uint16"),
        ([np.zeros((1, 8, 8), np.uint8)], r"an array of shape \(1, 8, 8\) is not \(height, width\)"),
        ([{"image": GREY}], r"images\[0\]: a dict is not a PIL image or an array"),
        ("images", r"images\[0\]: a str is not a PIL image"),
        (Image.fromarray(GREY), "images is a Image, not a list of images"),
        (
            [GREY, GREY[:7]],
            r"images differ in size or type: images\[0\] has shape \(1, 8, 8\).*images\[1\] .* \(1, 7, 8\)",
        ),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "images are a tensor of torch.int64, not uint8 or floating point"),
        (torch.full((2, 1, 8, 8), torch.nan), "values from nan to nan"),
    ],
)
def test_what_has_no_known_meaning_is_refused_in_one_line(images, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        images_to_tensor(images, 1)
    assert "\n" not in str(error.value)


def test_tensor_without_anything_dark_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """It may be in [0, 1], where models see grey for black."""
    pixels = torch.from_numpy(GREY)[None, None] / 255
    with caplog.at_level(logging.WARNING):
        assert torch.equal(images_to_tensor(pixels, 1), pixels)
        assert "pass images * 2 - 1" in caplog.text
        caplog.clear()
        images_to_tensor(pixels * 2 - 1, 1)
    assert not caplog.records


def test_twelve_bits_stored_in_sixteen_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """They are taken as they are, which is nearly black."""
    dark, bright = Image.fromarray(DEEP // 16), Image.fromarray(DEEP)
    with caplog.at_level(logging.WARNING):
        images_to_tensor([bright, dark], 1)
        assert not caplog.records
        found = images_to_tensor([dark, dark], 1)
    assert f"mode I;16 with values up to {DEEP.max() // 16} of 65535" in caplog.text
    torch.testing.assert_close(found[:1], wanted(DEEP // 16, 65535, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "La"])
def test_modes_that_need_no_pixels_are_accepted_whatever_these_are(mode: str, channels: int) -> None:
    if mode in ("I;16", "La"):
        picture = Image.new(mode, (8, 8))
    else:
        picture = Image.fromarray(COLOUR).convert("L").convert(mode)
    if needs_pixels(picture, channels):
        assert channels == 1 or mode in ("I", "F", "La")
    else:
        assert pixel_values(with_channels(picture, channels), channels).shape == (channels, 8, 8)
