"""Load trained pipelines with strict checks, and save them in their own class.

A pipeline can be pruned if its class and components in `model_index.json` and the class of its scheduler
(`diffusion.process`) are supported, and its weights fit its config. Nothing else is loaded: code of the repository does not
run, and pickles are not read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ModelMixin
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError

from . import PruneDDPMPipeline
from .diffusion.process import check_scheduler_class, training_process
from .errors import HUB_ERRORS, first_line
from .families.lookup import FAMILIES, family_of
from .remote.pipeline_prune_ddpm import check_pipeline_index

__all__ = ["TrainedPipeline", "load_pipeline"]

logger = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model"
# Errors that loading a malformed repository may raise
_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(SafetensorError, HfHubHTTPError, HFValidationError),
)


class TrainedPipeline(NamedTuple):
    """A trained UNet with the other components of its pipeline.

    Attributes:
        unet: The model, on the CPU, in float32.
        scheduler: The scheduler, with the class and configuration in which it was saved.
        process: Scheduler that adds the noise of the training.
        kind: Class of the pipeline.
    """

    unet: ModelMixin
    scheduler: object
    process: DDPMScheduler
    kind: type[DiffusionPipeline]

    def save(self, unet: ModelMixin, folder: str | os.PathLike) -> None:
        """Save the pipeline with another UNet.

        Args:
            unet: The pruned model.
            folder: Output folder.
        """
        # It is saved as a plain DDPMPipeline, with the file of a pipeline class that can prune again
        kind = PruneDDPMPipeline if self.kind is DDPMPipeline else self.kind
        kind(unet=unet, scheduler=self.scheduler).save_pretrained(folder)


def load_pipeline(
    name_or_path: str,
    revision: str | None = None,
    argument: str = "pretrained_model_name_or_path",
    pruned: bool = False,
) -> TrainedPipeline:
    """Load a trained DDPM.

    Args:
        name_or_path: A Hub id or a local folder, with the components in subfolders or, as in old repositories, at the root.
        revision: Branch, tag or commit on the Hub.
        argument: Name of the argument, for error messages.
        pruned: Whether a pruned model is accepted, too; it cannot be pruned again.

    Raises:
        ValueError: The pipeline does not exist or cannot be pruned, or its weights are missing, damaged, pickled or of a
            wrong shape.
    """
    argument = f"{argument}={name_or_path}"
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not Path(name_or_path).is_dir():
        raise ValueError(f"{argument} is not a folder")
    if revision is not None and Path(name_or_path).is_dir():
        raise ValueError(f"{argument} is a folder: revision={revision} applies to Hub repositories only")
    with _one_line(argument):
        folder = Path(name_or_path) if Path(name_or_path).is_dir() else _download(name_or_path, revision)
        if not (folder / "model_index.json").is_file():
            raise ValueError("it has no model_index.json: a UNet without its scheduler is not enough")
        index = json.loads((folder / "model_index.json").read_text())
        kind = getattr(diffusers, check_pipeline_index(index).replace("PruneDDPM", "DDPM"))
        scheduler = _load_scheduler(folder, index)
        process = training_process(scheduler)
        unet, info = _load_unet(folder, index, pruned)
        family_of(unet).check_timesteps(unet.config, process.config.num_train_timesteps)
    # Diffusers initializes missing weights randomly, with a warning only.
    wrong = sorted(str(key) for what in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[what])
    if wrong:
        raise ValueError(f"{argument}: {len(wrong)} weights do not fit its config, first {wrong[0]}")
    for name, parameter in unet.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{argument}: the weight {name} holds values that are not finite (NaN or infinity)")
    try:
        family_of(unet).check_trainable(unet.config)
    except ValueError as error:
        raise ValueError(f"{argument} has {error}") from error
    return TrainedPipeline(unet, scheduler, process, kind)


@contextlib.contextmanager
def _one_line(argument: str) -> Iterator[None]:
    """Convert errors of loading to a `ValueError` of one line with the name of the argument."""
    try:
        yield
    except _ERRORS as error:
        raise ValueError(f"{argument} cannot be loaded: {first_line(error)}") from error


def _download(name: str, revision: str | None) -> Path:
    """Download the files of a pipeline."""
    options = {"revision": revision, "use_safetensors": True}
    try:
        return Path(DDPMPipeline.download(name, **options))
    except OSError:  # Diffusers finds default weights, or those of a given variant
        with contextlib.suppress(*HUB_ERRORS):
            files = [Path(file).name for file in HfApi().list_repo_files(name, revision=revision)]
            if (variant := _variant_to_load(map(_variant, files))) is not None:
                return Path(DDPMPipeline.download(name, variant=variant, **options))
        raise


def _component(folder: Path, name: str) -> Path:
    """Folder of a component; old repositories have no subfolders."""
    return folder / name if (folder / name).is_dir() else folder


def _variant(file: str) -> str | None:
    """Variant of a weights file: `""` for the default, None if the file is not in safetensors format."""
    match = re.fullmatch(
        rf"{WEIGHTS}(?:\.(?P<plain>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(?P<sharded>[\w-]+))?\.json)?", file
    )
    return None if match is None else match["plain"] or match["sharded"] or ""


def _variant_to_load(variants: Iterable[str | None]) -> str | None:
    """The only variant with weights; None if there are default weights or no weights.

    Raises:
        ValueError: There are several variants and no default weights.
    """
    present = sorted({variant for variant in variants if variant is not None})
    if "" not in present and len(present) > 1:
        raise ValueError(f"its unet has weights of the variants {', '.join(present)} and no default weights: keep one variant")
    return present[0] if present and "" not in present else None


def _load_scheduler(folder: Path, index: dict):
    component = index["scheduler"][1]
    check_scheduler_class(component)
    config = DDPMScheduler.load_config(_component(folder, "scheduler"))
    check_scheduler_class(config.get("_class_name", component))  # Diffusers does not check the class of the configuration
    return getattr(diffusers, component).from_pretrained(_component(folder, "scheduler"))


def _load_unet(folder: Path, index: dict, pruned: bool) -> tuple[ModelMixin, dict]:
    families = [family for family in FAMILIES if index["_class_name"] in family.pipelines]
    classes = [kind for family in families for kind in (family.dense_class, *((family.pruned_class,) if pruned else ()))]
    name = families[0].component  # all models of a pipeline have the same component name
    known, component = {kind.__name__: kind for kind in classes}, index[name][1]
    if component not in known:
        raise ValueError(f"its {name} is a {component}, not a {' or '.join(known)}")
    folder = _component(folder, name)
    files = [path.name for path in folder.iterdir() if path.name.startswith(WEIGHTS)]
    if all(_variant(file) is None for file in files):
        raise ValueError(f"its {name} has {', '.join(files) or 'no weights'}: only safetensors are loaded, not pickles")
    variant = _variant_to_load(map(_variant, files))
    if variant is not None:
        logger.warning("the %s has weights of the variant %s only: they are loaded in float32", name, variant)
    unet, info = known[component].from_pretrained(folder, use_safetensors=True, output_loading_info=True, variant=variant)
    return unet.float(), info
