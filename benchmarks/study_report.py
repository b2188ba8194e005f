"""Tables and pictures of the study, from the results of `study.py`.

    python benchmarks/study_report.py                       prints the tables
    python benchmarks/study_report.py --write               also updates README.md and benchmarks/README.md

Times are computed from the measurements of `study_time.py`, for the settings that it measured. Tables in a document are
between two comments, `<!-- study: NAME -->` and `<!-- end -->`; the text between them is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from study_settings import DATASETS, SCORES, SETTINGS
from study_time import OUTPUT as TIMES
from study_time import seconds

from diffusers_gfprune.errors import one_line_errors

matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/study"
SENSITIVITY = ROOT / "benchmarks/results/sensitivity"
APPROXIMATION = ROOT / "benchmarks/results/approximation.json"
PICTURES = ROOT / "benchmarks/pictures"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks/README.md")
DISTANCE = {"digits": "fd_pixels", "cifar10": "fd_efflite0"}
TITLES = {"digits": "digits, 8x8", "cifar10": "CIFAR-10, 16x16"}
COLUMNS = {"step_loss": "step loss", "distance": "", "ssim_to_dense": "SSIM to dense", "psnr_to_dense": "PSNR to dense"}

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


def main_table(found: Found, dataset: str, names: Sequence[str]) -> str:
    """A Markdown table of the named settings that have results, in the given order."""
    first = next(iter(found.values()))[0]
    distance = first["evaluation"]["distances"][DISTANCE[dataset]]["title"]
    titles = [distance if name == "distance" else title for name, title in COLUMNS.items()]
    lines = ["| setting | seeds | MACs | " + " | ".join(titles) + " |", "|---|---|---|" + "---|" * len(titles)]
    dense = [figure(first, dataset, name, "dense") for name in COLUMNS]
    cells = [
        "1" if name == "ssim_to_dense" else "-" if v is None else f"{v:.{decimals(v)}f}" for name, v in zip(COLUMNS, dense)
    ]
    lines.append(f"| dense | - | {first['dense']['macs'] / 1e6:.1f}M | " + " | ".join(cells) + " |")
    for name in names:
        setting, runs = SETTINGS[name], found.get(name, [])
        if not runs:
            continue
        cells = [spread([figure(run, dataset, column) for run in runs]) for column in COLUMNS]
        macs = statistics.mean(run["pruned"]["macs"] for run in runs) / 1e6
        lines.append(f"| {setting.title} | {len(runs)} | {macs:.1f}M | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dense_distance(runs: Sequence[Run], dataset: str) -> float:
    """The dense model's distance in runs that are shown together.

    Raises:
        ValueError: The distances differ.
    """
    found = [figure(run, dataset, "distance", "dense") for run in runs]
    if max(found) > 1.01 * min(found):  # the last digits differ from machine to machine
        raise ValueError(f"runs of {dataset} have dense distances from {min(found):.4g} to {max(found):.4g}: show them apart")
    return found[0]


def approximation_table(path: Path) -> str:
    """A table of how well the first-order approximation predicts the change of the gradient norm."""
    models = json.loads(path.read_text())["models"]
    lines = [
        "| model | a | correlation | rank correlation | same sign | measured / predicted (median) |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in models.items():
        for share, row in found["single"]["by_share"].items():
            cells = (f"{row[key]:.2f}" for key in ("pearson", "spearman", "same_sign", "median_ratio"))
            lines.append(f"| {name} | {share} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| model | squared gradient norm | lowest-scored removed | change predicted | measured | loss before | after |",
        "|---" * 7 + "|",
    ]
    for name, found in models.items():
        for row in found["together"]:
            norm = f"{found['squared_gradient_norm']:.2g}"
            lines.append(
                f"| {name} | {norm} | {row['share']:.0%} of every group | {row['predicted']:+.3g} | {row['measured']:+.3g} | "
                f"{found['loss']:.3f} | {found['loss'] + row['loss_change']:.3f} |"
            )
    return "\n".join(lines)


def sensitivity_table(folder: Path) -> str:
    """A table of how well summed scores predict the damage of pruning a group, and scores that of single channels."""
    lines = [
        "| model | criterion | groups: correlation of logarithms | rank correlation | decades | channels: rank correlation |",
        "|---" * 6 + "|",
    ]
    for dataset in DATASETS:
        if (folder / f"{dataset}.json").is_file():
            found = json.loads((folder / f"{dataset}.json").read_text())
            for criterion, row in found["by_criterion"].items():
                cells = f"{row['log_pearson']:.2f} | {row['spearman']:.2f} | {row['decades']:.1f}"
                cells += f" of {found['damage_decades']:.1f} | {row['within_groups']:.2f}"
                lines.append(f"| {TITLES[dataset]} | {SCORES[criterion]} | {cells} |")
    return "\n".join(lines)


def revival_table(found: Found, dataset: str) -> str:
    """A table of revived units and sample quality; older runs count channels."""
    lines = [
        "| setting | seeds | rankings | came back, per run | of all ranked out | distance | SSIM to dense |",
        "|---" * 7 + "|",
    ]
    for name in ("two-phase", "paper", "often", *of_part("revival")):
        runs = found.get(name, [])
        if runs:
            back, gone = (
                [sum(r.get(f"{what}_units", r.get(f"{what}_channels")) for r in run["rankings"]) for run in runs]
                for what in ("revived", "newly_pruned")
            )
            share = statistics.mean(b / g for b, g in zip(back, gone))
            title = SETTINGS[name].title + (f", {runs[0]['steps']} steps" if name in ("two-phase", "paper") else "")
            distance, ssim = (spread([figure(run, dataset, c) for run in runs]) for c in ("distance", "ssim_to_dense"))
            cells = (title, len(runs), len(runs[0]["rankings"]), spread(back, 1), f"{share:.1%}", distance, ssim)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def iterations_table(found: Found, dataset: str) -> str:
    """A table of quality at the end of each phase, for runs without fine-tuning."""
    lines = [
        "| schedules | seeds | distance at N | at M | SSIM to dense at N | at M |",
        "|---" * 6 + "|",
    ]
    shown = {name: runs for name in of_part("iterations") if (runs := found.get(name))}
    if shown:
        dense = f"{dense_distance([run for runs in shown.values() for run in runs], dataset):.4f}"
        lines.append(f"| dense | - | {dense} | {dense} | 1 | 1 |")
    for name, runs in shown.items():
        cells = []
        for metric in ("distance", "ssim_to_dense"):
            curves = [dict(zip(*curve(run, dataset, metric))) for run in runs]
            for end in ("soft_end_step", "total_steps"):
                cells.append(spread([c[run["phases"][end]] for c, run in zip(curves, runs)]))
        lines.append(f"| {SETTINGS[name].title} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_part(part: str) -> list[str]:
    """Names of the settings of a part of the study."""
    return [setting.name for setting in SETTINGS.values() if setting.part == part]


def peer_table(found: Found, dataset: str) -> str:
    """A table of the models pruned by Torch-Pruning."""
    lines = [
        "| data | seed | asked for | MACs removed | step loss before | right after pruning | attention scale |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in found.get("torch-pruning", []):
        peer = run["peer"]
        drift = statistics.mean(peer["attention_scale_ratio"].values())
        lines.append(
            f"| {TITLES[dataset]} | {run['seed']} | 50 % | {peer['macs_removed']:.1%} | {peer['step_loss_dense']:.4f} | "
            f"{peer['step_loss_after_pruning']:.4f} | x {drift:.3f} |"
        )
    return "\n".join(lines)


def time_table(data: dict[str, Found], times: dict) -> str:
    """A table of the time of runs and of their rankings, in dense training steps."""
    lines = ["| data | setting | steps | time of a run | of it, rankings |", "|---" * 5 + "|"]
    for dataset, found in data.items():
        for name in times[dataset]["settings"]:
            runs = found.get(name, [])
            if runs:
                ranking = times[dataset]["settings"][name]["ranking"]
                whole = statistics.mean(seconds(run, run["steps"], times[dataset]) for run in runs)
                rankings = statistics.mean(ranking * len(run["rankings"]) for run in runs)
                cells = (TITLES[dataset], SETTINGS[name].title, f"{runs[0]['steps']:,}", f"{whole:,.0f}", f"{rankings:,.0f}")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


CURVES = {
    "two-phase": ("gradient flow, two phases (default)", "tab:blue"),
    "one-shot-diff-pruning": ("Diff-Pruning, one-shot", "tab:orange"),
    "one-shot-magnitude": ("magnitude, one-shot", "tab:green"),
    "one-shot-gradient-flow": ("gradient flow, one-shot", "tab:purple"),
    "paper": ("gradient flow as published, no teacher", "tab:red"),
}
# The rows that the README shows
RIVALS = ("two-phase", "one-shot-diff-pruning", "one-shot-magnitude")


COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")
ITERATIONS = {name: (SETTINGS[name].title, colour) for name, colour in zip(of_part("iterations"), COLOURS)}


def curve(run: Run, dataset: str, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric during a run, including its end."""
    key = DISTANCE[dataset] if metric == "distance" else metric
    curves = run["curves"]
    return [*curves["quality_steps"], run["steps"]], [*curves["quality"][key], run["pruned"][key]]


