"""The models of the page: a pruned pipeline, and the dense one that it was made from, if that can be found."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

from ..errors import HUB_ERRORS, one_line
from ..families.lookup import family_of
from ..metrics.model_size import count_macs, count_parameters
from ..metrics.sampling import image_shape
from ..metrics.speedup import compare_speeds
from ..reports.pipeline_kinds import IMAGENET_CLASSES
from ..reports.provenance import portable
from ..reports.results import read_results
from ..trained_pipelines import TrainedPipeline, load_pipeline

__all__ = ["Choices", "Models", "ShownModel", "load_models", "without_reference"]

REPORT = "pruning_report.json"
# Beside the pipeline's own scheduler
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
DTYPES = ("float32", "float16", "bfloat16")
# Where pipelines of Diffusers fail, with output_type="np": NumPy has no bfloat16, and LDMPipeline draws noise in float32
UNUSABLE_DTYPES = {
    **dict.fromkeys(("DDPMPipeline", "PNDMPipeline", "ConsistencyModelPipeline", "LDMTextToImagePipeline"), ("bfloat16",)),
    "LDMPipeline": ("float16", "bfloat16"),
}
# Pipelines that give their generator to the first noise only
WITHOUT_GENERATOR = ("DiTPipeline", "LDMPipeline", "LDMTextToImagePipeline", "PNDMPipeline")


@dataclass(frozen=True)
class ShownModel:
    """A model of the page.

    Attributes:
        name: Hub id, relative path, or last part of an absolute one.
        pipeline: The pipeline as Diffusers loads it.
        scheduler: Its own scheduler, whose configuration other schedulers take over.
        parameters: Number of parameters of the denoiser.
        macs: MACs of a forward pass of the denoiser at batch size 1.
        in_latents: Whether it denoises latents.
    """

    name: str
    pipeline: DiffusionPipeline
    scheduler: object
    parameters: int
    macs: int
    in_latents: bool


@dataclass(frozen=True)
class Choices:
    """What can be chosen for the samples of a pipeline.

    Attributes:
        image_size: Height and width of its images in pixels.
        num_train_timesteps: Number of timesteps of its training, and the maximum number of steps.
        schedulers: Names of the schedulers that its pipeline samples with.
        has_prompts: Whether it takes prompts.
        classes: Class labels; empty if it takes none.
        class_names: Names of classes by label; empty if the pipeline has none.
        guidance_scale: Default scale of classifier-free guidance; None if the pipeline has none for this model.
    """

    image_size: tuple[int, int]
    num_train_timesteps: int
    schedulers: tuple[str, ...]
    has_prompts: bool = False
    classes: tuple[int, ...] = ()
    class_names: Mapping[int, str] = field(default_factory=dict)
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Models:
    """What the page shows.

    Attributes:
        pruned: The pruned model.
        reference: The dense model; None if it was not found.
        choices: What can be chosen.
        report: Content of `pruning_report.json`; None if there is none.
        speed: How fast the pruned model is, as the run measured it; None if it did not.
        notice: Why there is no reference; None if there is one.
        requested: Whether the reference was requested. Otherwise the page goes without it if it cannot be shown.
    """

    pruned: ShownModel
    reference: ShownModel | None
    choices: Choices
    report: Mapping | None = None
    speed: str | None = None
    notice: str | None = None
    requested: bool = False


def load_models(
    name: str,
    reference: str | None = None,
    *,
    revision: str | None = None,
    reference_revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
) -> Models:
    """Load the models of the page. Code of repositories does not run, and pickles are not read.

    Args:
        name: Folder or Hub id of the pruned pipeline.
        reference: Folder or Hub id of the dense pipeline (default: the one that the report of the run names, if it can be
            loaded and fits on the device).
        revision: Branch, tag or commit of the pruned pipeline on the Hub.
        reference_revision: Branch, tag or commit of `reference` on the Hub.
        device: Device to sample on (default: a GPU, if there is one).
        dtype: One of `DTYPES`.

    Raises:
        ValueError: A pipeline cannot be loaded, does not fit on the device, or both make different images.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    if reference_revision is not None and reference is None:
        raise ValueError(f"reference_revision={reference_revision} needs a reference")
    place = _place(device)
    trained = load_pipeline(name, revision, pruned=True)
    kind = trained.stock_class.__name__
    if dtype in UNUSABLE_DTYPES.get(kind, ()):
        usable = [other for other in DTYPES if other not in UNUSABLE_DTYPES[kind]]
        raise ValueError(f"dtype={dtype} must be {' or '.join(usable)}: a {kind} of Diffusers makes no pictures in {dtype}")
    report, requested, notice, dense = read_report(name, revision), reference is not None, None, None
    shown = _shown(name, trained, place, dtype)
    try:
        if not requested:
            reference, reference_revision = named_reference(report)
        dense = _shown(reference, _matching(trained, reference, reference_revision), place, dtype)
    except ValueError as error:
        if requested:
            raise
        notice = without_reference(error)
    return Models(
        pruned=shown,
        reference=dense,
        choices=choices_of(trained, shown.pipeline, (report or {}).get("arguments", {}).get("null_label")),
        report=report,
        speed=measured_speed(name, revision),
        notice=notice,
        requested=requested,
    )


