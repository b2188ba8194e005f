"""Output of a run: the plan before training, `results.json` and `pruning_report.json` after it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import GradientFlowPruner
from ..criteria import find_criterion
from ..data.splits import DataSummary
from ..evaluation.sample_quality import SampleQuality
from ..families.lookup import family_of
from ..fingerprints import tensors_fingerprint
from ..formatting import format_count, format_duration
from ..metrics.model_size import count_macs, count_parameters, spatial_size, weight_file_bytes
from ..metrics.sampling import image_shape
from ..metrics.speed import measure_speed
from ..metrics.step_loss import StepLoss
from ..pruning.blocks import RemovableBlock, removed_blocks
from ..pruning.cost_model import COUNTED_TARGETS
from ..pruning.damage_curves import measured_widths
from ..pruning.depth import saved_by_blocks
from ..pruning.recovery import recovery_bytes, recovery_macs
from ..reports.provenance import package_versions, portable
from ..reports.results import PRUNING_RUN, ModelFigures, Results
from ..scoring.group_damage import curve_bytes, curve_macs
from ..trained_pipelines import TrainedPipeline
from .arguments import Arguments
from .estimate import StepEstimate, machine_memory, memory_plan
from .recovery import ROWS, SAMPLES
from .state import Curves

__all__ = ["describe_evaluation", "describe_plan", "measure_step_losses", "model_figures", "pruning_report", "results"]

REPORT_VERSION = 4
CURVE_POINTS = 500


def describe_plan(
    pruner: GradientFlowPruner, args: Arguments, estimate: StepEstimate, device: torch.device, data: DataSummary
) -> str:
    """Describe what a run will do: widths, costs, data, steps, time, memory.

    Args:
        pruner: The pruner before its first step.
        args: The command line.
        estimate: Estimate of a dense training step.
        device: Training device.
        data: Summary of the training images.
    """
    cost, schedule, config = pruner.cost, pruner.schedule, pruner.config
    total = config.total_steps
    planned = list(zip(pruner.groups, cost.present(pruner.planned_widths)))
    channels = [(group, width) for group, width in planned if not isinstance(group, RemovableBlock)]
    blocks = f"{len(cost.inner)} removable blocks, " if cost.inner else ""
    lines = [
        f"plan: remove {config.ratio:.1%} of {config.target} by {config.criterion} "
        f"({len(channels)} channel groups of {sum(group.num_units for group, _ in channels)} units, {blocks}"
        f"ranking: {config.ranking})",
        "  widths "
        + ("that fill blocks" if config.channel_multiple == "auto" else "in multiples")
        + f" of {pruner.channel_multiple} channels, as far as whole units allow",
        "",
        f"  {'channel group':44}{'dense':>7}{'units':>7}{'planned' if pruner.choice.widths_are_planned else 'even cut':>9}",
    ]
    lines += [
        f"  {group.name:44}{group.num_channels:>7}{group.num_units:>7}{int(width):>9}"
        + (f"   ({group.heads} heads)" if group.heads > 1 else "")
        for group, width in channels
    ]
    if cost.inner:
        lines += ["", f"  {'removable block':44}{'saves':>14}{'planned':>9}   (depth={config.depth})"]
    lines += [
        f"  {pruner.groups[index].name:44}{saved:>14.1%}{'kept' if planned[index][1] else 'removed':>9}"
        for index, saved in saved_by_blocks(cost, config.target, cost.dense).items()
    ]
    if not pruner.choice.widths_are_planned:
        others = "other widths and blocks" if cost.inner else "other widths"
        points = sum(len(measured_widths(ladder)) for ladder in pruner.ladders)
        by = f"by the damage of {points} narrower groups" if config.ranking == "curves" else "by scores"
        lines.append(f"  (ranking={config.ranking} will choose {others}, {by}, at the same {config.target})")
    for name in COUNTED_TARGETS:
        before, after = cost.cost(name, cost.dense), cost.cost(name, pruner.planned_widths)
        lines.append(f"  {name:10} {before:>16,.0f} -> {after:>16,.0f}   (-{1 - after / before:.1%})")
    if pruner.latency is not None:
        setting, before, after = config.latency_setting(), *(cost.seconds(n) for n in (cost.dense, pruner.planned_widths))
        models, last = len(pruner.latency["calibration"]), pruner.latency["calibration"][-1]["measured"]
        lines.append(
            f"  latency    {1000 * before:>13,.3g} ms -> {1000 * after:>13,.3g} ms   (-{1 - after / before:.1%}; a forward, "
            f"{setting.describe()}, by the times of its layers and of {models} models, the last of which lost {last:.1%})"
        )
    lines += [f"  {title:10} {line}" for title, line in zip(itertools.chain(["data"], itertools.repeat("")), data.lines())]
    soft, end = min(schedule.soft_steps, total), min(schedule.end_steps, total)
    updates = [step for step in schedule.update_steps() if step <= total]
    recovery = {"none": "", "compaction": ", recovery before compaction", "rankings": ", recovery at each"}[
        args.pruning.recovery
    ]
    whole = estimate.timed_batch_size == estimate.batch_size
    timed = "" if whole else f", extrapolated from {estimate.timed_batch_size}"
    about = "about" if whole else "at most"  # small batches take more time for an image
    lines += [
        f"  steps      soft {soft}, hard {end - soft}, fine-tuning {total - end}; {format_count(len(updates), 'ranking')} of "
        f"{format_count(args.pruning.calibration_batches, 'calibration batch', 'calibration batches')}{recovery}",
        f"  time       {about} {format_duration(_seconds(pruner, args, estimate, end, len(updates)))} without evaluation "
        f"({estimate.seconds:.3f} s for a dense forward and backward of {estimate.batch_size} images{timed})",
    ]
    memory = memory_plan(
        estimate,
        machine_memory(device),
        criterion=config.criterion,
        hvp=config.hvp,
        use_8bit_adam=args.training.use_8bit_adam,
        use_ema=args.training.use_ema,
        teacher=args.objective.needs_teacher,
        gradient_checkpointing=args.precision.gradient_checkpointing,
        gradient_accumulation_steps=args.training.gradient_accumulation_steps,
        curve_bytes=curve_bytes(pruner.unet, pruner.groups) if config.ranking == "curves" else 0,
        recovery_bytes=recovery_bytes(pruner.unet) if args.pruning.recovery != "none" else 0,
        device=device,
    )
    return "\n".join([*lines, *(f"  {line}" for line in memory.lines)])


def _seconds(pruner: GradientFlowPruner, args: Arguments, estimate: StepEstimate, end: int, rankings: int) -> float:
    """Seconds of a run without its evaluation, from the time of a dense step.

    As measured on the digits and CIFAR-10 models (benchmarks/cost.py), masks cost about a tenth of a step, scoring a batch
    takes the passes of the criterion's record, and a compacted step is proportional to its MACs. So is recovery: two forwards
    of its images, and the products of features. Damage curves take a forward for each point, and such products.
    """
    config, t = pruner.config, args.training
    step = estimate.seconds * t.gradient_accumulation_steps
    left = 1 - pruner.cost.removed("macs", pruner.planned_widths)
    images = args.pruning.calibration_batches * (args.pruning.calibration_batch_size or t.train_batch_size)
    criterion = find_criterion(config.criterion)
    passes = criterion.passes + criterion.block_passes * len(pruner.cost.inner)
    scoring = passes * estimate.seconds * rankings * images / t.train_batch_size
    # A dense forward is a third of a dense step
    masked = 1.1 * step + args.objective.extra_forwards() * step / 3
    small = left * step + args.objective.extra_forwards(left) * step / 3
    dense_macs = pruner.cost.macs(pruner.cost.dense)
    seconds_per_mac = estimate.seconds / (3 * t.train_batch_size * dense_macs)
    recoveries = {"none": 0, "compaction": 1, "rankings": rankings}[args.pruning.recovery]
    recovery = 0.0
    if recoveries:
        forwards = 2 * max(images, SAMPLES) * dense_macs
        recovery = recoveries * seconds_per_mac * (forwards + left * recovery_macs(pruner.unet, ROWS))
    if config.ranking == "curves":
        scoring += seconds_per_mac * curve_macs(dense_macs, pruner.unet, pruner.ladders)
    return masked * end + scoring + recovery + small * (config.total_steps - end)


def measure_step_losses(step_loss: StepLoss, unet: nn.Module, null: Mapping[str, Tensor]) -> dict[str, float]:
    """Step losses of a model, as `results.json` names them.

    Args:
        step_loss: Step loss on held-out images, with their conditioning.
        unet: The model.
        null: Conditioning without a label or caption, with one row; empty if the model has none.
    """
    losses = {"step_loss": step_loss(unet)}
    if null:
        losses["step_loss_null_label"] = step_loss.with_conditioning(null)(unet)
    return losses


def model_figures(name: str, unet: nn.Module, step_losses: Mapping[str, float]) -> ModelFigures:
    """Figures of a model in `results.json` that need no samples.

    Args:
        name: `"dense"` or `"pruned"`.
        unet: The model.
        step_losses: Result of `measure_step_losses`.
    """
    return ModelFigures(
        name,
        parameters=count_parameters(unet),
        macs=count_macs(unet),
        weight_file_bytes=weight_file_bytes(unet),
        **step_losses,
    )


def describe_evaluation(args: Arguments, unet: nn.Module, sample_quality: SampleQuality, num_held_out: int) -> dict:
    """Settings that the figures in `results.json` depend on."""
    parameter, latents = next(unet.parameters()), sample_quality.codec is not None
    return {
        **sample_quality.settings.identity(),
        "num_images": args.evaluation.eval_images,
        "ema": args.training.use_ema,
        "step_loss_images": num_held_out,
        "sample_size": list(image_shape(unet, sample_quality.codec)[1:]),
        **({"latent_size": [unet.config.in_channels, *spatial_size(unet)]} if latents else {}),
        "device": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "distances": {},
        "versions": package_versions(),
    }


def results(
    args: Arguments,
    dense: nn.Module,
    pruned: nn.Module,
    sample_quality: SampleQuality,
    num_held_out: int,
    step_losses: tuple[Mapping[str, float], Mapping[str, float]],
) -> tuple[Results, Tensor | None, Tensor | None]:
    """Measure the dense and the pruned model side by side.

    Args:
        args: The command line.
        dense: The dense model.
        pruned: The pruned model.
        sample_quality: Measures samples.
        num_held_out: Number of images of the step losses.
        step_losses: Results of `measure_step_losses` for both models.

    Returns:
        The results, and the samples of both models in [0, 1], or None with `eval_images=0`.
    """
    models, settings = {"dense": dense, "pruned": pruned}, args.evaluation.speed_settings()
    figures = {name: model_figures(name, models[name], losses) for name, losses in zip(models, step_losses)}
    for name, model in models.items():  # a push and a later evaluation check theirs against it
        figures[name].weights = tensors_fingerprint(model.state_dict())
    for row in measure_speed(models, settings, progress="speed") if settings else ():
        figures[row.pop("model")].speed.append(row)
    evaluation = describe_evaluation(args, pruned, sample_quality, num_held_out) | sample_quality.conditions.description
    measured = Results(PRUNING_RUN, figures["pruned"], figures["dense"], evaluation)
    if args.evaluation.eval_images == 0:
        return measured, None, None
    quality = sample_quality.quality
    samples = sample_quality.sample(pruned, progress="sampling (pruned)")
    figures["dense"].quality = quality.measure_dense()
    figures["pruned"].quality = quality.measure(samples)
    evaluation["distances"] = quality.describe()
    return measured, quality.dense_samples, samples


def _schedule_curves(pruner: GradientFlowPruner) -> dict[str, list]:
    """s_t (as a share of the dense cost) and p_t over the pruning steps, subsampled in long runs."""
    schedule = pruner.schedule
    steps = list(range(0, schedule.end_steps, max(1, schedule.end_steps // CURVE_POINTS)))
    return {
        "schedule_steps": steps,
        "sparsity": [schedule.sparsity(step) * pruner.config.ratio for step in steps],
        "mask_value": [schedule.mask_value(step) for step in steps],
    }


def describe_pipeline(pipeline: TrainedPipeline) -> dict:
    """Class of the pipeline, component of its denoiser, its process, and its condition, for the report."""
    family = family_of(pipeline.denoiser)
    labels = family.class_labels(pipeline.denoiser.config)
    described = {
        "class_name": pipeline.kind.__name__,
        "component": family.component,
        "process": pipeline.process.name,
        "condition": None,
    }
    if (predicted := pipeline.scheduler.config.get("prediction_type")) is not None and pipeline.process.name == "ddpm":
        described["prediction_type"] = predicted
    if pipeline.prompts is not None:
        return {**described, "condition": "text"}
    if labels is not None:
        return {**described, "condition": "class labels", "num_classes": labels.count}
    if family.vector_size(pipeline.denoiser.config) is not None:
        return {**described, "condition": "vectors"}
    return described


def pruning_report(
    args: Arguments,
    pruner: GradientFlowPruner,
    curves: Curves,
    dense_step_loss: float,
    origin: dict,
    diagnostics: dict | None = None,
    broken: Sequence[str] = (),
    timestep_density: dict | None = None,
) -> dict:
    """The content of `pruning_report.json`: removed channels and blocks, rankings and training curves.

    Groups of channels inside of removed blocks keep nothing.

    Args:
        args: The command line.
        pruner: The pruner after the last step.
        curves: Curves recorded during the run.
        dense_step_loss: Step loss of the base model.
        origin: `base_model`, `dataset` and `command` (see `provenance`), `num_processes`, and `pipeline` (see
            `describe_pipeline`).
        diagnostics: Known failures of the method that were detected.
        broken: Images that could not be read.
        timestep_density: How often timesteps were drawn at the end (`TimestepDensity.describe`).
    """
    return {
        "format_version": REPORT_VERSION,
        **origin,
        "config": pruner.config.to_dict(),
        "arguments": {name: portable(value) for name, value in args.to_dict().items()},
        "phases": {
            "soft_end_step": pruner.schedule.soft_steps,
            "hard_end_step": pruner.schedule.end_steps,
            "total_steps": pruner.config.total_steps,
            "update_interval": pruner.schedule.update_interval,
        },
        "channel_groups": [
            {
                "name": group.name,
                "dense_channels": group.num_channels,
                "kept_channels": int(width),
                "dense_units": group.num_units,
                "kept_units": int(pruner.kept[group.name].sum()) if width else 0,
                "heads": group.heads,
            }
            for group, width in zip(pruner.groups, pruner.cost.present(pruner.kept_channels()))
            if not isinstance(group, RemovableBlock)
        ],
        "removed_blocks": sorted(block.name for block in removed_blocks(pruner.groups, pruner.kept)),
        "latency_calibration": None if pruner.latency is None else pruner.latency["calibration"],
        "damage_curves": None
        if pruner.damage_curves is None
        else {name: curve.to_dict() for name, curve in pruner.damage_curves.items() if curve.widths},
        "mask_updates": [update.to_dict() for update in pruner.history],
        "dense_step_loss": dense_step_loss,
        "curves": {**_schedule_curves(pruner), **dataclasses.asdict(curves)},
        "timestep_density": timestep_density,
        "diagnostics": diagnostics or {},
        "unreadable_images": [portable(name) for name in broken],
        "versions": package_versions(),
    }
