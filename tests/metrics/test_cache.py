"""metrics/cache.py: values are made once, and again if the file is invalid."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from diffusers_gfprune.metrics.cache import TensorCache

KEY = {"model": "a", "images": 3}


class Counting:
    """Makes a tensor, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"x": torch.arange(6.0).view(2, 3).T}


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    make, cache = Counting(), TensorCache(tmp_path / "new")
    for _ in range(2):
        assert torch.equal(cache.get("features", KEY, make)["x"], torch.arange(6.0).view(2, 3).T)
    assert make.calls == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == [cache.path("features", KEY).name]


def test_entries_have_the_permissions_of_other_files(tmp_path: Path) -> None:
    """A cache may be shared; temporary files are for their owner alone."""
    before = os.umask(0o027)
    try:
        TensorCache(tmp_path).get("features", KEY, Counting())
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o640]


def test_another_description_is_another_entry(tmp_path: Path) -> None:
    make, cache = Counting(), TensorCache(tmp_path)
    cache.get("features", KEY, make)
    cache.get("features", {**KEY, "images": 4}, make)
    cache.get("samples", KEY, make)
    assert make.calls == 3
    cache.get("features", dict(reversed(KEY.items())), make)  # the order of names does not matter
    assert make.calls == 3


def test_without_a_folder_nothing_is_kept() -> None:
    make = Counting()
    for _ in range(2):
        TensorCache(None).get("features", KEY, make)
    assert make.calls == 2


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", None])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: bytes | None, capsys: pytest.CaptureFixture) -> None:
    make, cache = Counting(), TensorCache(tmp_path)
    cache.get("features", KEY, make)
    path = cache.path("features", KEY)
    path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
    assert torch.equal(cache.get("features", KEY, make)["x"], make()["x"])
    assert "is made again" in capsys.readouterr().err
    before = make.calls
    cache.get("features", KEY, make)
    assert make.calls == before


def test_an_entry_under_the_wrong_name_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, cache = Counting(), TensorCache(tmp_path)
    cache.get("features", KEY, make)
    other = {**KEY, "images": 4}
    cache.path("features", KEY).rename(cache.path("features", other))
    cache.get("features", other, make)
    assert make.calls == 2
    assert "describes something else" in capsys.readouterr().err


def test_no_room_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    make = Counting()
    assert "x" in TensorCache(tmp_path / "file" / "cache").get("features", KEY, make)
    assert "cannot be written" in capsys.readouterr().err