def without_reference(error: ValueError) -> str:
    """Say why a page goes without the dense model, on the terminal and in the returned notice."""
    notice = f"The dense model is not shown: {one_line(error)}"
    print(f"{notice}. Pass --reference to show one", file=sys.stderr)
    return notice


def _place(device: str | None) -> torch.device:
    """The device to sample on.

    Raises:
        ValueError: There is no such device.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={device} cannot be used: {one_line(error)}") from error
    return place


def _of_run(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a run, or of a pushed one; None if there is none."""
    with suppress(*HUB_ERRORS):
        path = Path(name, file) if Path(name).is_dir() else Path(hf_hub_download(name, file, revision=revision))
        return path if path.is_file() else None
    return None


def read_report(name: str, revision: str | None = None) -> dict | None:
    """The report of a run, or of a pushed one; None if there is none.

    Args:
        name: Folder or Hub id of the pruned pipeline.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: It is not JSON.
    """
    path = _of_run(name, REPORT, revision)
    try:
        return None if path is None else json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {one_line(error)}") from error


def measured_speed(name: str, revision: str | None = None) -> str | None:
    """How fast the pruned model is compared with the dense one, as the run measured it; None if it did not.

    Args:
        name: Folder or Hub id of the pruned pipeline.
        revision: Branch, tag or commit on the Hub.
    """
    path = _of_run(name, "results.json", revision)
    with suppress(ValueError, KeyError):  # other results, or older ones
        results = None if path is None else read_results(path)
        if results is not None and results.reference_model is not None and results.model.speed:
            rows = compare_speeds(results.reference_model.speed, results.model.speed)
            words = "; ".join(f"{row['title']}: {row['words']}" for row in rows)
            hardware = " and ".join(dict.fromkeys(row["hardware"] for row in results.model.speed))
            return f"A forward pass on {hardware}, as the run measured it. {words}."
    return None


def named_reference(report: Mapping | None) -> tuple[str, str | None]:
    """Name and revision of the dense model in a report.

    Raises:
        ValueError: The report names none, or a folder that is not here.
    """
    if report is None:
        raise ValueError(f"there is no {REPORT} that names it")
    base = report["base_model"]
    if base["hub_id"] is None and not Path(base["name"]).is_dir():
        raise ValueError(f"{REPORT} names {base['name']}, which is not a folder here")
    return base["hub_id"] or base["name"], base["revision"]


