"""Checkpoints: the complete state of a run as safetensors and JSON, written atomically.

    checkpoint-<step>/
        checkpoint.json      format, identity of the run, settings, size and CRC-32 of every other file, and its own CRC-32
        state.json           numbers: step, history, curves, position in the data
        <part>.safetensors   tensors: model, optimizer, ema, pruner

A checkpoint is written under a hidden name, flushed to disk and then renamed: a process killed at any time leaves a complete
checkpoint or none. Later damage (an incomplete copy, a full disk, a flipped bit) is detected by checksums, and the previous
checkpoint is used instead. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "changed_settings"]

FORMAT_VERSION = 1
MANIFEST, STATE = "checkpoint.json", "state.json"
NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or is damaged."""


@dataclass
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        path: Folder of the checkpoint.
        step: Number of completed training steps.
        identity: Values that must not change when the run is resumed, JSON values by name.
        settings: Values that may change when the run is resumed, JSON values by argument name.
        tensors: Tensors by part and name, on the CPU.
        values: All other state, JSON.
    """

    path: Path
    step: int
    identity: dict
    settings: dict
    tensors: dict[str, dict[str, Tensor]]
    values: dict


def _flush(path: Path) -> None:
    """Flush a file or folder to disk. Some file systems cannot flush folders."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
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


def _crc32_of(manifest: Mapping) -> int:
    """Checksum of a manifest's values, without its own."""
    return zlib.crc32(json.dumps({name: value for name, value in manifest.items() if name != "crc32"}).encode())


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors as safetensors requires them: contiguous, on the CPU, without shared memory."""
    form = {"device": "cpu", "memory_format": torch.contiguous_format, "copy": True}
    return {name: tensor.detach().to(**form) for name, tensor in tensors.items()}


def changed_settings(before: Mapping, now: Mapping) -> list[str]:
    """One line for each name whose value differs, with both values."""
    names = sorted({*before, *now}, key=str)
    return [f"{n} was {before.get(n)}, is {now.get(n)}" for n in names if before.get(n) != now.get(n)]


class Checkpoints:
    """The checkpoints of a run, in one folder.

    Args:
        folder: Folder of the checkpoints, created when the first is saved.
        total_limit: Number of newest checkpoints to keep (0: all).
    """

    def __init__(self, folder: Path, total_limit: int = 0) -> None:
        self.folder, self.total_limit = folder, total_limit

    def paths(self) -> list[Path]:
        """All checkpoints, newest first, damaged ones included."""
        if not self.folder.is_dir():
            return []
        by_step = {int(match[1]): path for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name))}
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    def later_than(self, step: int) -> list[Path]:
        """Checkpoints of later steps, newest first."""
        return [path for path in self.paths() if int(NAME.fullmatch(path.name)[1]) > step]

    def save(
        self, step: int, identity: Mapping, settings: Mapping, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping
    ) -> Path:
        """Write the checkpoint of a step, then remove those of later steps, and the oldest ones beyond the limit.

        Later steps were left behind when the run was resumed from an earlier one, for example since they had diverged.

        Args:
            step: Number of completed training steps.
            identity: JSON values that must not change when the run is resumed.
            settings: JSON values that may change.
            tensors: Tensors by part (the file name without its extension) and name.
            values: All other state, JSON.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: It cannot be written, for example because the disk is full. Earlier checkpoints are unchanged.
        """
        path = self.folder / f"checkpoint-{step}"
        fresh = self.folder / f".{path.name}.saving"
        try:
            for left in self.folder.glob(".checkpoint-*"):  # by processes that were killed
                shutil.rmtree(left, ignore_errors=True)
            fresh.mkdir(parents=True)
            for part, content in tensors.items():
                save_file(_packed(content), fresh / f"{part}.safetensors")
            (fresh / STATE).write_text(json.dumps(dict(values), allow_nan=False))
            files = {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(fresh.iterdir())}
            manifest = {"format_version": FORMAT_VERSION, "step": step, "identity": dict(identity)}
            manifest |= {"settings": dict(settings), "files": files}
            manifest["crc32"] = _crc32_of(manifest)
            (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n")
            for written in (*fresh.iterdir(), fresh):
                _flush(written)
            self._remove(path)  # the same step, saved before a resume
            os.replace(fresh, path)
            _flush(self.folder)
        except BaseException as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError)):
                raise CheckpointError(f"checkpoint-{step} could not be saved in {self.folder}: {error}") from error
            raise
        for later in self.later_than(step):
            self._remove(later)
        if self.total_limit:
            for old in self.paths()[self.total_limit :]:
                self._remove(old)
        return path

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint. It is renamed first, so that no incomplete checkpoint has its name."""
        if path.exists():
            leaving = path.with_name(f".{path.name}.removing")
            shutil.rmtree(leaving, ignore_errors=True)
            os.replace(path, leaving)
            shutil.rmtree(leaving, ignore_errors=True)

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            CheckpointError: A file is missing, truncated or changed, or the format version differs.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            if manifest["format_version"] != FORMAT_VERSION:
                raise CheckpointError(f"{path} has format_version={manifest['format_version']}, not {FORMAT_VERSION}")
            if manifest.get("crc32", _crc32_of(manifest)) != _crc32_of(manifest):  # older checkpoints have none
                raise CheckpointError(f"{path / MANIFEST} is damaged: its checksum is not the one it was saved with")
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
        except CheckpointError:
            raise
        except (OSError, SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:  # JSON, UTF-8
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def find(self, which: str, warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr)) -> Checkpoint | None:
        """Load the checkpoint to resume from.

        Args:
            which: `"latest"`, the name of a checkpoint in the folder, or a path.
            warn: Called with a message for each damaged checkpoint that is skipped.

        Returns:
            The checkpoint; None for `"latest"` if there are no checkpoints.

        Raises:
            CheckpointError: The requested checkpoint is missing or damaged, or all checkpoints are damaged.
        """
        if which != "latest":
            path = self.folder / which if (self.folder / which).is_dir() else Path(which)
            if not path.is_dir():
                known = ", ".join(path.name for path in self.paths()) or "none"
                raise CheckpointError(f"resume_from_checkpoint={which} is not a checkpoint; {self.folder} holds {known}")
            return self.load(path)
        paths = self.paths()
        for path in paths:
            try:
                return self.load(path)
            except CheckpointError as error:
                warn(f"warning: {error}; trying the previous checkpoint")
        if paths:
            raise CheckpointError(f"resume_from_checkpoint=latest: all {len(paths)} checkpoints in {self.folder} are damaged")
        return None

    @staticmethod
    def check_identity(checkpoint: Checkpoint, identity: Mapping) -> None:
        """Refuse a checkpoint of another run.

        Raises:
            ValueError: Values differ; the message lists them.
        """
        differing = changed_settings(checkpoint.identity, json.loads(json.dumps(dict(identity))))
        if differing:
            shown = "; ".join(differing[:8]) + (f"; and {len(differing) - 8} more" if len(differing) > 8 else "")
            raise ValueError(f"{checkpoint.path} is a checkpoint of another run: {shown}")
