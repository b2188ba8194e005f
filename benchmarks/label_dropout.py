"""Loss of a pruned model with the null label, with and without label dropout during pruning and fine-tuning.

    python benchmarks/label_dropout.py

A class-conditional DDPM of the digits has 11 labels; the last one replaces 15 % of the labels in training. It is pruned to
half of its MACs without label dropout (`--label_dropout 0`) and with 10 %, the default of `prune_ddpm.py`. The measure is the
rise of the step loss on held-out images, with labels and with the null label,

    rise = loss of the pruned model / loss of the dense model - 1.

Results are written to `benchmarks/results/label_dropout.json`. `--write` updates the table in `benchmarks/README.md`. Models
are kept in `runs/label-dropout` and reused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from documents import write_table

from diffusers_gfprune.reports.results import read_results
from diffusers_gfprune.run_folder import write_json

ROOT = Path(__file__).resolve().parent.parent


RESULTS = ROOT / "benchmarks/results/label_dropout.json"
DATA = ("--dataset_name", "training/digits")
SHARES = (0.0, 0.1)
MODEL = {"block_out_channels": [32, 48], "num_class_embeds": 11, "dropout": 0.0}


def script(name: str, *words: object) -> None:
    """Run a training script on one thread.

    Raises:
        subprocess.CalledProcessError: The script fails.
    """
    command = [sys.executable, f"training/{name}", *map(str, words)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def train(folder: Path, steps: int) -> Path:
    """Train the dense model with 15 % of its labels dropped, unless it exists; returns its folder."""
    model = folder / "dense"
    if not model.exists():
        config = json.loads((ROOT / "training/digits/unet_config.json").read_text()) | MODEL
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "unet_config.json").write_text(json.dumps(config))
        words = ("--label_dropout", 0.15, "--max_train_steps", steps, "--train_batch_size", 64, "--lr_warmup_steps", 200)
        last = ("--resume_from_checkpoint", "latest", "--validation_steps", 1000, "--output_dir", model)
        script("train_ddpm.py", "--model_config", folder / "unet_config.json", *DATA, *words, *last)
    return model


def prune(model: Path, folder: Path, share: float, seed: int, steps: int) -> dict:
    """Prune with a share of the labels dropped, unless the run exists; returns its results."""
    run = folder / f"{share:g}-seed{seed}"
    if not run.exists():
        words = ("--max_train_steps", steps, "--label_dropout", share, "--seed", seed, "--target", "macs", "--ratio", 0.5)
        short = ("--eval_images", 0, "--speed_batch_sizes", 0, "--update_interval", max(1, steps // 20))
        script(
            *("prune_ddpm.py", "--pretrained_model_name_or_path", model, *DATA, *words, *short),
            *("--output_dir", run, "--overwrite_output_dir", "--resume_from_checkpoint", "latest"),
        )
    return read_results(run).to_dict()


def rises(results: dict) -> dict[str, float]:
    """Relative rise of both losses."""
    dense, pruned = results["dense"], results["pruned"]
    return {name: pruned[name] / dense[name] - 1 for name in ("step_loss", "step_loss_null_label")}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_steps", type=int, default=2500, help="steps of the dense model (>= 1)")
    parser.add_argument("--prune_steps", type=int, default=500, help="steps of each pruning run (>= 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of the pruning runs")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/label-dropout", help="folder of the models")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--write", action="store_true", help="update the table in benchmarks/README.md")
    args = parser.parse_args(argv)
    for name in ("train_steps", "prune_steps"):
        if getattr(args, name) < 1:
            sys.exit(f"label_dropout.py: error: {name}={getattr(args, name)} must be at least 1")
    model = train(args.folder, args.train_steps)
    rows = []
    for share in SHARES:
        for seed in args.seeds:
            results = prune(model, args.folder, share, seed, args.prune_steps)
            losses = {which: {name: results[which][name] for name in rises(results)} for which in ("dense", "pruned")}
            rows.append({"label_dropout": share, "seed": seed, "rise": rises(results), **losses})
    settings = {"train_steps": args.train_steps, "prune_steps": args.prune_steps, "train_label_dropout": 0.15}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {"settings": settings, "runs": rows})
    print(table(rows))
    if args.write:
        write_table("label dropout", table(rows))


def table(rows: list[dict]) -> str:
    """A Markdown table with a row per share: means over seeds."""
    lines = [
        "| `--label_dropout` | seeds | rise with labels | rise with the null label | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for share in dict.fromkeys(row["label_dropout"] for row in rows):
        found = [row["rise"] for row in rows if row["label_dropout"] == share]
        labels, null = (sum(rise[name] for rise in found) / len(found) for name in ("step_loss", "step_loss_null_label"))
        lines.append(f"| {share:g} | {len(found)} | {labels:.1%} | {null:.1%} | {null / labels:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