def _matching(trained: TrainedPipeline, reference: str, revision: str | None) -> TrainedPipeline:
    """Load the reference.

    Raises:
        ValueError: It cannot be loaded, or makes other images.
    """
    dense = load_pipeline(reference, revision, "reference", pruned=True)
    if dense.makes() != trained.makes():
        raise ValueError(f"reference={reference} generates {dense.makes()}, but the pruned model {trained.makes()}")
    return dense


def _shown(name: str, trained: TrainedPipeline, device: torch.device, dtype: str) -> ShownModel:
    """The pipeline on its device, in its dtype.

    Raises:
        ValueError: The device has too little memory.
    """
    denoiser = trained.denoiser.requires_grad_(False).eval()
    parameters, macs = count_parameters(denoiser), count_macs(denoiser)
    pipeline = trained.stock()
    if dtype != "float32":  # in which it is loaded
        pipeline.to(getattr(torch, dtype))
    try:
        pipeline.to(device)  # at last: in float32, it may not fit
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{portable(name)} does not fit on device={device} in dtype={dtype}: {one_line(error)}") from error
    pipeline.set_progress_bar_config(leave=False)
    in_latents = trained.codec is not None
    return ShownModel(str(portable(name)), pipeline, pipeline.scheduler, parameters, macs, in_latents)


def choices_of(trained: TrainedPipeline, pipeline: DiffusionPipeline, null_label: int | None = None) -> Choices:
    """What can be chosen for the samples of a pipeline.

    Args:
        trained: The pipeline with its parts.
        pipeline: The same pipeline as Diffusers loads it.
        null_label: Label for "no label", if one of the model's labels is used for it.

    Raises:
        ValueError: It samples with none of the schedulers.
    """
    denoiser = trained.denoiser
    taken = inspect.signature(type(pipeline).__call__).parameters
    labels = family_of(denoiser).class_labels(denoiser.config)
    # DiTPipeline takes 1000 as the null label, which only models of ImageNet have
    guided = "guidance_scale" in taken and (labels is None or labels.count == IMAGENET_CLASSES)
    return Choices(
        image_size=image_shape(denoiser, trained.codec)[1:],
        num_train_timesteps=trained.scheduler.config.num_train_timesteps,
        schedulers=tuple(_schedulers(trained, pipeline)),
        has_prompts=trained.prompts is not None,
        classes=tuple(label for label in range(0 if labels is None else labels.count) if label != null_label),
        class_names={number: name for name, number in getattr(pipeline, "labels", {}).items()},
        guidance_scale=taken["guidance_scale"].default if guided else None,
    )


def _schedulers(trained: TrainedPipeline, pipeline: DiffusionPipeline) -> list[str]:
    """Names of schedulers that a pipeline samples with, by the seed alone."""
    own, found = type(pipeline.scheduler).__name__, []
    learned = family_of(trained.denoiser).has_learned_variance(trained.denoiser.config)
    for name in dict.fromkeys((*SCHEDULERS, own) if trained.process.name == "ddpm" else (own,)):
        kind = getattr(diffusers, name)
        if type(pipeline).__name__ in WITHOUT_GENERATOR:
            possible = not _draws_noise(kind, pipeline.scheduler.config)
        elif trained.codec is None:  # DDPMPipeline passes its generator, and learned variances
            possible = "generator" in inspect.signature(kind.step).parameters and (not learned or name == own)
        else:
            possible = True
        if possible:
            with suppress(NotImplementedError, ValueError):  # betas that the scheduler does not implement
                kind.from_config(pipeline.scheduler.config)
                found.append(name)
    if not found:
        raise ValueError(f"a {type(pipeline).__name__} with {own} cannot be sampled with any of {', '.join(SCHEDULERS)}")
    return found


def _draws_noise(kind: type, config: Mapping) -> bool:
    """Whether a scheduler with this configuration adds noise in its steps."""
    if kind.__name__ in ("DDPMScheduler", "DDPMParallelScheduler", "SASolverScheduler"):
        return True
    return "algorithm_type" in inspect.signature(kind).parameters and "sde" in config.get("algorithm_type", "")
