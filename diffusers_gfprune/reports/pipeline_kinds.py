"""What a model card says about a kind of pipeline: its task and tag on the Hub, and a call that makes an image."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["TASKS", "example_of", "kind_of", "pipeline_of", "process_of", "task_of"]

UNCONDITIONAL, TEXT_TO_IMAGE = TASKS = ("unconditional-image-generation", "text-to-image")
# Tags of pipelines; others are of DDPMs
KINDS = {
    "ConsistencyModelPipeline": "consistency-model",
    "DiTPipeline": "dit",
    "LDMPipeline": "latent-diffusion",
    "LDMTextToImagePipeline": "latent-diffusion",
    "PixArtAlphaPipeline": "pixart-alpha",
    "PixArtSigmaPipeline": "pixart-sigma",
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "StableDiffusionPipeline": "stable-diffusion",
    "StableDiffusionXLPipeline": "stable-diffusion-xl",
}
# Reports of format versions 1 to 3 are of pipelines of pixels, and do not say so
DDPM = {"class_name": "DDPMPipeline", "component": "unet", "condition": None}
# Pipelines that do not pass class labels to their model
WITHOUT_LABELS = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline")
# Classes of the model whose null label, 1000, DiTPipeline always takes
IMAGENET_CLASSES = 1000


def pipeline_of(report: Mapping) -> Mapping:
    """The entry `pipeline` of a report of any format version: `class_name`, `component`, `process` and `condition`.

    With the condition `"class labels"`, it also has `num_classes`.
    """
    return report.get("pipeline", DDPM)


def process_of(pipeline: Mapping) -> str:
    """Name of the process (`DiffusionProcess.name`). Reports of earlier versions are of DDPMs, and do not say so."""
    return pipeline.get("process", "ddpm")


def task_of(pipeline: Mapping) -> str:
    """Task on the Hub."""
    return TEXT_TO_IMAGE if pipeline["condition"] == "text" else UNCONDITIONAL


def kind_of(pipeline: Mapping) -> str:
    """Tag on the Hub."""
    return KINDS.get(pipeline["class_name"], "ddpm")


def example_of(pipeline: Mapping) -> str:
    """A call of the pipeline that makes an image."""
    if pipeline["condition"] == "text":
        # Captions of the training images may be private. PixArt's bins are of images of a few sizes only
        binning = ", use_resolution_binning=False" if pipeline["class_name"].startswith("PixArt") else ""
        return f'pipe("a prompt"{binning}).images.pop()'
    if pipeline["condition"] == "class labels" and pipeline["class_name"] == "DiTPipeline":
        guidance = "" if pipeline["num_classes"] == IMAGENET_CLASSES else ", guidance_scale=1"
        return f"pipe(class_labels=[0]{guidance}).images.pop()"
    if pipeline["condition"] == "class labels" and pipeline["class_name"] in WITHOUT_LABELS:
        return "pipe.unet(noisy_images, timesteps, class_labels=labels).sample  # the pipeline passes no labels"
    if pipeline["condition"] == "vectors":
        return "pipe.unet(noisy_images, timesteps, class_labels=vectors).sample  # no stock pipeline passes vectors"
    return "pipe().images.pop()"
