"""Files of a pruned pipeline: those of the denoiser and of the components that pruning did not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..remote.pipeline_prune_ddpm import MODEL, WEIGHTS
from .components import COPIED
from .pipeline_layouts import PACKAGE, components_of

__all__ = ["file_patterns", "is_unchanged", "weight_patterns"]

# Weights of text encoders
OF_TRANSFORMERS = ("unet/model*.safetensors", "unet/model*.safetensors.index*.json")


def _in_folder(patterns: Sequence[str], folder: str) -> list[str]:
    """Patterns of a `unet` for another component."""
    return [pattern.replace("unet/", f"{folder}/", 1) for pattern in patterns]


def file_patterns(index: Mapping) -> tuple[str, ...]:
    """Patterns of all files of a pipeline, relative to its folder.

    Args:
        index: Content of `model_index.json`; empty for a pipeline of pixels.
    """
    patterns = [*MODEL, *WEIGHTS]
    for name, (library, _) in components_of(index).items():
        if library == PACKAGE:
            patterns += _in_folder((*MODEL, *WEIGHTS), name)
        elif name != "scheduler":
            patterns += [f"{name}/*{suffix}" for suffix in COPIED]
    return tuple(patterns)


def is_unchanged(index: Mapping, name: str) -> bool:
    """Whether a file belongs to a component that pruning did not change; it may name paths of other machines."""
    library, _ = components_of(index).get(name.partition("/")[0], (PACKAGE, ""))
    return library != PACKAGE and not name.startswith("scheduler/")


def weight_patterns(names: Sequence[str]) -> list[str]:
    """Patterns of weights of an earlier version, in all folders in which `names` has weights."""
    folders = sorted({name.rpartition("/")[0] for name in names if name.endswith(".safetensors")} | {"unet"})
    return [pattern for folder in folders for pattern in _in_folder((*WEIGHTS, *OF_TRANSFORMERS), folder)]
