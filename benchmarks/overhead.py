"""Overhead of a run over plain training steps: masks and scores, recovery, the teacher, checkpoints, trackers.

    python benchmarks/overhead.py                 writes benchmarks/results/overhead.json for both recipes (about ten minutes)

Parts are measured in interleaved pairs with plain dense training steps on the same images, as in `cost.py`, and combined for
the recipes' lengths and intervals:

    pruning part    masked step + rankings x calibration batches x scoring / steps of phases 1 and 2
    whole run       the same over phases 1 and 2, then compacted steps to the end; one-shot pruning ranks once instead
    recovery        time of least squares before compaction, which is in none of the other rows / time of a step
    checkpoints     time to save the masked model with moments and average / time of the steps between checkpoints
    tracking        time to log a point (and a ranking) to tensorboard / time of the steps between points

in units of one dense training step. A CIFAR-10 step at the recipe's batch size is extrapolated from fewer images.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cost import Trainer, half_masked, paired, scorer
from diffusers import DDPMScheduler, UNet2DModel
from models import batches_for, build

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.pruner import MaskUpdate
from diffusers_gfprune.run_folder import RunFolder
from diffusers_gfprune.training.arguments import parse_arguments
from diffusers_gfprune.training.checkpointing import Checkpoints
from diffusers_gfprune.training.recovery import mend
from diffusers_gfprune.training.run_setup import run_accelerator, run_identity, run_settings
from diffusers_gfprune.training.state import TrainingState
from diffusers_gfprune.training.tracking import Tracking

ROOT = Path(__file__).resolve().parent.parent


BATCH_SIZES, REPEATS, SCORING_BATCHES, RECOVERIES = (
    {"digits": 64, "cifar10": 16},
    {"digits": 15, "cifar10": 3},
    {"digits": 2, "cifar10": 2},
    {"digits": 5, "cifar10": 1},
)


class Distilled(Trainer):
    """Training steps with an additional forward of the dense model."""

    def __init__(self, unet: UNet2DModel, batches, teacher: UNet2DModel) -> None:
        super().__init__(unet, batches)
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    def steps(self) -> None:
        for clean, _, timesteps in self.batches:
            with torch.no_grad():
                self.teacher(clean, timesteps)
        super().steps()


def median_seconds(function: Callable[[int], object], repeats: int = 5) -> float:
    """Median time of a function in seconds; its argument is the index of the call."""
    times = []
    for index in range(repeats):
        start = time.perf_counter()
        function(index)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_steps(model: str, config: GFPruneConfig) -> dict[str, float]:
    """Ratios to a plain dense step on the same images; scores are those of `config`."""
    dense, size, repeats = build(model), BATCH_SIZES[model], REPEATS[model]
    batches = batches_for(dense, size, 1)
    several = batches_for(dense, size, SCORING_BATCHES[model])
    masked = copy.deepcopy(dense)
    small = half_masked(masked).compact()
    plain = Trainer(copy.deepcopy(dense), batches)
    pairs = {
        "masked_step": (Trainer(masked, batches).steps, plain.steps),
        "compacted_step": (Trainer(small, batches).steps, plain.steps),
        "distilled_compacted_step": (Distilled(copy.deepcopy(small), batches, dense).steps, plain.steps),
        "scoring_per_batch": (
            scorer(copy.deepcopy(dense), several, config.hvp if config.takes_hessian else "none", config.hessian_batches),
            Trainer(copy.deepcopy(dense), several).steps,
        ),
    }
    found = {name: paired(first, second, repeats) for name, (first, second) in pairs.items()}
    ratios = {name: result["ratio"] for name, result in found.items()}
    pruner = half_masked(copy.deepcopy(dense))
    plan, images = pruner.compaction_plan(), [DiffusionBatch.of(batch) for batch in batches]
    recovery = median_seconds(lambda index: mend(dense, pruner, plan, images), RECOVERIES[model])
    seconds = {"plain_step_seconds": found["masked_step"]["baseline_ms"] / 1000, "recovery_seconds": recovery}
    return {**ratios, **seconds, "batch_size": size}


def measure_state(model: str, words: list[str]) -> dict[str, float]:
    """Seconds to save a checkpoint, its size in MiB, and seconds to log a point and a ranking."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "--output_dir", f"{folder}/run", "--mixed_precision", "no", "--report_to", "tensorboard"]
        args = parse_arguments(words)
        run_folder = RunFolder(args.run.output_dir, False)
        accelerator = run_accelerator(args, run_folder)
        unet = build(model)
        dense = copy.deepcopy(unet)
        pruner = GradientFlowPruner(unet, args.pruning.config(args.training.max_train_steps))
        state = TrainingState(args, accelerator, unet, pruner)
        for parameter in unet.parameters():  # as after a backward
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
        checkpoints = Checkpoints(run_folder.training, args.checkpoints.checkpoints_total_limit)
        identity, settings = run_identity(args, dense, training_process(DDPMScheduler())), run_settings(args, accelerator)
        save_seconds = median_seconds(
            lambda index: checkpoints.save(index, identity, settings, state.tensors(), state.values())
        )
        size = sum(path.stat().st_size for path in checkpoints.paths()[0].iterdir())
        tracking = Tracking(args, accelerator, run_folder, sample_quality=None)  # nothing is sampled
        update = MaskUpdate(0, "soft", 0.5, 0.0, 1, 0, 0, 1, 1.0, 1.0)
        log_seconds = median_seconds(lambda index: tracking.log_training(state, 0.1, {"noise": 0.1}, 1.0), 200)
        ranking_seconds = median_seconds(lambda index: tracking.log_ranking(state, update), 20)
        accelerator.end_training()
    return {
        "checkpoint_seconds": save_seconds,
        "checkpoint_mib": size / 2**20,
        "log_seconds": log_seconds,
        "log_ranking_seconds": ranking_seconds,
    }


