"""Gradient flow against one-shot criteria on the digits, at equal MACs and steps: the results table of the README.

    python benchmarks/compare_digits.py                  every setting and seed, into benchmarks/results/digits.json
    python benchmarks/compare_digits.py --table          print the table of that file

Each run is `make prune` with the arguments of its setting and seed. Runs that the file already has are not made again, so
that an interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "gradient flow, two phases (default)": "",
    "gradient flow, two phases (as published)": "--preset paper",
    "gradient flow, one-shot": "--preset one-shot",
    "magnitude, one-shot": "--preset one-shot --criterion magnitude",
    "Diff-Pruning, one-shot": "--preset one-shot --criterion diff-pruning",
    "random, one-shot": "--preset one-shot --criterion random",
}
COLUMNS = {"step_loss": "step loss", "fd_pixels": "FD-pixels", "ssim_to_dense": "SSIM to dense"}


def run(setting: str, seed: int) -> dict:
    """One run of `make prune` with other arguments; returns its results.json."""
    with tempfile.TemporaryDirectory() as folder:
        # --pruning_seed: so that random choices differ from seed to seed
        arguments = f"{SETTINGS[setting]} --seed {seed} --pruning_seed {seed} --output_dir {folder}/run"
        subprocess.run(["make", "--silent", "prune", f"ARGS={arguments}"], cwd=ROOT, check=True)
        return json.loads((Path(folder) / "run/results.json").read_text())


def table(found: dict) -> str:
    """Markdown: mean and sample standard deviation over seeds."""
    first = next(iter(next(iter(found["runs"].values())).values()))
    header = ["setting", "seeds", "MACs", *COLUMNS.values()]
    dense = first["dense"]
    dense_cells = ["dense", "-", f"{dense['macs'] / 1e6:.1f}M"]
    dense_cells += [f"{dense[key]:.4f}" if key in dense else "1" for key in COLUMNS]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", "| " + " | ".join(dense_cells) + " |"]
    for setting, by_seed in found["runs"].items():
        runs = [results["pruned"] for results in by_seed.values()]
        cells = [setting, str(len(runs)), f"{statistics.mean(r['macs'] for r in runs) / 1e6:.1f}M"]
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
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/digits.json")
    parser.add_argument("--table", action="store_true", help="print the table of an existing file and stop")
    args = parser.parse_args()
    found = json.loads(args.output.read_text()) if args.output.exists() else {"runs": {}}
    if args.table:
        print(table(found))
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for setting in args.settings:
            runs = found["runs"].setdefault(setting, {})
            if str(seed) not in runs:
                print(f"--- {setting}, seed {seed}", file=sys.stderr)
                runs[str(seed)] = run(setting, seed)
                args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
