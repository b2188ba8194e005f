"""Time of the steps of the study's runs, including scoring and masking, for the time axis of its curves.

    python benchmarks/study_time.py               writes benchmarks/results/study_time.json (a quarter of an hour)

The study's runs share a machine, so their own clocks are not reliable. Here the parts of a run are measured in interleaved
pairs with plain dense training steps on the same images, on one CPU thread as in the study,

    masked      a training step with masks
    compacted   a training step of the model in the final widths of a setting (first seed)
    teacher     a forward of the dense model
    scoring     one calibration batch for one criterion, gradient flow in either metric
    features    block outputs of the teacher in the loss: a step with them, less one without
    recovery    least squares for the layers that read pruned units, once

and `seconds` adds them up for a run, in units of one dense training step:

    t(k) = sum over steps < k of (masked or compacted + teacher + features)
           + sum over rankings before k of (batches x scoring + recovery)
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from pathlib import Path

import torch
from cost import Trainer, half_masked, paired
from diffusers import UNet2DModel
from models import batches_for
from study import RESULTS, ROOT, arguments_of
from study_baselines import with_widths
from study_settings import DATASETS, SETTINGS, TEACHERS

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.objectives.objective import NoisePrediction, Objective, ObjectiveArguments
from diffusers_gfprune.scoring.importance import score_units
from diffusers_gfprune.training.arguments import parse_arguments
from diffusers_gfprune.training.recovery import mend

OUTPUT = ROOT / "benchmarks/results/study_time.json"
# Settings whose times are in the table; most have curves of quality over time
TIMED = (
    *("default", "no-recovery", "one-shot", "diff-pruning", "magnitude", "two-phase", "one-shot-gradient-flow"),
    *("one-shot-diff-pruning", "one-shot-magnitude", "two-phase-noise", "paper", "features-recovery"),
)
BATCH_SIZE = 64
FEATURE_WEIGHT = 0.03  # any positive one takes as long


class TaughtSteps:
    """Training steps with the dense model as teacher, with its block outputs in the loss or without.

    Args:
        pruner: Of a masked model, which is compacted.
        dense: The dense model.
        batches: As those of `cost.Trainer`.
        weight: `feature_distillation_weight`.
    """

    def __init__(self, pruner: GradientFlowPruner, dense: UNet2DModel, batches, weight: float) -> None:
        masks = pruner.unet.channel_masks
        small = pruner.compact().train()
        self.model, self.batches = NoisePrediction(small, features=weight > 0), [DiffusionBatch.of(batch) for batch in batches]
        arguments = ObjectiveArguments(feature_distillation_weight=weight)
        self.objective = Objective(arguments, pruner.process, copy.deepcopy(dense), masks)
        self.optimizer = torch.optim.AdamW(small.parameters(), lr=1e-5)

    def steps(self) -> None:
        """One step on every batch."""
        for batch in self.batches:
            loss = self.objective(self.model, batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def measure(dataset: str, results: Path, repeats: int) -> dict:
    """Ratios to a plain dense step for the parts of all settings that have results."""
    dense = UNet2DModel.from_pretrained(ROOT / TEACHERS[dataset] / "unet", use_safetensors=True)
    batches = batches_for(dense, BATCH_SIZE, 1)
    several = [DiffusionBatch.of(batch) for batch in batches]
    plain = Trainer(copy.deepcopy(dense), batches)
    frozen = copy.deepcopy(dense).eval().requires_grad_(False)
    masked = copy.deepcopy(dense)
    half_masked(masked)

    def ratio(function) -> float:
        return paired(function, plain.steps, repeats)["ratio"]

    @torch.no_grad()
    def ask_teacher() -> None:
        frozen(batches[0][0], batches[0][2])

    def features() -> float:
        without, with_outputs = (
            TaughtSteps(half_masked(copy.deepcopy(dense)), dense, batches, weight) for weight in (0, FEATURE_WEIGHT)
        )
        share = paired(with_outputs.steps, without.steps, repeats)["ratio"]
        return (share - 1) * ratio(without.steps)

    recovering = half_masked(copy.deepcopy(dense))
    plan = recovering.compaction_plan()
    found = {
        "masked": ratio(Trainer(masked, batches).steps),
        "teacher": ratio(ask_teacher),
        "features": features(),
        "recovery": ratio(lambda: mend(dense, recovering, plan, several)),
        "settings": {},
    }
    scoring: dict[str, float] = {"magnitude": 0.0}
    compacted: dict[tuple, float] = {}  # settings with the same final widths take the same time
    for name in TIMED:
        path = results / dataset / f"{name}-seed0.json"
        if not path.is_file():
            continue
        args = parse_arguments(arguments_of(SETTINGS[name], dataset, 0, []))
        config: GFPruneConfig = args.pruning.config(args.training.max_train_steps)
        score = config.criterion
        if score not in scoring:
            pruner = GradientFlowPruner(copy.deepcopy(dense), config)
            scoring[score] = ratio(lambda p=pruner, c=config: score_units(p.unet, p.groups, several, p.process, c))
        widths = json.loads(path.read_text())["widths"]
        if tuple(widths.items()) not in compacted:
            compacted[tuple(widths.items())] = ratio(Trainer(with_widths(dense, widths), batches).steps)
        found["settings"][name] = {
            "compacted": compacted[tuple(widths.items())],
            "ranking": args.pruning.calibration_batches * scoring[score],
            "teacher": found["teacher"] * args.objective.needs_teacher,
            "features": found["features"] * args.objective.needs_features,
            "recovery": found["recovery"] * (args.pruning.recovery == "rankings"),
        }
    return {**found, "scoring_per_batch": scoring, "repeats": repeats}


def seconds(run: dict, step: int, pieces: dict) -> float:
    """Time of a run until a step, in dense training steps.

    Args:
        run: Results of the run, as kept by `study.py`.
        step: Number of completed training steps (>= 0).
        pieces: Result of `measure` for its data set.
    """
    own = pieces["settings"][run["setting"]]
    masked = min(step, run["phases"]["hard_end_step"])
    rankings = sum(ranking["step"] < step for ranking in run["rankings"])
    steps = masked * pieces["masked"] + (step - masked) * own["compacted"] + step * (own["teacher"] + own["features"])
    return steps + rankings * (own["ranking"] + own["recovery"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the study's results, for widths.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--repeats", type=int, default=9, help="Number of pairs per measurement (>= 1).")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise ValueError(f"repeats={args.repeats} must be at least 1")
    if not any(args.results.glob("*/*-seed0.json")):
        raise ValueError(f"results={args.results} holds no results: run benchmarks/study.py first")
    torch.set_num_threads(1)
    found: dict = {"machine": {"threads": 1, "torch": torch.__version__, "python": platform.python_version()}}
    for dataset in DATASETS:
        found[dataset] = measure(dataset, args.results, args.repeats)
        print(dataset, json.dumps(found[dataset], indent=2))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    with one_line_errors("study_time.py"):
        main()
