"""Measured latency with a budget of 40 % of the forward time, compared with a budget of 40 % of the MACs.

    python benchmarks/latency_budget.py           writes benchmarks/results/latency_budget.json (about ten minutes)
    python benchmarks/latency_budget.py --table   prints the table of that file

A case is a model of `models.py` and a batch size. The pruner plans the same share of every group, as far as width ladders
allow (ranking by group); in the case `digits-magnitude-16`, magnitudes choose the widths (global ranking). The measured share
is a median over interleaved rounds of the dense and the pruned model, with its standard error. If 40 % cannot be removed,
because even the narrowest model takes longer, the budget is half of the largest possible share; the table shows this.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import tempfile
import time
from pathlib import Path

import torch
from diffusers import UNet2DModel
from models import build

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.latency.calibration import LATENCY_TOLERANCE, LatencyCheck, latency_meter
from diffusers_gfprune.latency.layer_times import machine_description

ROOT = Path(__file__).resolve().parent.parent
RATIO = 0.4
CHECK_SECONDS = 60.0  # limit on a measurement that is extended because of other load on the machine
# model, batch size, whether magnitudes choose widths
CASES = {
    "digits-1": ("digits", 1, False),
    "digits-16": ("digits", 16, False),
    "digits-magnitude-16": ("digits", 16, True),
    "cifar10-1": ("cifar10", 1, False),
    "cifar10-16": ("cifar10", 16, False),
    "deep-1": ("deep", 1, False),
    "deep-4": ("deep", 4, False),
}


def make_pruner(unet: UNet2DModel, case: tuple[str, int, bool], backend: str, target: str, ratio: float, cache_dir: Path):
    """A pruner that has pruned a copy of the model in one shot."""
    _, batch_size, by_magnitude = case
    config = GFPruneConfig.from_preset(
        "one-shot",
        total_steps=1,
        criterion="magnitude",
        ranking="global" if by_magnitude else "group",
        target=target,
        ratio=ratio,
        latency_batch_size=batch_size,
        latency_backend=backend,
    )
    pruner = GradientFlowPruner(copy.deepcopy(unet), config, latency_cache_dir=cache_dir)
    pruner.step(0, [])
    return pruner


def measure_case(case: tuple[str, int, bool], backend: str) -> dict:
    """Prune by a share of the time and by the same share of the MACs, and measure both."""
    unet, ratio, most = build(case[0]).eval(), RATIO, None
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            timed = make_pruner(unet, case, backend, "latency", ratio, Path(folder))
        except ValueError as error:
            said = re.search(r"the maximum is ([\d.]+) with", str(error))
            if said is None:
                raise
            most = float(said[1])
            ratio = round(most / 2, 2)
            timed = make_pruner(unet, case, backend, "latency", ratio, Path(folder))
        planning_seconds = time.perf_counter() - start
    counted = make_pruner(unet, case, backend, "macs", ratio, None)
    found = {"most": most, "planning_seconds": planning_seconds, "calibration": timed.latency["calibration"]}
    for target, pruner in (("latency", timed), ("macs", counted)):
        with latency_meter(unet, timed.config.latency_setting(), seconds=CHECK_SECONDS) as measure:
            pair = measure(pruner.compact())
        kept = pruner.kept_channels()
        check = LatencyCheck(timed.config.latency_setting(), ratio, timed.cost.removed("latency", kept), pair)
        print(f"{case[0]}, target={target}: {check}; {timed.cost.removed('macs', kept):.1%} fewer MACs", flush=True)
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
        asked = f"{case['latency']['asked']:.0%}" + (f" (of {case['most']:.0%} at most)" if case["most"] else "")
        macs, seconds = f"-{case['latency']['macs_removed']:.0%}", f"{case['planning_seconds']:.0f} s"
        lines.append(f"| {name} | {asked} | {cells['latency']} | {macs} | {cells['macs']} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--backend", choices=["eager", "compile"], default="eager")
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
    for name in args.cases:
        suffix = "" if args.backend == "eager" else f"-{args.backend}"
        found["cases"][name + suffix] = measure_case(CASES[name], args.backend)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
