"""The recipes of the latent digits models, which `make prune FAMILY=...` runs, in a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, DiTPipeline, LDMPipeline, StableDiffusionPipeline

from helpers.scripts import run_script

KINDS = {"dit": DiTPipeline, "ldm": LDMPipeline, "text": StableDiffusionPipeline}
SHORT = [
    *("--max_train_steps", "6", "--soft_fraction", "0.34", "--hard_fraction", "0.67", "--update_interval", "1"),
    *("--train_batch_size", "16", "--calibration_batches", "1", "--validation_images", "16", "--lr_warmup_steps", "0"),
    *("--eval_images", "16", "--ddim_num_inference_steps", "4", "--speed_batch_sizes", "0", "--recovery", "none"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_half_the_macs_of_a_trained_latent_model(kind: str, tmp_path: Path) -> None:
    """Even after six steps, samples resemble those of the dense model, since trained weights are kept."""
    output, cache = tmp_path / "run", tmp_path / "encoded"
    folders = ("--encoding_cache_dir", cache, "--output_dir", output)
    done = run_script("training/prune_ddpm.py", "--recipe", f"digits_{kind}", *SHORT, *folders)
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    dense, pruned = results["dense"], results["pruned"]
    assert pruned["macs"] / dense["macs"] == pytest.approx(0.5, abs=0.01)
    assert 0.3 < pruned["quality"]["ssim_to_dense"] < 1
    pipeline = DiffusionPipeline.from_pretrained(output)
    assert type(pipeline) is KINDS[kind]
