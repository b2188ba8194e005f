"""data/batches.py: batches depend only on their number, not on the loading process or on where a run resumes."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_gfprune.data.batches import BrokenImages, calibration_batches, train_dataloader
from diffusers_gfprune.data.draws import random_generator
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.class_labels import ClassLabels
from helpers.images import encode, load, model_spec, numbered, numbers_of, write_folder, write_parquet
from helpers.processes import ddpm

TRUNCATED = numbered(7)[:45]
NUMBERED = [numbered(number) for number in range(26)]  # of which two are held out


def make_images(tmp_path: Path, kind: str, config=None, numbered_images=NUMBERED, **arguments):
    """24 training images: on the disk, as a stream of so many shards, or as a stream of image files."""
    folder = tmp_path / "data"
    if kind == "files":
        return load(write_folder(folder, numbered_images), config, streaming=True, **arguments)[0]
    shards = int(kind.removeprefix("stream ")) if kind != "rows" else 1
    held_out, left = numbered_images[:2], numbered_images[2:]
    write_parquet(folder, [held_out], split="test")
    size = -(-len(left) // shards)
    write_parquet(folder, [left[first : first + size] for first in range(0, len(left), size)])
    return load(folder, config, streaming=kind != "rows", **arguments)[0]


def loader(images, batch_size: int = 4, **options):
    return train_dataloader(images, batch_size, **{"seed": 3, "process": ddpm(1000), **options})


def take(images, count: int, batch_size: int = 4, **options) -> list[dict]:
    """Batches with what is in them by name, and the names of images that are broken."""
    found = itertools.islice(loader(images, batch_size, **options), count)
    return [{"broken": broken, **named(batch)} for batch, _, broken in found]


def named(batch: DiffusionBatch) -> dict[str, Tensor]:
    return {"clean": batch.clean, "noise": batch.noise, "timesteps": batch.timesteps, **batch.conditioning}


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right):
        assert one.keys() == other.keys()
        for name, values in one.items():
            assert torch.equal(values, other[name]) if torch.is_tensor(values) else values == other[name], name


# what a batch holds


def test_batch_types(tmp_path: Path) -> None:
    (batch,) = take(make_images(tmp_path, "rows", model_spec(classes=4)), 1)
    assert set(batch) == {"clean", "noise", "timesteps", "class_labels", "broken"}
    assert batch["clean"].shape == batch["noise"].shape == (4, 1, 8, 8)
    assert batch["clean"].dtype == batch["noise"].dtype == torch.float32
    assert batch["timesteps"].dtype == batch["class_labels"].dtype == torch.int64
    labels = [(number - 2) % 4 for number in numbers_of(batch["clean"])]
    assert batch["class_labels"].tolist() == labels and batch["broken"] == []


def test_noise_and_timesteps_have_the_right_distribution(tmp_path: Path) -> None:
    batches = take(make_images(tmp_path, "rows"), 60, batch_size=24, process=ddpm(10))
    noise = torch.cat([batch["noise"] for batch in batches])
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
    counts = torch.bincount(torch.cat([batch["timesteps"] for batch in batches]), minlength=10)
    assert len(counts) == 10 and ((counts - 144).abs() < 60).all()  # five standard deviations
    assert len({tuple(image[0, 0].tolist()) for image in noise}) == len(noise)


def test_stratified_timesteps_are_one_of_each_part(tmp_path: Path) -> None:
    """With as many parts as timesteps, a batch has each once, in an order of its own; all else is as without."""
    images = make_images(tmp_path, "rows")
    plain, spread = (take(images, 8, batch_size=24, process=ddpm(24), stratified=value) for value in (False, True))
    for one, other in zip(plain, spread):
        assert sorted(other["timesteps"].tolist()) == list(range(24)) != sorted(one["timesteps"].tolist())
        assert torch.equal(one["clean"], other["clean"]) and torch.equal(one["noise"], other["noise"])
    assert len({tuple(batch["timesteps"].tolist()) for batch in spread}) == 8


def test_stratified_timesteps_have_the_right_distribution_in_every_row(tmp_path: Path) -> None:
    """Where in its part a timestep is, is drawn, and a row's part changes from batch to batch."""
    batches = take(make_images(tmp_path, "rows"), 360, process=ddpm(12), stratified=True)
    timesteps = torch.stack([batch["timesteps"] for batch in batches])  # three timesteps in each of four parts
    assert ((timesteps.sort(dim=1).values // 3) == torch.arange(4)).all()
    for row in timesteps.T:
        counts = torch.bincount(row, minlength=12)
        assert len(counts) == 12 and ((counts - 30).abs() < 27).all()  # five standard deviations


def test_generators_look_at_all_bits() -> None:
    seen = {
        random_generator(seed, *key).random()
        for seed in (0, 1, 2**32, 2**32 + 1, 2**63)
        for key in ((), (0,), (1,), (2**32,), (0, 0), (0, 1))
    }
    assert len(seen) == 30


def test_crop_and_flip_follow_the_draw(tmp_path: Path) -> None:
    """Images of two columns, black and white: a draw shows one, and half of the draws are flipped."""
    images = [encode(np.repeat(np.array([[0] * 8 + [255] * 8], dtype=np.uint8), 8, axis=0))] * 26
    batches = take(make_images(tmp_path, "rows", numbered_images=images, random_flip=True), 50)
    pixels = torch.cat([batch["clean"] for batch in batches])[:, 0, 0]
    white = (pixels > 0).sum(dim=1)
    assert white.unique().tolist() == list(range(9))
    mixed = pixels[(white > 0) & (white < 8)]
    assert 0.35 < (mixed[:, 0] > 0).float().mean() < 0.65
    again = take(make_images(tmp_path / "again", "rows", numbered_images=images, random_flip=True), 50)
    assert_same(batches, again)


# order


def test_epochs_meet_each_image_at_most_once(tmp_path: Path) -> None:
    images = make_images(tmp_path, "rows")
    batches = [numbers_of(batch["clean"]) for batch in take(images, 8, batch_size=5)]  # four batches an epoch
    epochs = [sum(batches[:4], []), sum(batches[4:], [])]
    assert [len(set(epoch)) for epoch in epochs] == [20, 20]
    assert epochs[0] != epochs[1] and set(epochs[0]) | set(epochs[1]) <= set(range(2, 26))
    assert epochs[0] != sum([numbers_of(batch["clean"]) for batch in take(images, 4, batch_size=5, seed=4)], [])


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(world_size: int, stratified: bool, tmp_path: Path) -> None:
    images = make_images(tmp_path, "rows", model_spec(classes=4))
    whole = take(images, 7, batch_size=6, stratified=stratified)
    options = {"world_size": world_size, "stratified": stratified}
    parts = [take(images, 7, 6 // world_size, rank=rank, **options) for rank in range(world_size)]
    for name in ("clean", "noise", "timesteps", "class_labels"):
        for number, batch in enumerate(whole):
            assert torch.equal(batch[name], torch.cat([part[number][name] for part in parts])), name


def test_workers_change_nothing(tmp_path: Path) -> None:
    images = make_images(tmp_path, "rows")
    assert_same(take(images, 9, stratified=True), take(images, 9, num_workers=2, stratified=True))


@pytest.mark.fast_variants(3)
@pytest.mark.parametrize(
    ("kind", "num_workers", "world_size"),
    [
        *(("rows", 0, 1), ("rows", 2, 1), ("stream 1", 0, 1), ("stream 2", 2, 1), ("stream 3", 2, 1)),
        *(("stream 1", 0, 2), ("stream 3", 0, 2), ("files", 0, 1), ("files", 2, 2)),
    ],
)
def test_resumed_batches_are_those_of_an_uninterrupted_run(
    kind: str, num_workers: int, world_size: int, tmp_path: Path
) -> None:
    """From within the first epoch, its end, and far beyond."""
    images = make_images(tmp_path, kind, shuffle_buffer_size=7)
    options = {"num_workers": num_workers, "rank": world_size - 1, "world_size": world_size, "stratified": True}
    batches = take(images, 30, **options)
    for first in (1, 6, 27):
        assert_same(batches[first : first + 3], take(images, 3, first_batch=first, **options))


@pytest.mark.parametrize("kind", ["rows", "stream 2"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_generators_are_left_alone(kind: str, num_workers: int, tmp_path: Path) -> None:
    images = make_images(tmp_path, kind)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    take(images, 3, num_workers=num_workers)
    calibration_batches(images, 1, 4, process=ddpm(1000), seed=0, step=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]


# streams


@pytest.mark.fast_variants(3)
@pytest.mark.parametrize(
    ("kind", "num_workers", "world_size", "epochs"),
    [
        *(("stream 1", 0, 1, 1), ("stream 4", 2, 2, 1), ("stream 4", 0, 1, 1), ("stream 2", 2, 1, 1)),
        *(("stream 1", 0, 2, 1), ("stream 1", 1, 3, 1), ("stream 2", 2, 3, 1), ("files", 2, 2, 1)),
        *(("stream 3", 2, 1, 2), ("stream 3", 0, 2, 2)),  # shares of unequal size: even out over two epochs
    ],
)
def test_stream_meets_every_image_equally_often(
    kind: str, num_workers: int, world_size: int, epochs: int, tmp_path: Path
) -> None:
    images = make_images(tmp_path, kind, shuffle_buffer_size=5)
    ranks = []
    for rank in range(world_size):
        count = 24 * epochs // world_size
        batches = take(images, count, batch_size=1, num_workers=num_workers, rank=rank, world_size=world_size)
        ranks.append([number for batch in batches for number in numbers_of(batch["clean"])])
    assert Counter(sum(ranks, [])) == Counter(list(range(2, 26)) * epochs)
    if epochs == 1:
        assert sum(map(len, map(set, ranks))) == 24  # disjoint
        assert sum(ranks, []) != sorted(sum(ranks, []))


def test_stream_shuffles_anew_in_every_epoch(tmp_path: Path) -> None:
    batches = take(make_images(tmp_path, "stream 2"), 12)
    epochs = [sum((numbers_of(batch["clean"]) for batch in part), []) for part in (batches[:6], batches[6:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(2, 26)) and epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("kind", "num_workers", "world_size", "most"), [("stream 1", 2, 1, 1), ("stream 3", 2, 2, 1), ("stream 2", 3, 4, 2)]
)
def test_more_workers_than_shards(kind: str, num_workers: int, world_size: int, most: int, tmp_path: Path) -> None:
    images = make_images(tmp_path, kind)
    message = f"dataloader_num_workers={num_workers} must be at most {most}: .* stream has {kind[-1]} for {world_size} process"
    with pytest.raises(ValueError, match=message):
        loader(images, num_workers=num_workers, world_size=world_size)


# broken images


@pytest.mark.parametrize("kind", ["rows", "stream 2"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_replaced_and_counted_once(kind: str, num_workers: int, tmp_path: Path) -> None:
    images = [*NUMBERED[:9], None, *NUMBERED[10:17], TRUNCATED, *NUMBERED[18:]]  # training images 7 and 15
    source = make_images(tmp_path, kind, numbered_images=images)
    batches = take(source, 18, num_workers=num_workers)  # three epochs
    names = sum((batch["broken"] for batch in batches), [])
    expected = ["row 15", "row 7"] if kind == "rows" else ["row 3 of shard 1", "row 7 of shard 0"]
    assert sorted(set(names)) == expected and len(names) >= 6
    broken = BrokenImages(2)
    for batch in batches:
        broken.add(batch["broken"])
    assert sorted(broken.to_list()) == expected
    met = [number for batch in batches for number in numbers_of(batch["clean"])]
    assert len(met) == 72 and set(met) == set(range(2, 26)) - {9, 17}
    assert_same(batches, take(source, 18, num_workers=num_workers))
    assert_same(batches[14:], take(source, 4, num_workers=num_workers, first_batch=14))
    with pytest.raises(ValueError, match="max_broken_images=1 is exceeded: 2 images"):
        BrokenImages(1, names)


def test_replacement_keeps_the_noise_of_the_draw(tmp_path: Path) -> None:
    images = make_images(tmp_path / "whole", "rows")
    broken = make_images(tmp_path / "broken", "rows", numbered_images=[*NUMBERED[:9], None, *NUMBERED[10:]])
    for one, other in zip(take(images, 6), take(broken, 6)):
        assert torch.equal(one["noise"], other["noise"]) and torch.equal(one["timesteps"], other["timesteps"])
        changed = (one["clean"] != other["clean"]).any(dim=(1, 2, 3))
        assert changed.sum() == len(other["broken"])


@pytest.mark.parametrize("kind", ["rows", "stream 2"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_images_in_a_row(kind: str, num_workers: int, tmp_path: Path) -> None:
    images = make_images(tmp_path, kind, numbered_images=[*NUMBERED[:3], *[TRUNCATED] * 300])
    with pytest.raises(ValueError, match=r"^11 images in a row cannot be read .*: row \d+.* of column image: ") as error:
        take(images, 60, num_workers=num_workers)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_wrong_label_in_the_middle_is_one_clear_line(num_workers: int, tmp_path: Path) -> None:
    images = make_images(tmp_path, "rows", model_spec(classes=4))
    images.decoder.labels = ClassLabels(3)
    with pytest.raises(ValueError, match=r"^label 3 of row \d+ must be at least 0 and less than num_class_embeds=3$"):
        take(images, 6, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_that_breaks_off_is_one_clear_line(num_workers: int, tmp_path: Path) -> None:
    images = make_images(tmp_path, "stream 2")
    (tmp_path / "data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="^images cannot be read: .*train-00001-of-00002.parquet") as error:
        take(images, 6, num_workers=num_workers)
    assert "Traceback" not in str(error.value)


def test_signals_to_the_run_do_not_end_its_workers(tmp_path: Path) -> None:
    """They come from a process that is not the workers' parent, as with Ctrl-C or from a scheduler."""
    batches = iter(loader(make_images(tmp_path, "rows"), num_workers=2))
    assert len(list(itertools.islice(batches, 2))) == 2  # one of each worker: both run
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    assert len(workers) == 2
    for signal in ("-TERM", "-INT"):
        subprocess.run(["kill", signal, *workers], check=True)
        assert len(list(itertools.islice(batches, 10))) == 10
    assert len(multiprocessing.active_children()) == 2


# calibration


def calibrate(images, num_batches: int = 2, batch_size: int = 8, **options) -> list[tuple]:
    options = {"process": ddpm(1000), "seed": 0, "step": 5, **options}
    return [tuple(batch.tensors()) for batch in calibration_batches(images, num_batches, batch_size, **options)]


@pytest.mark.parametrize("kind", ["rows", "stream 3"])
def test_calibration_is_a_function_of_seed_and_step(kind: str, tmp_path: Path) -> None:
    images = make_images(tmp_path, kind, model_spec(classes=4))
    first, again, *others = (calibrate(images), calibrate(images), calibrate(images, step=6), calibrate(images, seed=1))
    assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y))
    for other in others:
        assert not torch.equal(first[0][0], other[0][0]) and not torch.equal(first[0][1], other[0][1])
    assert not torch.equal(first[0][1], first[1][1])
    clean, noise, timesteps, labels = first[0]
    assert clean.shape == noise.shape == (8, 1, 8, 8) and timesteps.dtype == labels.dtype == torch.int64
    assert len(set(numbers_of(clean))) == 8  # different images
    assert (timesteps // 125).tolist() == list(range(8))  # one in each stratum


@pytest.mark.parametrize("kind", ["rows", "stream 3"])
@pytest.mark.parametrize(("batch_size", "rows"), [(4, 4), (50, 12)])
def test_processes_share_calibration_batches(
    kind: str, batch_size: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each decodes its block only, also where batches are as large as the data set."""
    images = make_images(tmp_path, kind)
    whole = calibrate(images, batch_size=2 * batch_size)
    open_image, opened = images.decoder.open, []
    monkeypatch.setattr(images.decoder, "open", lambda image: opened.append(image) or open_image(image))
    parts = [calibrate(images, batch_size=batch_size, rank=rank, world_size=2) for rank in range(2)]
    assert len(opened) == 2 * 2 * rows
    for number, batch in enumerate(whole):
        for values, *shares in zip(batch, parts[0][number], parts[1][number]):
            assert len(shares[0]) == rows and torch.equal(values, torch.cat(shares))


@pytest.mark.parametrize("kind", ["rows", "stream 1"])
def test_calibration_replaces_and_counts_broken_images(kind: str, tmp_path: Path) -> None:
    images = make_images(tmp_path, kind, numbered_images=[*NUMBERED[:9], None, *NUMBERED[10:]])
    broken = BrokenImages(1)
    ((clean, *_),) = calibrate(images, 1, 24, broken=broken)
    assert len(clean) == 24 and broken.to_list() == ["row 7" if kind == "rows" else "row 7 of shard 0"]
    with pytest.raises(ValueError, match="max_broken_images=0 is exceeded"):
        calibrate(images, 1, 24, broken=BrokenImages(0))


# arguments


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    images = make_images(tmp_path, "rows")
    with pytest.raises(ValueError, match="train_batch_size=25 is larger than the 24 training images"):
        loader(images, 25)
    with pytest.raises(ValueError, match="train_batch_size=13 on each of 2 processes is larger than the 24 training images"):
        loader(images, 13, world_size=2)
    with pytest.raises(ValueError, match="fewer training images than the 25 processes"):
        calibrate(images, world_size=25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "train_batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"first_batch": -1}, "first_batch=-1 must be at least 0"),
        ({"num_workers": -1}, "dataloader_num_workers=-1 must be at least 0"),
        ({"rank": 2, "world_size": 2}, r"rank=2 must be in \[0, 2\)"),
    ],
)
def test_numbers_out_of_range(options: dict, message: str, tmp_path: Path) -> None:
    images = make_images(tmp_path, "rows")
    with pytest.raises(ValueError, match=message):
        loader(images, **options)
