"""The study: runs every setting of `study_settings.py` and keeps its results.

    python benchmarks/study.py --dataset digits                     missing runs, three seeds each
    python benchmarks/study.py --dataset digits --part main --jobs 2
    python benchmarks/study.py --dataset cifar10 --dataset_name uoft-cs/cifar10
    python benchmarks/study.py --dataset digits-dit                 also digits-ldm, digits-text: latent models of the digits
    python benchmarks/study.py --quick                              everything at reduced size, in runs/study-quick

Each run writes one JSON file to `benchmarks/results/study/<dataset>/`. Existing files are kept; a file from other arguments is
an error. A killed run resumes from its checkpoint. `study_report.py` makes tables and pictures from these files.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from study_digits import DISTANCE_TITLE, script_environment
from study_settings import BASE, CURVE_STEPS, DATASETS, FORMER_DEFAULTS, LATENT, SETTINGS, TEACHERS, Setting

from diffusers_gfprune.reports.results import ModelFigures, Results, read_results
from diffusers_gfprune.training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent


RESULTS = ROOT / "benchmarks/results/study"
RUNS = ROOT / "runs/study"
QUICK = ROOT / "runs/study-quick"
# One setting of every kind and part, with runs of seconds
QUICK_SETTINGS = (
    *("default", "two-phase", "diff-pruning", "magnitude", "paper", "scratch", "torch-pruning"),
    *("default-30", "phases-5-10", "p-cosine", "iterations", "no-revival", "ranking-global"),
)
QUICK_ARGUMENTS = (
    *("--max_train_steps", "40", "--calibration_batches", "1", "--calibration_batch_size", "16", "--train_batch_size", "16"),
    *("--eval_images", "80", "--ddim_num_inference_steps", "5", "--validation_images", "64", "--ema_max_decay", "0.9"),
)
FORMAT_VERSION = 1
# Arguments that do not affect the results of a run
MACHINE = (
    *("--evaluation_cache_dir", "--teacher_images_dir", "--speed_batch_sizes"),
    *("--resume_from_checkpoint", "--checkpointing_steps"),
    "--latency_batch_size",  # in older runs
    *("--output_dir", "--dataset_name", "--baseline", "--results", "--eval_steps", "--fraction", "--share"),
)
# Older runs have `--flow_metric` instead of two criteria
FLOW_METRICS = {"predictions": "gradient-flow", "weights": "gradient-flow-weights"}


def result_file(dataset: str, setting: Setting, seed: int, results: Path = RESULTS) -> Path:
    """Results file of a run."""
    return results / dataset / f"{setting.name}-seed{seed}.json"


def record(
    setting: Setting, dataset: str, seed: int, results: Results, report: dict, digits: dict[str, dict] | None = None
) -> dict:
    """Content of a results file: results, curves, rankings and provenance.

    Args:
        setting: The setting.
        dataset: The data set.
        seed: Seed of the run.
        results: Its `results.json`.
        report: Its `pruning_report.json`.
        digits: For latent models, figures of `study_digits.py` by name of the model, `"dense"` and `"pruned"`.
    """
    evaluation, digits = results.evaluation, digits or {}
    if digits:
        distances = {**evaluation.get("distances", {}), "fd_digits": {"title": DISTANCE_TITLE}}
        evaluation = {**evaluation, "distances": distances}
    curves = report.get("curves", {})
    names = ("quality_steps", "quality", "validation_steps", "validation_loss", "compaction")
    shown = ("step", "phase", "sparsity", "mask_value", "revived_units", "newly_pruned_units")
    return {
        "format_version": FORMAT_VERSION,
        "setting": setting.name,
        "dataset": dataset,
        "seed": seed,
        "command": report.get("command"),
        "commit": commit(),
        "dense": {**figures(results.reference_model), **digits.get("dense", {})},
        "pruned": {**figures(results.model), **digits.get("pruned", {})},
        "evaluation": evaluation,
        "steps": report["phases"]["total_steps"],
        "phases": report["phases"],
        "curves": {name: curves[name] for name in names if name in curves},
        "rankings": [{name: update[name] for name in shown} for update in report.get("mask_updates", [])],
        "widths": {group["name"]: group["kept_channels"] for group in report.get("channel_groups", [])},
        **{name: report[name] for name in ("peer", "removed_blocks", "trajectory") if report.get(name)},
    }


def figures(model: ModelFigures) -> dict:
    """Costs, losses and metrics of a model as a flat dictionary."""
    names = ("parameters", "macs", "weight_file_bytes", "step_loss", "step_loss_null_label")
    measured = {name: value for name in names if (value := getattr(model, name)) is not None}
    return {**measured, **model.quality}


def commit() -> str | None:
    """The checked-out commit, marked as dirty if files have changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    return found.stdout.strip() or None if found is not None else None


