"""Gradient flow against one-shot criteria on the digits, at equal MACs and steps: the results table of the README.

    python benchmarks/compare_digits.py                  every setting and seed, one file a run in benchmarks/results/digits/
    python benchmarks/compare_digits.py --table          print the table of those files

Each run is `make prune` with the arguments of its setting and seed, and leaves its results.json. A run whose file is there is
not made again, so that an interrupted comparison goes on, and two of them can share the work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/digits"
# File name, title, arguments of `make prune`
SETTINGS = {
    "two-phase": ("gradient flow, two phases (default)", ""),
    "two-phase-noise": ("gradient flow, two phases, no teacher", "--distillation_weight 0"),
    "two-phase-noise-longer": (
        "gradient flow, two phases, no teacher, 1,890 steps (the time of the default)",
        "--distillation_weight 0 --max_train_steps 1890",
    ),
    "paper": ("gradient flow, two phases, as published", "--preset paper"),
    "one-shot-noise": ("gradient flow, one-shot, no teacher", "--preset one-shot --distillation_weight 0"),
    "one-shot-diff-pruning": ("Diff-Pruning, one-shot", "--preset one-shot --criterion diff-pruning"),
    "one-shot-diff-pruning-noise": (
        "Diff-Pruning, one-shot, no teacher",
        "--preset one-shot --criterion diff-pruning --distillation_weight 0",
    ),
    "one-shot-magnitude-noise": (
        "magnitude, one-shot, no teacher",
        "--preset one-shot --criterion magnitude --distillation_weight 0",
    ),
    "one-shot-random-noise": ("random, one-shot, no teacher", "--preset one-shot --criterion random --distillation_weight 0"),
}
# Made before training batches were drawn by number (commit 76bb19c): other images and noise in each step, all else alike
EARLIER = (
    *("paper", "one-shot-noise", "one-shot-diff-pruning", "one-shot-diff-pruning-noise"),
    *("one-shot-magnitude-noise", "one-shot-random-noise"),
)
COLUMNS = {"step_loss": "step loss", "fd_pixels": "FD-pixels", "ssim_to_dense": "SSIM to dense"}


def result_file(setting: str, seed: int) -> Path:
    return RESULTS / f"{setting}-seed{seed}.json"


def run(setting: str, seed: int) -> None:
    """One run of `make prune` with other arguments; keeps its results.json."""
    with tempfile.TemporaryDirectory() as folder:
        # --pruning_seed: so that random choices differ from seed to seed
        arguments = f"{SETTINGS[setting][1]} --seed {seed} --pruning_seed {seed} --output_dir {folder}/run"
        subprocess.run(["make", "--silent", "prune", f"ARGS={arguments}"], cwd=ROOT, check=True)
        complete = result_file(setting, seed).with_suffix(".tmp")
        complete.write_text((Path(folder) / "run/results.json").read_text())
        os.replace(complete, result_file(setting, seed))


def table() -> str:
    """Markdown: mean over seeds, and the sample standard deviation where there are several."""
    found = {}
    for setting in SETTINGS:
        files = sorted(RESULTS.glob(f"{setting}-seed*.json"))
        if files:
            found[setting] = [json.loads(path.read_text()) for path in files]
    header = ["setting", "seeds", "MACs", *COLUMNS.values()]
    dense = next(iter(found.values()))[0]["dense"]
    cells = ["dense", "-", f"{dense['macs'] / 1e6:.1f}M", *(f"{dense[key]:.4f}" if key in dense else "1" for key in COLUMNS)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", "| " + " | ".join(cells) + " |"]
    for setting, results in found.items():
        runs = [result["pruned"] for result in results]
        title = SETTINGS[setting][0] + (" *" if setting in EARLIER else "")
        cells = [title, str(len(runs)), f"{statistics.mean(r['macs'] for r in runs) / 1e6:.1f}M"]
        for key in COLUMNS:
            values = [r[key] for r in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--table", action="store_true", help="print the table of the runs that are there and stop")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for seed in args.seeds:
            for setting in args.settings:
                if not result_file(setting, seed).exists():
                    print(f"--- {SETTINGS[setting][0]}, seed {seed}", file=sys.stderr)
                    run(setting, seed)
    print(table())


if __name__ == "__main__":
    main()
