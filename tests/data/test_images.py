"""data/images.py, sources.py and decoding.py: every image becomes the right tensor, or counts as broken."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from diffusers_gfprune.data import images as image_data
from diffusers_gfprune.data.batches import train_dataloader
from diffusers_gfprune.data.decoding import BrokenImage, BrokenImages, EncodedImage, ImageDecoder
from diffusers_gfprune.data.images import DataArguments
from helpers.images import encode, load, model_spec, numbered, numbers_of, write_folder, write_parquet
from helpers.processes import ddpm

TRUNCATED = numbered(7)[:45]
SMALL = encode(np.zeros((4, 9), dtype=np.uint8))
COLOUR = encode(np.array([[[255, 0, 0]]], dtype=np.uint8).repeat(8, 0).repeat(8, 1))


def decoder(size: int | tuple[int, int] = 8, channels: int = 1, classes: int | None = None, **options) -> ImageDecoder:
    return ImageDecoder("image", datasets.Image(), model_spec(size, channels, classes), **options)


def encoded(data: bytes | None, label: int | None = None) -> EncodedImage:
    return EncodedImage(None if data is None else {"bytes": data, "path": None}, label, (5,))


def noise_image(height: int, width: int, mode: str = "L") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


def tensor(picture: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(picture)).float() / 127.5 - 1
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


# decoding


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGB", "RGBA", "P", "CMYK"])
def test_any_mode_for_a_colour_model(mode: str) -> None:
    picture = noise_image(8, 8, "RGB").convert(mode)
    pixels = decoder(channels=3)(encoded(encode(picture, "tiff")))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, tensor(picture.convert("RGB")), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_greyscale_modes_for_a_greyscale_model(mode: str) -> None:
    picture = noise_image(8, 8).convert(mode)
    pixels = decoder()(encoded(encode(picture)))
    torch.testing.assert_close(pixels, tensor(picture.convert("L")), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK"])
def test_greyscale_stored_in_colour_fits_a_greyscale_model_and_colour_does_not(mode: str) -> None:
    grey = noise_image(8, 8)
    pixels = decoder()(encoded(encode(grey.convert("P") if mode == "P" else grey.convert("RGB").convert(mode), "tiff")))
    torch.testing.assert_close(pixels, tensor(grey), atol=1e-6, rtol=0)
    with pytest.raises(BrokenImage, match=f"row 5 of column image: mode {mode} is in colour, but the model is greyscale"):
        decoder()(encoded(encode(noise_image(8, 8, "RGB").convert(mode), "tiff")))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height", [8, 12])
def test_sixteen_bits_are_scaled_cropped_and_not_clipped(channels: int, height: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (height, 8), dtype=np.uint16)
    decode = decoder(channels=channels, center_crop=True)
    top = (height - 8) // 2
    expected = torch.from_numpy(values[top : top + 8] / 65535 * 2 - 1).float().expand(channels, 8, 8)
    torch.testing.assert_close(decode(encoded(encode(values))), expected, atol=1e-6, rtol=0)
    with pytest.raises(BrokenImage, match=r"row 5 of column image: mode F .* has values from 0 to 255, not in \[0, 1\]"):
        decode(encoded(encode(np.full((8, 8), 255, np.float32) * np.eye(8, dtype=np.float32), "tiff")))


def test_mode_of_a_data_set_does_not_clip_sixteen_bits() -> None:
    decode = ImageDecoder("image", datasets.Image(mode="L"), model_spec())
    pixels = decode(encoded(encode(np.full((8, 8), 65535 // 4, np.uint16))))
    torch.testing.assert_close(pixels, torch.full((1, 8, 8), -0.5), atol=1e-4, rtol=0)
    assert decode(encoded(encode(noise_image(8, 8, "RGB")))).shape == (1, 8, 8)  # asked for by the data set


SIZES = [(8, 8), (6, 10), (10, 6)]  # height and width


@pytest.mark.parametrize(("height", "width"), [(12, 16), (16, 12), (10, 30)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_another_shape_are_scaled_to_cover_and_cropped(size: tuple[int, int], height: int, width: int) -> None:
    picture = noise_image(height, width)
    scale = max(size[0] / height, size[1] / width)
    scaled = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - size[1]) / 2), round((scaled.height - size[0]) / 2)
    expected = tensor(scaled.crop((left, top, left + size[1], top + size[0])))
    image = encoded(encode(picture))
    torch.testing.assert_close(decoder(size)(image), expected, atol=1e-6, rtol=0)
    pixels, sizes = decoder(size).centred(image)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)
    assert sizes == (height, width, top, left, *size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_goes_to_every_edge_and_no_further(size: tuple[int, int]) -> None:
    height, width = size
    wide, high = noise_image(height, width + 3), noise_image(height + 3, width)
    decode = decoder(size)
    for number, start in ((0.0, 0), (0.26, 1), (0.74, 2), (np.nextafter(1, 0), 3)):
        pixels = decode(encoded(encode(wide)), (0.9, number, 0.9))
        torch.testing.assert_close(pixels, tensor(wide.crop((start, 0, start + width, height))), atol=1e-6, rtol=0)
        pixels = decode(encoded(encode(high)), (number, 0.9, 0.9))
        torch.testing.assert_close(pixels, tensor(high.crop((0, start, width, start + height))), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_at_the_centre_and_flip_if_asked(size: tuple[int, int]) -> None:
    image = encoded(encode(noise_image(10, 14)))
    centre = decoder(size)(image)
    for uniforms in ((0.0, 0.0, 0.0), (0.9, 0.9, 0.9)):
        assert torch.equal(decoder(size, center_crop=True)(image, uniforms), centre)
    flipping = decoder(size, center_crop=True, random_flip=True)
    assert torch.equal(flipping(image, (0, 0, 0.49)), centre.flip(2))
    assert torch.equal(flipping(image, (0, 0, 0.51)), centre)
    assert torch.equal(flipping(image), centre)


@pytest.mark.parametrize("data", [None, b"", b"not an image", TRUNCATED, SMALL, COLOUR])
def test_what_counts_as_broken(data: bytes | None) -> None:
    with pytest.raises(BrokenImage, match="row 5 of column image: "):
        decoder()(encoded(data))


def test_missing_file_is_broken_and_named(tmp_path: Path) -> None:
    image = EncodedImage({"bytes": None, "path": str(tmp_path / "gone.png")}, None, (0, 3))
    assert image.is_path and image.name == str(tmp_path / "gone.png")
    with pytest.raises(BrokenImage, match="gone.png of column image"):
        decoder()(image)
    assert EncodedImage({"bytes": b"", "path": "x.png"}, None, (1, 3)).name == "row 3 of shard 1"


def test_image_that_cannot_be_fetched_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an hour without a network would count as so many broken images, and a resumed run would meet others."""

    def disconnected(*arguments):
        raise ConnectionError("Server\nDisconnected")

    decode = decoder()
    monkeypatch.setattr(decode.feature, "decode_example", disconnected)
    with pytest.raises(ValueError, match="^row 5 cannot be downloaded: Server Disconnected$") as error:
        decode(encoded(numbered(1)))
    assert not isinstance(error.value, BrokenImage)


