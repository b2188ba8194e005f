"""training/checkpointing.py: checkpoints are written atomically, and later damage is detected."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from diffusers_gfprune.training import checkpointing
from diffusers_gfprune.training.checkpointing import CheckpointError, Checkpoints, changed_settings

ROOT = Path(__file__).resolve().parents[2]


TENSORS = {
    "model": {"conv.weight": torch.arange(24.0).view(2, 3, 2, 2), "conv.bias": torch.tensor([0.5, -0.5])},
    "optimizer": {"step/conv.bias": torch.tensor(7.0), "state1/conv.bias": torch.tensor([1, 255], dtype=torch.uint8)},
}


def save(checkpoints: Checkpoints, step: int, **identity) -> Path:
    return checkpoints.save(step, identity, {"learning_rate": 1e-3}, TENSORS, {"curves": [step, 0.1 + 0.2]})


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run.training")
    path = save(checkpoints, 30, seed=3)
    assert files(tmp_path) == {
        f"run.training/checkpoint-30/{name}"
        for name in ("checkpoint.json", "state.json", "model.safetensors", "optimizer.safetensors")
    }
    loaded = checkpoints.load(path)
    assert (loaded.step, loaded.identity, loaded.settings) == (30, {"seed": 3}, {"learning_rate": 1e-3})
    assert loaded.values == {"curves": [30, 0.30000000000000004]}
    assert loaded.tensors.keys() == TENSORS.keys()
    for part, content in TENSORS.items():
        assert loaded.tensors[part].keys() == content.keys()
        for name, tensor in content.items():
            assert loaded.tensors[part][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[part][name], tensor)


def test_tensors_that_share_memory_or_are_views_are_saved(tmp_path: Path) -> None:
    table = torch.arange(256.0)
    picture = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    content = {"qmap1/a": table, "qmap1/b": table, "part": table[3:5], "picture": picture}
    checkpoints = Checkpoints(tmp_path)
    loaded = checkpoints.load(checkpoints.save(1, {}, {}, {"optimizer": content}, {}))
    for name, tensor in content.items():
        assert torch.equal(loaded.tensors["optimizer"][name], tensor)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, total_limit=2)
    for step in (5, 10, 20, 100):  # by number, not by name
        save(checkpoints, step)
    assert [path.name for path in checkpoints.paths()] == ["checkpoint-100", "checkpoint-20"]
    unlimited = Checkpoints(tmp_path / "all")
    for step in range(5):
        save(unlimited, step)
    assert len(unlimited.paths()) == 5


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_run_that_went_back_leaves_later_steps_behind(tmp_path: Path, limit: int) -> None:
    """They are not taken for the newest ones, nor kept in place of what was just saved."""
    before, checkpoints = Checkpoints(tmp_path), Checkpoints(tmp_path, limit)
    for step in (300, 400, 500):
        save(before, step)
    assert [path.name for path in checkpoints.later_than(300)] == ["checkpoint-500", "checkpoint-400"]
    save(checkpoints, 350)
    assert [path.name for path in checkpoints.paths()] == ["checkpoint-350", "checkpoint-300"][: limit or None]
    assert checkpoints.find("latest").step == 350


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, total_limit=1)
    save(checkpoints, 10)
    before = files(tmp_path)
    real = checkpointing.save_file

    def full(tensors, path) -> None:
        if path.name.startswith("optimizer"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpointing, "save_file", full)
    with pytest.raises(CheckpointError, match="checkpoint-20 could not be saved in .*No space left on device"):
        save(checkpoints, 20)
    assert files(tmp_path) == before
    assert checkpoints.find("latest").step == 10


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "checkpoint.json"])
@pytest.mark.parametrize("harm", ["truncated", "changed", "removed", "garbled"])
def test_damage_is_seen_and_the_checkpoint_before_is_taken(tmp_path: Path, name: str, harm: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    path = save(checkpoints, 20) / name
    content = path.read_bytes()
    if harm == "removed":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "garbled":  # also no UTF-8
        path.write_bytes(content[: len(content) // 2] + b"\xff" + content[len(content) // 2 + 1 :])
    elif name == "checkpoint.json":
        path.write_bytes(content.replace(b'"crc32": ', b'"crc32": 1'))
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said: list[str] = []
    assert checkpoints.find("latest", said.append).step == 10
    assert len(said) == 1 and "checkpoint-20" in said[0] and "trying the previous checkpoint" in said[0]
    with pytest.raises(CheckpointError, match="checkpoint-20"):
        checkpoints.find("checkpoint-20")
    with pytest.raises(CheckpointError, match="checkpoint-20"):
        checkpoints.find(str(tmp_path / "checkpoint-20"))


def test_nothing_sound_left_is_an_error_and_nothing_at_all_is_a_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run.training")
    assert checkpoints.find("latest") is None
    (save(checkpoints, 10) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints in .* are damaged"):
        checkpoints.find("latest", lambda text: None)
    with pytest.raises(CheckpointError, match="checkpoint=checkpoint-9 is not a checkpoint; .* holds checkpoint-10"):
        checkpoints.find("checkpoint-9")


def test_half_written_checkpoints_are_not_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = save(checkpoints, 10)
    path.rename(tmp_path / ".checkpoint-10.saving")
    (tmp_path / ".checkpoint-9.removing").mkdir()
    assert checkpoints.paths() == []
    save(checkpoints, 11)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-11"]


def test_what_differs_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    identity = {"seed": 0, "ratio": 0.5, "unet.block_out_channels": (48, 80)}
    checkpoint = checkpoints.load(checkpoints.save(1, identity, {}, {}, {}))
    checkpoints.check_identity(checkpoint, identity)  # a tuple is what JSON calls a list
    with pytest.raises(ValueError, match=r"checkpoint of another run: ratio was 0.5, is 0.3; seed was 0, is 1$"):
        checkpoints.check_identity(checkpoint, {**identity, "seed": 1, "ratio": 0.3})
    assert changed_settings({"a": 1, "b": None}, {"b": 2, "c": 3}) == [
        "a was 1, is None",
        "b was None, is 2",
        "c was None, is 3",
    ]


def test_a_changed_number_of_the_manifest_is_not_believed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    manifest = save(checkpoints, 20, seed=3) / "checkpoint.json"
    text = manifest.read_text()
    for before, after in (('"step": 20', '"step": 28'), ('"seed": 3', '"seed": 2')):
        assert text.count(before) == 1
        manifest.write_text(text.replace(before, after))
        with pytest.raises(CheckpointError, match="checkpoint.json is damaged: its checksum is not the one"):
            checkpoints.load(manifest.parent)
    content = json.loads(text)
    del content["crc32"]  # as older versions wrote it
    manifest.write_text(json.dumps(content))
    assert checkpoints.load(manifest.parent).step == 20


def test_another_format_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    manifest = save(checkpoints, 1) / "checkpoint.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    with pytest.raises(CheckpointError, match="format_version=2, not 1"):
        checkpoints.load(manifest.parent)


def test_not_finite_numbers_are_not_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError):
        checkpoints.save(1, {}, {}, {}, {"loss": float("nan")})
    assert checkpoints.paths() == []
