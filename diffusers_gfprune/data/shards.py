"""Rows of tensors in shards: files of limited size, each made once, and read row by row.

A shard is a safetensors file, named by a hash of everything that its rows depend on. It is written completely or not at all. A
run that was stopped keeps the shards that it has written, and later runs on the same data find them. Several processes divide
the shards among them. Files are mapped into memory, so that rows can be read that do not fit into memory together.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ..distributed import fail_together, gather_rows, made_by_first_rank, process_rank, world_size
from ..formatting import format_size
from ..metrics.cache import entry_name, holds_entry, write_entry

__all__ = ["ShardedRows", "Shards", "make_shards"]

FORMAT = 1  # of the tensors in shards; part of their names
# Limits of a shard: rows, and bytes
SHARD_ROWS, SHARD_BYTES = 1024, 2**27
OPEN_FILES = 64  # of each process
NAME_BYTES = 96  # of a file name, when processes exchange them


@dataclass(frozen=True)
class Shards:
    """Rows to make, in shards.

    Attributes:
        kind: First word of the files' names.
        count: Number of rows.
        row_bytes: Size of a row.
        describe: Everything that a span of rows depends on, as JSON values.
        make: Tensors of a span of rows, by name; each has one row for each.
        ready: Context in which `make` is called, which is entered only if there is something to make.
        title: Label of the progress bar.
        unit: What a row is, for the progress bar.
        argument: Name of the argument that gives the folder, for error messages.
        most_rows: Limit of the rows of a shard (default: `SHARD_ROWS`). A run that is stopped loses a shard at most.
    """

    kind: str
    count: int
    row_bytes: int
    describe: Callable[[range], Mapping]
    make: Callable[[range], Mapping[str, Tensor]]
    ready: Callable[[], AbstractContextManager]
    title: str
    unit: str
    argument: str = "encoding_cache_dir"
    most_rows: int | None = None

    @property
    def size(self) -> int:
        """Number of rows in each shard except the last one."""
        return max(1, min(self.most_rows or SHARD_ROWS, SHARD_BYTES // self.row_bytes))

    def spans(self) -> list[range]:
        """Rows of each shard."""
        return [range(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size)]


class ShardedRows:
    """Rows of tensors in shards. Files are opened when they are first read, in every process.

    Args:
        paths: Files of the shards, in order.
        size: Number of rows in each shard except the last one.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = tuple(paths), size
        self._files: OrderedDict[int, safe_open] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict()}

    def read(self, name: str, row: int) -> Tensor:
        """One row of a tensor."""
        shard, offset = divmod(row, self.size)
        return self._file(shard).get_slice(name)[offset : offset + 1][0]

    def column(self, name: str) -> Tensor:
        """All rows of a tensor, which must fit into memory."""
        return torch.cat([self._file(shard).get_tensor(name) for shard in range(len(self.paths))])

    def _file(self, shard: int) -> safe_open:
        if shard not in self._files:
            self._files[shard] = safe_open(self.paths[shard], framework="pt")
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]


def make_shards(shards: Shards, folder: Path) -> ShardedRows:
    """Make the shards that are missing. All processes must call this function; each makes every n-th shard.

    Args:
        shards: The rows.
        folder: Folder of the files.

    Returns:
        The rows of all processes.

    Raises:
        ValueError: The files cannot be written, or another process failed.
    """
    names, error = [], None
    try:
        keys = [
            {**shards.describe(span), "rows": len(span), "format": FORMAT}
            for span in shards.spans()[process_rank() :: world_size()]
        ]
        names = [entry_name(shards.kind, key) for key in keys]
    except Exception as caught:  # the other processes wait
        error = caught
    fail_together(error)
    _check_shared(folder, shards.argument)
    todo = [number for number, (name, key) in enumerate(zip(names, keys)) if not _is_made(folder / name, key)]
    spans = shards.spans()[process_rank() :: world_size()]
    _check_space(folder, sum(len(spans[number]) for number in todo) * shards.row_bytes, shards.argument)
    try:
        _make(shards, folder, [(folder / names[number], keys[number], spans[number]) for number in todo])
    except Exception as caught:
        error = caught
    fail_together(error)
    return ShardedRows([folder / name for name in _of_all_processes(names, len(shards.spans()))], shards.size)


def _is_made(path: Path, key: Mapping) -> bool:
    try:
        return path.exists() and holds_entry(path, key)
    except (OSError, SafetensorError):
        return False


def _make(shards: Shards, folder: Path, todo: Sequence[tuple[Path, Mapping, range]]) -> None:
    if not todo:
        return
    total = sum(len(span) for _, _, span in todo)
    hidden = process_rank() > 0
    with shards.ready(), tqdm(total=total, desc=shards.title, unit=f" {shards.unit}", disable=hidden) as bar:
        for path, key, span in todo:
            tensors = shards.make(span)
            try:
                write_entry(path, {name: values.contiguous() for name, values in tensors.items()}, key)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{shards.argument}={folder}: {path.name} cannot be written: {error}") from error
            bar.update(len(span))


def _check_space(folder: Path, needed: int, argument: str) -> None:
    """Check that a folder can be written, and that its disk has space for the files of all processes."""
    error = None
    try:
        needed = int(gather_rows(torch.tensor([needed])).sum())
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            error = ValueError(
                f"{argument}={folder} needs {format_size(needed, 0)}, but the disk has {format_size(free, 0)} free"
            )
    except OSError as caught:
        error = ValueError(f"{argument}={folder} cannot be written: {caught.strerror}")
    fail_together(error)


def _check_shared(folder: Path, argument: str) -> None:
    """Check that all processes see the same folder.

    Raises:
        ValueError: It cannot be written, or is on a disk of one machine, and there are processes on others.
    """
    if world_size() == 1:
        return

    def make() -> dict[str, str]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(dir=folder, prefix=".shared-")
        except OSError as error:
            raise ValueError(f"{argument}={folder} cannot be written: {error.strerror}") from error
        os.close(handle)
        return {"name": Path(path).name}

    seen = folder / made_by_first_rank(make)["name"]
    missing = ValueError(f"{argument}={folder} must be on a file system that all processes share")
    try:
        fail_together(None if seen.exists() else missing)
    finally:
        if process_rank() == 0:
            seen.unlink(missing_ok=True)


def _of_all_processes(names: Sequence[str], count: int) -> list[str]:
    """File names of all processes, in the order of shards."""
    processes = world_size()
    rows = torch.zeros(-(-count // processes), NAME_BYTES, dtype=torch.uint8)
    for row, name in zip(rows, names):
        row[: len(name)] = torch.tensor(list(name.encode()), dtype=torch.uint8)
    gathered = gather_rows(rows).view(processes, -1, NAME_BYTES)
    found = [gathered[number % processes, number // processes] for number in range(count)]
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in found]
