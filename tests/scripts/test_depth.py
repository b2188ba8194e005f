"""training/prune_ddpm.py --depth: the plan, a run to its card, and a run that goes on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from helpers.resume import (
    assert_same_result,
    assert_same_state,
    checkpoints_kept,
    last_checkpoint,
    place,
    run_here,
    uninterrupted,
)
from helpers.scripts import ROOT, SHORT, run_script

DIGITS = [
    *("--pretrained_model_name_or_path", ROOT / "training/digits/teacher", "--dataset_name", "training/digits"),
    *("--eval_images", 0, "--speed_batch_sizes", 0),
]


@pytest.mark.slow
def test_a_run_that_removes_blocks_only(tmp_path: Path) -> None:
    """Plan, results, report and card name the same blocks; the distance to block outputs of the teacher copes with them."""
    output = tmp_path / "run"
    words = ("--depth", "only", "--ratio", 0.3, "--feature_distillation_weight", 0.1, "--output_dir", output)
    run = run_script("training/prune_ddpm.py", *SHORT, *DIGITS, *words)
    assert run.returncode == 0, run.stderr
    assert "removable block" in run.stdout and "(depth=only)" in run.stdout
    results, report, config = (
        json.loads((output / name).read_text()) for name in ("results.json", "pruning_report.json", "unet/config.json")
    )
    removed = report["removed_blocks"]
    assert removed == config["removed_blocks"] != []
    assert config["layer_channels"] == {}
    assert results["pruned"]["macs"] / results["dense"]["macs"] == pytest.approx(0.7, abs=0.01)
    masked, compacted = (report["curves"]["compaction"][f"step_loss_{name}"] for name in ("masked", "compacted"))
    assert compacted == pytest.approx(masked, rel=1e-4)
    for group in report["channel_groups"]:
        inside = any(group["name"].startswith((f"{name}.conv1", f"{name}.to_")) for name in removed)
        assert group["kept_channels"] == (0 if inside else group["dense_channels"]), group
    kept = sum(group["kept_channels"] for group in report["channel_groups"])
    assert report["mask_updates"][-1]["kept_channels"] == kept
    card = (output / "README.md").read_text()
    assert "residual blocks are removed" in card and all(f"`{name}`" in card for name in removed)
    pipe = DiffusionPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (1, 8, 8, 1)


def test_the_plan_lists_blocks(tmp_path: Path) -> None:
    words = ("--depth", "allow", "--dry_run", "--output_dir", tmp_path / "run")
    run = run_script("training/prune_ddpm.py", *SHORT, *DIGITS, *words)
    assert run.returncode == 0, run.stderr
    assert "11 removable blocks" in run.stdout and "mid_block.attentions.0 " in run.stdout
    assert "ranking=sensitivity will choose other widths and blocks, by scores" in run.stdout


@pytest.mark.slow
def test_going_on_with_blocks_ends_in_the_same_state(tmp_path: Path) -> None:
    """From the soft phase, and from after compaction."""
    words = ("--depth", "only", "--ratio", 0.3)
    run, kept = uninterrupted(tmp_path, *words)
    for step in (3, 9):
        place(kept, tmp_path / f"again-{step}", step)
        with checkpoints_kept(tmp_path / f"kept-{step}") as again:
            run_here(tmp_path / f"again-{step}", *words, "--resume_from_checkpoint", "latest")
        assert_same_state(last_checkpoint(kept), last_checkpoint(again))
        assert_same_result(run, tmp_path / f"again-{step}")
