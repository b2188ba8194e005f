"""Checkpoints: the whole state of a run as safetensors and JSON, there complete or not at all.

    checkpoint-<step>/
        checkpoint.json      format, identity of the run, settings, size and CRC-32 of every other file
        state.json           numbers: step, history, curves, position in the data
        <part>.safetensors   tensors: model, optimizer, ema, pruner

A checkpoint is written under a hidden name, flushed to the disk and then renamed, so that a process killed at any instant
leaves either none or a whole one. What happens to it later (a copy cut short, a full disk, a flipped bit) shows in the
checksums, and the checkpoint before it is taken instead. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "changed_settings"]

FORMAT_VERSION = 1
MANIFEST, STATE = "checkpoint.json", "state.json"
NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or is damaged."""


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: Its folder.
        step: Training steps done.
        identity: What makes the run this run and no other, JSON values by name.
        settings: What may be changed when a run goes on, JSON values by argument name.
        tensors: By part and name, on the CPU.
        values: Everything else, JSON.
    """

    path: Path
    step: int
    identity: dict
    settings: dict
    tensors: dict[str, dict[str, Tensor]]
    values: dict


def _flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk, not only in memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: contiguous, on the CPU, none sharing memory with another."""
    packed, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        packed[name] = tensor
    return packed


def changed_settings(before: Mapping, now: Mapping) -> list[str]:
    """One line for every name whose value differs, with both values."""
    names = sorted({*before, *now}, key=str)
    return [f"{n} was {before.get(n)}, is {now.get(n)}" for n in names if before.get(n) != now.get(n)]


class Checkpoints:
    """The checkpoints of a run, in one folder.

    Args:
        folder: Where they lie; made when the first is saved.
        total_limit: How many are kept, newest first (0: all of them).
    """

    def __init__(self, folder: Path, total_limit: int = 0) -> None:
        self.folder, self.total_limit = folder, total_limit

    def paths(self) -> list[Path]:
        """All checkpoints, newest first, damaged ones included."""
        if not self.folder.is_dir():
            return []
        by_step = {int(match[1]): path for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name))}
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    def save(
        self, step: int, identity: Mapping, settings: Mapping, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping
    ) -> Path:
        """Write the checkpoint of a step, and remove the oldest beyond the limit once it is there.

        Args:
            step: Training steps done.
            identity: JSON values that a run must share to go on from here.
            settings: JSON values that may change.
            tensors: By part (a file name without ending) and name.
            values: Everything else, JSON.

        Returns:
            Its folder.

        Raises:
            CheckpointError: It cannot be written, say because the disk is full. Earlier ones are as they were.
        """
        path = self.folder / f"checkpoint-{step}"
        fresh = self.folder / f".{path.name}.saving"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            for part, content in tensors.items():
                save_file(_packed(content), fresh / f"{part}.safetensors")
            (fresh / STATE).write_text(json.dumps(dict(values), allow_nan=False))
            files = {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(fresh.iterdir())}
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "identity": dict(identity),
                "settings": dict(settings),
                "files": files,
            }
            (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n")
            for written in (*fresh.iterdir(), fresh):
                _flush(written)
            self._remove(path)  # of the same step, from before a resume
            os.replace(fresh, path)
            _flush(self.folder)
        except BaseException as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError)):
                raise CheckpointError(f"checkpoint-{step} could not be saved in {self.folder}: {error}") from error
            raise
        if self.total_limit:
            for old in self.paths()[self.total_limit :]:
                self._remove(old)
        return path

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint; half of one never stands under its name."""
        if path.exists():
            leaving = path.with_name(f".{path.name}.removing")
            shutil.rmtree(leaving, ignore_errors=True)
            os.replace(path, leaving)
            shutil.rmtree(leaving, ignore_errors=True)

    def clear(self) -> None:
        """Remove all checkpoints, and what a killed process left half-written."""
        for path in self.paths():
            self._remove(path)
        for left in self.folder.glob(".checkpoint-*") if self.folder.is_dir() else ():
            shutil.rmtree(left, ignore_errors=True)

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            CheckpointError: A file is missing, shorter than it was, or changed, or the format is another one.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            if manifest["format_version"] != FORMAT_VERSION:
                raise CheckpointError(f"{path} has format_version={manifest['format_version']}, not {FORMAT_VERSION}")
            for name, expected in manifest["files"].items():
                size = (path / name).stat().st_size
                if size != expected["bytes"]:
                    raise CheckpointError(f"{path / name} has {size} bytes, not {expected['bytes']}")
                if _crc32(path / name) != expected["crc32"]:
                    raise CheckpointError(f"{path / name} is damaged: its checksum is not the one it was saved with")
            parts = [name for name in manifest["files"] if name.endswith(".safetensors")]
            tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in parts}
            values = json.loads((path / STATE).read_text())
            return Checkpoint(path, manifest["step"], manifest["identity"], manifest["settings"], tensors, values)
        except (OSError, SafetensorError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def find(self, which: str, warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr)) -> Checkpoint | None:
        """The checkpoint to go on from.

        Args:
            which: `"latest"`, the name of a checkpoint in the folder, or a path.
            warn: Told about every damaged checkpoint that is passed over.

        Returns:
            The checkpoint; None if `"latest"` was asked for and there is none at all.

        Raises:
            CheckpointError: The one asked for is missing or damaged, or all of them are.
        """
        if which != "latest":
            path = self.folder / which if (self.folder / which).is_dir() else Path(which)
            if not path.is_dir():
                known = ", ".join(path.name for path in self.paths()) or "none"
                raise CheckpointError(f"resume_from_checkpoint={which} is no checkpoint; {self.folder} holds {known}")
            return self.load(path)
        paths = self.paths()
        for path in paths:
            try:
                return self.load(path)
            except CheckpointError as error:
                warn(f"warning: {error}; looking for the checkpoint before it")
        if paths:
            raise CheckpointError(f"resume_from_checkpoint=latest: all {len(paths)} checkpoints in {self.folder} are damaged")
        return None

    @staticmethod
    def check_identity(checkpoint: Checkpoint, identity: Mapping) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            ValueError: Something differs, all of which is named.
        """
        differing = changed_settings(checkpoint.identity, json.loads(json.dumps(dict(identity))))
        if differing:
            shown = "; ".join(differing[:8]) + (f"; and {len(differing) - 8} more" if len(differing) > 8 else "")
            raise ValueError(f"{checkpoint.path} is a checkpoint of another run: {shown}")
