"""data/latents.py and encoding.py: latents of every draw are those of the image, whoever encoded it and when."""

from __future__ import annotations

import itertools
import logging
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusers_gfprune.data.batches import calibration_batches, train_dataloader
from diffusers_gfprune.data.decoding import BrokenImages
from diffusers_gfprune.diffusion.latents import LatentCodec
from helpers.images import numbered
from helpers.latent_data import DIT_LABELS, SIZE, latent_spec, load_latents, noise_image, write_images
from helpers.latent_models import autoencoder, vq_model
from helpers.processes import ddpm

IMAGES = [noise_image(number) for number in range(14)]


def batches(images, count: int, batch_size: int = 4, **options) -> list[dict[str, Tensor]]:
    loader = train_dataloader(images, batch_size, **{"seed": 3, "process": ddpm(1000), **options})
    taken = list(itertools.islice(loader, count))
    assert all(broken == [] for *_, broken in taken)
    return [{"clean": batch.clean, "noise": batch.noise, "t": batch.timesteps, **batch.conditioning} for batch, *_ in taken]


def assert_same(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right):
        assert one.keys() == other.keys()
        assert all(torch.equal(values, other[name]) for name, values in one.items())


def expected_moments(images, codec: LatentCodec, flipped: bool = False) -> Tensor:
    pixels = images.head(99)
    return codec.encode(pixels.flip(-1) if flipped else pixels)


def distances_to(drawn: Tensor, known: Tensor) -> Tensor:
    """Distance of each latent to each of the others, without the rounding of a matrix product."""
    return torch.cdist(drawn, known, compute_mode="donot_use_mm_for_euclid_dist")


def test_batches_are_latents(tmp_path: Path) -> None:
    images, held_out = load_latents(write_images(tmp_path / "data", IMAGES), latent_spec(labels=DIT_LABELS))
    (batch,) = batches(images, 1)
    assert set(batch) == {"clean", "noise", "t", "class_labels"}
    assert batch["clean"].shape == batch["noise"].shape == (4, 4, 8, 8)
    assert batch["clean"].dtype == torch.float32 and batch["class_labels"].dtype == torch.int64
    assert len(held_out) == 2 and held_out.samples.shape == (2, 4, 8, 8)
    assert held_out.conditioning["class_labels"].shape == (2,)
    assert images.head(3).shape == (3, 3, SIZE, SIZE) == images.pixels.head(3).shape


@pytest.mark.parametrize("make", [autoencoder, vq_model])
def test_draws_are_those_of_the_codec(make, tmp_path: Path) -> None:
    """The latents of a draw, less its own noise, are the scaled means."""
    codec = LatentCodec(make())
    images, held_out = load_latents(write_images(tmp_path / "data", IMAGES), latent_spec(codec))
    moments = expected_moments(images, codec)
    stored = torch.stack([images.split.moments.read("moments", int(row))[0] for row in images.order])
    torch.testing.assert_close(stored, moments, rtol=1e-4, atol=1e-5)
    drawn = torch.cat([batch["clean"] for batch in batches(images, 300)])
    nearest = distances_to(drawn.flatten(1), codec.draw(moments).flatten(1)).argmin(dim=1)
    found = torch.stack([drawn[nearest == number].mean(dim=0) for number in range(12)])
    spread = (codec.draw(moments, torch.ones_like(found)) - codec.draw(moments)).abs()
    assert (found - codec.draw(moments)).abs().max() <= 5 * spread.max() / 10 + 1e-4  # a hundred draws of each
    if codec.is_random:
        first = drawn[nearest == 0]
        ratio = first.std(dim=0) / spread[0]
        assert 0.8 < ratio.mean() < 1.2 and not torch.equal(first[0], first[1])
    again = load_latents(tmp_path / "data", latent_spec(codec))[1]
    assert torch.equal(held_out.samples, again.samples)