def arguments_of(setting: Setting, dataset: str, seed: int, extra: list[str], curve_steps: int | None = None) -> list[str]:
    """Arguments of a run of `training/prune_ddpm.py`."""
    steps = curve_steps or setting.curve_steps or CURVE_STEPS.get(dataset)
    curves = ("--eval_steps", str(steps)) if setting.curves and steps is not None else ()
    seeds = ("--seed", str(seed), "--pruning_seed", str(seed))  # random choices depend on the seed, too
    return [*BASE[dataset], *setting.arguments, *setting.own.get(dataset, ()), *curves, *seeds, *extra]


def words_of_today(words: list[str], dataset: str) -> list[str]:
    """Arguments of an older run under their current names."""
    found = list(words)
    for name, default in FORMER_DEFAULTS[dataset].items():
        if name not in words:
            found += [name, default]
    if "--flow_metric" in found:
        index = found.index("--flow_metric")
        found[index : index + 2] = "--criterion", FLOW_METRICS[found[index + 1]]
    return found


def made_by(command: str, words: list[str], dataset: str) -> bool:
    """Whether the command line in a run's report has the same values as these arguments, except for those of `MACHINE`."""
    given = shlex.split(command.replace("\\\n", " "))[3:]  # accelerate launch SCRIPT
    return _meaning(words_of_today(given, dataset)) == _meaning(words)


def _meaning(words: list[str]) -> dict:
    """Values of all arguments, explicit or from the recipe."""
    kept, skipped = [], False
    for word in words:
        skipped = word in MACHINE if word.startswith("--") else skipped
        if not skipped:
            kept.append(str(ROOT / word) if word.endswith(".yaml") else word)
    values = asdict(parse_arguments(kept))
    del values["words"]
    return values


