"""Measured latency with a budget of 40 % of the forward time, compared with a budget of 40 % of the MACs.

    python benchmarks/latency_budget.py           writes benchmarks/results/latency_budget.json (about ten minutes)
    python benchmarks/latency_budget.py --backends onnxruntime openvino   adds the rows of runtimes to it
    python benchmarks/latency_budget.py --table   prints the table of that file

A case is a model of `models.py`, a batch size, and whether forward passes run eagerly, compiled, or exported to a runtime, all
with the same number of threads. In a runtime, the layers and all models are timed there. The pruner plans the same share of
every group, as far as width ladders allow (ranking by group); in the case `digits-magnitude-16`, magnitudes choose the widths
(global ranking). The measured share is a median over interleaved rounds of the dense and the pruned model, with its standard
error. The narrowest model that the ladders allow is measured first: if it saves less than 40 %, the budget is half of what it
saves; the table shows this.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from models import build

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.latency.budget import model_of_widths
from diffusers_gfprune.latency.calibration import LATENCY_TOLERANCE, LatencyCheck, latency_meter
from diffusers_gfprune.latency.layer_times import machine_description
from diffusers_gfprune.pruning.budget import BUDGET_TOLERANCE, width_ladder
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.runtimes.requirements import RUNTIMES, runtime_versions

ROOT = Path(__file__).resolve().parent.parent
RATIO = 0.4
LARGEST_SECONDS = 10.0  # limit on the measurement of the narrowest model
CHECK_SECONDS = 60.0  # limit on a measurement that is extended because of other load on the machine


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        model: Name of a model of `models.py`.
        batch_size: Number of samples of a forward pass.
        by_magnitude: Whether magnitudes choose widths.
        backend: `latency_backend` of the pruner.
    """

    model: str
    batch_size: int
    by_magnitude: bool = False
    backend: str = "eager"

    def config(self, target: str, ratio: float) -> GFPruneConfig:
        """One-shot pruning by magnitude with this case's budget."""
        return GFPruneConfig.from_preset(
            "one-shot",
            total_steps=1,
            criterion="magnitude",
            ranking="global" if self.by_magnitude else "group",
            target=target,
            ratio=ratio,
            latency_batch_size=self.batch_size,
            latency_backend=self.backend,
        )


CASES = {
    "digits-1": Case("digits", 1),
    "digits-16": Case("digits", 16),
    "digits-16-compile": Case("digits", 16, backend="compile"),
    "digits-magnitude-16": Case("digits", 16, by_magnitude=True),
    "cifar10-1": Case("cifar10", 1),
    "cifar10-16": Case("cifar10", 16),
    "deep-1": Case("deep", 1),
    "deep-4": Case("deep", 4),
    **{
        f"{model}-{batch_size}-{runtime}": Case(model, batch_size, backend=runtime)
        for model, batch_size in (("digits", 16), ("cifar10", 1), ("cifar10", 16), ("deep", 4))
        for runtime in RUNTIMES
    },
}


def largest_share(unet: UNet2DModel, config: GFPruneConfig) -> float:
    """The measured share of the dense time that the narrowest possible model saves."""
    groups = trace_channel_groups(unet)
    ladders = [width_ladder(group, 1, config.min_keep_ratio, config.attention_unit) for group in groups]
    narrowest = model_of_widths(unet, groups, np.array([ladder[-1] for ladder in ladders]), config.attention_unit)
    with latency_meter(unet, config.latency_setting(), seconds=LARGEST_SECONDS) as measure:
        return measure(narrowest).share


def budget(most: float) -> float:
    """The share to ask for where at most `most` can be removed: `RATIO` if it is clearly less, else half of `most`."""
    return RATIO if RATIO <= most - BUDGET_TOLERANCE else round(most / 2, 2)


def make_pruner(unet: UNet2DModel, config: GFPruneConfig, cache_dir: Path | None) -> GradientFlowPruner:
    """A pruner that has pruned a copy of the model in one shot."""
    pruner = GradientFlowPruner(copy.deepcopy(unet), config, latency_cache_dir=cache_dir)
    pruner.step(0, [])
    return pruner


def measure_case(case: Case) -> dict:
    """Prune by a share of the time and by the same share of the MACs, and measure both."""
    unet = build(case.model).eval()
    most = largest_share(unet, case.config("latency", RATIO))
    ratio = budget(most)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        timed = make_pruner(unet, case.config("latency", ratio), Path(folder))
        planning_seconds = time.perf_counter() - start
    counted = make_pruner(unet, case.config("macs", ratio), None)
    found = {"most": most, "planning_seconds": planning_seconds, "calibration": timed.latency["calibration"]}
    if timed.config.latency_runtime is not None:
        found["versions"] = runtime_versions(timed.config.latency_runtime)
    for target, pruner in (("latency", timed), ("macs", counted)):
        with latency_meter(unet, timed.config.latency_setting(), seconds=CHECK_SECONDS) as measure:
            pair = measure(pruner.compact())
        kept = pruner.kept_channels()
        check = LatencyCheck(timed.config.latency_setting(), ratio, timed.cost.removed("latency", kept), pair)
        print(f"{case.model}, target={target}: {check}; {timed.cost.removed('macs', kept):.1%} fewer MACs", flush=True)
        found[target] = {**check.to_dict(), "macs_removed": timed.cost.removed("macs", kept)}
    return found


def table(found: dict) -> str:
    """Markdown table with a row for each case."""
    lines = [
        "| model and batch | asked | measured | MACs then | `--target macs` at the same ratio | table and calibration |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in found["cases"].items():
        shares = {target: case[target]["pair"] for target in ("latency", "macs")}
        cells = {target: f"{pair['share']:.1%} ± {pair['spread']:.1%}" for target, pair in shares.items()}
        if abs(shares["latency"]["share"] - case["latency"]["asked"]) > LATENCY_TOLERANCE:
            cells["latency"] += " (missed)"
        asked = f"{case['latency']['asked']:.0%}" + (
            f" (of {case['most']:.0%} at most)" if case["latency"]["asked"] < RATIO else ""
        )
        macs, seconds = f"-{case['latency']['macs_removed']:.0%}", f"{case['planning_seconds']:.0f} s"
        lines.append(f"| {name} | {asked} | {cells['latency']} | {macs} | {cells['macs']} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    backends = list(dict.fromkeys(case.backend for case in CASES.values()))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="cases to measure (default: those of the backends)")
    parser.add_argument("--backends", nargs="+", choices=backends, default=["eager", "compile"])
    parser.add_argument("--threads", type=int, help="number of PyTorch threads (default: PyTorch's)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/latency_budget.json")
    parser.add_argument("--table", action="store_true", help="print the table of an existing file and stop")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text())))
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    machine = {**machine_description(torch.device("cpu")), "python": platform.python_version()}
    # Other cases keep their earlier values if they are from the same machine
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    found = found if found.get("machine") == machine else {"machine": machine, "cases": {}}
    for name in args.cases or [name for name, case in CASES.items() if case.backend in args.backends]:
        found["cases"] = {**found["cases"], name: measure_case(CASES[name])}
        found["cases"] = {case: found["cases"][case] for case in CASES if case in found["cases"]}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
