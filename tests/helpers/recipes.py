"""Short runs by the recipes that are shipped, with the test Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from helpers.scripts import ROOT

SMALL = [
    *("--max_train_steps", "3", "--soft_fraction", "0.34", "--hard_fraction", "0.67", "--train_batch_size", "1"),
    *("--calibration_batches", "1", "--calibration_batch_size", "1", "--validation_images", "1", "--eval_images", "0"),
    *("--speed_batch_sizes", "0", "--dataloader_num_workers", "0", "--mixed_precision", "no"),
]


def settings(recipe: str) -> dict:
    text = (ROOT / f"training/recipes/{recipe}.yaml").read_text()
    return yaml.safe_load(text.replace("{recipe_dir}/../", "training/"))


def words_of(recipe: str, folder: Path) -> list[str]:
    """The command line of a small run by a recipe."""
    return ["--recipe", recipe, *SMALL, "--output_dir", str(folder / "run")]


def run_recipe(recipe: str, folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """In a separate process, whose environment points to the test Hub."""
    command = [sys.executable, "training/prune_ddpm.py", *words_of(recipe, folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