def run(setting: Setting, dataset: str, seed: int, options: argparse.Namespace) -> None:
    """Make one run, unless its results exist."""
    target = result_file(dataset, setting, seed, options.results)
    name = f"{dataset}, {setting.title}, seed {seed}"
    curve_steps = 10 if options.quick else None
    if target.exists():
        words = arguments_of(setting, dataset, seed, options.extra, curve_steps)
        if not made_by(json.loads(target.read_text())["command"], words, dataset):
            print(
                f"*** {name}: {target} was made with other arguments; remove it to repeat the run", file=sys.stderr, flush=True
            )
            options.failed.append(name)
        return
    folder = options.runs / dataset / f"{setting.name}-seed{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    extra = ["--evaluation_cache_dir", str(options.runs / "cache"), "--speed_batch_sizes", "0", *options.extra]
    if options.dataset_name is not None:
        extra += ["--dataset_name", options.dataset_name]
    if "--train_data" in setting.arguments:
        extra += ["--teacher_images_dir", str(options.runs / "teacher-images")]
    script, more = "training/prune_ddpm.py", ["--resume_from_checkpoint", "latest", "--checkpointing_steps", "250"]
    if setting.kind == "trajectory":
        script, more = "benchmarks/study_trajectory.py", [*setting.more]
    elif setting.kind != "prune":
        script = "benchmarks/study_baselines.py"
        more = ["--baseline", setting.kind, "--results", str(options.results / dataset)]
    words = arguments_of(setting, dataset, seed, extra, curve_steps)
    remembered = ["benchmarks/study_run.py", "--teacher_cache", str(options.runs / f"teacher-{dataset}-seed{seed}")]
    command = [sys.executable, *remembered, script, *words, *more, "--output_dir", str(folder)]
    print(f"--- {name}", flush=True)
    log = folder.with_name(f"{folder.name}.log")
    done = (folder / "results.json").exists() or logged(command, log, options.threads)
    digits = None
    if done and dataset in LATENT:
        paths = {"dense": dense_digits(dataset, options), "pruned": folder / "digits.json"}
        done = paths["pruned"].exists() or logged(digits_command(folder, paths["pruned"]), log, options.threads)
        digits = {which: json.loads(path.read_text()) for which, path in paths.items()} if done else None
    if not done:
        print(f"*** {name} failed; see {log}", file=sys.stderr, flush=True)
        options.failed.append(name)
        return
    results, report = read_results(folder), json.loads((folder / "pruning_report.json").read_text())
    target.parent.mkdir(parents=True, exist_ok=True)
    complete = target.with_suffix(".tmp")
    complete.write_text(json.dumps(record(setting, dataset, seed, results, report, digits), indent=1) + "\n")
    os.replace(complete, target)
    shutil.rmtree(folder)
    measured = {**results.model.quality, **(digits or {}).get("pruned", {})}
    measured = {name: value for name, value in measured.items() if name.startswith(("fd_", "ssim", "right"))}
    print(f"    {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in measured.items()), flush=True)


def logged(command: list[str], log: Path, threads: int) -> bool:
    """Run a command with its output appended to a log; returns whether it succeeded."""
    environment = {**script_environment(), "OMP_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode == 0


def digits_command(pipeline: Path, output: Path) -> list[str]:
    """Command that measures the samples of a latent pipeline."""
    return [sys.executable, "benchmarks/study_digits.py", str(pipeline), "--output", str(output)]


def dense_digits(dataset: str, options: argparse.Namespace) -> Path:
    """File with the figures of a dense latent model, which `main` makes."""
    return options.runs / f"digits-of-dense-{dataset}.json"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; unknown arguments are passed to the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=(*DATASETS, *LATENT))
    parser.add_argument("--quick", action="store_true", help="Run everything at reduced size, as a test.")
    parser.add_argument("--folder", type=Path, default=QUICK, help="Folder of results and runs of --quick.")
    parser.add_argument("--part", nargs="+", choices=sorted({s.part for s in SETTINGS.values()}), help="Parts (default: all).")
    parser.add_argument(
        "--settings", nargs="+", choices=list(SETTINGS), metavar="NAME", help="Names of settings (default: all of the parts)."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="Number of simultaneous runs.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per run.")
    parser.add_argument("--dataset_name", help="Data set to use instead of the recipe's.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=RUNS)
    options, options.extra = parser.parse_known_args(argv)
    options.failed = []
    if options.quick:
        options.dataset, options.seeds = "digits", [0, 1]
        options.settings = options.settings or QUICK_SETTINGS
        options.results, options.runs = options.folder / "results", options.folder / "runs"
        options.extra = [*QUICK_ARGUMENTS, *options.extra]
    if options.dataset is None:
        parser.error("--dataset or --quick is needed")
    return options


def main(argv: list[str] | None = None) -> None:
    """Make all missing runs."""
    options = parse(argv)
    teacher = TEACHERS[options.dataset]
    if not (ROOT / teacher).is_dir():
        target = {"digits": "teacher", "cifar10": "cifar10-teacher"}.get(options.dataset, "latent-teachers")
        sys.exit(f"study.py: error: dataset={options.dataset} needs {teacher}: make {target}, and copy its result there")
    chosen = [
        setting
        for setting in SETTINGS.values()
        if options.dataset in setting.datasets
        and (options.settings is None or setting.name in options.settings)
        and (options.part is None or setting.part in options.part)
    ]
    # Scratch uses the widths of the setting two-phase, which runs first
    work = [(s, seed) for late in (False, True) for seed in options.seeds for s in chosen if (s.kind == "scratch") == late]
    if options.dataset in LATENT and not (dense := dense_digits(options.dataset, options)).exists():
        options.runs.mkdir(parents=True, exist_ok=True)
        log = dense.with_suffix(".log")
        if not logged(digits_command(ROOT / teacher, dense), log, options.threads):
            sys.exit(f"study.py: error: the dense model of dataset={options.dataset} cannot be measured; see {log}")
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda item: run(item[0], options.dataset, item[1], options), work))
    if options.failed:
        sys.exit(f"study.py: error: {len(options.failed)} of {len(work)} runs failed: {'; '.join(options.failed)}")


if __name__ == "__main__":
    main()
