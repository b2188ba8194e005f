"""evaluation/inputs.py: folders of images, and compatible models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_gfprune.evaluation.inputs import FolderImages
from helpers.images import encode


def write(folder: Path, *values: int, shape: tuple[int, ...] = (6, 4)) -> Path:
    """Images of one value each, in files whose order is that of the values."""
    folder.mkdir(exist_ok=True)
    for index, value in enumerate(values):
        (folder / f"{index:03}.png").write_bytes(encode(np.full(shape, value, dtype=np.uint8)))
    return folder


def test_images_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    """Folders in the folder included; hidden files and other kinds are none."""
    write(tmp_path, 1, 2, 3)
    write(tmp_path / "0", 7)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    for hidden in (".ipynb_checkpoints", "0/.thumbnails/large", "__MACOSX"):
        (tmp_path / hidden).mkdir(parents=True)
        write(tmp_path / hidden, 9)
    images = FolderImages(str(tmp_path))
    assert len(images) == 4 and images.channels == 1 and images.size == (6, 4)
    pixels = images.read(range(4))
    assert pixels.dtype == torch.uint8 and pixels.shape == (4, 1, 6, 4)
    assert pixels[:, 0, 0, 0].tolist() == [7, 1, 2, 3]
    assert images.read(range(1, 3))[:, 0, 0, 0].tolist() == [1, 2]
    assert FolderImages(str(tmp_path), num_images=2).read(range(2))[:, 0, 0, 0].tolist() == [7, 1]


def test_colour_is_read_as_rgb(tmp_path: Path) -> None:
    """Palettes, transparency and single greyscale images among them included."""
    folder = write(tmp_path, 10, shape=(6, 4, 3))
    Image.fromarray(np.full((6, 4), 20, np.uint8)).save(folder / "001.png")
    Image.fromarray(np.full((6, 4, 4), 30, np.uint8), "RGBA").save(folder / "002.png")
    Image.fromarray(np.full((6, 4, 3), 40, np.uint8)).quantize(4).save(folder / "003.png")
    Image.fromarray(np.full((6, 4, 3), 50, np.uint8)).save(folder / "004.jpg", quality=100)
    pixels = FolderImages(str(folder)).read(range(5))
    assert pixels.shape == (5, 3, 6, 4)
    assert pixels[:, :, 0, 0].tolist() == [[value] * 3 for value in (10, 20, 30, 40, 50)]


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3)])
def test_greyscale_is_read_as_it_is_however_it_is_stored(shape: tuple[int, ...], tmp_path: Path) -> None:
    """16 bits are scaled, and not clipped to white."""
    folder = write(tmp_path, 10, shape=shape)
    Image.fromarray(np.full((6, 4), 20 * 257, np.uint16)).save(folder / "001.png")
    Image.fromarray(np.full((6, 4, 3), 30, np.uint8)).save(folder / "002.png")
    Image.fromarray(np.full((6, 4), 40 / 255, np.float32)).save(folder / "003.tif")
    pixels = FolderImages(str(folder)).read(range(4))
    assert pixels.dtype == torch.uint8 and pixels.shape == (4, len(shape) * 2 - 3, 6, 4)
    assert pixels.amax((1, 2, 3)).tolist() == pixels.amin((1, 2, 3)).tolist() == [10, 20, 30, 40]


def test_digest_is_of_what_the_files_hold(tmp_path: Path) -> None:
    write(tmp_path / "a", 1, 2, 3)
    write(tmp_path / "b", 1, 2, 4)
    a, b = (FolderImages(str(tmp_path / name)) for name in "ab")
    assert a.digest(range(2)) == b.digest(range(2)) != a.digest(range(1, 3))
    assert a.digest(range(3)) != b.digest(range(3))
    write(tmp_path / "a", 1, 2, 4)
    assert FolderImages(str(tmp_path / "a")).digest(range(3)) == b.digest(range(3))


def test_what_are_no_images_of_one_kind_is_refused(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "x", 1, 2, 3))
    with pytest.raises(ValueError, match="x holds 3 images, but must hold at least 5"):
        FolderImages(folder, num_images=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds 0 images, but must hold at least 2"):
        FolderImages(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="resolution=8 but images of images_dir=.*x have 6x4 pixels"):
        FolderImages(folder, resolution=8)
    extra = tmp_path / "x/003.png"
    for content, message in (
        (encode(np.zeros((8, 8), np.uint8)), "003.png has 8x8 pixels, others have 6x4"),
        (
            encode(np.eye(6, 4, dtype=np.uint8)[..., None] * np.uint8([9, 0, 0])),
            "003.png: mode RGB is in colour, but the model is greyscale",
        ),
        (b"no image", "003.png cannot be read: cannot identify"),
    ):
        extra.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            FolderImages(folder)


def test_image_that_breaks_off_is_named(tmp_path: Path) -> None:
    """Its header is whole."""
    generator = np.random.default_rng(0)
    for index in range(2):
        content = encode(generator.integers(0, 256, (32, 32), dtype=np.uint8))
        (tmp_path / f"{index}.png").write_bytes(content[: len(content) // 2] if index else content)
    images = FolderImages(str(tmp_path))
    assert images.read(range(1)).shape == (1, 1, 32, 32)
    with pytest.raises(ValueError, match="1.png cannot be read"):
        images.read(range(2))
