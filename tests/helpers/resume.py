"""Helpers for tests of interrupted runs: a short run through all phases, in this process or through the launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_gfprune.run_folder import RunFolder
from diffusers_gfprune.scripts import prune_ddpm
from diffusers_gfprune.training.checkpointing import Checkpoint, Checkpoints
from helpers.scripts import ROOT, forget_accelerator, plain_runs

TEACHER = ROOT / "training/digits/teacher"
STEPS = 16
# Soft phase to step 4, hard phase to step 8, rankings at every second step, a checkpoint after every step
PHASES = [
    *("--pretrained_model_name_or_path", str(TEACHER), "--dataset_name", str(ROOT / "training/digits")),
    *("--max_train_steps", str(STEPS), "--soft_fraction", "0.25", "--hard_fraction", "0.5", "--update_interval", "2"),
    *("--train_batch_size", "8", "--calibration_batches", "1", "--use_ema", "--lr_scheduler", "cosine"),
    *("--validation_steps", "8", "--validation_images", "4", "--logging_steps", "4"),
    *("--eval_images", "0", "--speed_batch_sizes", "0", "--checkpointing_steps", "1", "--recovery", "none"),
]


def run_here(output_dir: Path, *arguments: object) -> None:
    """The script in this process, which saves the seconds that a new one takes to import everything."""
    forget_accelerator()
    with plain_runs():
        prune_ddpm.main([*PHASES, "--output_dir", str(output_dir), *map(str, arguments)])


def start(output_dir: Path, *arguments: object, launcher: tuple[str, ...] = (sys.executable,), **options) -> subprocess.Popen:
    """Start the script in a separate process."""
    command = [*launcher, "training/prune_ddpm.py", *PHASES, "--output_dir", str(output_dir), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **options)


@contextmanager
def checkpoints_kept(folder: Path) -> Iterator[Path]:
    """Inside, runs of this process leave a copy of their checkpoints, which they remove at their end, in `folder`."""
    publish = RunFolder.publish

    def copy_first(self: RunFolder) -> None:
        shutil.copytree(self.training, folder, dirs_exist_ok=True)
        publish(self)

    RunFolder.publish = copy_first
    try:
        yield folder
    finally:
        RunFolder.publish = publish


def uninterrupted(folder: Path, *arguments: object) -> tuple[Path, Path]:
    """A finished run, and the checkpoints of all its steps."""
    with checkpoints_kept(folder / "kept") as kept:
        run_here(folder / "run", "--checkpoints_total_limit", 0, *arguments)
    return folder / "run", kept


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.partition("-")[2])


def place(source: Path, output_dir: Path, last: int) -> None:
    """Put the checkpoints up to a step where a run with `output_dir` looks for its own, as if it had been killed there."""
    for path in source.glob("checkpoint-*"):
        if step_of(path) <= last:
            shutil.copytree(path, output_dir.with_name(f"{output_dir.name}.training") / path.name)


def last_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint of the last step."""
    return Checkpoints(folder).load(max(folder.glob("checkpoint-*"), key=step_of))


def assert_same_state(first: Checkpoint, second: Checkpoint) -> None:
    """Everything but the time it took is equal, tensors bit for bit."""
    assert first.tensors.keys() == second.tensors.keys()
    for part, content in first.tensors.items():
        assert content.keys() == second.tensors[part].keys()
        for name, tensor in content.items():
            assert torch.equal(tensor, second.tensors[part][name]), (part, name)
    timeless = [
        {**c.values, "curves": {k: v for k, v in c.values["curves"].items() if k != "seconds"}} for c in (first, second)
    ]
    assert timeless[0] == timeless[1]


def assert_same_result(first: Path, second: Path) -> None:
    """Two finished runs saved the same weights, widths, rankings and curves."""
    weights = [load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert (first / "unet/config.json").read_text() == (second / "unet/config.json").read_text()
    reports = [json.loads((folder / "pruning_report.json").read_text()) for folder in (first, second)]
    assert reports[0]["mask_updates"] == reports[1]["mask_updates"]
    for report in reports:
        del report["curves"]["seconds"]
    assert reports[0]["curves"] == reports[1]["curves"]


def wait_for_checkpoint(process: subprocess.Popen, output_dir: Path, step: int) -> None:
    """Until the checkpoint of a step, or a later one, is there."""
    folder = output_dir.with_name(f"{output_dir.name}.training")
    while process.poll() is None:
        if any(step_of(path) >= step for path in folder.glob("checkpoint-*")):
            return
        time.sleep(0.005)
    pytest.fail(f"the run ended before checkpoint {step}: {process.communicate()[1]}")
