"""The end of a run, tried at its start: what would fail after the last step fails before the first, in seconds.

Sampling, features, timing, the card and the files of a run are all needed only at its end. Here each is made once, as small as
it can be: one step of the sampler from pure noise, features of two images, one timed forward, a card from made-up figures, and
a file of the size of the weights, which is deleted. `--dry_run` does the same.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from diffusers_gfprune import GradientFlowPruner
from diffusers_gfprune.evaluation.cost import example_inputs, measure_latency, spatial_size
from diffusers_gfprune.evaluation.eval_mode import evaluating
from diffusers_gfprune.evaluation.features import FeatureNetwork
from diffusers_gfprune.evaluation.quality import SamplingSettings, extract_features
from diffusers_gfprune.evaluation.sampling import make_sampler
from diffusers_gfprune.hub import check_nothing_private
from diffusers_gfprune.model_card import render_card
from measuring import SampleQuality
from prune_arguments import Arguments
from reporting import describe_evaluation, model_figures, pruning_report
from run_folder import RunFolder, format_size, write_json
from training_state import Curves

__all__ = ["rehearse_features", "rehearse_run", "trial"]

# Values of the images in a trial on a CPU, where more of them only take longer
TRIAL_VALUES = 2**14


def _trial_batch(unet: nn.Module, batch_size: int) -> int:
    """Images of a trial: as many as are wanted on a GPU, whose memory may not do."""
    if next(unet.parameters()).device.type != "cpu":
        return batch_size
    values = unet.config.in_channels * math.prod(spatial_size(unet))
    return min(batch_size, max(1, TRIAL_VALUES // values))


@torch.no_grad()
def trial(argument: str, unet: nn.Module, scheduler, settings: SamplingSettings) -> float:
    """Take the first step of sampling, and time its forward.

    Args:
        argument: What the model was given as, for messages.
        unet: The model, where it is and in its dtype.
        scheduler: Of the model.
        settings: How it is to be sampled.

    Returns:
        Seconds that a forward takes for each image.

    Raises:
        ValueError: The sampler cannot be made; or the forward fails, say because the memory or the number type does not do; or
            the model, or the sampler's step, gives values that are not finite.
    """
    parameter = next(unet.parameters())
    sampler = make_sampler(scheduler, settings.num_inference_steps, settings.timestep_spacing)
    batch_size = _trial_batch(unet, min(settings.batch_size, settings.num_images))
    dtype = str(parameter.dtype).removeprefix("torch.")
    inputs = example_inputs(unet, *spatial_size(unet), batch_size, parameter.device, parameter.dtype)
    noise = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    timestep = sampler.timesteps[0]
    inputs |= {"sample": noise.to(parameter.dtype), "timestep": timestep.to(parameter.device)}
    try:
        with evaluating(unet):
            for _ in range(2):  # the first one warms up
                start = time.perf_counter()
                prediction = unet(**inputs).sample.float()
                finite = bool(prediction.isfinite().all())
                seconds = time.perf_counter() - start
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"of {batch_size} images in {dtype} on {parameter.device.type}"
        raise ValueError(f"{argument}: a forward {where} fails: {reason}") from error
    if not finite:
        raise ValueError(f"{argument} predicts values that are not finite in {dtype}")
    if not sampler.step(prediction, timestep, noise).prev_sample.isfinite().all():
        raise ValueError(f"{argument}: a DDIM step from timestep {int(timestep)} gives values that are not finite")
    return seconds / batch_size


def rehearse_features(networks: Sequence[FeatureNetwork], shape: tuple[int, int, int]) -> None:
    """Take features of two images of a shape `(channels, height, width)` by every network.

    Raises:
        ValueError: A network fails.
    """
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for network in networks:
        try:
            extract_features(network, images)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"features={network.name} of images of shape {shape} fail: {reason}") from error


def rehearse_run(
    args: Arguments,
    pruner: GradientFlowPruner,
    sample_quality: SampleQuality,
    num_held_out: int,
    origin: dict,
    folder: RunFolder,
) -> str:
    """Try all that a pruning run does at its end.

    Args:
        args: The command line.
        pruner: Made, but not stepped yet.
        sample_quality: With the dense model.
        num_held_out: Held-out images.
        origin: `base_model`, `dataset` and `command` (see `provenance`).
        folder: Of the run.

    Returns:
        What was tried, in one line.

    Raises:
        ValueError: Something would fail.
    """
    start, tried = time.perf_counter(), []
    dense, e = sample_quality.dense, args.evaluation
    home = next(dense.parameters()).device
    dense.to(sample_quality.device)
    if e.eval_images or args.tracking.sample_steps:
        argument = f"pretrained_model_name_or_path={args.model.pretrained_model_name_or_path}"
        trial(argument, dense, sample_quality.scheduler, sample_quality.settings)
        tried.append("a sampling step")
    if sample_quality.network is not None:
        rehearse_features([sample_quality.network], (dense.config.in_channels, *spatial_size(dense)))
        tried.append("features")
    latency = None
    if e.latency_batch_size:
        latency = measure_latency(dense, _trial_batch(dense, e.latency_batch_size), repeats=1, warmup=0)
        tried.append("a timed forward")
    rehearse_card(args, pruner, sample_quality, num_held_out, origin, latency)
    dense.to(home)
    size = sum(parameter.numel() * parameter.element_size() for parameter in dense.parameters())
    folder.try_writing(size)
    tried.append(f"a card and a file of {format_size(size)}")
    return f"{'tried':10} {', '.join(tried)}, in {time.perf_counter() - start:.1f} s"


def rehearse_card(
    args: Arguments,
    pruner: GradientFlowPruner,
    sample_quality: SampleQuality,
    num_held_out: int,
    origin: dict,
    latency: dict | None,
) -> None:
    """Render the card of a run from figures that are made up, and look at it as a push would.

    Raises:
        ValueError: The card would not be valid, or a push would refuse it.
    """
    dense, network = sample_quality.dense, sample_quality.network
    losses = {"step_loss": 1.0}
    if sample_quality.settings.null_label is not None:
        losses["step_loss_null_label"] = 1.0
    figures = model_figures(dense, losses, latency)
    evaluation = describe_evaluation(args, dense, sample_quality.settings, num_held_out)
    if args.evaluation.eval_images:
        figures |= {"ssim_to_dense": 1.0, "psnr_to_dense": 1.0}
    if network is not None:
        figures[network.metric] = 1.0
        description = {"title": network.title, "features": network.description, "reference_images": 2}
        evaluation["distances"] = {network.metric: description}
    results = {"format_version": 0, "dense": figures, "pruned": figures, "evaluation": evaluation}
    report = pruning_report(args, pruner, Curves(), 1.0, origin)
    card = render_card(results, report, args.hub.hub_model_id or Path(args.run.output_dir).name)
    if args.hub.push_to_hub:
        with tempfile.TemporaryDirectory() as place:
            Path(place, "README.md").write_text(card, "utf-8")
            for name, content in (("results.json", results), ("pruning_report.json", report)):
                write_json(Path(place, name), content)
            check_nothing_private(place, ["README.md", "results.json", "pruning_report.json"], args.hub.hub_token)
