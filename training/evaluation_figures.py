"""What an evaluation says: its plan, figures of a model that take no samples, and all that figures depend on."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from torch import nn

from diffusers_gfprune.evaluation.cache import tensors_fingerprint
from diffusers_gfprune.evaluation.cost import (
    count_macs,
    count_parameters,
    example_inputs,
    hardware_name,
    spatial_size,
    uses_tf32,
)
from diffusers_gfprune.evaluation.quality import Quality
from diffusers_gfprune.evaluation.step_loss import StepLoss
from diffusers_gfprune.hub import HUB_ERRORS
from evaluation_arguments import EvaluateArguments
from evaluation_inputs import Inputs
from evaluation_results import ModelFigures
from evaluation_samples import Samples
from measuring import RealFeatures, versions
from provenance import describe_base_model, describe_dataset, portable
from reporting import package_versions, weight_file_bytes

__all__ = ["describe_evaluation", "describe_model", "describe_plan", "trial", "warn_of_few"]

# What figures depend on besides the packages of a run
PACKAGES = ("clean-fid", "numpy", "pillow", "scikit-image", "scipy", "torchvision", "transformers")
SIMILARITIES = {
    "ssim_to_dense": "scikit-image, uniform window of 7x7 pixels, mean over images",
    "psnr_to_dense": "of the mean squared error over all images",
}
# Values of the images in the trial on a CPU, where more of them only take longer
TRIAL_VALUES = 2**14


@torch.no_grad()
def trial(argument: str, name: str, unet: nn.Module, batch_size: int) -> float:
    """Try a forward before long work, and time it.

    Args:
        argument: What the model was given as.
        name: What was given.
        unet: The model.
        batch_size: Images in a forward.

    Returns:
        Seconds that a forward takes for each image.

    Raises:
        ValueError: It fails, say because the memory or the number type does not do, or gives values that are not finite.
    """
    parameter = next(unet.parameters())
    if parameter.device.type == "cpu":
        batch_size = min(batch_size, max(1, TRIAL_VALUES // (unet.config.in_channels * math.prod(spatial_size(unet)))))
    dtype = str(parameter.dtype).removeprefix("torch.")
    inputs = example_inputs(unet, *spatial_size(unet), batch_size, parameter.device, parameter.dtype)
    noise = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(0))
    inputs["sample"] = noise.to(parameter.device, parameter.dtype)
    try:
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            finite = bool(unet(**inputs).sample.isfinite().all())
            seconds = time.perf_counter() - start
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"of {batch_size} images in {dtype} on {parameter.device.type}"
        raise ValueError(f"{argument}={name}: a forward {where} fails: {reason}") from error
    if not finite:
        raise ValueError(f"{argument}={name} predicts values that are not finite in {dtype}")
    return seconds / batch_size


def describe_plan(args: EvaluateArguments, inputs: Inputs, samples: Samples, real: RealFeatures, processes: int) -> str:
    """What the evaluation will do, and how long sampling may take.

    Raises:
        ValueError: A model does not run.
    """
    s, lines, count, seconds = args.samples, ["plan:"], inputs.num_images, 0.0
    missing = samples.unsampled() if inputs.models else []
    for index, (argument, (unet, _)) in enumerate(inputs.models.items()):
        name = getattr(args.model, argument)
        cost = f"{count_parameters(unet):,} parameters, {count_macs(unet):,} MACs"
        lines.append(f"  {argument:16} {name}: {cost}")
        per_image = trial(argument, name, unet, min(s.eval_batch_size, max(1, count)))
        if count:
            seconds += per_image * s.num_inference_steps * missing[index]
    if inputs.folder_images is not None:
        size = "x".join(map(str, inputs.folder_images.size))
        lines.append(f"  {'images':16} {count:,} of {args.model.images_dir}, {size} pixels")
    elif not count:
        lines.append(f"  {'samples':16} none")
    else:
        drawn = f"{s.num_inference_steps} steps ({s.timestep_spacing}), eta {s.eta:g}, seed {s.seed}"
        lines.append(f"  {'samples':16} {count:,} of each model: DDIM, {drawn}")
        left = f"{sum(missing):,} of {count * len(inputs.models):,} are to be made"
        shared = f" by {processes} processes" if processes > 1 else ""
        lines.append(f"  {'':16} {left}{shared}, in about {_duration(seconds / processes)}")
    if inputs.networks:
        titles = ", ".join(network.title for network in inputs.networks)
        lines.append(f"  {'distances':16} {titles}, to {real.count:,} real images")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def warn_of_few(inputs: Inputs, real: RealFeatures) -> None:
    """A covariance takes more images than it has dimensions."""
    fewest = min(inputs.num_images, real.count)
    for network in inputs.networks:
        if network.dimensions is not None and fewest <= network.dimensions:
            print(
                f"warning: {fewest:,} images are few for {network.title} on {network.dimensions:,} features: it will be far "
                f"above what more would give, so compare it with nothing but the same number of images",
                file=sys.stderr,
            )


def describe_model(args: EvaluateArguments, argument: str, inputs: Inputs) -> ModelFigures:
    """What can be said about a model without samples.

    Raises:
        ValueError: Its loss is not finite.
    """
    unet, scheduler = inputs.models[argument]
    name = getattr(args.model, argument)
    revision = args.model.revision if argument == "model" else args.model.reference_revision
    images, labels = inputs.held_out
    step_loss = StepLoss(images, scheduler, labels, grid=args.cost.step_loss_timesteps)
    losses = step_loss.by_timestep(unet)
    met = [int((step_loss.timesteps == timestep).sum()) for timestep in losses]
    mean = math.fsum(loss * count for loss, count in zip(losses.values(), met)) / sum(met)
    if not math.isfinite(mean):
        raise ValueError(f"{argument}={name}: its step loss in {args.model.torch_dtype} is {mean}, not a finite number")
    return ModelFigures(
        name=str(portable(name)),
        revision=describe_base_model(name, revision)["revision"],
        weights=tensors_fingerprint(unet.state_dict()),
        ema=known_ema(name, revision),
        parameters=count_parameters(unet),
        macs=count_macs(unet),
        weight_file_bytes=weight_file_bytes(unet),
        scheduler={key: value for key, value in scheduler.config.items() if not key.startswith("_")},
        step_loss=mean,
        step_loss_by_timestep={str(timestep): loss for timestep, loss in losses.items()},
    )


def known_ema(name: str, revision: str | None = None) -> bool | None:
    """Whether weights are averaged, if the results of the run that made them say so."""
    with suppress(ValueError, LookupError, TypeError, *HUB_ERRORS):
        path = Path(name) / "results.json"
        if not Path(name).is_dir():
            path = Path(hf_hub_download(name, "results.json", revision=revision))
        ema = json.loads(path.read_text())["evaluation"]["ema"]
        return ema if isinstance(ema, bool) else None
    return None


def describe_evaluation(
    args: EvaluateArguments, inputs: Inputs, real: RealFeatures, quality: Quality, accelerator: Accelerator
) -> dict:
    """Everything that figures depend on, once they are there."""
    images, labels = inputs.held_out
    held_out = {"images": images} if labels is None else {"images": images, "labels": labels}
    fingerprint = tensors_fingerprint(held_out) if inputs.models else None
    drawn = {"sampler": "images of a folder"} if args.model.images_dir else quality.settings.identity()
    return {
        **drawn,
        "num_images": inputs.num_images,
        "sample_size": list(spatial_size(SimpleNamespace(config=inputs.config))),
        "channels": inputs.config.in_channels,
        "classes": inputs.config.num_class_embeds,  # sampled in turn
        "dtype": args.model.torch_dtype,
        "dataset": {
            **describe_dataset(args.data.dataset_name, args.data.train_data_dir),
            "config_name": args.data.dataset_config_name,
            "fingerprint": real.fingerprint,
        },
        "distances": quality.describe(),
        "step_loss_images": len(inputs.held_out[0]) if inputs.models else 0,
        "step_loss_timesteps": args.cost.step_loss_timesteps if inputs.models else 0,
        "step_loss_fingerprint": fingerprint,
        "similarities": SIMILARITIES if len(inputs.models) == 2 and inputs.num_images else {},
        "tf32": uses_tf32(accelerator.device),
        "device": accelerator.device.type,
        "hardware": hardware_name(accelerator.device),
        "threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "versions": {**package_versions(), **versions(*PACKAGES)},
    }
