"""Plan of a run at the scale of the paper: google/ddpm-cifar10-32 to half its MACs in 100,000 steps, on one GPU of 80 GB.

    python benchmarks/paper_scale.py              prints the two tables of the README (half a minute, on a CPU)

No such run was made. Three questions are answered from what was measured:

    memory      the estimate of a run's plan (`training/estimate.py`), for the recipe's batch size
    time        images per second of masked and compacted training steps and of the teacher's forwards on an H100
                (`results/gpu.json`), for the steps and rankings of the recipe. A ranking takes as many dense steps as on a CPU
                (`results/cost.json`), eagerly in float32
    distance    the share of one-shot Diff-Pruning's gap to the dense model that the default leaves on the study's CIFAR-10
                model, times that gap as published. Two rows of the study stand for Diff-Pruning: one removes as many MACs as
                the default, in whole norm groups, the other as many as were published, in single channels by its script

For a share r of the gap, the predicted FID is FID_dense + r (FID_Diff-Pruning - FID_dense).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from memory import CARD_BYTES
from models import build
from study_records import load, spread
from study_settings import SETTINGS

from diffusers_gfprune.formatting import format_size
from diffusers_gfprune.metrics.model_size import parameter_bytes
from diffusers_gfprune.training.arguments import parse_arguments
from diffusers_gfprune.training.estimate import StepEstimate, count_activations, memory_plan

RESULTS = Path(__file__).resolve().parent / "results"
# Columns of the plan: arguments after those of the recipe, and the scoring of `cost.json`
RUNS: dict[str, tuple[tuple[str, ...], str]] = {
    "as published": ((), "scoring_exact_mean"),
    "default": (("--preset", "default"), "scoring_none"),
}
MODES = {"bf16, CUDA graphs": "graph", "bf16": "eager"}
# FID of the dense model (averaged weights) and of Diff-Pruning, which removes 44 % of the MACs, after 100,000 steps, both with
# 100 steps of DDIM (arXiv 2305.10924, table 1)
PUBLISHED_DENSE, PUBLISHED_DIFF_PRUNING = 4.19, 5.29
FID_IMAGES, FID_STEPS = 50_000, 100
RIVALS, OURS = ("diff-pruning", "torch-pruning"), ("default", "no-recovery")


def rate(gpu: dict, part: str, model: str, mode: str, dtype: str = "bfloat16") -> float:
    """Images per second of `results/gpu.json`: `part` is `"steps"` or `"forwards"`."""
    wanted = {"model": model, "mode": mode, "dtype": dtype}
    return next(row["samples_per_second"] for row in gpu[part] if wanted.items() <= row.items())


def lengths(arguments: Sequence[str]) -> dict[str, int | str | bool]:
    """Steps, batch size, rankings, calibration batches and criterion of a run, and whether it has a teacher."""
    args = parse_arguments(["--recipe", "cifar10", *arguments])
    schedule = args.pruning.config(args.training.max_train_steps).schedule()
    return {
        "pruning_steps": schedule.end_steps,
        "fine_tuning_steps": args.training.max_train_steps - schedule.end_steps,
        "batch_size": args.training.train_batch_size,
        "rankings": len(schedule.update_steps()),
        "calibration_batches": args.pruning.calibration_batches,
        "criterion": args.pruning.criterion,
        "teacher": args.objective.needs_teacher,
    }


def hours(run: Mapping[str, int | str | bool], gpu: dict, mode: str, scoring: float) -> float:
    """Time of a run's steps and rankings in hours.

    Args:
        run: Result of `lengths`.
        gpu: Contents of `results/gpu.json`.
        mode: `"graph"` or `"eager"`.
        scoring: Time of scoring a batch, in dense training steps.
    """
    size = run["batch_size"]
    seconds = size * run["pruning_steps"] / rate(gpu, "steps", "masked", mode)
    seconds += size * run["fine_tuning_steps"] / rate(gpu, "steps", "compacted", mode)
    if run["teacher"]:
        seconds += size * (run["pruning_steps"] + run["fine_tuning_steps"]) / rate(gpu, "forwards", "dense", mode)
    scored = run["rankings"] * run["calibration_batches"] * size
    return (seconds + scoring * scored / rate(gpu, "steps", "dense", "eager", "float32")) / 3600


def sampling_hours(gpu: dict, mode: str) -> float:
    """Time to draw the samples of an FID from both models, in hours."""
    return sum(FID_IMAGES * FID_STEPS / rate(gpu, "forwards", model, mode) for model in ("dense", "compacted")) / 3600


def memory(run: Mapping[str, int | str | bool]) -> tuple[int, int]:
    """Bytes of training and of a ranking of a run, with averaged weights and bfloat16 autocast (rankings: float32)."""
    with torch.device("meta"):
        model = build("cifar10")
    size = int(run["batch_size"])
    training, scoring = count_activations(model, size, mixed_precision="bf16"), count_activations(model, size)
    estimate = StepEstimate(size, 0.0, size, parameter_bytes(model), training, size, scoring)
    options = {"criterion": run["criterion"], "use_ema": True, "teacher": bool(run["teacher"]), "device": "cuda"}
    plan = memory_plan(estimate, CARD_BYTES, **options)
    return plan.training, plan.scoring


def plan_column(run: Mapping[str, int | str | bool], gpu: dict, scoring: float) -> dict[str, str]:
    """Cells of the plan's table by the titles of their rows; arguments as those of `hours`."""
    training, ranking = memory(run)
    return {
        "teacher": "the dense model" if run["teacher"] else "none",
        "steps of phases 1 and 2": f"{run['pruning_steps']:,}",
        "steps of fine-tuning": f"{run['fine_tuning_steps']:,}",
        "rankings x batches": f"{run['rankings']} x {run['calibration_batches']}",
        **{f"hours, {title}": f"{hours(run, gpu, mode, scoring):.1f}" for title, mode in MODES.items()},
        f"hours to sample {FID_IMAGES:,} images of both models": f"{sampling_hours(gpu, 'graph'):.1f}",
        "memory, training": format_size(training, 1),
        "memory, ranking": format_size(ranking, 1),
    }


