"""Measured time of a forward pass of the study's pruned models, as a speed-up over the dense model.

    python benchmarks/study_latency.py                    rows that are missing or have new widths
    python benchmarks/study_latency.py --only default     the default at 30, 50 and 70 % of the MACs removed
    python benchmarks/study_latency.py --overwrite        all rows again

The study keeps no weights, and time does not depend on them: every model is built again with the widths of its row, checked by
its MACs, and timed in interleaved rounds with the dense model (`metrics/speed.py`), eagerly in float32. A median of ratios is
kept with its distribution-free interval (`metrics/speedup.py`). Models are built in one of four ways, which the results name:

    units           whole norm groups are kept: the model as it was
    native norms    channels of any number were kept, and norms had groups of unequal size. Here each norm has the largest
                    number of equal groups, up to the dense model's, that divides its width. This is about the least time
                    that a model of these widths takes
    ragged norms    the same widths with groups of unequal size, as models of the earlier build run today (random channels)
    torch-pruning   Torch-Pruning prunes again at the ratio of the row. In most models, its widths do not depend on scores;
                    rows of others are not timed

Runs from scratch recorded no widths. They have those of the run with the same seed, MACs and parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ModelMixin
from study_baselines import example_of, layer_widths, prune_once
from study_records import (
    BUDGETS,
    CHANNELS,
    DEFAULT,
    RESULTS,
    ROOT,
    Found,
    Run,
    load,
    load_channels,
    widths_key,
    widths_of,
)
from study_settings import EVERY, LATENT, SETTINGS, TEACHERS
from torch import nn

from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.latency.layer_times import machine_description
from diffusers_gfprune.metrics.model_size import count_macs
from diffusers_gfprune.metrics.speed import SpeedSetting, measure_speed
from diffusers_gfprune.pruning.blocks import trace_blocks
from diffusers_gfprune.pruning.budget import select_units, width_ladder
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.compaction import compact, plan_compaction
from diffusers_gfprune.trained_pipelines import load_pipeline

OUTPUT = ROOT / "benchmarks/results/study_latency.json"
BATCH_SIZES = {"digits": (16, 128), "cifar10": (16,), **dict.fromkeys(LATENT, (16,))}
# Others are short runs, with the widths of these
PARTS = (
    *("main", "budget", "rates", "earlier", "earlier-budget", "widths", "width-budgets", "metric", "depth", "features"),
    "igsm",
)
ROUNDS = 60
NAMES = [
    *(name for name, setting in SETTINGS.items() if setting.part in PARTS),
    *(name + ending for name in CHANNELS for ending in BUDGETS),
]


def native_groups(channels: int, dense_groups: int) -> int:
    """The largest number of equal groups, up to that of the dense norm, that divides a width."""
    return next(groups for groups in range(dense_groups, 0, -1) if channels % groups == 0)


def narrowed(dense: ModelMixin, widths: dict[str, int], ragged: bool = False) -> tuple[nn.Module, str]:
    """A model with the given channels in each group, and how it was built (see the module docstring).

    Args:
        dense: The dense model.
        widths: Channels of each group, and 0 for each removed block. With removed blocks, groups that are not named are
            whole, and groups inside of blocks have 0 channels.
        ragged: Whether norms keep groups of unequal size, unless whole groups are kept.

    Raises:
        ValueError: The widths are not those of the dense model's groups.
    """
    groups, blocks = trace_channel_groups(dense), {block.name: block for block in trace_blocks(dense)}
    removed = [blocks[name] for name in widths if name in blocks]
    channels = {group.name: group.num_channels for group in groups}
    if not widths.keys() <= channels.keys() | blocks.keys() or (not removed and widths.keys() != channels.keys()):
        raise ValueError("widths are not those of the dense model's channel groups and blocks")
    channels |= {name: width for name, width in widths.items() if width > 0}
    whole = all(channels[group.name] in width_ladder(group) for group in groups)
    if not whole:
        groups = [replace(g, units=tuple((c,) for c in range(g.num_channels)), fixed=()) for g in groups]
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.num_units, generator=generator) for group in groups}
    masks = {group.name: select_units(group, scores[group.name], channels[group.name]).float() for group in groups}
    masks |= {block.name: torch.zeros(1) for block in removed}
    small = compact(dense, plan_compaction(dense, [*groups, *removed], masks))
    if whole or ragged:
        return small, "units" if whole else "ragged norms"
    theirs = dict(dense.named_modules())
    for name, norm in list(small.named_modules()):
        if isinstance(norm, nn.GroupNorm):
            count = native_groups(norm.num_channels, theirs[name].num_groups)
            small.set_submodule(name, nn.GroupNorm(count, norm.num_channels, norm.eps))
    return small, "native norms"


def pruned_again(dense: ModelMixin, peer: dict) -> nn.Module:
    """Torch-Pruning's model at the ratio of a row.

    Raises:
        ValueError: Its widths are not those of the row.
    """
    for parameter in dense.parameters():
        parameter.grad = torch.randn_like(parameter)  # its importance reads them; with one ratio, widths do not depend on them
    small = prune_once(dense, example_of(dense), peer["pruning_ratio"])
    dense.zero_grad()
    small.zero_grad()
    widths = layer_widths(small)
    if any(widths.get(name) != width for name, width in peer["widths"].items()):  # older rows have convolutions only
        raise ValueError(f"Torch-Pruning at ratio={peer['pruning_ratio']} no longer gives the widths of the row")
    return small


def model_of(run: Run, widths: dict[str, int], dense: ModelMixin, ragged: bool = False) -> tuple[nn.Module, str]:
    """The model of a run with the dense model's weights, and how it was built (see the module docstring).

    Raises:
        ValueError: Its MACs are not those of the run.
    """
    small, how = (pruned_again(dense, run["peer"]), "torch-pruning") if "peer" in run else narrowed(dense, widths, ragged)
    macs = count_macs(small)
    if macs != run["pruned"]["macs"]:
        raise ValueError(f"{run['setting']}, seed {run['seed']}: the model has {macs:,} MACs, not {run['pruned']['macs']:,}")
    return small, how


def time_model(dense: nn.Module, small: nn.Module, batch_size: int, rounds: int) -> dict:
    """Speed-up of a model over the dense one: its median, interval, and times in milliseconds."""
    settings = [SpeedSetting(batch_size, "float32")]
    first, other = measure_speed({"dense": dense, "pruned": small}, settings, repeats=rounds, warmup=5)
    return {
        "speedup": other["speedup"],
        "interval": list(other["speedup_interval"]),
        "dense_ms": first["latency_ms"],
        "pruned_ms": other["latency_ms"],
        "rounds": rounds,
    }


def is_ragged(name: str) -> bool:
    """Whether models of a setting are timed with norms of unequal groups."""
    return name.startswith("channels-ragged")


def measure(
    dataset: str, found: Found, rows: dict, chosen: list[str], rounds: int, overwrite: bool, save: Callable[[dict], None]
) -> dict:
    """Rows of a data set, measured where they are missing or have other widths.

    Args:
        dataset: The data set.
        found: Its runs by setting.
        rows: Rows of an earlier measurement.
        chosen: Names of the settings to measure.
        rounds: Number of rounds; kept rows have as many or more.
        overwrite: Whether chosen rows are measured again.
        save: Called with the rows so far after each model.

    Returns:
        By setting and seed: `widths`, the key of the widths; `macs_removed`; `built`, how the model was built; `speed` by
        batch size (`time_model`). Rows of runs that are gone, or that have other widths now, are left out unless measured.
    """
    dense = load_pipeline(str(ROOT / TEACHERS[dataset])).denoiser.eval()

    def complete(row: dict) -> bool:
        return all(row["speed"].get(str(n), {}).get("rounds", 0) >= rounds for n in BATCH_SIZES[dataset])

    timed: dict[tuple[str, bool], dict] = {}  # by widths and norms: equal models are timed once
    kept: dict[str, dict] = {}
    work: list[tuple[str, Run, dict]] = []
    for name in NAMES:
        for run in found.get(name, []):
            seed, widths = str(run["seed"]), widths_of(run, found)
            if widths is None:
                print(f"{dataset}, {name}, seed {seed}: no widths are known; not timed", flush=True)
                continue
            old = rows.get(name, {}).get(seed)
            fits = old is not None and old["widths"] == widths_key(widths)
            if fits and (name not in chosen or (complete(old) and not overwrite)):
                kept.setdefault(name, {})[seed] = old
            elif name in chosen:
                work.append((name, run, widths))
    if not overwrite:
        for name, seeds in kept.items():
            timed |= {(row["widths"], is_ragged(name)): row for row in seeds.values() if complete(row)}
    for name, run, widths in work:
        key = widths_key(widths), is_ragged(name)
        if key not in timed:
            try:
                small, how = model_of(run, widths, dense, is_ragged(name))
            except ValueError as error:
                if "peer" not in run:
                    raise
                print(f"{dataset}, {name}, seed {run['seed']}: not timed: {error}", flush=True)
                continue
            speed = {str(n): time_model(dense, small, n, rounds) for n in BATCH_SIZES[dataset]}
            removed = 1 - run["pruned"]["macs"] / run["dense"]["macs"]
            timed[key] = {"widths": key[0], "macs_removed": removed, "built": how, "speed": speed}
            shown = ", ".join(f"batch {n}: {s['speedup']:.3f}" for n, s in speed.items())
            print(f"{dataset}, {name}, seed {run['seed']} ({how}): {shown}", flush=True)
        kept.setdefault(name, {})[str(run["seed"])] = timed[key]
        save(kept)
    save(kept)
    return kept


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="Names of settings, or `default` (default: all rows).")
    parser.add_argument("--dataset", nargs="+", choices=EVERY, default=list(EVERY))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="Number of rounds per model (>= 6).")
    parser.add_argument("--overwrite", action="store_true", help="Measure the chosen rows again.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the study's results, for widths.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    if args.rounds < 6:
        raise ValueError(f"rounds={args.rounds} must be at least 6, the least for an interval")
    chosen = NAMES if args.only is None else []
    for name in args.only or []:
        names = [DEFAULT + ending for ending in BUDGETS] if name == "default" else [name]
        if not set(names) <= set(NAMES):
            raise ValueError(f"only={name} must be `default` or one of {', '.join(NAMES)}")
        chosen = [*chosen, *names]
    data = {dataset: {**load(dataset, args.results), **load_channels(dataset, args.results)} for dataset in args.dataset}
    if not any(name in SETTINGS for runs in data.values() for name in runs):
        raise ValueError(f"results={args.results} holds no results: run benchmarks/study.py first")
    machine = {**machine_description(torch.device("cpu")), "python": platform.python_version()}
    content = json.loads(args.output.read_text()) if args.output.is_file() else {"machine": machine, "rows": {}}
    if content["machine"] != machine:
        if not args.overwrite or args.only is not None or set(args.dataset) != set(EVERY):
            raise ValueError(f"output={args.output} is of another machine: measure all rows again with --overwrite")
        content = {"machine": machine, "rows": {}}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for dataset, found in data.items():

        def save(rows: dict, dataset: str = dataset) -> None:
            content["rows"][dataset] = {name: rows[name] for name in NAMES if name in rows}
            complete = args.output.with_suffix(".tmp")
            complete.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(complete, args.output)

        measure(dataset, found, content["rows"].get(dataset, {}), chosen, args.rounds, args.overwrite, save)
    print(f"written: {args.output}")


if __name__ == "__main__":
    with one_line_errors("study_latency.py"):
        main()
