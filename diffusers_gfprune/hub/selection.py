"""Which files of a run are pushed, and the check that they name no token and no path of this machine."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..errors import TOKEN, one_line
from ..fingerprints import tensors_fingerprint
from ..loading.pipeline_files import file_patterns, is_unchanged
from ..loading.pipeline_layouts import PACKAGE, components_of
from ..remote.pipeline_prune_ddpm import COMPANIONS, weight_files
from ..reports.results import read_results

__all__ = ["check_measured", "check_nothing_private", "files_to_push", "read_json", "selected"]

# Paths in text below folders that hold private ones: other words with slashes are parts of links, formulas and code
PRIVATE = re.compile(
    r"(?:^|(?<=[\s(\"'`=:])|(?<=file://))/(?:home|Users|root|mnt|media|data|scratch|workspace|Volumes)(?:/[\w.~-]+)+", re.M
)
NEEDED = ("model_index.json", "scheduler/scheduler_config.json", "pruning_report.json", "results.json")


def files_to_push(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Select the files of a run to push.

    Args:
        folder: A finished run: a pruned pipeline with `results.json` and `pruning_report.json`.

    Returns:
        Relative paths of the files to push, and of the files to leave out, sorted.

    Raises:
        ValueError: The folder is not a finished run, or its weights are damaged.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"folder={folder} is not a folder")
    going, left_out = selected(root)
    present = [*going, *left_out]
    _check_there(folder, NEEDED, present)
    denoiser = _denoiser_of(root)
    _check_there(folder, (f"{denoiser}/config.json", f"{denoiser}/{PACKAGE}.py"), present)
    if not any(fnmatch.fnmatchcase(name, f"{denoiser}/*.safetensors") for name in going):
        raise ValueError(f"folder={folder} has no weights: {denoiser}/diffusion_pytorch_model.safetensors is missing")
    for name in [name for name in going if name.endswith(".safetensors")]:
        try:
            with safe_open(root / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{root / name} is damaged: {one_line(error)}") from error
    return going, left_out


def check_measured(folder: str | os.PathLike) -> None:
    """Check that the figures of a run are those of its weights.

    Weights in another precision than the measured ones cannot be told from others, and pass. So do those of results that do
    not have `weights`, as of earlier versions.

    Args:
        folder: A finished run (see `files_to_push`).

    Raises:
        ValueError: They are figures of other weights, or cannot be read.
    """
    root, tensors = Path(folder), {}
    denoiser, results = _denoiser_of(root), read_results(root)
    if results.model.weights is None:
        return
    for path in weight_files(root / denoiser):
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    if dtypes == {results.evaluation.get("dtype")} and tensors_fingerprint(tensors) != results.model.weights:
        raise ValueError(
            f"folder={folder}: its results.json is of other weights than those in {denoiser}: measure these with "
            f"training/evaluate.py --update_model_card, or push the folder that was measured"
        )


def _denoiser_of(root: Path) -> str:
    """Name of the component that is a pruned model.

    Raises:
        ValueError: There is none.
    """
    components = components_of(read_json(root / "model_index.json"))
    denoisers = [name for name, (library, _) in components.items() if library == PACKAGE]
    if not denoisers:
        classes = ", ".join(f"{name}: {class_name}" for name, (_, class_name) in components.items())
        raise ValueError(f"folder={root} does not contain a pruned model: its model_index.json has {classes}")
    return denoisers[0]


def _check_there(folder: str | os.PathLike, needed: Sequence[str], present: Sequence[str]) -> None:
    missing = [name for name in needed if name not in present]
    if missing:
        raise ValueError(f"folder={folder} is not a finished pruning run: it has no {missing[0]}")


def _index(root: Path) -> dict:
    """The content of `model_index.json`; empty if there is none."""
    path = root / "model_index.json"
    return read_json(path) if path.is_file() else {}


def selected(root: Path) -> tuple[list[str], list[str]]:
    """Relative paths of the files of a run that are pushed, and of the others, sorted."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    patterns = (*COMPANIONS, *file_patterns(_index(root)))
    going = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return going, [name for name in names if name not in going]


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


def _strings(value: object) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def check_nothing_private(folder: str | os.PathLike, names: Sequence[str], token: str | None = None) -> None:
    """Check that files contain no access token and no path of this machine.

    Args:
        folder: Folder of the files.
        names: Relative paths; only cards, JSON and YAML are read.
        token: The token in use, which is searched for as well.

    Raises:
        ValueError: A file contains a token or a path.
    """
    root = Path(folder).absolute()
    # Short paths such as / or /root would match unrelated text
    places = {str(place) for place in (Path.home(), Path.cwd(), root, root.resolve()) if len(place.parts) > 2}
    index = _index(root)
    for name in names:
        if not name.endswith((".md", ".json", ".yaml")):
            continue
        text = (root / name).read_text("utf-8")
        if TOKEN.search(text) or (token and token in text):
            raise ValueError(f"{root / name} contains an access token: remove it before you push")
        private = [place for place in sorted(places) if place in text]
        if name.endswith(".md"):
            private += [path.rstrip(".") for path in PRIVATE.findall(text)]
        if name.endswith(".json") and not is_unchanged(index, name):
            private += [string for string in _strings(read_json(root / name)) if os.path.isabs(string)]
        if private:
            raise ValueError(f"{root / name} contains the path {private[0]} of this machine: remove it before you push")