def plan_table(gpu: dict, cost: dict) -> str:
    """Markdown table of steps, time and memory."""
    columns = [plan_column(lengths(words), gpu, cost["cifar10"][scoring]["ratio"]) for words, scoring in RUNS.values()]
    lines = [f"| | {' | '.join(RUNS)} |", "|---" * (1 + len(RUNS)) + "|"]
    lines += [f"| {title} | {' | '.join(column[title] for column in columns)} |" for title in columns[0]]
    return "\n".join(lines)


def measured_steps(run: dict) -> list[int]:
    """Steps at which a run has a distance."""
    return [*run["curves"].get("quality_steps", []), run["steps"]]


def distance(run: dict, step: int) -> float:
    """FD-EffLite0 of a run at a step at which it was measured."""
    if step == run["steps"]:
        return run["pruned"]["fd_efflite0"]
    return run["curves"]["quality"]["fd_efflite0"][run["curves"]["quality_steps"].index(step)]


def gap_left(runs: Sequence[dict], rivals: Sequence[dict], step: int) -> list[float]:
    """Share of the rivals' mean gap to the dense model that each run leaves at a step."""
    dense = runs[0]["dense"]["fd_efflite0"]
    gap = statistics.mean(distance(run, step) for run in rivals) - dense
    return [(distance(run, step) - dense) / gap for run in runs]


def distance_table(found: Mapping[str, Sequence[dict]]) -> str:
    """Markdown table of shares of the gap and predicted FIDs."""
    titles = ("setting", "seeds", "for Diff-Pruning", "its MACs removed", "seeds", "after step", "gap left", "predicted FID")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, rival in itertools.product(OURS, RIVALS):
        runs, rivals = found.get(name, []), found.get(rival, [])
        steps = measured_steps(runs[0]) if runs and rivals else []
        for step in (step for step in steps if all(step in measured_steps(run) for run in rivals)):
            shares = gap_left(runs, rivals, step)
            predicted = [PUBLISHED_DENSE + share * (PUBLISHED_DIFF_PRUNING - PUBLISHED_DENSE) for share in shares]
            removed = 1 - rivals[0]["pruned"]["macs"] / rivals[0]["dense"]["macs"]
            stood = (SETTINGS[rival].title, f"{removed:.0%}", str(len(rivals)))
            cells = (SETTINGS[name].title, str(len(runs)), *stood, str(step), spread(shares, 2), spread(predicted, 2))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    gpu, cost = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("gpu", "cost"))
    print(plan_table(gpu, cost), end="\n\n")
    print(distance_table(load("cifar10")))


if __name__ == "__main__":
    main()
