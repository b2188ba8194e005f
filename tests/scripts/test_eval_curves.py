"""--eval_steps of training/prune_ddpm.py: curves of sample quality, which affect nothing else and survive an interruption."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusers_gfprune.scripts import prune_ddpm
from diffusers_gfprune.training.state import Curves
from helpers.resume import checkpoints_kept, place, run_here

# Of 16 steps, the 6th and 12th, and the end; later arguments win
CURVES = ("--eval_steps", 6, "--eval_images", 70, "--eval_batch_size", 70, "--ddim_num_inference_steps", 2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with curves, and its checkpoints."""
    folder = tmp_path_factory.mktemp("measured")
    with checkpoints_kept(folder / "checkpoints"):
        run_here(folder / "run", *CURVES)
    return folder / "run", folder / "checkpoints"


def weights(run: Path) -> bytes:
    return (run / "unet/diffusion_pytorch_model.safetensors").read_bytes()


def report(run: Path) -> dict:
    return json.loads((run / "pruning_report.json").read_text())


@pytest.mark.slow
def test_quality_is_measured_along_the_way(measured: tuple[Path, Path]) -> None:
    curves = report(measured[0])["curves"]
    assert curves["quality_steps"] == [6, 12]
    assert set(curves["quality"]) == {"fd_pixels", "psnr_to_dense", "ssim_to_dense"}
    assert all(len(values) == 2 for values in curves["quality"].values())
    assert 0 < curves["quality_seconds"][0] < curves["quality_seconds"][1] <= sum(curves["seconds"].values())
    results = json.loads((measured[0] / "results.json").read_text())
    assert (
        results["pruned"]["quality"]["ssim_to_dense"] > 0
        and results["evaluation"]["distances"]["fd_pixels"]["reference_images"] == 1500
    )


@pytest.mark.slow
def test_measuring_changes_nothing_else(measured: tuple[Path, Path], whole_run: tuple[Path, Path]) -> None:
    assert weights(whole_run[0]) == weights(measured[0])


@pytest.mark.slow
def test_curves_go_on_after_an_interruption(measured: tuple[Path, Path], tmp_path: Path) -> None:
    place(measured[1], tmp_path / "run", 9)
    run_here(tmp_path / "run", *CURVES, "--resume_from_checkpoint", "latest")
    mine, whole = (report(run)["curves"] for run in (tmp_path / "run", measured[0]))
    assert mine["quality_steps"] == whole["quality_steps"] and mine["quality"] == whole["quality"]
    assert weights(tmp_path / "run") == weights(measured[0])


def test_curves_of_other_features_have_gaps() -> None:
    """A run that is resumed with others: every curve still has a value, or None, for each step."""
    curves, later = (
        Curves(),
        [{"fd_pixels": 3.0, "ssim_to_dense": 0.5}, {"ssim_to_dense": 0.7}, {"fid": 2.0, "ssim_to_dense": 0.9}],
    )
    quality = SimpleNamespace(measure=lambda unet: later[len(curves.quality_steps)])
    run = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True), sample_quality=quality)
    state = SimpleNamespace(averaged=contextlib.nullcontext, curves=curves, step=0)
    tracking = SimpleNamespace(log_quality=lambda step, values: None)
    for _ in later:
        prune_ddpm.measure_quality(run, state, tracking)
    assert curves.quality == {
        "fd_pixels": [3.0, None, None],
        "ssim_to_dense": [0.5, 0.7, 0.9],
        "fid": [None, None, 2.0],
    }