def plot_curves(path: Path, data: dict[str, Found], shown: dict, times: dict | None = None) -> None:
    """Plot quality over steps or time, with a row per data set. Bands are standard deviations; dashed lines have one seed.

    The first point of a curve does not affect the axis limits and may lie outside of the picture.

    Args:
        path: File of the picture.
        data: Runs by data set; data sets without any of the shown settings are left out.
        shown: Title and colour by setting.
        times: Results of `study_time.py`, for quality over time.
    """
    data = {dataset: found for dataset, found in data.items() if any(name in found for name in shown)}
    figure_, axes = plt.subplots(len(data), 2, figsize=(10, 3.4 * len(data)), squeeze=False, constrained_layout=True)
    for row, (dataset, found) in zip(axes, data.items()):
        for axis, metric in zip(row, ("distance", "ssim_to_dense")):
            seen: list[float] = []
            drawn: list[Run] = []
            for name, (title, colour) in shown.items():
                runs = [run for run in found.get(name, []) if run["curves"].get("quality_steps")]
                if not runs or (times is not None and name not in times[dataset]["settings"]):
                    continue
                steps = curve(runs[0], dataset, metric)[0]
                values = list(zip(*(curve(run, dataset, metric)[1] for run in runs)))
                places = [seconds(runs[0], step, times[dataset]) for step in steps] if times is not None else steps
                means, deviations = list(map(statistics.mean, values)), list(map(deviation, values))
                style = "-" if len(runs) > 1 else "--"
                axis.plot(places, means, style, marker=".", label=title, color=colour)
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
    """Plot quality over the removed share of MACs. Bars are standard deviations; hollow points have one seed."""
    figure_, axes = plt.subplots(len(data), 2, figsize=(10, 3.4 * len(data)), squeeze=False, constrained_layout=True)
    for row, (dataset, found) in zip(axes, data.items()):
        for axis, metric in zip(row, ("distance", "ssim_to_dense")):
            drawn: list[Run] = []
            for name in ("two-phase", "one-shot-diff-pruning", "one-shot-magnitude"):
                points = []
                for ending in ("-30", "", "-70"):
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
                    title, colour = CURVES[name]
                    axis.errorbar([100 * s for s in shares], means, errors, marker="o", capsize=3, label=title, color=colour)
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