@pytest.mark.parametrize("label", [4, -1, None, 1.0])
def test_label_that_the_model_does_not_have_is_an_error(label) -> None:
    with pytest.raises(
        ValueError, match=f"label {label} of row 5 must be at least 0 and less than num_class_embeds=4"
    ) as error:
        decoder(classes=4)(encoded(numbered(1), label))
    assert not isinstance(error.value, BrokenImage)


# counting broken images


def test_broken_images_count_once_and_are_limited() -> None:
    broken = BrokenImages(3)
    assert broken.add(["row 1", "row 2", "row 1"]) == ["row 1", "row 2"]
    assert broken.add(["row 2", "row 9"]) == ["row 9"]
    assert len(broken) == 3
    with pytest.raises(ValueError, match=r"max_broken_images=3 is exceeded: 4 images .*: row 1, row 2, row 9, \.\.\.$"):
        broken.add(["row 4"])


def test_broken_images_survive_a_checkpoint() -> None:
    broken = BrokenImages(2)
    broken.add(["b", "a"])
    names = json.loads(json.dumps(broken.to_list()))
    assert names == ["b", "a"]
    assert BrokenImages(2, names).add(["a", "b"]) == []
    with pytest.raises(ValueError, match="max_broken_images=1 is exceeded: 2 images"):
        BrokenImages(1, names)


