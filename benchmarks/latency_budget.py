"""Asks for 40 % less time of a forward, and measures what comes out; and what a budget of 40 % of the MACs would have given.

    python benchmarks/latency_budget.py           everything, into benchmarks/results/latency_budget.json (about half an hour)
    python benchmarks/latency_budget.py --table   Markdown of what is there

Every case is a model and a batch size. Widths are planned as a run does with ranking by group: the same share of every group,
as far as ladders go; in the case `digits-magnitude`, scores choose them. The measured share is a median over interleaved rounds
of the dense and the pruned model, with its standard error. Where 40 % cannot be removed, because even the narrowest model takes
longer, the case asks for two thirds of what can, and says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from cost import build
from diffusers import UNet2DModel

from diffusers_gfprune.budget import allocate_global, allocate_per_group, aligned_ladder, HARDWARE_MULTIPLES
from diffusers_gfprune.channel_groups import trace_channel_groups
from diffusers_gfprune.configuration import GFPruneConfig
from diffusers_gfprune.cost_model import CostModel
from diffusers_gfprune.evaluation.layer_times import machine_description
from diffusers_gfprune.evaluation.speed import SpeedSetting
from diffusers_gfprune.importance import normalize_scores, score_units
from diffusers_gfprune.latency_budget import measured_latency_model, model_of_widths
from diffusers_gfprune.latency_calibration import LATENCY_TOLERANCE, LatencyCheck, LatencyMeter

ROOT = Path(__file__).resolve().parent.parent
DEEP = {
    "sample_size": 128,
    "layers_per_block": 4,
    "block_out_channels": (32, 64, 96, 128, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "norm_num_groups": 8,
}
RATIO = 0.4
MIN_KEEP_RATIO = 0.1
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


def model_named(name: str) -> UNet2DModel:
    """The digits teacher, the configuration of google/ddpm-cifar10-32, or a deep model of many small layers."""
    torch.manual_seed(0)
    return (UNet2DModel(**DEEP) if name == "deep" else build(name)).eval()


def measure_case(name: str, batch_size: int, by_magnitude: bool, backend: str, seconds: float) -> dict:
    """Ask for a share of the time, then for the same share of the MACs, and measure both."""
    unet = model_named(name)
    groups = trace_channel_groups(unet)
    setting = SpeedSetting(batch_size, "float32", compiled=backend == "compile")
    multiple = HARDWARE_MULTIPLES[next(unet.parameters()).device.type]
    ladders = [aligned_ladder(group, multiple, MIN_KEEP_RATIO, "head_dim") for group in groups]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model, found = measured_latency_model(
            unet, groups, RATIO, setting, lambda cost: ladders, cache_dir=Path(folder), seconds=seconds, progress=name
        )
    planning_seconds = time.perf_counter() - start
    cost = CostModel(unet, groups, seconds=model.seconds)
    most = found["calibration"][0]["measured"]
    ratio = RATIO if most > RATIO else round(most * 2 / 3, 2)
    rows = {}
    with LatencyMeter(unet, setting, seconds=2 * seconds) as meter:
        for target in ("latency", "macs"):
            kept = widths(unet, groups, cost, target, ratio, ladders, by_magnitude)
            pair = meter.measure(model_of_widths(unet, groups, kept))
            check = LatencyCheck(setting, ratio, model.removed(kept), pair)
            print(f"{name}, {target}: {check}; {cost.removed('macs', kept):.1%} fewer MACs")
            rows[target] = {**check.to_dict(), "macs_removed": cost.removed("macs", kept)}
    return {
        "most": most,
        "planning_seconds": planning_seconds,
        "calibration": found["calibration"],
        "shares": model.shares_by_kind,
        **rows,
    }


def widths(unet: UNet2DModel, groups, cost: CostModel, target: str, ratio: float, ladders, by_magnitude: bool) -> np.ndarray:
    """The widths of a budget, by planned shares or by magnitude."""
    if not by_magnitude:
        return allocate_per_group(cost, target, ratio, ladders)
    config = GFPruneConfig.from_preset("one-shot", total_steps=1, criterion="magnitude", ranking="global")
    scores = normalize_scores(score_units(unet, groups, [], None, config), config.normalization)
    return allocate_global(cost, target, ratio, ladders, [scores[group.name] for group in groups])


def table(found: dict) -> str:
    """Markdown: a line for each case."""
    lines = [
        "| case | asked | measured | with as many MACs fewer instead | most that can be removed | table and calibration |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in found["cases"].items():
        cells = [f"{100 * case[target]['pair']['share']:.1f} ± {100 * case[target]['pair']['spread']:.1f} %" for target in ("latency", "macs")]
        off = abs(case["latency"]["pair"]["share"] - case["latency"]["asked"])
        cells[0] += "" if off <= LATENCY_TOLERANCE else " (missed)"
        asked, most = f"{100 * case['latency']['asked']:.0f} %", f"{100 * case['most']:.0f} %"
        lines.append(f"| {name} | {asked} | {cells[0]} | {cells[1]} | {most} | {case['planning_seconds']:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--backend", choices=["eager", "compile"], default="eager")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own)")
    parser.add_argument("--seconds", type=float, default=20.0, help="that a pair of models is timed for, about")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/latency_budget.json")
    parser.add_argument("--table", action="store_true", help="print the table of an existing file and stop")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text())))
        return
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    machine = {**machine_description(torch.device("cpu")), "python": platform.python_version()}
    # Cases that are not measured now keep what was measured on the same machine
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    found = found if found.get("machine") == machine else {"machine": machine, "cases": {}}
    for name in args.cases:
        suffix = "" if args.backend == "eager" else f"-{args.backend}"
        found["cases"][name + suffix] = measure_case(*CASES[name], args.backend, args.seconds)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
