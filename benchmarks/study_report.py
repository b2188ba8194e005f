"""Tables and pictures of the study, from the results of `study.py`.

    python benchmarks/study_report.py                       prints the tables
    python benchmarks/study_report.py --write               also updates README.md and benchmarks/README.md

Times of runs are computed from the measurements of `study_time.py`, for the settings that it measured. Speeds of pruned
models are those of `study_latency.py`; runs whose widths have changed since do not count. Tables in a document are between two
comments, `<!-- study: NAME -->` and `<!-- end -->`; the text between them is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from study_latency import OUTPUT as LATENCIES
from study_plots import CURVES, ITERATIONS, curve, plot_budgets, plot_curves, plot_speeds
from study_records import (
    DISTANCE,
    RESULTS,
    ROOT,
    TITLES,
    Found,
    decimals,
    dense_distance,
    figure,
    load,
    load_channels,
    of_part,
    spread,
)
from study_settings import DATASETS, EVERY, LATENT, SCORES, SETTINGS, SHARED
from study_speed import NOT_MEASURED, Speeds, batch_sizes, equal_time_table, load_speeds
from study_time import OUTPUT as TIMES
from study_time import seconds

from diffusers_gfprune.errors import one_line_errors

SENSITIVITY = ROOT / "benchmarks/results/sensitivity"
APPROXIMATION = ROOT / "benchmarks/results/approximation.json"
PICTURES = ROOT / "benchmarks/pictures"
SPEED_PICTURE = "quality_over_measured_time.png"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks/README.md")
COLUMNS = {"step_loss": "step loss", "distance": "", "ssim_to_dense": "SSIM to dense", "psnr_to_dense": "PSNR to dense"}
RIGHT_DIGITS = "right_digits"  # of models with a condition

# The rows that the README shows
RIVALS = ("default", "no-recovery", "diff-pruning", "magnitude", "torch-pruning")


def main_table(found: Found, dataset: str, names: Sequence[str], speeds: Speeds | None = None) -> str:
    """A Markdown table of the named settings that have results, in the given order, with speeds if any of them has one."""
    first = next(iter(found.values()))[0]
    distance = first["evaluation"]["distances"][DISTANCE[dataset]]["title"]
    shown = {name: by_batch for name, by_batch in (speeds or {}).items() if name in names}
    sizes = batch_sizes(shown)
    columns = {**COLUMNS, **({RIGHT_DIGITS: "right digits"} if RIGHT_DIGITS in first["dense"] else {})}
    titles = [distance if name == "distance" else title for name, title in columns.items()]
    titles += [f"times as fast, batch {size}" for size in sizes]
    lines = ["| setting | seeds | MACs | " + " | ".join(titles) + " |", "|---|---|---|" + "---|" * len(titles)]
    dense = [figure(first, dataset, name, "dense") for name in columns]
    cells = [
        "1" if name == "ssim_to_dense" else "-" if v is None else f"{v:.{decimals(v)}f}" for name, v in zip(columns, dense)
    ] + ["1"] * len(sizes)
    lines.append(f"| dense | - | {first['dense']['macs'] / 1e6:.1f}M | " + " | ".join(cells) + " |")
    for name in names:
        setting, runs = SETTINGS[name], found.get(name, [])
        if not runs:
            continue
        cells = [spread([figure(run, dataset, column) for run in runs]) for column in columns]
        cells += [str(shown.get(name, {}).get(size, "-")) for size in sizes]
        macs = statistics.mean(run["pruned"]["macs"] for run in runs) / 1e6
        lines.append(f"| {setting.title} | {len(runs)} | {macs:.1f}M | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
        "| model | criterion | groups: correlation of logarithms | rank correlation | decades | units: rank correlation |",
        "|---" * 6 + "|",
    ]
    for dataset in EVERY:
        if (folder / f"{dataset}.json").is_file():
            found = json.loads((folder / f"{dataset}.json").read_text())
            for criterion, row in found["by_criterion"].items():
                cells = f"{row['log_pearson']:.2f} | {row['spearman']:.2f} | {row['decades']:.1f}"
                cells += f" of {found['damage_decades']:.1f} | {row['within_groups']:.2f}"
                lines.append(f"| {TITLES[dataset]} | {SCORES[criterion]} | {cells} |")
    return "\n".join(lines)


def kinds_table(folder: Path) -> str:
    """A table of the rank correlation of scores and damage of units within groups, by the kind of their layers."""
    found = {d: json.loads(path.read_text()) for d in EVERY if (path := folder / f"{d}.json").is_file()}
    rows = {d: results["by_criterion"] for d, results in found.items() if "kinds" in results}
    kinds = list(dict.fromkeys(kind for by in rows.values() for row in by.values() for kind in row["within_groups_by_kind"]))
    lines = ["| model | criterion | " + " | ".join(kinds) + " |", "|---" * (2 + len(kinds)) + "|"]
    for dataset, by_criterion in rows.items():
        for criterion, row in by_criterion.items():
            values = [row["within_groups_by_kind"].get(kind) for kind in kinds]
            cells = " | ".join("-" if value is None else f"{value:.2f}" for value in values)
            lines.append(f"| {TITLES[dataset]} | {SCORES[criterion]} | {cells} |")
    return "\n".join(lines)


def revival_table(found: Found, dataset: str) -> str:
    """A table of revived units and sample quality; older runs count channels."""
    lines = [
        "| setting | seeds | rankings | came back, per run | of all ranked out | distance | SSIM to dense |",
        "|---" * 7 + "|",
    ]
    for name in ("default", "no-recovery", "two-phase", "paper", "often", *of_part("revival")):
        runs = found.get(name, [])
        if runs:
            back, gone = (
                [sum(r.get(f"{what}_units", r.get(f"{what}_channels")) for r in run["rankings"]) for run in runs]
                for what in ("revived", "newly_pruned")
            )
            share = statistics.mean(b / g for b, g in zip(back, gone))
            title = SETTINGS[name].title + (
                f", {runs[0]['steps']} steps" if SETTINGS[name].part in ("main", "earlier") else ""
            )
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


def peer_table(found: Found, dataset: str) -> str:
    """A table of the models pruned by Torch-Pruning."""
    lines = [
        "| data | seed | asked for | MACs removed | step loss before | right after pruning | attention scale |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in [*found.get("earlier-torch-pruning", []), *found.get("torch-pruning", [])]:
        peer = run["peer"]
        drift = statistics.mean(peer["attention_scale_ratio"].values())
        lines.append(
            f"| {TITLES[dataset]} | {run['seed']} | 50 % | {peer['macs_removed']:.1%} | {peer['step_loss_dense']:.4f} | "
            f"{peer['step_loss_after_pruning']:.4f} | x {drift:.3f} |"
        )
    return "\n".join(dict.fromkeys(lines))  # runs with other training prune the same model


def trajectory_table(found: Found, dataset: str) -> str:
    """A table of runs with trajectories, and of errors on trajectories, relative to those on held-out images with noise.

    Errors are sums over the steps of the sampler: over all, and over the first half of them, with the higher noise.
    """
    names = ("", "seeds", "distance", "SSIM to dense", "errors on its own trajectories", "first half")
    names += ("on the dense model's", "first half")
    lines = [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    for name in of_part("trajectory"):
        if not (runs := found.get(name, [])):
            continue
        cells = [spread([figure(run, dataset, metric) for run in runs]) for metric in ("distance", "ssim_to_dense")]
        for kind in ("own", "dense"):
            for parts in (1, 2):
                ratios = []
                for errors in (run["trajectory"] for run in runs):
                    steps = len(errors["timesteps"]) // parts
                    ratios.append(sum(errors[kind][:steps]) / sum(errors["held_out"][:steps]))
                cells.append(spread(ratios, 2))
        lines.append(f"| {SETTINGS[name].title} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table(data: dict[str, Found], times: dict) -> str:
    """A table of the time of runs, of their rankings and of recovery, in dense training steps."""
    lines = ["| data | setting | steps | time of a run | of it, rankings | of it, recovery |", "|---" * 6 + "|"]
    for dataset, found in data.items():
        for name in times[dataset]["settings"]:
            runs = found.get(name, [])
            if runs:
                own = times[dataset]["settings"][name]
                whole = statistics.mean(seconds(run, run["steps"], times[dataset]) for run in runs)
                rankings = statistics.mean(len(run["rankings"]) for run in runs)
                parts = (whole, rankings * own["ranking"], rankings * own["recovery"])
                told = (TITLES[dataset], SETTINGS[name].title, f"{runs[0]['steps']:,}", *(f"{part:,.0f}" for part in parts))
                lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


# Parts with a table for each data set
PARTS = (
    *("main", "budget", "steps", "earlier", "earlier-budget", "widths", "width-budgets", "metric", "phases", "schedules"),
    *("scores", "data", "features", "timesteps", "rates", "igsm", "recovery", "convergence"),
)
# The default with the learning rate of other parts
EARLIER_DEFAULT = {"digits": "default", "cifar10": "rate-3e-4"}
# Rows of other parts to compare the rows of a part with; None: the row of `EARLIER_DEFAULT`
BESIDE = {
    "widths": ("two-phase", "one-shot-gradient-flow"),
    "width-budgets": ("default", "default-30", "default-70"),
    "budget": ("default", "diff-pruning", "magnitude"),
    "earlier-budget": ("two-phase", "one-shot-diff-pruning", "one-shot-magnitude"),
    "metric": ("two-phase", "one-shot-gradient-flow", "two-phase-group", "one-shot-group"),
    "scores": ("short",),
    "data": ("default",),
    "features": (None, "independent", "two-phase"),
    "timesteps": (None, "one-shot-diff-pruning", "one-shot-magnitude"),
    "rates": ("default", "diff-pruning"),
    "igsm": ("default", "diff-pruning"),
    "recovery": (None, "independent", "two-phase"),
    "convergence": (None, "two-phase", "one-shot-diff-pruning", "one-shot-magnitude"),
}


def tables(data: dict[str, Found], speeds: dict[str, Speeds] | None = None) -> dict[str, str]:
    """All tables of the documents that are made for each data set, by name.

    Args:
        data: Runs by data set, those of `load_channels` included.
        speeds: Their measured speeds.
    """
    speeds = speeds or {}

    def rows(names: Sequence[str | None]) -> Callable[[Found, str], str]:
        def make(found: Found, dataset: str) -> str:
            known = [name or EARLIER_DEFAULT[dataset] for name in names]
            return main_table(found, dataset, known, speeds.get(dataset))

        return make

    made: dict[str, Callable[[Found, str], str]] = {
        "rivals": rows(RIVALS),
        **{part: rows((*BESIDE.get(part, ()), *of_part(part))) for part in PARTS},
        "iterations": iterations_table,
        "revival": revival_table,
        "peer": peer_table,
        "trajectory": trajectory_table,
        "equal time": lambda found, dataset: equal_time_table(found, dataset, speeds.get(dataset, {}), 16),
        "equal time 128": lambda found, dataset: equal_time_table(found, dataset, speeds.get(dataset, {}), 128),
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
    parser.add_argument("--latencies", type=Path, default=LATENCIES, help="Results of study_latency.py.")
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    args = parser.parse_args(argv)
    data, latent = ({d: found for d in some if (found := load(d, args.results))} for some in (DATASETS, LATENT))
    if not data and not latent and not args.write:
        raise SystemExit(f"study_report.py: error: results={args.results} holds no results: run benchmarks/study.py first")
    everything = {dataset: {**found, **load_channels(dataset, args.results)} for dataset, found in data.items()}
    speeds = load_speeds(args.latencies, {**everything, **latent})
    made = tables(everything, speeds)
    rows = (*of_part("main"), *SHARED, *of_part("widths"), *of_part("features"), *of_part("depth"))
    for d, found in latent.items():
        made |= {f"latent {d}": main_table(found, d, rows, speeds[d])}
        made |= {f"recovery {d}": main_table(found, d, of_part("recovery"))}
    # The picture exists only where speeds were measured
    made["speed picture"] = (
        f"![quality over measured time](pictures/{SPEED_PICTURE})" if any(speeds[d] for d in everything) else NOT_MEASURED
    )
    times = json.loads(args.times.read_text()) if args.times.is_file() else None
    if times is not None:
        made["time"] = time_table(data, times)
    if APPROXIMATION.is_file():
        made["approximation"] = approximation_table(APPROXIMATION)
    if SENSITIVITY.is_dir():
        made["sensitivity"] = sensitivity_table(SENSITIVITY)
        made["sensitivity by kind"] = kinds_table(SENSITIVITY)
    for name, table in made.items():
        print(f"\n{name}\n\n{table}")
    if data:
        plot_curves(args.pictures / "quality_over_steps.png", data, CURVES)
        if times is not None:
            plot_curves(args.pictures / "quality_over_time.png", data, CURVES, times)
        if any(name in found for found in data.values() for name in ITERATIONS):
            plot_curves(args.pictures / "quality_at_rankings.png", data, ITERATIONS)
        if any(SETTINGS[name].part.endswith("budget") for found in data.values() for name in found):
            plot_budgets(args.pictures / "quality_over_macs.png", data)
        if any(speeds[dataset] for dataset in everything):
            plot_speeds(args.pictures / SPEED_PICTURE, everything, speeds)
    if args.write:
        for document in DOCUMENTS:
            write(document, made)


if __name__ == "__main__":
    with one_line_errors("study_report.py"):
        main()
