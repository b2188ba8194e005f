"""PruneDDPMPipeline: `DDPMPipeline` for dense and pruned models. With the package installed, it prunes and exports."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping

import torch
from diffusers import DDPMPipeline
from diffusers.utils import hub_utils, logging
from safetensors import SafetensorError, safe_open
from torch import nn

__all__ = ["PruneDDPMPipeline"]

logger = logging.get_logger(__name__)

# Files of a pruning run that are copied and uploaded with the model
REPORT = "pruning_report.json"
EVAL_RESULTS = ".eval_results/diffusers_gfprune.yaml"
COMPANIONS = (REPORT, "results.json", "README.md", EVAL_RESULTS, "samples.png", "widths.png", "pruning.png")
MODEL = ("model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/diffusers_gfprune.py", "unet/config.json")
WEIGHTS = ("unet/diffusion_pytorch_model*.safetensors", "unet/diffusion_pytorch_model*.safetensors.index*.json")
DEFAULT_WEIGHTS = "unet/diffusion_pytorch_model.safetensors*"  # a single file, or the index of several; not of a variant
EARLIER = "earlier_results"  # folder for results of weights that were replaced
DISTRIBUTION = "diffusers-gfprune"
# Imported by its name: for an import statement, Diffusers would tell users without it to install a package from PyPI
PACKAGE = "diffusers_gfprune"

# Pipelines that consist of a pixel-space UNet2DModel and a scheduler
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "PruneDDPMPipeline")
COMPONENTS = ("unet", "scheduler")


def check_pipeline_index(index: Mapping) -> str:
    """Check that a pipeline consists of a UNet and a scheduler.

    Args:
        index: Content of `model_index.json`.

    Returns:
        The name of the pipeline's class.

    Raises:
        ValueError: The class is not supported, a component is missing, or there are others, as in latent diffusion models.
    """
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"its pipeline is a {name}, which is not supported; supported: {', '.join(PIPELINES[:-1])}")
    components = [key for key, value in index.items() if isinstance(value, (list, tuple)) and any(value)]
    missing = [key for key in COMPONENTS if key not in components]
    if missing:
        raise ValueError(f"its {name} has no component {missing[0]}")
    other = [key for key in components if key not in COMPONENTS]
    if other:
        raise ValueError(f"its {name} has a component {other[0]}; only {' and '.join(COMPONENTS)} are supported")
    return name


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Safetensors files that a model is loaded from: default weights, or those of variants if there are no others.

    Args:
        folder: Folder of the model.

    Raises:
        ValueError: An index of sharded weights is damaged.
    """
    names = sorted(path.name for path in folder.glob("diffusion_pytorch_model*.safetensors*"))
    found = [name for name in names if re.fullmatch(r"\w+(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)] or names
    shards: set[str] = set()  # Diffusers loads by an index, if there is one
    for name in (name for name in found if name.endswith(".json")):
        try:
            shards |= set(json.loads((folder / name).read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / name} is not an index of weights: {error!r}") from error
    return [folder / name for name in sorted(shards) or found if name.endswith(".safetensors")]


def has_weights_of(unet: nn.Module, folder: pathlib.Path) -> bool:
    """Whether a UNet has the weights that are loaded from a folder, in its dtype; not if these are damaged."""
    left = getattr(unet, "_orig_mod", unet).state_dict()  # without the names of torch.compile
    try:
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():
                    ours, theirs = left.pop(name, None), weights.get_tensor(name)
                    if ours is None or ours.shape != theirs.shape or not torch.equal(ours.cpu(), theirs.to(ours.dtype)):
                        return False
    except (OSError, SafetensorError, ValueError):
        return False
    return not left


def set_results_aside(folder: pathlib.Path) -> None:
    """Move card, report, results and pictures of a run into its subfolder `EARLIER`, over those of an earlier time."""
    for name in filter(lambda name: (folder / name).is_file(), COMPANIONS):
        (folder / EARLIER / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, folder / EARLIER / name)


def rename_in_card(card: str, repo_id: str) -> str:
    """The card with `repo_id` as the repository in its examples."""
    earlier = re.search(r'from_pretrained\("([^"]+)", trust_remote_code=True\)', card)
    return card if earlier is None else card.replace(f'from_pretrained("{earlier[1]}"', f'from_pretrained("{repo_id}"')


def _seal(card: str) -> str:
    return f"<!-- rendered by diffusers-gfprune, {hashlib.sha256(card.encode()).hexdigest()[:16]} -->"


def seal_of(card: str) -> str:
    """A comment with a hash of a card, which reveals later edits; its examples may name another repository later."""
    return _seal(rename_in_card(card, DISTRIBUTION))


def is_as_rendered(card: str) -> bool:
    """Whether a card is unchanged since it was rendered with its seal, but for the repository in its examples."""
    body, newline, seal = card.removesuffix("\n").rpartition("\n")
    return bool(newline) and seal in (seal_of(body), _seal(body))  # the latter of earlier versions


def run_on_hub(repo_id: str, token: str | None = None, revision: str | None = None) -> tuple[bytes | None, str | None]:
    """Report and card in a repository; None for what it does not have, or if there is no such branch."""
    try:
        info = hub_utils.model_info(repo_id, revision=revision, token=token)
    except hub_utils.RevisionNotFoundError:
        return None, None
    # A commit names its files. By the name of a branch, files that the server fails to send would be absent, or old ones.
    there = {file.rfilename for file in info.siblings or ()}
    report, card = (
        pathlib.Path(hub_utils.hf_hub_download(repo_id, name, token=token, revision=info.sha)).read_bytes()
        if name in there
        else None
        for name in (REPORT, "README.md")
    )
    return report, None if card is None else card.decode("utf-8", "replace")


class PruneDDPMPipeline(DDPMPipeline):
    r"""
    Pipeline for unconditional image generation with a dense or a pruned UNet.

    Parameters:
        unet ([`UNet2DModel`] or `GFPrunedUNet2DModel`): A model that denoises images.
        scheduler ([`SchedulerMixin`]): A scheduler of DDPMs, such as [`DDPMScheduler`] or [`DDIMScheduler`], or a
            [`FlowMatchEulerDiscreteScheduler`].
    """

    _card: str | None = None

    def prune(self, images=None, **options) -> PruneDDPMPipeline:
        """Prune the UNet by gradient flow, in one shot and without training.

        Args:
            images: Calibration images like the training images: a tensor in [-1, 1] with shape
                `(images, channels, height, width)`, or a list of PIL images of the model's size. None: the dense model draws
                `num_teacher_images` (default 128).
            **options: Fields of `GFPruneConfig`, such as `target="macs", ratio=0.3`, and: `batch_size` (default 32);
                `class_labels` with shape `(images,)`, for conditional models; `null_label` and `label_dropout`, for models
                with classifier-free guidance: the label for "no label", and the share of labels that it replaces (default
                0.1); `seed` for noise and timesteps (default 0); `recovery=False` to leave out the least-squares correction
                of the layers that read pruned channels.

        Returns:
            A new pipeline with a `GFPrunedUNet2DModel`; this one is unchanged.

        Raises:
            ImportError: The package `diffusers_gfprune` is not installed.
            ValueError: The budget cannot be met, or the images do not fit the model.
        """
        try:
            one_shot = importlib.import_module(f"{PACKAGE}.one_shot")
        except ImportError as error:
            raise ImportError("prune() needs the package diffusers-gfprune to be installed") from error

        unet = one_shot.prune_unet(self.unet, self.scheduler, images, pipeline=PruneDDPMPipeline.__name__, **options)
        return type(self)(unet=unet, scheduler=type(self.scheduler).from_config(self.scheduler.config))

    def export(self, output_dir, **options):
        """Export the UNet, dense or pruned, with the scheduler's configuration.

        Args:
            output_dir: Folder of the export, which appears when it is complete and checked against PyTorch.
            **options: Fields of `ExportOptions`, such as `format="onnx"`, `"openvino"` or `"torch"`, `dtype="fp32"`,
                `"fp16"` or `"int8"`, and `batch="dynamic"` or a number of samples.

        Returns:
            An `ExportDescription` with the errors of the export.

        Raises:
            ImportError: The package `diffusers_gfprune` or the runtime is not installed.
            ValueError: An option is not supported, the folder cannot be written, or the export differs from the UNet.
        """
        try:
            exports = importlib.import_module(f"{PACKAGE}.export")
        except ModuleNotFoundError as error:
            raise ImportError("export() needs the package diffusers-gfprune to be installed") from error

        return exports.export_pipeline(self, output_dir, **options)

    @classmethod
    @functools.wraps(DDPMPipeline.load_config.__func__)
    def load_config(cls, *args, **kwargs):
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        check_pipeline_index(index)  # Diffusers would only warn and drop an unknown component
        return loaded

    @functools.wraps(DDPMPipeline.save_pretrained)
    def save_pretrained(self, save_directory, *args, **kwargs):
        os.makedirs(save_directory, exist_ok=True)
        target = os.path.join(save_directory, "pipeline.py")
        if not (os.path.exists(target) and os.path.samefile(__file__, target)):
            shutil.copyfile(__file__, target)
        given = inspect.signature(DDPMPipeline.save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
        folder, source = pathlib.Path(save_directory), self.config.get("_name_or_path") or ""
        replaces = not given.get("variant") or not any(folder.glob(DEFAULT_WEIGHTS))  # a variant lies beside the weights
        if (folder / REPORT).is_file() and replaces and any(folder.glob(WEIGHTS[0])):
            if not has_weights_of(self.unet, folder / "unet"):
                set_results_aside(folder)
                moved = "%s has results of other weights than the UNet that replaces them: they are now in %s."
                logger.warning(moved, folder, folder / EARLIER)
        # A model loaded from a run is saved with its card and report, unless the folder has others.
        if source and not (folder / REPORT).is_file() and os.path.isfile(os.path.join(source, REPORT)):
            if has_weights_of(self.unet, pathlib.Path(source, "unet")):
                for name in filter(lambda name: os.path.isfile(os.path.join(source, name)), COMPANIONS):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(os.path.join(source, name), folder / name)
            else:
                logger.warning("The UNet has other weights than that of %s: its card and results are not copied.", source)
        card = folder / "README.md"
        self._card = card.read_text("utf-8") if card.is_file() else None
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_folder(self, working_dir, repo_id, token=None, commit_message=None, create_pr=False, subfolder=None):
        """Upload the files that belong to a pruned pipeline, and delete results of other weights in the repository."""
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place)
            for path in sorted(p for p in pathlib.Path(working_dir).rglob("*") if p.is_file()):
                name = path.relative_to(working_dir).as_posix()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in (*COMPANIONS, *MODEL, *WEIGHTS)):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, folder / name)
            if self._card is not None:  # Diffusers has just replaced it by the card in the repository, or a generic one
                pathlib.Path(working_dir, "README.md").write_text(self._card, "utf-8")
                (folder / "README.md").write_text(rename_in_card(self._card, repo_id), "utf-8")
            stale = [] if subfolder else self._stale_results(pathlib.Path(working_dir), folder, repo_id, token)
            return hub_utils.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                token=token,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
                path_in_repo=subfolder,
                delete_patterns=stale or None,
            )

    def _stale_results(self, saved: pathlib.Path, folder: pathlib.Path, repo_id: str, token: str | None) -> list[str]:
        """Results to delete in a repository, because they are of other weights. The card to upload is corrected.

        Args:
            saved: Folder that the pipeline was saved in, with the card that Diffusers wrote.
            folder: Folder to upload, with the pipeline's own card, or else the same one.
            repo_id: The repository.
            token: Access token.
        """
        card, (report, theirs) = folder / "README.md", run_on_hub(repo_id, token)
        rendered = theirs is not None and is_as_rendered(theirs)
        stale = [name for name in COMPANIONS if name != "README.md"] if report is not None else []
        if (folder / REPORT).is_file():  # 1. a run
            same = report == (folder / REPORT).read_bytes()
            if same and not rendered and theirs is not None and self._card is not None and is_as_rendered(self._card):
                card.unlink()
                logger.warning("The card of %s was edited on the Hub and stays: delete it there to replace it.", repo_id)
            return stale
        kept = not any(folder.glob(DEFAULT_WEIGHTS))  # those of a variant do not replace the measured ones
        if report is not None and (kept or self._is_on_hub(repo_id, token)):  # 2. the measured model without its results
            if self._card is None:
                card.unlink(missing_ok=True)  # it has other YAML than the card in the repository
            return []
        if self._card is None and rendered:  # 3. another model
            about = "This is the model card of a 🧨 diffusers pipeline that has been pushed on the Hub."
            data = hub_utils.ModelCardData(library_name="diffusers")
            for path in (saved / "README.md", card):
                hub_utils.ModelCard.from_template(data, model_description=about).save(path)
        elif self._card is None and report is not None:
            logger.warning("The card of %s was edited on the Hub and stays, but its results are deleted.", repo_id)
        return stale

    def _is_on_hub(self, repo_id: str, token: str | None) -> bool:
        """Whether a repository has the weights of the UNet. They are downloaded, unless they are in the cache."""
        folder = hub_utils.snapshot_download(repo_id, allow_patterns=list(WEIGHTS), token=token)
        return has_weights_of(self.unet, pathlib.Path(folder, "unet"))

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        # Without this package, Diffusers can load only a `DDPMPipeline`; the samples are the same.
        DDPMPipeline(unet=self.unet, scheduler=self.scheduler).save_config(save_directory, push_to_hub, **kwargs)
