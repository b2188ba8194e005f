"""Descriptions of an evaluation: its plan, figures of a model that need no samples, and the settings behind the figures."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import torch
from accelerate import Accelerator

from ..fingerprints import tensors_fingerprint
from ..formatting import format_count, format_duration
from ..metrics.model_size import count_macs, count_parameters, hardware_name, weight_file_bytes
from ..metrics.quality import Quality
from ..metrics.step_loss import StepLoss
from ..precision import float32_description
from ..reports.provenance import describe_base_model, describe_dataset, package_versions, portable
from ..reports.results import ModelFigures
from .arguments import EvaluateArguments
from .inputs import Inputs, recorded_settings
from .sample_quality import RealFeatures
from .samples import Samples
from .trials import try_sampling

__all__ = ["describe_evaluation", "describe_model", "describe_plan", "warn_of_few"]

# Packages that figures depend on, in addition to those of a run
PACKAGES = ("clean-fid", "numpy", "pillow", "scikit-image", "scipy", "torchvision", "transformers")
SIMILARITIES = {
    "ssim_to_dense": "scikit-image, uniform window of 7x7 pixels, mean over images",
    "psnr_to_dense": "of the mean squared error over all images",
}


def describe_plan(args: EvaluateArguments, inputs: Inputs, samples: Samples, real: RealFeatures, processes: int) -> str:
    """The plan of the evaluation, with an estimate of the sampling time.

    Raises:
        ValueError: A model fails to run.
    """
    settings, lines, count, seconds = inputs.settings, ["plan:"], inputs.num_images, 0.0
    missing = samples.unsampled() if inputs.models else []
    # Without samples, the step loss has the largest batches
    tried = settings if count else replace(settings, num_images=args.data.validation_images * args.cost.step_loss_timesteps)
    for index, (argument, pipeline) in enumerate(inputs.models.items()):
        name, denoiser = getattr(args.model, argument), pipeline.denoiser
        cost = f"{count_parameters(denoiser):,} parameters, {count_macs(denoiser):,} MACs"
        lines.append(f"  {argument:16} {name}: {cost}")
        per_image = try_sampling(f"{argument}={name}", denoiser, pipeline.scheduler, tried, pipeline.codec)
        if count:
            seconds += per_image * settings.num_inference_steps * missing[index]
    if inputs.folder_images is not None:
        size = "x".join(map(str, inputs.folder_images.size))
        lines.append(f"  {'images':16} {count:,} of {args.model.images_dir}, {size} pixels")
    elif not count:
        lines.append(f"  {'samples':16} none")
    else:
        spacing = "" if settings.timestep_spacing is None else f" ({settings.timestep_spacing}), eta {settings.eta:g}"
        steps = format_count(settings.num_inference_steps, "step")
        drawn = f"{steps}{spacing}, seed {settings.seed}"
        drawn += f", guidance {settings.guidance_scale:g}" if settings.guidance_scale != 1 else ""
        lines.append(f"  {'samples':16} {count:,} of each model: {settings.sampler}, {drawn}")
        left = f"{sum(missing):,} of {count * len(inputs.models):,} remain to be drawn"
        shared = f" by {processes} processes" if processes > 1 else ""
        lines.append(f"  {'':16} {left}{shared}, in about {format_duration(seconds / processes)}")
    lines += [f"  {title:16} {line}" for title, line in zip(("data", ""), inputs.images.summary.lines())]
    if inputs.networks:
        titles = ", ".join(network.title for network in inputs.networks)
        lines.append(f"  {'distances':16} {titles}, to {real.count:,} real images")
    return "\n".join(lines)


def warn_of_few(inputs: Inputs, real: RealFeatures) -> None:
    """Warn if there are fewer images than a covariance has dimensions."""
    fewest = min(inputs.num_images, real.count)
    for network in inputs.networks:
        if network.dimensions is not None and fewest <= network.dimensions:
            print(
                f"warning: {fewest:,} images are few for {network.title} on {network.dimensions:,} features: it is biased far "
                f"upwards, so compare it only with figures of the same number of images",
                file=sys.stderr,
            )


def describe_model(args: EvaluateArguments, argument: str, inputs: Inputs) -> ModelFigures:
    """Figures of a model that need no samples.

    Raises:
        ValueError: The model's loss is not finite.
    """
    unet, scheduler, process = (getattr(inputs.models[argument], name) for name in ("denoiser", "scheduler", "process"))
    reference = inputs.models["reference_model"].denoiser if "reference_model" in inputs.models else None
    name = getattr(args.model, argument)
    revision = args.model.revision if argument == "model" else args.model.reference_revision
    held_out, null = inputs.held_out, inputs.images.null_conditioning()
    losses: dict = {}
    if process.has_target or reference is not None:
        options = {"grid": args.cost.step_loss_timesteps, "batch_size": args.samples.eval_batch_size, "reference": reference}
        step_loss = StepLoss(held_out.samples, process, held_out.conditioning, **options)
        by_timestep = step_loss.by_timestep(unet)
        met = [int((step_loss.timesteps == timestep).sum()) for timestep in by_timestep]
        mean = math.fsum(loss * count for loss, count in zip(by_timestep.values(), met)) / sum(met)
        if not math.isfinite(mean):
            raise ValueError(f"{argument}={name}: the step loss in {args.model.dtype} must be finite, not {mean}")
        losses = {
            "step_loss": mean,
            "step_loss_null_label": step_loss.with_conditioning(null)(unet) if null else None,
            "step_loss_by_timestep": {_key(timestep): loss for timestep, loss in by_timestep.items()},
        }
    return ModelFigures(
        name=str(portable(name)),
        revision=describe_base_model(name, revision)["revision"],
        weights=tensors_fingerprint(unet.state_dict()),
        ema=ema if isinstance(ema := recorded_settings(name, revision).get("ema"), bool) else None,
        parameters=count_parameters(unet),
        macs=count_macs(unet),
        weight_file_bytes=weight_file_bytes(unet),
        scheduler={key: _finite(value) for key, value in scheduler.config.items() if not key.startswith("_")},
        **losses,
    )


def _key(timestep: float) -> str:
    return str(timestep) if isinstance(timestep, int) else f"{timestep:g}"


def _finite(value: object) -> object:
    """A configuration value as valid JSON: DPM-Solver's `lambda_min_clipped` is minus infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def describe_evaluation(
    args: EvaluateArguments, inputs: Inputs, real: RealFeatures, quality: Quality, accelerator: Accelerator
) -> dict:
    """Everything that the measured figures depend on."""
    held_out = inputs.held_out
    known = {"class_labels": "labels"}  # names of earlier results
    tensors = {"images": held_out.samples, **{known.get(n, n): values for n, values in held_out.conditioning.items()}}
    fingerprint = tensors_fingerprint(tensors) if inputs.models else None
    drawn = {"sampler": "images of a folder"} if args.model.images_dir else quality.settings.identity()
    return {
        **drawn,
        "num_images": inputs.num_images,
        **(inputs.conditions.description if inputs.models else {}),
        "sample_size": list(inputs.shape[1:]),
        "channels": inputs.shape[0],
        "classes": inputs.classes,  # sampled in turn, except null_label
        "dtype": args.model.dtype,
        "dataset": {
            **describe_dataset(args.data.dataset_name, args.data.train_data_dir),
            "config_name": args.data.dataset_config_name,
            "fingerprint": real.fingerprint,
        },
        "distances": quality.describe(),
        "step_loss_images": len(held_out) if inputs.models else 0,
        "step_loss_timesteps": args.cost.step_loss_timesteps if inputs.models else 0,
        "step_loss_fingerprint": fingerprint,
        "similarities": SIMILARITIES if len(inputs.models) == 2 and inputs.num_images else {},
        **float32_description(accelerator.device),
        "device": accelerator.device.type,
        "hardware": hardware_name(accelerator.device),
        "threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "versions": package_versions(*PACKAGES),
    }
