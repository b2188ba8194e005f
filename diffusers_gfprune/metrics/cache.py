"""Caches of expensive results, such as features of a data set or samples of a dense model.

An entry is one file, named by a hash of everything it depends on. The file also holds this description. Entries are written
atomically. A damaged entry, or one with another description, is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["TensorCache", "default_cache_dir", "entry_name", "holds_entry", "write_entry"]

ABANDONED_AFTER = 3600  # seconds until a file that is being written counts as left behind


def default_cache_dir() -> Path:
    """Folder next to the cache of the Hub's client."""
    return Path(constants.HF_HOME) / "diffusers_gfprune"


class TensorCache:
    """Cache of tensors.

    Args:
        folder: Folder of the entries; None: nothing is cached.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, kind: str, key: Mapping) -> Path | None:
        """The file of an entry, whether it is there or not."""
        return None if self.folder is None else self.folder / entry_name(kind, key)

    def has(self, kind: str, key: Mapping) -> bool:
        """Whether there is a file of an entry."""
        path = self.path(kind, key)
        return path is not None and path.exists()

    def get(self, kind: str, key: Mapping, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of an entry, computed if they are not cached.

        Args:
            kind: First word of the file's name.
            key: Everything that the tensors depend on, as JSON values.
            make: Computes the tensors.

        Returns:
            Tensors by name, on the CPU.
        """
        path = self.path(kind, key)
        if path is not None and path.exists():
            try:
                if holds_entry(path, key):
                    with safe_open(path, framework="pt") as file:
                        return {name: file.get_tensor(name) for name in file.keys()}
                print(f"warning: {path} describes something else and is made again", file=sys.stderr)
            except (OSError, SafetensorError) as error:
                print(f"warning: {path} cannot be read ({error}) and is made again", file=sys.stderr)
        made = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        if path is not None:
            _keep(path, made, key)
        return made


def _keep(path: Path, tensors: dict[str, Tensor], key: Mapping) -> None:
    """Write an entry. If that fails, warn and continue."""
    try:
        write_entry(path, tensors, key)
    except (OSError, SafetensorError) as error:
        print(f"warning: {path} cannot be written: {error}", file=sys.stderr)


def entry_name(kind: str, key: Mapping) -> str:
    """Name of the file of an entry."""
    return f"{kind}-{hashlib.sha256(_canonical(key).encode()).hexdigest()[:20]}.safetensors"


def holds_entry(path: Path, key: Mapping) -> bool:
    """Whether a file is complete and has the description `key`.

    Raises:
        OSError, SafetensorError: It cannot be read, or is damaged.
    """
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("key") == _canonical(key)


def write_entry(path: Path, tensors: Mapping[str, Tensor], key: Mapping) -> None:
    """Write the file of an entry completely, or not at all.

    Raises:
        OSError, SafetensorError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > ABANDONED_AFTER:
            left.unlink(missing_ok=True)
    handle, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(dict(tensors), fresh, metadata={"key": _canonical(key)})
        os.chmod(fresh, 0o666 & ~_umask())  # temporary files are for their owner alone, and the cache may be shared
        os.replace(fresh, path)
    finally:
        Path(fresh).unlink(missing_ok=True)


def _umask() -> int:
    """Permissions that new files do not get. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _canonical(key: Mapping) -> str:
    return json.dumps(dict(key), sort_keys=True, allow_nan=False)
