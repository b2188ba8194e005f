"""Pictures of the study: quality over steps, over the time of a run, over MACs, and over measured time."""

from __future__ import annotations

import statistics
from collections.abc import Container
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from study_records import BUDGETS, DEFAULT, DISTANCE, TITLES, Found, Run, dense_distance, deviation, figure, of_part, title_of
from study_speed import Speeds, batch_sizes, series
from study_time import seconds

matplotlib.use("Agg")

CURVES = {
    "default": "tab:blue",
    "no-recovery": "tab:cyan",
    "diff-pruning": "tab:orange",
    "magnitude": "tab:green",
    "one-shot": "tab:purple",
    "paper": "tab:red",
}
# Rows with the training before, which stand for those that are still to be run
EARLIER = {
    "no-recovery": "two-phase",
    "diff-pruning": "one-shot-diff-pruning",
    "magnitude": "one-shot-magnitude",
    "one-shot": "one-shot-gradient-flow",
}
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")
ITERATIONS = dict(zip(of_part("iterations"), COLOURS))


def curve(run: Run, dataset: str, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric during a run, including its end."""
    key = DISTANCE[dataset] if metric == "distance" else metric
    curves = run["curves"]
    return [*curves["quality_steps"], run["steps"]], [*curves["quality"][key], run["pruned"][key]]


def stand_in(name: str, found: Found, timed: Container[str] | None = None) -> str:
    """The name of a row, or of its row of `EARLIER` if it has no results; `timed`: or none of these times."""
    return name if name in found and (timed is None or name in timed) else EARLIER.get(name, name)


def plot_curves(path: Path, data: dict[str, Found], shown: dict[str, str], times: dict | None = None) -> None:
    """Plot quality over steps or time, with a row per data set. Bands are standard deviations; dashed lines have one seed.

    The first point of a curve does not affect the axis limits and may lie outside of the picture.

    Args:
        path: File of the picture.
        data: Runs by data set; data sets without any of the shown settings are left out.
        shown: Colours by setting; a row of `EARLIER` stands for one without results.
        times: Results of `study_time.py`, for quality over time.
    """
    timed = {dataset: None if times is None else times[dataset]["settings"] for dataset in data}
    data = {
        dataset: found
        for dataset, found in data.items()
        if any(stand_in(name, found, timed[dataset]) in found for name in shown)
    }
    figure_, axes = plt.subplots(len(data), 2, figsize=(10, 3.4 * len(data)), squeeze=False, constrained_layout=True)
    for row, (dataset, found) in zip(axes, data.items()):
        for axis, metric in zip(row, ("distance", "ssim_to_dense")):
            seen: list[float] = []
            drawn: list[Run] = []
            for name, colour in shown.items():
                name = stand_in(name, found, timed[dataset])
                runs = [run for run in found.get(name, []) if run["curves"].get("quality_steps")]
                if not runs or (times is not None and name not in timed[dataset]):
                    continue
                steps = curve(runs[0], dataset, metric)[0]
                values = list(zip(*(curve(run, dataset, metric)[1] for run in runs)))
                places = [seconds(runs[0], step, times[dataset]) for step in steps] if times is not None else steps
                means, deviations = list(map(statistics.mean, values)), list(map(deviation, values))
                style = "-" if len(runs) > 1 else "--"
                axis.plot(places, means, style, marker=".", label=title_of(name), color=colour)
                low, high = ([m + sign * d for m, d in zip(means, deviations)] for sign in (-1, 1))
                axis.fill_between(places, low, high, alpha=0.15, color=colour)
                seen += [value for bounds in (low, high) for value in (bounds[1:] or bounds)]
                drawn += runs
            if not drawn:
                continue
            title = (
                drawn[0]["evaluation"]["distances"][DISTANCE[dataset]]["title"] if metric == "distance" else "SSIM to dense"
            )
            if metric == "distance":
                axis.set_yscale("log")
                dense = dense_distance(drawn, dataset)
                axis.axhline(dense, color="gray", linestyle=":", label="dense")
                seen.append(dense)
            if len(set(seen)) > 1:
                margin = 0.3 * (max(seen) - min(seen))
                axis.set_ylim(0.95 * min(seen) if metric == "distance" else min(seen) - margin, max(seen) + margin)
            axis.set_title(f"{TITLES[dataset]}: {title}", fontsize=10)
            axis.set_xlabel("training step" if times is None else "time of training and scoring, in dense training steps")
    axes[0, 0].legend(fontsize=7)
    _save(figure_, path)


def plot_budgets(path: Path, data: dict[str, Found]) -> None:
    """Plot quality over the removed share of MACs. Bars are standard deviations; hollow points have one seed.

    Where a row has no results at the smallest budget, its row of `EARLIER` is drawn, too, dashed.
    """
    figure_, axes = plt.subplots(len(data), 2, figsize=(10, 3.4 * len(data)), squeeze=False, constrained_layout=True)
    for row, (dataset, found) in zip(axes, data.items()):
        for axis, metric in zip(row, ("distance", "ssim_to_dense")):
            drawn: list[Run] = []
            rows = [(name, CURVES[name], "-") for name in ("default", "no-recovery", "diff-pruning", "magnitude")]
            rows += [(EARLIER[n], colour, "--") for n, colour, _ in rows if n in EARLIER and n + BUDGETS[0] not in found]
            for name, colour, line in rows:
                points = []
                for ending in BUDGETS:
                    drawn += found.get(name + ending, [])
                    for run in found.get(name + ending, []):
                        points.append((1 - run["pruned"]["macs"] / run["dense"]["macs"], figure(run, dataset, metric)))
                groups: dict[float, list[float]] = {}
                for share, value in points:
                    groups.setdefault(round(share, 1), []).append(value)
                if groups:
                    shares = sorted(groups)
                    means = [statistics.mean(groups[share]) for share in shares]
                    errors = [deviation(groups[share]) for share in shares]
                    label = title_of(name)
                    places, style = [100 * s for s in shares], {"label": label, "color": colour, "linestyle": line}
                    axis.errorbar(places, means, errors, marker="o", capsize=3, **style)
                    single = [(100 * s, mean) for s, mean in zip(shares, means) if len(groups[s]) == 1]
                    for place, mean in single:
                        axis.plot(place, mean, "o", color=colour, markerfacecolor="white", zorder=3)
            if metric == "distance" and drawn:
                axis.axhline(dense_distance(drawn, dataset), color="gray", linestyle=":")
            axis.set_title(
                f"{TITLES[dataset]}: {'Fréchet distance' if metric == 'distance' else 'SSIM to dense'}", fontsize=10
            )
            axis.set_xlabel("MACs removed, %")
            axis.set_xticks([30, 50, 70])
    axes[0, 0].legend(fontsize=7)
    _save(figure_, path)


# Methods over measured time: those with several budgets are joined by a line
TIMED = {
    "default": ("tab:blue", "o"),
    "diff-pruning": ("tab:orange", "o"),
    "magnitude": ("tab:green", "o"),
    "torch-pruning": ("tab:red", "D"),
    "two-phase": ("tab:cyan", "o"),
    "channels": ("tab:olive", "o"),
    "channels-ragged": ("tab:olive", "x"),
    "one-shot-gradient-flow": ("tab:purple", "s"),
    "one-shot-diff-pruning": ("tab:orange", "s"),
    "progressive-diff-pruning": ("tab:orange", "^"),
    "one-shot-magnitude": ("tab:green", "s"),
    "progressive-magnitude": ("tab:green", "^"),
    "one-shot-taylor": ("tab:brown", "s"),
    "progressive-taylor": ("tab:brown", "^"),
    "one-shot-random": ("tab:gray", "s"),
    "progressive-random": ("tab:gray", "^"),
    "earlier-torch-pruning": ("tab:pink", "D"),
}


def plot_speeds(path: Path, data: dict[str, Found], speeds: dict[str, Speeds]) -> None:
    """Plot quality over measured time, with a row per data set and batch size. Bars are standard deviations over seeds.

    Args:
        path: File of the picture.
        data: Runs by data set, those of `load_channels` included.
        speeds: Their measured speeds, at least one.
    """
    rows = [(dataset, size) for dataset in data for size in batch_sizes(speeds[dataset])]
    figure_, axes = plt.subplots(len(rows), 2, figsize=(10, 3.6 * len(rows)), squeeze=False, constrained_layout=True)
    for row, (dataset, size) in zip(axes, rows):
        found = data[dataset]
        for axis, metric in zip(row, ("distance", "ssim_to_dense")):
            drawn: list[Run] = []
            seen: list[float] = []
            for name, (colour, marker) in TIMED.items():
                shown = [one for one in series(name, found, speeds[dataset]) if size in speeds[dataset][one]]
                if not shown:
                    continue
                times = [speeds[dataset][one][size].time for one in shown]
                values = [[figure(run, dataset, metric) for run in found[one]] for one in shown]
                means, errors = list(map(statistics.mean, values)), list(map(deviation, values))
                front = 3 if name == DEFAULT else 2
                axis.plot(times, means, marker=marker, markersize=5, color=colour, label=title_of(name), zorder=front)
                axis.errorbar(times, means, errors, fmt="none", capsize=2, color=colour)
                drawn += [run for one in shown for run in found[one]]
                seen += means
            if metric == "distance" and drawn:
                if max(seen) > 3 * min(seen):
                    axis.set_yscale("log")
                axis.axhline(dense_distance(drawn, dataset), color="gray", linestyle=":", label="dense")
            title = "Fréchet distance" if metric == "distance" else "SSIM to dense"
            axis.set_title(f"{TITLES[dataset]}, batch {size}: {title}", fontsize=10)
            axis.set_xlabel("measured time of a forward, as a share of the dense model's")
    named = {label: line for row in axes for line, label in zip(*row[0].get_legend_handles_labels())}
    figure_.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, fontsize=8)
    _save(figure_, path)


def _save(figure_, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=110)
    plt.close(figure_)