def put_together(recipe: str, words: list[str], steps: dict[str, float], state: dict[str, float]) -> dict[str, float]:
    """The ratios of the module's docstring for a recipe."""
    args = parse_arguments(words)
    config, t = args.pruning.config(args.training.max_train_steps), args.training
    schedule, total = config.schedule(), t.max_train_steps
    step_seconds = steps["plain_step_seconds"] * t.train_batch_size / steps["batch_size"]
    rankings, pruning_steps = len(schedule.update_steps()), schedule.end_steps
    calibration = args.pruning.calibration_batches * (args.pruning.calibration_batch_size or t.train_batch_size)
    ranking = steps["scoring_per_batch"] * calibration / t.train_batch_size  # in dense steps
    two_phase = steps["masked_step"] * pruning_steps + ranking * rankings
    fine_tuning = steps["compacted_step"] * (total - pruning_steps)
    logged = args.tracking.logging_steps
    return {
        "recipe": recipe,
        "dense_step_seconds": step_seconds,
        "rankings": rankings,
        "one_ranking_in_steps": ranking,
        "pruning_part": two_phase / pruning_steps,
        "whole_run": (two_phase + fine_tuning) / total,
        "whole_run_one_shot": (ranking + steps["compacted_step"] * total) / total,
        "recovery_in_steps": steps["recovery_seconds"] / step_seconds,
        "teacher_while_fine_tuning": steps["distilled_compacted_step"] / steps["compacted_step"],
        "checkpoint_in_steps": state["checkpoint_seconds"] / step_seconds,
        "checkpoint_share": state["checkpoint_seconds"] / (args.checkpoints.checkpointing_steps * step_seconds),
        "tracking_share": state["log_seconds"] / (logged * step_seconds)
        + state["log_ranking_seconds"] * rankings / (total * step_seconds),
    }


def table(found: dict) -> str:
    """Markdown table."""
    rows = [
        ("pruning part (phases 1 and 2, scoring included) / as many dense steps", "≤ 1.35", "pruning_part", "{:.2f}"),
        ("one ranking, in dense steps", "", "one_ranking_in_steps", "{:.0f}"),
        ("rankings in the run", "", "rankings", "{:.0f}"),
        ("whole run / as many dense steps", "", "whole_run", "{:.2f}"),
        ("whole run, one-shot pruning, then fine-tuning", "", "whole_run_one_shot", "{:.2f}"),
        ("recovery, in dense steps", "", "recovery_in_steps", "{:.0f}"),
        ("fine-tuning step with the dense model as teacher / without", "", "teacher_while_fine_tuning", "{:.2f}"),
        ("a checkpoint, in dense steps", "", "checkpoint_in_steps", "{:.2f}"),
        ("checkpoints at the recipe's interval", "≤ 3 %", "checkpoint_share", "{:.3%}"),
        ("tracking (tensorboard)", "≤ 1 %", "tracking_share", "{:.3%}"),
    ]
    models = [model for model in BATCH_SIZES if model in found]
    lines = [f"| | wanted | {' | '.join(f'recipe {model}' for model in models)} |", "|---" * (2 + len(models)) + "|"]
    for title, wanted, key, form in rows:
        values = [found[model]["together"].get(key) for model in models]
        cells = " | ".join("-" if value is None else form.format(value) for value in values)
        lines.append(f"| {title} | {wanted} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(BATCH_SIZES), default=list(BATCH_SIZES))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/overhead.json")
    parser.add_argument("--table", action="store_true", help="print the table of an existing file and stop")
    args = parser.parse_args()
    if not args.table:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
        # Other models keep their earlier values if they are from the same machine.
        found: dict[str, dict] = json.loads(args.output.read_text()) if args.output.exists() else {}
        found = {**found, "machine": machine} if found.get("machine") == machine else {"machine": machine}
        for model in args.models:
            words = ["--recipe", model]
            config = parse_arguments(words).pruning.config(1)
            steps, state = measure_steps(model, config), measure_state(model, words)
            found[model] = {"steps": steps, "state": state, "together": put_together(model, words, steps, state)}
            args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(table(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()
