"""Provenance of a run for publication: base model, data set and command, without local paths or tokens."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache

from ..errors import HUB_ERRORS, one_line
from ..families.lookup import FAMILIES
from .model_card import LICENSES

__all__ = ["command_line", "describe_base_model", "describe_dataset", "installed_versions", "package_versions", "portable"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A folder of the Hub's cache
SNAPSHOT = re.compile(r"(?:^|[/\\])models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)")
SECRETS = ("--hub-token",)


def portable(value: object) -> object:
    """The last part of a local path. Other values, including relative paths below the current folder, are unchanged."""
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~") or ".." in Path(value).parts):
        return Path(value).name
    return value


def command_line(argv: Sequence[str], script: str = "training/prune_ddpm.py", num_processes: int = 1) -> str:
    """The command of a run for a shell, one argument per line, without tokens.

    Args:
        argv: Arguments of the script.
        script: The script.
        num_processes: Number of processes of the run.
    """
    parts: list[str] = []
    skip = False
    for word in argv:
        name, equals, value = word.partition("=")
        if skip or name.replace("_", "-") in SECRETS:  # both spellings are accepted arguments
            skip = not skip and not equals
            continue
        word = f"{name}={portable(value)}" if equals and name.startswith("--") else str(portable(word))
        if word.startswith("--") or not parts:
            parts.append(shlex.quote(word))
        else:
            parts[-1] += " " + shlex.quote(word)
    launch = "accelerate launch" if num_processes == 1 else f"accelerate launch --multi_gpu --num_processes {num_processes}"
    return " \\\n    ".join([f"{launch} {script}", *parts])


def _license(data: Mapping, hub_id: str | None = None) -> dict[str, str | None]:
    """The licence in the metadata of a card.

    Args:
        data: The metadata.
        hub_id: Repository of the card, which links may be relative to.

    Returns:
        `license`, an id in the Hub's spelling; None if the Hub does not know it. With `"other"`, also `license_name` and
        `license_link`, without which it says nothing, and is None.
    """
    license = data.get("license")
    license = license.lower() if isinstance(license, str) and license.lower() in LICENSES else None
    if license != "other":
        return {"license": license}
    name, link = data.get("license_name"), data.get("license_link")
    if isinstance(link, str) and not re.match(r"https?://", link):
        link = f"https://huggingface.co/{hub_id}/blob/main/{link.removeprefix('./')}" if hub_id else None
    if not isinstance(name, str) or not isinstance(link, str):
        return {"license": None}
    return {"license": license, "license_name": name, "license_link": link}


def _metadata(readme: Path) -> dict:
    """The metadata of a local card. Of one that cannot be read, it is empty, with a warning: a run does not depend on it."""
    try:
        return ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:  # the client passes on errors of its YAML parser
        print(f"warning: {readme} cannot be read, so its licence is not recorded: {one_line(error)}", file=sys.stderr)
        return {}


def describe_base_model(name_or_path: str, revision: str | None = None) -> dict[str, str | None]:
    """Name, Hub id, commit and licence of the dense model, as far as they are known. The model must be loaded before.

    Args:
        name_or_path: A Hub id or a local folder.
        revision: Branch, tag or commit on the Hub.

    Returns:
        `name`, and `hub_id`, `revision` and `license`, which are None if unknown. The licence `"other"` has `license_name` and
        `license_link`, too. A local folder also has `derived_from` if its files identify the models on the Hub that it was
        made from.
    """
    source = {"name": str(portable(name_or_path)), "hub_id": None, "revision": revision, "license": None}
    if os.path.isdir(name_or_path):
        source["revision"] = None  # a folder has none
        cached = SNAPSHOT.search(os.path.realpath(name_or_path))
        hub_id = None if cached is None else f"{cached[1]}/{cached[2]}"
        readme, data = Path(name_or_path) / "README.md", {}
        if readme.is_file():
            data = _metadata(readme)
            source |= _license(data, hub_id)
        if cached is not None:
            return {**source, "name": hub_id, "hub_id": hub_id, "revision": cached[3]}
        origins = _origins(Path(name_or_path), data.get("base_model"))
        return {**source, "derived_from": origins} if origins else source
    source["hub_id"] = name_or_path
    # The loaded files are in a folder named by their commit. A branch may have changed since.
    cached = try_to_load_from_cache(name_or_path, "model_index.json", revision=revision)
    if isinstance(cached, str):
        source["revision"] = Path(cached).parent.name
    try:
        info = HfApi().model_info(name_or_path, revision=source["revision"])
    except HUB_ERRORS:  # offline, with the model in the cache
        return source
    source["revision"] = info.sha
    source |= _license({} if info.card_data is None else info.card_data.to_dict(), name_or_path)
    return source


def _origins(folder: Path, base_model: object) -> list[str]:
    """Models on the Hub that a saved pipeline was made from: those on its card, or the one that it was loaded from.

    Diffusers saves where a model was loaded from. A path in the Hub's cache is reliable; a bare name may be a local folder.
    """
    named = base_model if isinstance(base_model, list) else [base_model]
    named = [name for name in named if isinstance(name, str) and HUB_ID.fullmatch(name)]
    denoisers = dict.fromkeys(f"{family.component}/config.json" for family in FAMILIES)
    for name in (*denoisers, "model_index.json"):
        if named:
            break
        try:
            origin = json.loads((folder / name).read_text("utf-8")).get("_name_or_path")
        except (OSError, ValueError, AttributeError):
            continue
        if not isinstance(origin, str):
            continue
        if (cached := SNAPSHOT.search(origin)) is not None:
            named = [f"{cached[1]}/{cached[2]}"]
        elif HUB_ID.fullmatch(origin) and isinstance(try_to_load_from_cache(origin, "model_index.json"), str):
            named = [origin]  # it was loaded from the Hub on this machine
    return named


def describe_dataset(
    dataset_name: str | None, train_data_dir: str | None, drawn: str | None = None
) -> dict[str, str | bool | None]:
    """The data set of a run.

    Args:
        dataset_name: A Hub id or a local folder.
        train_data_dir: A local folder.
        drawn: How the dense model drew the training images, in words. A data set is then for measurements only. None: it
            drew none.

    Returns:
        `name`; `hub_id`, which is None unless it is known; and with `drawn`: `drawn`, which is True, `sampler`, the given
        words, and `measured`, whether there is a data set for measurements.
    """
    if drawn is not None:
        measured = dataset_name is not None or train_data_dir is not None
        source = {"name": "images drawn by the dense model", "hub_id": None}
        source = describe_dataset(dataset_name, train_data_dir) if measured else source
        return {**source, "drawn": True, "sampler": drawn, "measured": measured}
    if dataset_name is not None and not os.path.exists(dataset_name) and HUB_ID.fullmatch(dataset_name):
        return {"name": dataset_name, "hub_id": dataset_name}
    return {"name": str(portable(dataset_name or train_data_dir)), "hub_id": None}


def package_versions(*more: str) -> dict[str, str | None]:
    """Versions of Python, of the packages that affect results, and of more packages (see `installed_versions`)."""
    names = ("diffusers-gfprune", "torch", "diffusers", "accelerate", "datasets", "huggingface_hub", "torch-pruning")
    return {"python": platform.python_version(), **installed_versions(*names, *more)}


def installed_versions(*packages: str) -> dict[str, str | None]:
    """Installed versions of packages, by name; None if a package is not installed."""
    return {name: _version(name) for name in packages}


@functools.cache  # files are read
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
