"""data/shards.py: a shard is made once, completely or not at all, and again only if something it depends on has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_gfprune.data import shards as module
from diffusers_gfprune.data.shards import Shards, make_shards
from diffusers_gfprune.diffusion.latents import LatentCodec
from helpers import encoding_worker
from helpers.latent_data import latent_spec, load_latents, noise_image, prompt_encoder, write_images
from helpers.latent_models import autoencoder

WORKER = Path(encoding_worker.__file__)
IMAGES = [noise_image(number) for number in range(10)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four rows."""
    monkeypatch.setattr(module, "SHARD_ROWS", 4)


class Squares:
    """Rows with squares of numbers, and how often they were made."""

    def __init__(self, count: int = 10, key: str = "squares", row_bytes: int = 4) -> None:
        self.made: list[range] = []
        self.shards = Shards("squares", count, row_bytes, self.describe, self.make, nullcontext, "squaring", "number")
        self.key = key

    def describe(self, span: range) -> dict:
        return {"what": self.key, "first": span.start}

    def make(self, span: range) -> dict[str, torch.Tensor]:
        self.made.append(span)
        return {"square": torch.tensor([[float(number) ** 2] for number in span])}


def test_processes_that_see_different_folders_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made. What the first process wrote is not here, as on another machine."""

    def fail(error: Exception | None) -> None:
        if error is not None:
            raise error

    squares = Squares()
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "fail_together", fail)
    monkeypatch.setattr(module, "gather_rows", lambda rows: rows)
    monkeypatch.setattr(module, "made_by_first_rank", lambda make: {"name": ".shared-elsewhere"})
    with pytest.raises(ValueError, match=f"encoding_cache_dir={tmp_path} must be on a file system that all processes share"):
        make_shards(squares.shards, tmp_path)
    assert not squares.made
    monkeypatch.setattr(module, "made_by_first_rank", lambda make: make())
    module._check_shared(tmp_path, "encoding_cache_dir")
    assert not list(tmp_path.iterdir())  # nothing is left of the trial
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="encoding_cache_dir=.*file/cache cannot be written: Not a directory"):
        module._check_shared(tmp_path / "file/cache", "encoding_cache_dir")


def test_rows_are_made_once(tmp_path: Path) -> None:
    squares = Squares()
    rows = make_shards(squares.shards, tmp_path / "new")
    assert squares.made == [range(4), range(4, 8), range(8, 10)]
    assert [rows.read("square", row).tolist() for row in range(10)] == [[row**2] for row in range(10)]
    assert rows.column("square")[:, 0].tolist() == [row**2 for row in range(10)]
    make_shards(squares.shards, tmp_path / "new")
    make_shards(Squares(8).shards, tmp_path / "new")  # the first two shards are the same
    assert len(squares.made) == 3 and len(list((tmp_path / "new").iterdir())) == 3
    make_shards(Squares(key="other").shards, tmp_path / "new")
    assert len(list((tmp_path / "new").iterdir())) == 6


def test_shards_are_limited_in_bytes() -> None:
    assert Squares(row_bytes=2**26).shards.size == 2 and Squares(row_bytes=2**30).shards.size == 1


@pytest.mark.parametrize("damage", ["delete", "truncate", "other"])
def test_missing_and_damaged_shards_are_made_again_with_the_same_bytes(damage: str, tmp_path: Path) -> None:
    rows = make_shards(Squares().shards, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    victim = rows.paths[1]
    content = {"truncate": before[victim.name][:-3], "other": rows.paths[0].read_bytes()}.get(damage)
    victim.unlink() if content is None else victim.write_bytes(content)
    squares = Squares()
    make_shards(squares.shards, tmp_path)
    assert squares.made == [range(4, 8)]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_stopped_run_keeps_its_shards(tmp_path: Path) -> None:
    squares = Squares()

    def make(span: range) -> dict[str, torch.Tensor]:
        if span.start == 8:
            raise KeyboardInterrupt
        return squares.make(span)

    with pytest.raises(KeyboardInterrupt):
        make_shards(Shards(**{**vars(squares.shards), "make": make}), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    rest = Squares()
    make_shards(rest.shards, tmp_path)
    assert rest.made == [range(8, 10)]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    name = make_shards(Squares().shards, tmp_path).paths[0].name
    (tmp_path / name).unlink()
    old, fresh = tmp_path / f".{name}.old", tmp_path / f".{name}.fresh"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    make_shards(Squares().shards, tmp_path)
    assert not old.exists() and fresh.exists()  # another process may be writing it


def test_too_little_space_is_one_line_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squares = Squares(row_bytes=2**25)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2**28}))
    with pytest.raises(ValueError, match=r"encoding_cache_dir=.* needs 320 MiB, but the disk has 256 MiB free"):
        make_shards(squares.shards, tmp_path)
    assert squares.made == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="encoding_cache_dir=.*/file/cache cannot be written: Not a directory"):
        make_shards(squares.shards, tmp_path / "file/cache")


def test_processes_divide_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one after the other: each makes every second shard, and knows the files of both."""
    first = Squares()
    monkeypatch.setattr(module, "world_size", lambda: 2)
    names = [path.name for path in make_all(tmp_path / "whole").paths]
    given = {0: names[::2], 1: names[1::2]}

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        other = torch.zeros_like(tensor)
        for row, name in zip(other, given[1]):
            row[: len(name)] = torch.tensor(list(name.encode()), dtype=torch.uint8)
        return torch.cat([tensor, other])

    monkeypatch.setattr(module, "gather_rows", gathered)
    rows = make_shards(first.shards, tmp_path / "divided")
    assert first.made == [range(4), range(8, 10)]
    assert [path.name for path in rows.paths] == names
    assert {path.name for path in (tmp_path / "divided").iterdir()} == set(given[0])


