"""The files of a run: write checks, and a result that appears only when it is complete.

<output_dir>                 the complete result
.<output_dir>.incomplete     the result until it is complete
<output_dir>.training        during the run: checkpoint-<step>/, logs/, samples/
.<output_dir>.lock           during the run: keeps other runs away
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from .formatting import format_size

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["RunFolder", "write_json"]


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file. NaN and infinity raise a `ValueError`."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, inner ones first, as far as they are empty: others may use them already."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


class RunFolder:
    """A folder that appears under its name only when it is complete.

    Until then all files are written to a hidden folder beside it, so that write errors appear early.

    Attributes:
        path: The folder, which is no link.
        name: Its name as it was given, possibly that of a link.

    Args:
        output_dir: The folder. If it is a symbolic link, it is the folder that the link points to, and the link stays.
        overwrite: Whether to replace an existing folder, at the end of the run.
        inputs: Paths that the run reads and must not replace.
        marker: File at the top of every result. A folder without it is not replaced, unless it is empty. None: the caller
            checks what is replaced.
    """

    def __init__(
        self, output_dir: str, overwrite: bool, inputs: Sequence[str | None] = (), marker: str | None = "model_index.json"
    ) -> None:
        given = os.path.expanduser(output_dir)
        self.path, self.name = Path(os.path.realpath(given)), os.path.basename(os.path.abspath(given))
        self.overwrite, self.marker = overwrite, marker
        self.inputs = [Path(os.path.realpath(name)) for name in inputs if name and Path(name).exists()]
        self.staging = self._beside("incomplete")
        self.training = self.path.with_name(f"{self.path.name}.training")
        self._locked: IO[str] | None = None
        self._made: list[Path] = []
        self._prepared = False  # whether the files beside the folder are this run's

    def check(self, resuming: bool = False) -> None:
        """Check that the folder may be written.

        Args:
            resuming: Whether the run resumes from a checkpoint, and continues with the files beside the folder.

        Raises:
            ValueError: The folder exists and must not be replaced, contains inputs of the run or is no earlier result, or an
                earlier run left a model or checkpoints beside it.
        """
        for name in self.inputs:
            if self.path == name or self.path in name.parents:
                raise ValueError(f"output_dir={self.path} contains {name}, which this run reads")
        if self.path.exists() and not self.overwrite:
            raise ValueError(f"output_dir={self.path} already exists: choose another folder, or set overwrite_output_dir")
        self._check_replaced()
        if resuming:
            return
        for left in (self.staging, self._beside("saving"), self._beside("replaced")):
            if (left / "model_index.json").exists():
                raise ValueError(f"{left} contains the model of an unfinished run: move or remove it first")
        if any(self.training.glob("checkpoint-*")) and not self.overwrite:
            raise ValueError(
                f"{self.training} contains checkpoints of an unfinished run: resume with --resume_from_checkpoint latest, or "
                f"start again with --overwrite_output_dir"
            )

    def _check_replaced(self) -> None:
        """Check that a folder which would be replaced is an earlier result.

        Raises:
            ValueError: It is something else.
        """
        if self.marker is None:
            return
        held = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        if (self.path.exists() and not self.path.is_dir()) or (held and self.marker not in held):
            what = f"holds {held[0]} and no {self.marker}" if held else "is a file"
            raise ValueError(f"output_dir={self.path} {what}: it is not an earlier result, choose another folder")

    def check_not_training(self) -> None:
        """Check that no training run writes to this folder, for results of another kind.

        Raises:
            ValueError: One does.
        """
        if any(self.training.glob("*")):
            raise ValueError(f"output_dir={self.path} belongs to a training run, see {self.training}: choose another folder")

    def lock(self) -> None:
        """Keep other runs from writing to this folder, until this process ends or the context of this object is left.

        Raises:
            ValueError: Another run writes to it, or it cannot be written.
        """
        if fcntl is None or self._locked is not None:
            return
        self._made = [folder for folder in self.path.parents if not folder.exists()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self._beside("lock"), "a")  # noqa: SIM115 - closed in _unlock
        except OSError as error:
            raise ValueError(f"output_dir={self.path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(f"output_dir={self.path} is being written by another run: choose another folder") from error
        except OSError:  # a file system without locks
            pass
        self._locked = file

    def _unlock(self) -> None:
        if self._locked is not None:
            self._beside("lock").unlink(missing_ok=True)
            self._locked.close()
            self._locked = None
            _remove_empty(self._made)

    def check_outside(self, **folders: str | os.PathLike | None) -> None:
        """Check that folders which the run writes, by argument, are not in this one, which it replaces at its end.

        Raises:
            ValueError: One is.
        """
        for argument, name in folders.items():
            path = None if name is None else Path(os.path.realpath(name))
            if path is not None and (self.path == path or self.path in path.parents):
                raise ValueError(f"{argument}={path} must not be in output_dir={self.path}")

    def try_writing(self, size: int) -> None:
        """Write a file of `size` bytes next to the result's path, and delete it with the folders created for it.

        Free space does not account for quotas or missing write permissions.

        Raises:
            ValueError: The file cannot be written.
        """
        made = [folder for folder in self.path.parents if not folder.exists()]
        trial, chunk = self._beside("trial"), bytes(2**20)
        try:
            try:
                trial.parent.mkdir(parents=True, exist_ok=True)
                with open(trial, "wb") as file:
                    for start in range(0, size, len(chunk)):
                        file.write(chunk[: size - start])
                    os.fsync(file.fileno())
            finally:
                trial.unlink(missing_ok=True)
                _remove_empty(made)
        except OSError as error:
            raise ValueError(
                f"output_dir={self.path}: a file of the size of the weights, {format_size(size)}, cannot be written beside "
                f"it: {error.strerror}"
            ) from error

    def prepare(self, size: int = 0, resuming: bool = False) -> None:
        """Create the hidden folder, and check that the result fits on the disk.

        Args:
            size: Size of the model's files in bytes, if the result has one.
            resuming: Keep the files that an interrupted run saved there, also after an error.

        Raises:
            ValueError: The folder cannot be written, or the disk has too little space.
        """
        self.lock()
        try:
            self._prepared = True
            if not resuming:
                shutil.rmtree(self.staging, ignore_errors=True)
                shutil.rmtree(self.training, ignore_errors=True)
            self.staging.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.staging).free
        except OSError as error:
            raise ValueError(f"output_dir={self.path} cannot be written: {error.strerror}") from error
        needed = size + 64 * 2**20  # for pictures and reports
        if free < needed:
            if not resuming:
                self.discard()
            self._unlock()
            raise ValueError(
                f"output_dir={self.path} needs {format_size(needed, 0)}, but the disk has {format_size(free, 0)} free"
            )

    def save(self, write: Callable[[Path], object]) -> None:
        """Replace the content of the hidden folder by the files that `write` creates. After an error, it stays unchanged."""
        fresh, replaced = self._beside("saving"), self._beside("replaced")
        for leftover in (fresh, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            write(fresh)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        os.replace(self.staging, replaced)
        os.replace(fresh, self.staging)
        shutil.rmtree(replaced, ignore_errors=True)

    def _beside(self, what: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{what}")

    def publish(self) -> None:
        """Move the hidden folder to its final name, with logs and samples of the training, and delete the checkpoints."""
        for name in ("logs", "samples"):
            if (self.training / name).is_dir():  # copied: a run that is killed here still has them when it resumes
                shutil.rmtree(self.staging / name, ignore_errors=True)
                shutil.copytree(self.training / name, self.staging / name, symlinks=True)  # trackers link their latest run
        replaced = self._beside("replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.path.exists():
            if not self.overwrite:
                raise ValueError(f"output_dir={self.path} was created during the run; the result is in {self.staging}")
            os.replace(self.path, replaced)
        os.replace(self.staging, self.path)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(self.training, ignore_errors=True)

    def discard(self) -> None:
        """Delete the hidden folder."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        """After an error, keep a saved model or saved results, and delete the rest of this run's files."""
        if not self._prepared:  # they are those of another run, or of an earlier one
            self._unlock()
            return
        if error is not None and self.staging.exists():
            if (self.staging / "model_index.json").exists():
                print(f"the last saved pipeline is in {self.staging}", file=sys.stderr)
            elif (self.staging / "results.json").exists():  # a complete evaluation that could not be moved
                print(f"the results are in {self.staging}", file=sys.stderr)
            else:
                self.discard()
        if error is not None:
            with contextlib.suppress(OSError):
                self.training.rmdir()  # only if it is empty
        self._unlock()