def _save(figure_, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=110)
    plt.close(figure_)


# Rows of other parts to compare the rows of a part with
BESIDE = {
    "widths": ("two-phase", "one-shot-gradient-flow"),
    "budget": ("two-phase", "one-shot-diff-pruning", "one-shot-magnitude"),
    "metric": ("two-phase", "one-shot-gradient-flow", "two-phase-group", "one-shot-group"),
    "scores": ("short",),
}


def tables(data: dict[str, Found]) -> dict[str, str]:
    """All tables of the documents, by name."""
    made: dict[str, Callable[[Found, str], str]] = {
        "rivals": lambda found, dataset: main_table(found, dataset, RIVALS),
        **{
            part: (lambda found, dataset, part=part: main_table(found, dataset, (*BESIDE.get(part, ()), *of_part(part))))
            for part in ("main", "budget", "widths", "metric", "phases", "schedules", "scores")
        },
        "iterations": iterations_table,
        "revival": revival_table,
        "peer": peer_table,
    }
    return {f"{name} {dataset}": make(found, dataset) for name, make in made.items() for dataset, found in data.items()}


def write(document: Path, made: dict[str, str]) -> None:
    """Replace the tables of a document.

    Raises:
        ValueError: The document names an unknown table.
    """
    text = document.read_text()
    unknown = {*re.findall(r"<!-- study: (.+?) -->", text)} - {*made}
    if unknown:
        raise ValueError(f"{document.name} has a place for {', '.join(sorted(unknown))}, which is not a table")
    for name, table in made.items():
        marks = re.escape(f"<!-- study: {name} -->"), re.escape("<!-- end -->")
        text = re.sub(rf"({marks[0]}\n).*?({marks[1]})", lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", text, flags=re.DOTALL)
    document.write_text(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="Update the tables of the documents.")
    parser.add_argument("--times", type=Path, default=TIMES, help="Results of study_time.py.")
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    args = parser.parse_args(argv)
    data = {dataset: found for dataset in DATASETS if (found := load(dataset, args.results))}
    if not data and not args.write:
        raise SystemExit(f"study_report.py: error: results={args.results} holds no results: run benchmarks/study.py first")
    made = tables(data)
    times = json.loads(args.times.read_text()) if args.times.is_file() else None
    if times is not None:
        made["time"] = time_table(data, times)
    if APPROXIMATION.is_file():
        made["approximation"] = approximation_table(APPROXIMATION)
    if SENSITIVITY.is_dir():
        made["sensitivity"] = sensitivity_table(SENSITIVITY)
    for name, table in made.items():
        print(f"\n{name}\n\n{table}")
    if data:
        plot_curves(args.pictures / "quality_over_steps.png", data, CURVES)
        if times is not None:
            plot_curves(args.pictures / "quality_over_time.png", data, CURVES, times)
        if any(name in found for found in data.values() for name in ITERATIONS):
            plot_curves(args.pictures / "quality_at_rankings.png", data, ITERATIONS)
        if any(SETTINGS[name].part == "budget" for found in data.values() for name in found):
            plot_budgets(args.pictures / "quality_over_macs.png", data)
    if args.write:
        for document in DOCUMENTS:
            write(document, made)


if __name__ == "__main__":
    with one_line_errors("study_report.py"):
        main()