# loading


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("shuffle_buffer_size", 0), ("validation_images", 0), ("resolution", 0)),
        *(("max_broken_images", -1), ("dataloader_num_workers", -1)),
    ],
)
def test_arguments_out_of_range(argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value} must"):
        DataArguments(dataset_name="x", **{argument: value})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("files", ["parquet", "folder"])
def test_images_are_held_out_of_every_kind_of_source(files: str, streaming: bool, tmp_path: Path) -> None:
    images = [numbered(number) for number in range(12)]
    if files == "folder":
        folder = write_folder(tmp_path / "data", images)
    else:
        folder = write_parquet(tmp_path / "data", [images[:3], images[3:7], images[7:]])
    train, (pixels, labels) = load(folder, streaming=streaming, validation_images=5)
    held_out, left = numbers_of(pixels), numbers_of(train.head(100))
    assert labels is None
    assert sorted(held_out + left) == list(range(12)) and len(held_out) == 5
    assert train.num_images == (None if streaming else 7)
    assert numbers_of(train.head(3)) == left[:3] and train.head(0).shape == (0, 1, 8, 8)
    if streaming:
        assert held_out == [0, 1, 2, 3, 4]  # all of the first shard, and some of the second
        assert sorted(numbers_of(torch.stack([train.decoder(image) for image in train.spares]))) == left


