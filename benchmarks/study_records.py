"""Results of the study's runs: reading them, their figures, means and spreads."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from study_settings import LATENT, SETTINGS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/study"
# Rows of the default from the build that pruned single channels (commit 0b3cd48), to compare with
CHANNELS = {
    "channels": "gradient flow, two phases, single channels (earlier build), native norms",
    "channels-ragged": "gradient flow, two phases, single channels (earlier build), ragged norms",
}
DEFAULT, PLAIN = "default", "two-phase"  # the second without recovery, which that build did not have
BUDGETS = ("-30", "", "-70")  # endings of the names of a setting at 30, 50 and 70 % of the MACs removed
DISTANCE = {"digits": "fd_pixels", "cifar10": "fd_efflite0", **dict.fromkeys(LATENT, "fd_digits")}
TITLES = {
    "digits": "digits, 8x8",
    "cifar10": "CIFAR-10, 16x16",
    "digits-dit": "digits in latents, class-conditional DiT",
    "digits-ldm": "digits in latents, unconditional UNet",
    "digits-text": "digits in latents, text-conditional UNet",
}

Run = dict
Found = dict[str, list[Run]]


def load(dataset: str, results: Path = RESULTS) -> Found:
    """Runs by name of the setting, in the order of seeds."""
    found = {}
    for name in SETTINGS:
        paths = sorted((results / dataset).glob(f"{name}-seed*.json"), key=lambda path: int(path.stem.rpartition("seed")[2]))
        paths = [path for path in paths if re.fullmatch(rf"{re.escape(name)}-seed\d+", path.stem)]
        if paths:
            found[name] = [json.loads(path.read_text()) for path in paths]
    return found


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """Mean, and sample standard deviation of several values; by default with two decimals from 1 on, else with four."""
    digits = decimals(statistics.mean(values)) if digits is None else digits
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def decimals(value: float) -> int:
    """Number of decimals in tables."""
    return 2 if abs(value) >= 1 else 4


def figure(run: Run, dataset: str, column: str, which: str = "pruned") -> float | None:
    """A figure of a run."""
    return run[which].get(DISTANCE[dataset] if column == "distance" else column)


def load_channels(dataset: str, results: Path = RESULTS) -> Found:
    """Runs of the build that pruned single channels, under each name of `CHANNELS`: `channels`, `channels-30`, ...

    They are in a folder beside that of the results, with `_channels` after its name.
    """
    found = load(dataset, results.with_name(f"{results.name}_channels"))
    return {name + end: found[PLAIN + end] for name in CHANNELS for end in BUDGETS if PLAIN + end in found}


def title_of(name: str) -> str:
    """Title of a setting, or of the rows of `load_channels` without their budget."""
    return SETTINGS[name].title if name in SETTINGS else CHANNELS[re.sub(r"-\d+$", "", name)]


def removed_blocks_of(run: Run) -> list[str]:
    """Blocks that a run removed."""
    return run.get("removed_blocks", [])


def widths_of(run: Run, found: Found) -> dict[str, int] | None:
    """The widths that a run recorded; those of a run with its seed, MACs and parameters if it recorded none (`scratch`).

    Args:
        run: A run.
        found: Runs of its data set.

    Returns:
        Channels of each group, or of each layer for Torch-Pruning's models, and 0 for each removed block; None if they are
        not known.
    """
    own = {**(run.get("peer", {}).get("widths") or run["widths"]), **dict.fromkeys(removed_blocks_of(run), 0)}
    if own:
        return own

    def size(other: Run) -> tuple:
        return other["seed"], *(other["pruned"].get(name) for name in ("macs", "parameters"))

    return next((r["widths"] for runs in found.values() for r in runs if r["widths"] and size(r) == size(run)), None)


def widths_key(widths: dict[str, int]) -> str:
    """A short name of widths, for comparison."""
    return hashlib.sha256(json.dumps(widths, sort_keys=True).encode()).hexdigest()[:12]


def dense_distance(runs: Sequence[Run], dataset: str) -> float:
    """The dense model's distance in runs that are shown together.

    Raises:
        ValueError: The distances differ.
    """
    found = [figure(run, dataset, "distance", "dense") for run in runs]
    if max(found) > 1.01 * min(found):  # the last digits differ from machine to machine
        raise ValueError(f"runs of {dataset} have dense distances from {min(found):.4g} to {max(found):.4g}: show them apart")
    return found[0]


def of_part(part: str) -> list[str]:
    """Names of the settings of a part of the study."""
    return [setting.name for setting in SETTINGS.values() if setting.part == part]
