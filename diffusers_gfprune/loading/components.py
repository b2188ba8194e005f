"""Components of a pipeline: loaded from safetensors with strict checks, or copied.

Nothing of a repository is run, and no pickle is read. A model is loaded if its class is one of those that its place allows and
all of its weights are there, fit its config and are finite: Diffusers and transformers initialize missing weights randomly,
with a warning only.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

__all__ = [
    *("check_copied", "component_folder", "copied_files", "copy_component", "load_model", "variant_of", "variant_to_load"),
]

logger = logging.getLogger(__name__)

# Names of weight files in Diffusers and in transformers
STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".h5", ".msgpack", ".pkl", ".pt", ".pth")
# Files of components without pickles and code
COPIED = (".json", ".model", ".safetensors", ".txt")
# Buffers of text encoders in old repositories; later versions of transformers compute them
IGNORED = ("position_ids",)


def component_folder(folder: Path, name: str) -> Path:
    """Folder of a component; old repositories have no subfolders."""
    return folder / name if (folder / name).is_dir() else folder


def variant_of(file: str) -> str | None:
    """Variant of a weights file: `""` for the default, None if it is not a weights file in safetensors format."""
    match = re.fullmatch(
        rf"(?:{'|'.join(STEMS)})(?:\.(?P<plain>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors"
        r"(?:\.index(?:\.(?P<sharded>[\w-]+))?\.json)?",
        file,
    )
    return None if match is None else match["plain"] or match["sharded"] or ""


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


def _checked_variant(folder: Path, component: str) -> str | None:
    """The variant to load.

    Raises:
        ValueError: The component has no safetensors, or several variants.
    """
    files = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES or variant_of(path.name) is not None)
    if all(variant_of(file) is None for file in files):
        raise ValueError(f"its {component} has {', '.join(files) or 'no weights'}: only safetensors are loaded, not pickles")
    return variant_to_load(map(variant_of, files), component)


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


def copied_files(source: Path, component: str) -> list[Path]:
    """Files of a component that a pipeline loads: safetensors, configurations and vocabularies."""
    return sorted(path for path in (source / component).iterdir() if path.is_file() and path.suffix in COPIED)


def copy_component(source: Path, folder: Path, component: str) -> None:
    """Copy the files of a component that a pipeline loads."""
    for path in copied_files(source, component):
        (folder / component).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / component / path.name)


def check_copied(source: Path, component: str) -> None:
    """Check that a component can be copied.

    Raises:
        ValueError: The folder of the component is missing, or has its weights as pickles only.
    """
    folder = source / component
    if not folder.is_dir():
        raise ValueError(f"its {component} has no folder")
    names = [path.name for path in folder.iterdir()]
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles and all(variant_of(name) is None for name in names):
        raise ValueError(f"its {component} has {pickles[0]}: only safetensors are copied, not pickles")
