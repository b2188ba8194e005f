"""The complete run of `make prune` (slow): recognisable digits at half the cost."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import diffusers_gfprune  # noqa: F401  registers the pruned UNet
from diffusers_gfprune.metrics.sampling import sample_images

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "digits"
    subprocess.run(["make", "prune", f"ARGS=--output_dir {output}"], cwd=ROOT, check=True)
    return output


def clearly_digits(images: torch.Tensor) -> float:
    """Share of images that a classifier of real digits puts into a class with a probability of at least 0.8."""
    digits = load_digits()
    classifier = CalibratedClassifierCV(SVC(), ensemble=False).fit(digits.data / 16, digits.target)
    return float(np.mean(classifier.predict_proba(images.flatten(1).numpy()).max(axis=1) >= 0.8))


def test_samples_are_digits(default_run: Path) -> None:
    """As often as those of the dense model, give or take a few."""
    shares = []
    for folder in (ROOT / "training/digits/teacher", default_run):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        samples = sample_images(pipeline.unet, pipeline.scheduler, 300, (8, 8), num_inference_steps=50)
        shares.append(clearly_digits(samples))
    dense, pruned = shares
    assert dense > 0.75 and pruned > dense - 0.1


def test_results_are_near_the_dense_model(default_run: Path) -> None:
    results = json.loads((default_run / "results.json").read_text())
    dense, pruned = results["dense"], results["pruned"]
    assert pruned["macs"] / dense["macs"] == pytest.approx(0.5, abs=0.01)
    assert pruned["step_loss"] < 1.05 * dense["step_loss"]
    assert pruned["quality"]["fd_pixels"] < 2 * dense["quality"]["fd_pixels"]
    assert pruned["quality"]["ssim_to_dense"] > 0.9


def test_the_loss_has_no_cliff(default_run: Path) -> None:
    """Held-out loss along the run: no two neighbouring measurements are as far apart as one-shot pruning jumps (0.1)."""
    curves = json.loads((default_run / "pruning_report.json").read_text())["curves"]
    assert np.abs(np.diff(curves["validation_loss"])).max() < 0.01
    assert curves["compaction"]["step_loss_compacted"] == pytest.approx(curves["compaction"]["step_loss_masked"], rel=1e-4)


def test_pipeline_samples_with_another_scheduler(default_run: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(default_run)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(batch_size=4, num_inference_steps=20, output_type="np").images
    assert images.shape == (4, 8, 8, 1) and np.isfinite(images).all()
