"""Pipelines whose denoiser can be pruned, and the purpose of their components.

A pipeline of pixels consists of a denoiser and a scheduler. A latent pipeline also has an autoencoder, and one with text as
its condition has a tokenizer and a text encoder, or two of each. Every other component is *carried*: pruning does not need it,
and its files are copied to the pruned pipeline without being loaded.

The denoiser is not named here: its family knows its component and its pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..diffusion.process import DiffusionProcess
from ..remote.pipeline_prune_ddpm import PIPELINES, check_pipeline_index

__all__ = ["LAYOUTS", "PACKAGE", "PipelineLayout", "check_index", "check_process", "components_of"]

# Library of pruned models in `model_index.json`
PACKAGE = "diffusers_gfprune"


@dataclass(frozen=True)
class PipelineLayout:
    """Components of a pipeline by purpose, beside its denoiser and its scheduler.

    Attributes:
        autoencoder: Encodes images to latents and decodes samples; None for pixels.
        text: Pairs of a tokenizer and its text encoder.
        carried: Components that may be there and are copied.
        processes: Names of the processes that the pipeline samples rightly, see `diffusion.process`.
        splits_variances: Whether the pipeline removes learned variances from the output before its scheduler sees it.
        max_length: Number of tokens that it cuts prompts to; None: the tokenizer's limit. If there are three text encoders,
            that of the last one.
        scheduler: Settings that the pipeline gives its scheduler, whatever its file says.
    """

    autoencoder: str | None = None
    text: tuple[tuple[str, str], ...] = ()
    carried: tuple[str, ...] = ()
    processes: tuple[str, ...] = ("ddpm",)
    splits_variances: bool = False
    max_length: int | None = None
    scheduler: Mapping[str, object] = field(default_factory=dict)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Components that are loaded beside the denoiser and the scheduler."""
        autoencoder = () if self.autoencoder is None else (self.autoencoder,)
        return (*autoencoder, *(name for pair in self.text for name in pair))


_TEXT, _SECOND = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")
_NOISE = ("ddpm", "edm")  # of pipelines that scale noise and inputs as their scheduler says
LAYOUTS = {
    **dict.fromkeys(PIPELINES, PipelineLayout()),
    **dict.fromkeys(("DDPMPipeline", "PruneDDPMPipeline"), PipelineLayout(processes=("ddpm", "flow matching"))),
    "ConsistencyModelPipeline": PipelineLayout(processes=("consistency",)),
    "LDMPipeline": PipelineLayout("vqvae", processes=_NOISE),
    "DiTPipeline": PipelineLayout("vae", splits_variances=True),
    "StableDiffusionPipeline": PipelineLayout(
        "vae",
        (_TEXT,),
        ("safety_checker", "feature_extractor", "image_encoder"),
        processes=_NOISE,
        scheduler={"clip_sample": False, "steps_offset": 1},  # in its constructor
    ),
    "StableDiffusionXLPipeline": PipelineLayout(
        "vae", (_TEXT, _SECOND), ("feature_extractor", "image_encoder"), processes=_NOISE
    ),
    "StableDiffusion3Pipeline": PipelineLayout(
        *("vae", (_TEXT, _SECOND, ("tokenizer_3", "text_encoder_3")), ("feature_extractor", "image_encoder")),
        processes=("flow matching",),
        max_length=256,
    ),
    "LDMTextToImagePipeline": PipelineLayout("vqvae", (("tokenizer", "bert"),), max_length=77),
    "PixArtAlphaPipeline": PipelineLayout("vae", (_TEXT,), splits_variances=True, max_length=120),
    "PixArtSigmaPipeline": PipelineLayout("vae", (_TEXT,), splits_variances=True, max_length=300),
}


def check_process(pipeline: str, process: DiffusionProcess) -> None:
    """Check that a pipeline samples models of a process.

    Args:
        pipeline: Name of the pipeline's class, in `LAYOUTS`.
        process: Process of its scheduler.

    Raises:
        ValueError: It does not.
    """
    if process.name not in LAYOUTS[pipeline].processes:
        right = [name for name, layout in LAYOUTS.items() if process.name in layout.processes and name != "PruneDDPMPipeline"]
        raise ValueError(
            f"scheduler={type(process.model_scheduler).__name__} is of {process.title}, which a {pipeline} does not sample; "
            f"pipelines for it: {', '.join(right)}"
        )


def components_of(index: Mapping) -> dict[str, tuple[str, str]]:
    """Library and class of each component in `model_index.json`, without those that are None."""
    named = {name: value for name, value in index.items() if isinstance(value, (list, tuple)) and any(value)}
    for name, value in named.items():
        if name.startswith("_"):
            raise ValueError(f"{name}={value} of its model_index.json is code of the repository, which is not run")
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise ValueError(f"{name}={value} of its model_index.json must be the names of a library and a class")
    return {name: tuple(value) for name, value in named.items()}


def check_index(index: Mapping, denoiser: str) -> PipelineLayout:
    """Check that a pipeline is supported and has all components.

    Args:
        index: Content of `model_index.json`.
        denoiser: Component name of the denoiser.

    Returns:
        The layout of the pipeline.

    Raises:
        ValueError: The pipeline is not supported, or it lacks a component or has another one.
    """
    layout = LAYOUTS[index["_class_name"]]
    if index["_class_name"] in PIPELINES:
        check_pipeline_index(index)
        return layout
    name, present = index["_class_name"], components_of(index)
    needed = (denoiser, "scheduler", *layout.loaded)
    missing = [component for component in needed if component not in present]
    if missing:
        raise ValueError(f"its {name} has no component {missing[0]}")
    other = [component for component in present if component not in (*needed, *layout.carried)]
    if other:
        raise ValueError(f"its {name} has a component {other[0]}; supported are {', '.join((*needed, *layout.carried))}")
    return layout
