"""What a run says: the plan before it, `results.json` and `pruning_report.json` after it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusers_gfprune import GradientFlowPruner
from diffusers_gfprune.evaluation.cost import count_macs, count_parameters, measure_latency, spatial_size
from diffusers_gfprune.evaluation.fidelity import (
    frechet_distance_pixels,
    psnr_to_reference,
    sample_images,
    ssim_to_reference,
)
from image_data import stack_rows
from provenance import portable
from prune_arguments import Arguments

__all__ = ["describe_plan", "package_versions", "pruning_report", "results"]

FORMAT_VERSION = 1
LATENCY_BATCH_SIZE = 16
SSIM_WINDOW = 7


def package_versions() -> dict[str, str]:
    """Versions of Python and of what decides a result."""
    names = ("diffusers-gfprune", "torch", "diffusers", "accelerate", "datasets", "huggingface_hub", "torch-pruning")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def describe_plan(pruner: GradientFlowPruner, args: Arguments, seconds_per_dense_step: float) -> str:
    """What a run will do: widths, costs, steps, time.

    Args:
        pruner: Made, but not stepped yet.
        args: The command line.
        seconds_per_dense_step: Measured time of one dense training step.
    """
    cost, schedule, config = pruner.cost, pruner.schedule, pruner.config
    total = config.total_steps
    lines = [
        f"plan: remove {config.ratio:.1%} of {config.target} by {config.criterion} "
        f"({len(pruner.groups)} channel groups, ranking: {config.ranking})",
        "",
        f"  {'channel group':44}{'dense':>7}{'planned':>9}",
    ]
    lines += [
        f"  {group.name:44}{group.num_channels:>7}{int(width):>9}" + (f"   ({group.heads} heads)" if group.heads > 1 else "")
        for group, width in zip(pruner.groups, pruner.planned_widths)
    ]
    if config.ranking == "global":
        lines.append("  (a global ranking chooses widths by scores; these are those of a uniform cut)")
    for name in ("macs", "params", "channels"):
        before, after = cost.cost(name, cost.dense), cost.cost(name, pruner.planned_widths)
        lines.append(f"  {name:10} {before:>16,.0f} -> {after:>16,.0f}   (-{1 - after / before:.1%})")
    soft, end = min(schedule.soft_steps, total), min(schedule.end_steps, total)
    updates = [step for step in schedule.update_steps() if step <= total]
    # Measured on the digits and CIFAR-10 models (benchmarks/cost.py): masks cost about a tenth of a step, a scoring pass
    # over one batch about three steps, and a compacted step what its MACs say.
    masked = 1.1 * seconds_per_dense_step * end
    per_batch = {"gradient-flow": 3.0, "magnitude": 0.0, "random": 0.0}.get(config.criterion, 1.0)
    images = args.pruning.calibration_batches * (args.pruning.calibration_batch_size or args.training.train_batch_size)
    scoring = per_batch * seconds_per_dense_step * len(updates) * images / args.training.train_batch_size
    finetuning = seconds_per_dense_step * (1 - cost.removed("macs", pruner.planned_widths)) * (total - end)
    # A forward of the dense model is about a third of a step of it.
    distilling = seconds_per_dense_step * total / 3 if args.training.distillation_weight else 0.0
    lines += [
        f"  steps      soft {soft}, hard {end - soft}, fine-tuning {total - end}; {len(updates)} rankings of "
        f"{args.pruning.calibration_batches} calibration batches",
        f"  time       about {_duration(masked + scoring + finetuning + distilling)} "
        f"without evaluation ({seconds_per_dense_step:.3f} s for a dense step of {args.training.train_batch_size} images)",
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _file_size(unet: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _reference_images(images, count: int) -> Tensor:
    plain = images.without_augmentation()
    pixels, _ = stack_rows([plain[index] for index in range(min(count, len(plain)))])
    return pixels / 2 + 0.5


def results(
    args: Arguments,
    dense: nn.Module,
    pruned: nn.Module,
    noise_scheduler,
    images,
    num_held_out: int,
    step_losses: tuple[float, float],
) -> tuple[dict, Tensor | None, Tensor | None]:
    """Measure the dense and the pruned model side by side.

    Returns:
        The content of `results.json`, and the samples of either model in [0, 1], if any were asked for.
    """
    e = args.evaluation
    size = spatial_size(dense)
    measured: dict = {"format_version": FORMAT_VERSION}
    for name, unet, loss in (("dense", dense, step_losses[0]), ("pruned", pruned, step_losses[1])):
        measured[name] = {
            "parameters": count_parameters(unet),
            "macs": count_macs(unet),
            "weight_file_bytes": _file_size(unet),
            "step_loss": loss,
            "latency": measure_latency(unet, LATENCY_BATCH_SIZE),
        }
    measured["evaluation"] = {
        "num_images": e.eval_images,
        "sampler": "DDIM",
        "num_inference_steps": e.ddim_num_inference_steps,
        "timestep_spacing": "leading",
        "eta": 0.0,
        "seed": e.eval_seed,
        "ema": args.training.use_ema,
        "step_loss_images": num_held_out,
        "sample_size": list(size),
        "device": str(next(pruned.parameters()).device.type),
        "dtype": str(next(pruned.parameters()).dtype).removeprefix("torch."),
        "versions": package_versions(),
    }
    if e.eval_images == 0:
        return measured, None, None
    labels = None
    if dense.config.num_class_embeds is not None:
        labels = torch.arange(e.eval_images) % dense.config.num_class_embeds
    samples = {}
    for name, unet in (("dense", dense), ("pruned", pruned)):
        samples[name] = sample_images(
            unet,
            noise_scheduler,
            e.eval_images,
            size,
            e.ddim_num_inference_steps,
            e.eval_seed,
            e.eval_batch_size,
            labels,
            progress=f"sampling ({name})",
        )
    pixel_values = samples["dense"][0].numel()
    if e.eval_images > pixel_values and len(images) > pixel_values and pixel_values <= 1024:
        reference = _reference_images(images, 10_000)
        for name in samples:
            measured[name]["fd_pixels"] = frechet_distance_pixels(samples[name], reference)
        measured["evaluation"]["fd_features"] = "raw pixels in [0, 1]"
        measured["evaluation"]["fd_reference_images"] = len(reference)
    if min(size) >= SSIM_WINDOW:
        measured["pruned"]["ssim_to_dense"] = ssim_to_reference(samples["pruned"], samples["dense"])
    psnr = psnr_to_reference(samples["pruned"], samples["dense"])
    measured["pruned"]["psnr_to_dense"] = psnr if math.isfinite(psnr) else None  # no difference at all
    return measured, samples["dense"], samples["pruned"]


def pruning_report(args: Arguments, pruner: GradientFlowPruner, curves, dense_step_loss: float, origin: dict) -> dict:
    """The content of `pruning_report.json`: what was removed, when, and how training went.

    Args:
        args: The command line.
        pruner: After the last ranking.
        curves: What was recorded along the run, a dataclass.
        dense_step_loss: Of the base model.
        origin: `base_model`, `dataset` and `command` (see `provenance`).
    """
    return {
        "format_version": FORMAT_VERSION,
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
                "kept_channels": int(pruner.kept[group.name].sum()),
                "heads": group.heads,
            }
            for group in pruner.groups
        ],
        "mask_updates": [update.to_dict() for update in pruner.history],
        "dense_step_loss": dense_step_loss,
        "curves": dataclasses.asdict(curves),
        "versions": package_versions(),
    }
