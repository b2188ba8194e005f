"""The end of a run, tried at its start: what would fail after the last step fails before the first, in seconds.

Sampling, features, timing, the card and the files of a run are all needed only at its end. Here each is made once, as small as
it can be: one step of the sampler from pure noise, features of two images, one timed forward, a compiled function, a card from
made-up figures, and a file of the size of the weights, which is deleted. `--dry_run` does the same.
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
from diffusers_gfprune.evaluation.cost import example_inputs, spatial_size
from diffusers_gfprune.evaluation.eval_mode import evaluating
from diffusers_gfprune.evaluation.features import FeatureNetwork
from diffusers_gfprune.evaluation.quality import SamplingSettings, extract_features
from diffusers_gfprune.evaluation.sampling import make_sampler
from diffusers_gfprune.evaluation.speed import SpeedSetting, measure_speed, one_line
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


def rehearse_speed(unet: nn.Module, settings: Sequence[SpeedSetting]) -> tuple[list[dict], list[str]]:
    """Time a forward in every number type and memory format, and compile a function if models are to be compiled.

    What fails is no reason not to start: at the end, too, it is a row that says why.

    Args:
        unet: The dense model, where it is.
        settings: In which speed is to be measured at the end.

    Returns:
        Rows as `measure_speed` has them, and what was tried, in words.

    Raises:
        ValueError: Nothing can be timed on the model's device.
    """
    batch_size = _trial_batch(unet, max(setting.batch_size for setting in settings))
    kinds = dict.fromkeys((setting.dtype, setting.channels_last) for setting in settings)
    trials = [SpeedSetting(batch_size, dtype, channels_last=channels_last) for dtype, channels_last in kinds]
    try:
        rows = measure_speed({"dense": unet}, trials, repeats=1, warmup=1)
    except ValueError as error:
        raise ValueError(f"speed cannot be measured, --speed_batch_sizes 0 leaves it out: {error}") from error
    tried = [f"a timed forward{_failure(row.get('error'))}" for row in rows]
    if any(setting.compiled for setting in settings):
        tried.append(f"a compiled function{_failure(_compilation_error(next(unet.parameters()).device))}")
    return rows, tried


def _failure(error: str | None) -> str:
    return "" if error is None else f" (fails and will not be measured: {error})"


def _compilation_error(device: torch.device) -> str | None:
    """Why nothing can be compiled here, in one line. A whole model would take half a minute."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except (RuntimeError, ImportError) as error:
        return one_line(error)
    return None


def describe_speed(settings: Sequence[SpeedSetting]) -> str:
    """What will be timed at the end, in one line of the plan."""
    lists = [
        ("batch", dict.fromkeys(str(setting.batch_size) for setting in settings)),
        *(("", dict.fromkeys(getattr(s, name) for s in settings)) for name in ("dtype", "mode", "memory_format")),
    ]
    words = "; ".join(f"{title} {', '.join(values)}".strip() for title, values in lists)
    compilations = 2 * sum(setting.compiled for setting in settings)
    pause = f" ({compilations} compilations, of half a minute or more each)" if compilations else ""
    return f"{'speed':10} of both models at the end: {words}{pause}"


def rehearse_run(
    args: Arguments,
    pruner: GradientFlowPruner,
    sample_quality: SampleQuality,
    num_held_out: int,
    origin: dict,
    folder: RunFolder,
) -> list[str]:
    """Try all that a pruning run does at its end.

    Args:
        args: The command line.
        pruner: Made, but not stepped yet.
        sample_quality: With the dense model.
        num_held_out: Held-out images.
        origin: `base_model`, `dataset` and `command` (see `provenance`).
        folder: Of the run.

    Returns:
        What speed will be measured in, if it is, and what was tried, a line each.

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
    speed, lines, settings = [], [], e.speed_settings()
    if settings:
        speed, words = rehearse_speed(dense, settings)
        tried += words
        lines.append(describe_speed(settings))
    rehearse_card(args, pruner, sample_quality, num_held_out, origin, speed)
    dense.to(home)
    size = sum(parameter.numel() * parameter.element_size() for parameter in dense.parameters())
    folder.try_writing(size)
    tried.append(f"a card and a file of {format_size(size)}")
    return [*lines, f"{'tried':10} {', '.join(tried)}, in {time.perf_counter() - start:.1f} s"]


def rehearse_card(
    args: Arguments,
    pruner: GradientFlowPruner,
    sample_quality: SampleQuality,
    num_held_out: int,
    origin: dict,
    speed: Sequence[dict],
) -> None:
    """Render the card of a run from figures that are made up, and look at it as a push would.

    `speed` has rows of the dense model, which stand for the pruned one, too.

    Raises:
        ValueError: The card would not be valid, or a push would refuse it.
    """
    dense, network = sample_quality.dense, sample_quality.network
    losses = {"step_loss": 1.0}
    if sample_quality.settings.null_label is not None:
        losses["step_loss_null_label"] = 1.0
    figures = model_figures(dense, losses)
    evaluation = describe_evaluation(args, dense, sample_quality.settings, num_held_out)
    if args.evaluation.eval_images:
        figures |= {"ssim_to_dense": 1.0, "psnr_to_dense": 1.0}
    if network is not None:
        figures[network.metric] = 1.0
        description = {"title": network.title, "features": network.description, "reference_images": 2}
        evaluation["distances"] = {network.metric: description}
    rows = [{**row, "model": name} for row in speed for name in ("dense", "pruned")]
    results = {"format_version": 0, "dense": figures, "pruned": figures, "speed": rows, "evaluation": evaluation}
    report = pruning_report(args, pruner, Curves(), 1.0, origin)
    card = render_card(results, report, args.hub.hub_model_id or Path(args.run.output_dir).name)
    if args.hub.push_to_hub:
        with tempfile.TemporaryDirectory() as place:
            Path(place, "README.md").write_text(card, "utf-8")
            for name, content in (("results.json", results), ("pruning_report.json", report)):
                write_json(Path(place, name), content)
            check_nothing_private(place, ["README.md", "results.json", "pruning_report.json"], args.hub.hub_token)
