"""Components of a pipeline: loaded from safetensors with strict checks, or copied.

Nothing of a repository is run, and no pickle is read. A model is loaded if its class is one of those that its place allows and
all of its weights are there, fit its config and are finite: Diffusers and transformers initialize missing weights randomly,
with a warning only.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

__all__ = [
    *("check_copied", "component_folder", "copied_files", "copy_component", "load_model", "read_config", "variant_of"),
    *("variant_in", "variant_to_load"),
]

logger = logging.getLogger(__name__)

# Names of weight files in Diffusers and in transformers
STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".h5", ".msgpack", ".pkl", ".pt", ".pth")
# Files of components without pickles and code
COPIED = (".json", ".model", ".safetensors", ".txt")
SETTINGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")
# Entries of these files that say where a model or tokenizer was loaded from
PLACES = ("_name_or_path", "name_or_path")
# Buffers of text encoders in old repositories; later versions of transformers compute them
IGNORED = ("position_ids",)


def component_folder(folder: Path, name: str) -> Path:
    """Folder of a component; old repositories have no subfolders."""
    return folder / name if (folder / name).is_dir() else folder


def variant_of(file: str) -> str | None:
    """Variant of a weights file: `""` for the default, None if it is not a weights file in safetensors format.

    Diffusers also loads shards in its earlier naming, `<stem>-00001-of-00002.fp16.safetensors`.
    """
    match = re.fullmatch(
        rf"(?:{'|'.join(STEMS)})(?:\.(?P<plain>[\w-]+?))?(?:-\d+-of-\d+(?:\.(?P<earlier>[\w-]+))?)?\.safetensors"
        r"(?:(?:\.(?P<earlier_index>[\w-]+))?\.index(?:\.(?P<index>[\w-]+))?\.json)?",
        file,
    )
    return None if match is None else next(filter(None, match.groups()), "")


def variant_to_load(variants: Iterable[str | None], component: str) -> str | None:
    """The only variant with weights; None if there are default weights or no weights.

    Raises:
        ValueError: There are several variants and no default weights.
    """
    present = sorted({variant for variant in variants if variant is not None})
    if "" not in present and len(present) > 1:
        raise ValueError(
            f"its {component} has weights of the variants {', '.join(present)} and no default weights: keep one variant"
        )
    return present[0] if present and "" not in present else None


def variant_in(folder: Path, component: str) -> str | None:
    """The only variant with weights in a folder; None if there are default weights or no weights.

    Raises:
        ValueError: There are several variants and no default weights.
    """
    return variant_to_load((variant_of(path.name) for path in folder.iterdir()), component)


def _checked_variant(folder: Path, component: str) -> str | None:
    """The variant to load.

    Raises:
        ValueError: The component has no safetensors, several variants, or an index that names other files.
    """
    files = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES or variant_of(path.name) is not None)
    if all(variant_of(file) is None for file in files):
        raise ValueError(f"its {component} has {', '.join(files) or 'no weights'}: only safetensors are loaded, not pickles")
    for file in files:
        if file.endswith(".json"):
            _check_index(folder / file, component)
    return variant_in(folder, component)


def _check_index(path: Path, component: str) -> None:
    """Check that an index of sharded weights names safetensors beside it.

    Raises:
        ValueError: It is malformed, or names another file.
    """
    for name in sorted(set(_weight_map(path, component).values())):
        if variant_of(name) is None or name.endswith(".json"):
            raise ValueError(f"its {component} has {path.name}, which names {name}: only safetensors beside it are loaded")


def _weight_map(path: Path, component: str) -> dict[str, str]:
    """Files of weights by name, from an index of sharded weights.

    Raises:
        ValueError: The index is malformed.
    """
    try:
        found = read_config(path).get("weight_map")
    except ValueError:  # no JSON, or no UTF-8
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"its {component} has {path.name}, which is no index: weight_map must be an object of file names")
    return found


def load_model(folder: Path, component: str, class_name: str, classes: Mapping[str, type[nn.Module]]) -> nn.Module:
    """Load the model of a component.

    Args:
        folder: Folder of the pipeline.
        component: Name of the component.
        class_name: Its class in `model_index.json`.
        classes: Accepted classes by name.

    Returns:
        The model on the CPU, in float32.

    Raises:
        ValueError: The class is not accepted, or weights are missing, damaged, pickled, of a wrong shape or not finite.
    """
    if class_name not in classes:
        raise ValueError(f"its {component} is a {class_name}, not a {' or '.join(classes)}")
    folder = component_folder(folder, component)
    variant = _checked_variant(folder, component)
    if variant is not None:
        logger.warning("the %s has weights of the variant %s only: they are loaded in float32", component, variant)
    model, info = classes[class_name].from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, variant=variant, local_files_only=True
    )
    wrong = [str(key) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[what]]
    wrong = sorted(key for key in wrong if not key.endswith(IGNORED))
    if wrong:
        raise ValueError(f"{len(wrong)} weights of its {component} do not fit its config, first {wrong[0]}")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"the weight {name} of its {component} holds values that are not finite (NaN or infinity)")
    return model.float()


def read_config(path: Path) -> dict:
    """Content of a JSON file of a component; empty if it does not hold an object.

    Raises:
        ValueError: It is not JSON.
    """
    content = json.loads(path.read_text("utf-8"))
    return content if isinstance(content, dict) else {}


def copied_files(source: Path, component: str) -> list[Path]:
    """Files of a component that a pipeline loads: safetensors, configurations and vocabularies."""
    return sorted(path for path in (source / component).iterdir() if path.is_file() and path.suffix in COPIED)


def copy_component(
    source: Path, folder: Path, component: str, config: Mapping[str, object] | None = None, weights: bool = True
) -> None:
    """Copy the files of a component that a pipeline loads.

    They stay as they are, with two exceptions. Local folders that a component was loaded from are left out. Weights of a
    variant become the default weights if there are no others: pipelines are loaded without naming a variant.

    Args:
        source: Folder of the pipeline.
        folder: Folder of the copy.
        component: Name of the component.
        config: Entries to set in its `config.json` or `scheduler_config.json`.
        weights: Whether weights are copied, too.
    """
    variant, target = variant_in(source / component, component), folder / component
    target.mkdir(parents=True, exist_ok=True)
    for path in copied_files(source, component):
        if path.suffix == ".safetensors":
            if weights:
                shutil.copyfile(path, target / _default_name(path.name, variant))
            continue
        content = read_config(path) if path.name in SETTINGS or variant_of(path.name) is not None else {}
        changed = {key: value for key, value in content.items() if not (key in PLACES and _is_local(value))}
        changed |= config or {} if path.name in ("config.json", "scheduler_config.json") else {}
        if variant is not None and variant_of(path.name) == variant:  # an index
            names = _weight_map(path, component)
            changed["weight_map"] = {key: _default_name(name, variant) for key, name in names.items()}
        if changed == content:
            shutil.copyfile(path, target / path.name)
        else:
            text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
            (target / _default_name(path.name, variant)).write_text(text, "utf-8")


def _is_local(place: object) -> bool:
    return isinstance(place, str) and os.path.isabs(place)


def _default_name(file: str, variant: str | None) -> str:
    """Name of a weights file, or of its index, without the variant."""
    return file.replace(f".{variant}", "", 1) if variant is not None and variant_of(file) == variant else file


def check_copied(source: Path, component: str) -> None:
    """Check that a component can be copied.

    Raises:
        ValueError: The folder of the component is missing, has its weights as pickles or as several variants only, or has a
            malformed index of weights.
    """
    folder = source / component
    if not folder.is_dir():
        raise ValueError(f"its {component} has no folder")
    names = [path.name for path in folder.iterdir()]
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and all(variant_of(name) is None for name in names):
        raise ValueError(f"its {component} has {pickles[0]}: only safetensors are copied, not pickles")
    for name in sorted(names):
        if variant_of(name) is not None and name.endswith(".json"):
            _weight_map(folder / name, component)
    variant_in(folder, component)