def test_stream_that_decodes_by_itself_is_kept_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As streams of image files on the Hub do."""
    folder = write_folder(tmp_path / "data", [numbered(number) for number in range(5)] + [TRUNCATED])
    load_splits = image_data._load_splits

    def decoding(args: DataArguments) -> dict[str, datasets.IterableDataset]:
        return {name: rows.decode(num_threads=2) for name, rows in load_splits(args).items()}

    monkeypatch.setattr(image_data, "_load_splits", decoding)
    train, _ = load(folder, streaming=True)
    assert train.are_paths and numbers_of(train.head(9)) == [2, 3, 4]


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_split_and_labels(streaming: bool, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "data", [[numbered(number) for number in range(6)]])
    write_parquet(folder, [[numbered(100 + number) for number in range(4)]], split="validation")
    train, (pixels, labels) = load(folder, model_spec(classes=4), streaming=streaming, validation_images=3)
    assert numbers_of(pixels) == [100, 101, 102]
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 1, 2]
    assert numbers_of(train.head(100)) == [0, 1, 2, 3, 4, 5]
    assert [image.label for image in train.in_order()] == [0, 1, 2, 3, 0, 1]
    with pytest.raises(ValueError, match="^label_column=label needs a class-conditional model"):
        load(folder, streaming=streaming, label_column="label")
    with pytest.raises(ValueError, match="label 1 of row 1.* must be at least 0 and less than num_class_embeds=1"):
        load(folder, model_spec(classes=1), streaming=streaming, validation_images=3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("misfit", [TRUNCATED, None, SMALL, COLOUR], ids=["broken", "none", "small", "colour"])
def test_misfits_are_alike_wherever_they_stand(
    misfit: bytes | None, streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start, further on, and among the held-out ones."""
    folder = write_parquet(tmp_path / "data", [[misfit, misfit, *(numbered(n) for n in range(30)), misfit, numbered(30)]])
    write_parquet(folder, [[misfit, numbered(9), numbered(8)]], split="test")
    with caplog.at_level(logging.WARNING):
        images, (held_out, _) = load(folder, streaming=streaming, validation_images=3)
    assert numbers_of(held_out) == [9, 8]
    assert "1 held-out images do not fit the model and are left out, the last one: row 0" in caplog.text
    assert "enlarged" not in caplog.text
    assert numbers_of(images.head(99)) == list(range(31)) and not images.decoder.enlarge
    assert images.summary.num_held_out == 2
    batches = train_dataloader(images, 8, seed=0, process=ddpm(10))
    met = {name for _, batch in zip(range(12), batches) for name in batch.unread}
    assert met == {f"row {row}" + (" of shard 0" if streaming else "") for row in (0, 1, 32)}
    with pytest.raises(ValueError, match="split train: max_broken_images=1 is exceeded: 2 images .* row 0"):
        load(folder, streaming=streaming, max_broken_images=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_of_misfits_only(streaming: bool, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "data", [[TRUNCATED, COLOUR] * 20])
    write_parquet(folder, [[numbered(9)]], split="test")
    with pytest.raises(ValueError, match="none of the 32 checked images fits the model, the last one: row"):
        load(folder, streaming=streaming)
    (tmp_path / "other").mkdir()
    other = write_parquet(tmp_path / "other/data", [[numbered(1)] * 4])
    write_parquet(other, [[b""]], split="test")
    with pytest.raises(ValueError, match="split test: there are no held-out images: none of 1 fits the model, the last one: "):
        load(other, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_set_that_is_smaller_than_the_model_is_enlarged(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Diffusers' train_unconditional.py enlarges it, whichever images are held out; a set with one large image is not."""
    small = [noise_image(4, 6 - n % 3) for n in range(12)]
    folder = write_folder(tmp_path / "small", [*map(encode, small), TRUNCATED])
    scaled = transforms.Compose([transforms.Resize(8), transforms.CenterCrop(8), transforms.ToTensor()])
    with caplog.at_level(logging.WARNING):
        images, (held_out, _) = load(folder, streaming=streaming, validation_images=1 if streaming else 6)
    assert [r.getMessage() for r in caplog.records if "held-out" not in r.getMessage()] == [
        "the images (such as one of 4x6 pixels) are smaller than the model's sample_size=8x8: they are enlarged, as in "
        "Diffusers' train_unconditional.py"
    ]
    assert images.summary.enlarged and "all are scaled up to the model's size" in images.summary.lines()[1]
    pixels = torch.cat([held_out, images.head(99)])
    expected = torch.stack([scaled(picture) * 2 - 1 for picture in small])
    order = [int((pixels - picture).abs().amax((1, 2, 3)).argmin()) for picture in expected]
    torch.testing.assert_close(pixels[order], expected, atol=1e-6, rtol=0)
    mixed = write_parquet(tmp_path / "mixed", [[*map(encode, small), numbered(7), numbered(8)]])
    write_parquet(mixed, [[numbered(5)]], split="validation")
    images, _ = load(mixed, streaming=streaming, max_broken_images=12)
    assert not images.decoder.enlarge and numbers_of(images.head(99)) == [7, 8]


def test_greyscale_images_for_a_colour_model_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey = write_folder(tmp_path / "grey", [numbered(number) for number in range(6)])
    with caplog.at_level(logging.WARNING):
        train, (pixels, _) = load(grey, model_spec(channels=3))
    assert pixels.shape == (2, 3, 8, 8) and train.head(9).shape == (4, 3, 8, 8)
    assert [record.getMessage() for record in caplog.records] == [
        "images have mode L: they are converted to RGB for the model"
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_too_few_images_to_hold_out(streaming: bool, tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "data", [[numbered(1)] * 3])
    with pytest.raises(ValueError, match="has 3 images, too few to hold out validation_images=3"):
        load(folder, streaming=streaming, validation_images=3)
    empty = write_parquet(tmp_path / "empty", [[]])
    with pytest.raises(ValueError, match="has no training images" if streaming else "corresponds to no data"):
        load(empty, streaming=streaming)


def test_choice_among_several_columns_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Masks beside pictures, coarse labels beside fine ones."""
    rows = {
        name: [{"bytes": numbered(n + start), "path": None} for n in range(6)] for name, start in (("image", 0), ("mask", 9))
    }
    labels = {"fine": datasets.ClassLabel(num_classes=2), "coarse": datasets.ClassLabel(num_classes=2)}
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image(), **labels})
    (tmp_path / "data").mkdir()
    columns = {**rows, "fine": [0] * 6, "coarse": [1] * 6}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data/train.parquet")
    with caplog.at_level(logging.WARNING):
        train, (_, labels) = load(tmp_path / "data", model_spec(classes=2))
    assert max(numbers_of(train.head(9))) < 9 and labels.tolist() == [0, 0]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "image_column=image is used, the first of the columns ['image', 'mask']",
        "label_column=fine is used, the first of the columns ['fine', 'coarse']",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train, (_, labels) = load(tmp_path / "data", model_spec(classes=2), image_column="mask", label_column="coarse")
    assert min(numbers_of(train.head(9))) >= 9 and labels.tolist() == [1, 1] and not caplog.records


def test_folder_without_data_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for streaming in (False, True):
        with pytest.raises(ValueError, match="dataset_name=.*nothing cannot be loaded: ") as error:
            load(tmp_path / "nothing", streaming=streaming)
        assert "\n" not in str(error.value)