def test_flipped_images_are_encoded_not_flipped_latents(tmp_path: Path) -> None:
    codec = LatentCodec(vq_model())
    images, _ = load_latents(write_images(tmp_path / "data", IMAGES), latent_spec(codec), random_flip=True)
    rows = [images.split.moments.read("moments", int(row)) for row in images.order]
    torch.testing.assert_close(torch.stack([row[0] for row in rows]), expected_moments(images, codec), rtol=1e-4, atol=1e-5)
    flipped = expected_moments(images, codec, flipped=True)
    torch.testing.assert_close(torch.stack([row[1] for row in rows]), flipped, rtol=1e-4, atol=1e-5)
    drawn = torch.cat([batch["clean"] for batch in batches(images, 30)])
    versions = torch.cat([codec.draw(torch.stack([row[version] for row in rows])) for version in (0, 1)])
    distances = distances_to(drawn.flatten(1), versions.flatten(1))
    assert distances.min(dim=1).values.max() < 1e-3
    assert 0.35 < (distances.argmin(dim=1) >= 12).float().mean() < 0.65


def test_batches_do_not_depend_on_workers_ranks_or_resumption(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", IMAGES)
    images, _ = load_latents(folder, latent_spec(labels=DIT_LABELS), random_flip=True)
    whole = batches(images, 6, batch_size=4)
    assert_same(batches(images, 6, num_workers=2), whole)
    assert_same(batches(images, 3, first_batch=3), whole[3:])
    halves = [batches(images, 6, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    assert_same([{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*halves)], whole)
    again, _ = load_latents(folder, latent_spec(labels=DIT_LABELS), random_flip=True)
    assert_same(batches(again, 6), whole)
    assert_same(batches(pickle.loads(pickle.dumps(again)), 2), whole[:2])


def test_epochs_draw_anew(tmp_path: Path) -> None:
    images, _ = load_latents(write_images(tmp_path / "data", IMAGES), latent_spec())
    codec = LatentCodec(autoencoder())
    means = codec.draw(expected_moments(images, codec)).flatten(1)
    first, second = (torch.cat([b["clean"] for b in batches(images, 3, first_batch=n)]) for n in (0, 3))
    order = [distances_to(epoch.flatten(1), means).argmin(dim=1) for epoch in (first, second)]
    assert sorted(order[0].tolist()) == sorted(order[1].tolist()) == list(range(12))
    assert not any(torch.equal(a, b) for a in first for b in second)


def test_labels_are_dropped_to_the_null_label_of_the_model(tmp_path: Path) -> None:
    images, _ = load_latents(write_images(tmp_path / "data", IMAGES), latent_spec(labels=DIT_LABELS), label_dropout=0.25)
    assert images.choices() == {"null_label": 4, "label_dropout": 0.25}
    assert images.null_conditioning()["class_labels"].tolist() == [4]
    labels = torch.cat([batch["class_labels"] for batch in batches(images, 60)])
    assert 0.15 < (labels == 4).float().mean() < 0.35
    options = {"process": ddpm(1000), "seed": 0, "step": 0}
    used = torch.cat([b.conditioning["class_labels"] for b in calibration_batches(images, 4, 12, **options)])
    assert 11 <= (used == 4).sum() <= 13  # of 48


def test_calibration_batches_are_latents_of_the_step(tmp_path: Path) -> None:
    images, _ = load_latents(write_images(tmp_path / "data", IMAGES), latent_spec())
    options = {"process": ddpm(1000), "seed": 0, "broken": BrokenImages(0)}
    first, again, other = (calibration_batches(images, 2, 4, step=step, **options) for step in (5, 5, 6))
    assert torch.equal(first[0].clean, again[0].clean) and not torch.equal(first[0].clean, other[0].clean)
    assert first[0].clean.shape == (4, 4, 8, 8)


def test_broken_images_are_replaced_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = [*IMAGES[:6], IMAGES[6][:60], *IMAGES[7:], noise_image(99)[:60]]
    write_images(tmp_path / "data", data)
    write_images(tmp_path / "data", [IMAGES[0], IMAGES[1][:60], IMAGES[2]], split="test")
    with caplog.at_level(logging.WARNING):
        images, held_out = load_latents(tmp_path / "data", latent_spec(), validation_images=3)
    assert "1 held-out images do not fit the model and are left out" in caplog.messages
    assert len(held_out) == 2 == len(held_out.samples)
    loader = train_dataloader(images, 5, seed=0, process=ddpm(10))
    seen = BrokenImages(9)
    for batch, _, broken in itertools.islice(loader, 3):
        seen.add(broken)
        assert batch.clean.abs().sum(dim=(1, 2, 3)).min() > 0
    assert sorted(seen.to_list()) == ["row 14", "row 6"]
    with pytest.raises(ValueError, match="max_broken_images=1 is exceeded: 2 images cannot be read .*: row 6, row 14"):
        load_latents(tmp_path / "data", latent_spec(), max_broken_images=1)
    write_images(tmp_path / "data", [IMAGES[1][:60]] * 2, split="test")
    with pytest.raises(ValueError, match="there are no held-out images"):
        load_latents(tmp_path / "data", latent_spec())


@pytest.mark.parametrize(("size", "left"), [((SIZE, SIZE), 8), ((SIZE, SIZE + 8), 4)])
def test_crops_are_at_the_centre(size: tuple[int, int], left: int, tmp_path: Path) -> None:
    codec = LatentCodec(vq_model())
    wide = [noise_image(number, SIZE, 2 * SIZE) for number in range(6)]
    images, _ = load_latents(write_images(tmp_path / "data", wide), latent_spec(codec, size))
    drawn = torch.cat([batch["clean"] for batch in batches(images, 4)])
    assert drawn.shape[2:] == (size[0] // 2, size[1] // 2)
    distances = distances_to(drawn.flatten(1), codec.draw(expected_moments(images, codec)).flatten(1))
    assert distances.min(dim=1).values.max() < 1e-3
    assert "cropped at the centre" in images.summary.lines()[2]
    stored = [images.split.moments.read("time_ids", row).tolist() for row in range(6)]
    assert stored == [[16, 32, 0, left, *size]] * 6  # height and width, top and left of the crop, height and width of the crop


def test_small_and_greyscale_images(tmp_path: Path) -> None:
    """As for pixels, a set of small images is enlarged, and a greyscale one repeated."""
    folder = write_images(tmp_path / "data", [numbered(number) for number in range(14)])
    images, _ = load_latents(folder, latent_spec())
    assert images.summary.enlarged and batches(images, 1)[0]["clean"].shape == (4, 4, 8, 8)
    grey, _ = load_latents(folder, latent_spec(LatentCodec(autoencoder(channels=1))))
    assert grey.head(1).shape == (1, 1, SIZE, SIZE) and batches(grey, 1)[0]["clean"].shape == (4, 4, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"streaming": True}, "streaming=True must be False for a latent model"),
        ({"resolution": 32}, "resolution=32 but the model makes images of 16x16 pixels with its VAE"),
        ({"caption_column": "text"}, "caption_column=text needs a text-conditional model"),
        ({"caption_dropout": 0.1}, "caption_dropout=0.1 needs a text-conditional model"),
        ({"caption_dropout": 1.0}, r"caption_dropout=1.0 must be in \[0, 1\)"),
        ({"null_label": 3}, "null_label=3 must be 4, as num_embeds_ada_norm of the model is"),
        ({"label_column": "class"}, "label_column=class is not a column of the data set"),
    ],
)
def test_unsuitable_arguments_are_one_line_before_encoding(arguments: dict, message: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", IMAGES)
    with pytest.raises(ValueError, match=message) as error:
        load_latents(folder, latent_spec(labels=DIT_LABELS), prepare=False, **arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "encoded").exists()


def test_other_classes_than_the_model_has_are_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", IMAGES)
    with pytest.raises(ValueError, match="the data set has 4 classes, but the model has num_embeds_ada_norm=1000"):
        load_latents(folder, latent_spec(labels=DIT_LABELS._replace(count=1000, null_label=1000)), prepare=False)