def make_all(folder: Path):
    """The shards of a single process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "world_size", lambda: 1)
        return make_shards(Squares().shards, folder)


# images and captions


def files(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "encoded").iterdir()}


def test_encoding_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", IMAGES, captions=list("abcdefghij"))
    spec = latent_spec(prompts=prompt_encoder(tmp_path / "tokens"))
    load_latents(folder, spec)
    before = files(tmp_path)
    assert sorted(name.partition("-")[0] for name in before) == ["captions"] * 3 + ["moments"] * 3
    for name in list(before)[::2]:
        (tmp_path / "encoded" / name).unlink()
    load_latents(folder, latent_spec(prompts=prompt_encoder(tmp_path / "tokens")))
    assert files(tmp_path) == before


def test_shards_follow_images_vae_and_preprocessing(tmp_path: Path) -> None:
    """Each change makes new shards of images, and only of those that it concerns."""
    folder = write_images(tmp_path / "data", IMAGES)

    def made(**arguments) -> int:
        before = set(files(tmp_path)) if (tmp_path / "encoded").exists() else set()
        load_latents(folder, latent_spec(arguments.pop("codec", None)), **arguments)
        return len(set(files(tmp_path)) - before)

    assert made() == 3
    assert made() == made(validation_images=3) == made(center_crop=True) == made(max_broken_images=7) == 0
    assert made(random_flip=True) == 3
    assert made(codec=LatentCodec(autoencoder(seed=1))) == 3
    write_images(folder, [*IMAGES[:9], noise_image(77)])
    assert made() == 1


def test_models_are_on_the_device_only_while_they_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / "data", IMAGES)
    moves: list[str] = []
    codec = LatentCodec(autoencoder())
    monkeypatch.setattr(codec.vae, "to", lambda device: moves.append(str(device)))
    images, _ = load_latents(folder, latent_spec(codec), prepare=False)
    assert moves == []
    images.prepare("cpu:0")
    assert moves == ["cpu:0", "cpu"]
    images.prepare("cpu:0")  # nothing is left to do
    load_latents(folder, latent_spec(codec))
    assert moves == ["cpu:0", "cpu"]  # all shards are there
    assert np.isfinite(images.split.moments.column("moments").numpy()).all()


def in_two_processes(folder: Path) -> list[tuple[int, str]]:
    """Exit statuses and errors of two processes that encode the same images together."""
    commands = [[sys.executable, str(WORKER), str(rank), "2", str(folder)] for rank in (0, 1)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in running]
    return [(process.returncode, error) for process, error in zip(running, errors)]


@pytest.mark.slow
def test_two_processes_encode_as_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write_images(folder / "data", IMAGES, captions=list("abcdefghij"))
        prompt_encoder(folder / "tokens")  # writes the files before two processes read them
    encoding_worker.main(0, 1, one)
    statuses, errors = zip(*in_two_processes(two))
    assert statuses == (0, 0), errors
    assert files(two) == files(one)
    parts = [load_file(two / f"rank{rank}.safetensors") for rank in (0, 1)]
    whole = load_file(one / "rank0.safetensors")
    assert all(torch.equal(torch.cat([part[name] for part in parts]), values) for name, values in whole.items())
