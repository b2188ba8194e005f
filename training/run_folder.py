"""The files of a run: where it starts from, whether it can be written, and how it appears whole or not at all.

<output_dir>                 the result, once it is complete
.<output_dir>.incomplete     the result until then
<output_dir>.training        while the run goes on: checkpoint-<step>/, logs/, samples/
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import nn

from diffusers_gfprune import GFPrunedUNet2DModel

__all__ = ["RunFolder", "load_dense_pipeline", "load_pipeline", "write_json"]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def load_dense_pipeline(name_or_path: str, revision: str | None = None) -> tuple[UNet2DModel, DDPMScheduler]:
    """Load the UNet and the scheduler of a trained DDPM that is to be pruned, from safetensors only.

    Args:
        name_or_path: A Hub id or a local folder, with the components in subfolders or, as in old repositories, at the root.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: There is no such model, it is no DDPM with a `UNet2DModel`, or its weights are missing, damaged, of
            another shape, or a pickle.
    """
    return load_pipeline(name_or_path, revision, "pretrained_model_name_or_path", (UNet2DModel,))


def load_pipeline(
    name_or_path: str,
    revision: str | None,
    argument: str,
    classes: Sequence[type[UNet2DModel]] = (UNet2DModel, GFPrunedUNet2DModel),
) -> tuple[UNet2DModel, DDPMScheduler]:
    """Load the UNet and the scheduler of a DDPM, from safetensors only, without running code of the repository.

    Args:
        name_or_path: A Hub id or a local folder.
        revision: Branch, tag or commit on the Hub.
        argument: What to call it in errors.
        classes: What the UNet may be.

    Raises:
        ValueError: As `load_dense_pipeline`.
    """
    argument = f"{argument}={name_or_path}"
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not Path(name_or_path).is_dir():
        raise ValueError(f"{argument} is not a folder")
    if revision is not None and Path(name_or_path).is_dir():
        raise ValueError(f"{argument} is a folder, and has no revision={revision}: revisions are of the Hub")
    known = {kind.__name__: kind for kind in classes}
    try:
        folder = Path(name_or_path)
        if not folder.is_dir():
            folder = Path(DDPMPipeline.download(name_or_path, revision=revision, use_safetensors=True))
        index = json.loads((folder / "model_index.json").read_text())
        component = index["unet"][1]
        if component not in known:
            raise ValueError(f"its unet is a {component}, not a {' or '.join(known)}")
        unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
        weights = [path.name for path in unet_folder.iterdir() if path.name.startswith("diffusion_pytorch_model")]
        if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in weights):
            found = ", ".join(weights) or "no weights"
            raise ValueError(f"its unet has {found}: only safetensors are loaded, pickles never are")
        unet, info = known[component].from_pretrained(unet_folder, use_safetensors=True, output_loading_info=True)
        scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
        scheduler = DDPMScheduler.from_pretrained(scheduler_folder)
        if scheduler.config.num_train_timesteps < 1:
            raise ValueError(f"its scheduler has num_train_timesteps={scheduler.config.num_train_timesteps}")
    except (
        *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
        *(SafetensorError, HfHubHTTPError, HFValidationError),
    ) as error:
        raise ValueError(f"{argument} cannot be loaded: {_first_line(error)}") from error
    # Diffusers leaves weights that a file lacks random, with a warning only.
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
        raise ValueError(f"{argument}: {len(wrong)} weights do not fit its config, first {wrong[0]}")
    if unet.config.out_channels != unet.config.in_channels:
        raise ValueError(
            f"{argument} has in_channels={unet.config.in_channels} and out_channels={unet.config.out_channels}: models that "
            f"also predict the variance cannot be pruned"
        )
    return unet, scheduler


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file; NaN and infinity are refused."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


class RunFolder:
    """A folder that appears under its name only when it is complete.

    Until then everything is written to a hidden folder beside it, which makes sure early that it can be.

    Args:
        output_dir: The folder.
        overwrite: Whether an existing folder is replaced (at the end, not before).
        inputs: Paths that the run reads, which must not be replaced.
    """

    def __init__(self, output_dir: str, overwrite: bool, inputs: Sequence[str | None] = ()) -> None:
        self.path = Path(os.path.abspath(output_dir))
        self.overwrite = overwrite
        self.inputs = [Path(os.path.abspath(name)) for name in inputs if name and Path(name).exists()]
        self.staging = self._beside("incomplete")
        self.training = self.path.with_name(f"{self.path.name}.training")

    def check(self, resuming: bool = False) -> None:
        """Refuse a folder that may not be written.

        Args:
            resuming: Whether the run goes on from a checkpoint: what it left when it stopped is then its own.

        Raises:
            ValueError: It exists and may not be replaced, holds what the run reads, or an earlier run left a model or
                checkpoints beside it.
        """
        for name in self.inputs:
            if self.path == name or self.path in name.parents:
                raise ValueError(f"output_dir={self.path} holds {name}, which this run reads")
        if self.path.exists() and not self.overwrite:
            raise ValueError(f"output_dir={self.path} exists: name another folder, or pass --overwrite_output_dir")
        if resuming:
            return
        for left in (self.staging, self._beside("saving"), self._beside("replaced")):
            if (left / "model_index.json").exists():
                raise ValueError(f"{left} holds the model of a run that did not end: move or remove it first")
        if any(self.training.glob("checkpoint-*")) and not self.overwrite:
            raise ValueError(
                f"{self.training} holds checkpoints of a run that did not end: go on with --resume_from_checkpoint latest, "
                f"or start again with --overwrite_output_dir"
            )

    def prepare(self, model: nn.Module, resuming: bool = False) -> None:
        """Make the hidden folder, and check that a pipeline with `model` will fit on the disk.

        Args:
            model: The dense model.
            resuming: Keep what an interrupted run had saved there until it is replaced.
        """
        try:
            if not resuming:
                shutil.rmtree(self.staging, ignore_errors=True)
                shutil.rmtree(self.training, ignore_errors=True)
            self.staging.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.staging).free
        except OSError as error:
            raise ValueError(f"output_dir={self.path} cannot be written: {error.strerror}") from error
        needed = sum(p.numel() * p.element_size() for p in model.parameters()) + 64 * 2**20  # and pictures, reports
        if free < needed:
            self.discard()
            raise ValueError(
                f"output_dir={self.path} needs {needed / 2**20:.0f} MiB, but the disk has {free / 2**20:.0f} MiB free"
            )

    def save(self, write: Callable[[Path], object]) -> None:
        """Replace the content of the hidden folder by what `write` puts into the folder that it is given, or by nothing."""
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
        """Move the hidden folder to its name, with logs and samples of the training; checkpoints have done their work."""
        for name in ("logs", "samples"):
            if (self.training / name).is_dir():
                os.replace(self.training / name, self.staging / name)
        replaced = self._beside("replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.path.exists():
            if not self.overwrite:
                raise ValueError(f"output_dir={self.path} appeared while the run went on; the result is in {self.staging}")
            os.replace(self.path, replaced)
        os.replace(self.staging, self.path)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(self.training, ignore_errors=True)

    def discard(self) -> None:
        """Remove the hidden folder."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        """After an error, keep what was saved of a trained model, and nothing else."""
        if error is not None and self.staging.exists():
            if (self.staging / "model_index.json").exists():
                print(f"the last pipeline that was saved is in {self.staging}", file=sys.stderr)
            elif (self.staging / "results.json").exists():  # an evaluation that only could not be moved to its name
                print(f"the results are in {self.staging}", file=sys.stderr)
            else:
                self.discard()
        if error is not None:
            with contextlib.suppress(OSError):
                self.training.rmdir()  # with nothing in it
