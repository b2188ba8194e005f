"""PruneDDPMPipeline: `DDPMPipeline` for dense and pruned models. With the package installed, it prunes and exports."""

from __future__ import annotations

import fnmatch
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping

import torch
from diffusers import DDPMPipeline
from diffusers.utils import logging
from safetensors import safe_open
from torch import nn

__all__ = ["PruneDDPMPipeline"]

logger = logging.get_logger(__name__)

# Files of a pruning run that are copied and uploaded with the model
REPORT = "pruning_report.json"
EVAL_RESULTS = ".eval_results/diffusers_gfprune.yaml"
COMPANIONS = (REPORT, "results.json", "README.md", EVAL_RESULTS, "samples.png", "widths.png", "pruning.png")
MODEL = ("model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/diffusers_gfprune.py", "unet/config.json")
WEIGHTS = ("unet/diffusion_pytorch_model*.safetensors", "unet/diffusion_pytorch_model*.safetensors.index*.json")


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


def has_weights_of(unet: nn.Module, folder: pathlib.Path) -> bool:
    """Whether a UNet has the weights in the safetensors files of a folder, in its dtype."""
    files = [path for path in folder.glob("*.safetensors") if re.fullmatch(r"[a-z_]+(-\d+-of-\d+)?", path.stem)]
    left = getattr(unet, "_orig_mod", unet).state_dict()  # without the names of torch.compile
    for path in files or folder.glob("*.safetensors"):  # the latter are of a variant
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                ours, theirs = left.pop(name, None), weights.get_tensor(name)
                if ours is None or ours.shape != theirs.shape or not torch.equal(ours.cpu(), theirs.to(ours.dtype)):
                    return False
    return not left


def rename_in_card(card: str, repo_id: str) -> str:
    """The card with `repo_id` as the repository in its examples."""
    earlier = re.search(r'from_pretrained\("([^"]+)", trust_remote_code=True\)', card)
    return card if earlier is None else card.replace(f'from_pretrained("{earlier[1]}"', f'from_pretrained("{repo_id}"')


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
            from diffusers_gfprune.one_shot import prune_unet
        except ImportError as error:
            raise ImportError("prune() needs the package diffusers-gfprune to be installed") from error

        unet = prune_unet(self.unet, self.scheduler, images, pipeline=PruneDDPMPipeline.__name__, **options)
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
            from diffusers_gfprune.export import export_pipeline
        except ModuleNotFoundError as error:
            raise ImportError("export() needs the package diffusers-gfprune to be installed") from error

        return export_pipeline(self, output_dir, **options)

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
        # A model loaded from a run is saved with its card and report, unless the folder has others.
        source, has_others = self.config.get("_name_or_path") or "", os.path.exists(os.path.join(save_directory, REPORT))
        if source and not has_others and os.path.isfile(os.path.join(source, REPORT)):
            if has_weights_of(self.unet, pathlib.Path(source, "unet")):
                for name in filter(lambda name: os.path.isfile(os.path.join(source, name)), COMPANIONS):
                    os.makedirs(os.path.dirname(os.path.join(save_directory, name)), exist_ok=True)
                    shutil.copyfile(os.path.join(source, name), os.path.join(save_directory, name))
            else:
                logger.warning("The UNet has other weights than that of %s: its card and results are not copied.", source)
        card = pathlib.Path(save_directory, "README.md")
        self._card = card.read_text("utf-8") if card.is_file() else None
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_folder(self, working_dir, repo_id, *args, **kwargs):
        """Upload only the files that belong to a pruned pipeline."""
        with tempfile.TemporaryDirectory() as folder:
            for path in sorted(p for p in pathlib.Path(working_dir).rglob("*") if p.is_file()):
                name = path.relative_to(working_dir).as_posix()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in (*COMPANIONS, *MODEL, *WEIGHTS)):
                    copy = pathlib.Path(folder, name)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
            if self._card is not None:  # Diffusers has just replaced it by a generic card
                pathlib.Path(working_dir, "README.md").write_text(self._card, "utf-8")
                pathlib.Path(folder, "README.md").write_text(rename_in_card(self._card, repo_id), "utf-8")
            return super()._upload_folder(folder, repo_id, *args, **kwargs)

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        # Without this package, Diffusers can load only a `DDPMPipeline`; the samples are the same.
        DDPMPipeline(unet=self.unet, scheduler=self.scheduler).save_config(save_directory, push_to_hub, **kwargs)
