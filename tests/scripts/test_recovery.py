"""Recovery in runs of `prune_ddpm.py`: what it does to the loss, and that a resumed run does the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusers_gfprune.scripts import prune_ddpm
from diffusers_gfprune.training.recovery import plan_changes
from helpers.resume import (
    assert_same_result,
    assert_same_state,
    checkpoints_kept,
    last_checkpoint,
    place,
    run_here,
    uninterrupted,
)


@pytest.fixture(autouse=True)
def little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of 256 images, and of 8,192 rows of a layer or four for each of its features."""
    monkeypatch.setattr("diffusers_gfprune.training.recovery.SAMPLES", 32)
    monkeypatch.setattr("diffusers_gfprune.training.recovery.ROWS", 1024)
    monkeypatch.setattr("diffusers_gfprune.pruning.recovery.ROWS_PER_FEATURE", 2)


def report(folder: Path) -> dict:
    """What a run says of its pruning."""
    return json.loads((folder / "pruning_report.json").read_text())


def compaction(folder: Path) -> dict[str, float]:
    """Step losses at compaction."""
    return report(folder)["curves"]["compaction"]


@pytest.mark.slow
def test_one_shot_starts_from_a_mended_model(tmp_path: Path) -> None:
    """Before any training, on held-out images; compaction itself changes nothing."""
    words = ("--preset", "one-shot", "--max_train_steps", 1, "--train_batch_size", 32, "--checkpointing_steps", 0)
    for recovery in ("none", "rankings"):
        run_here(tmp_path / recovery, *words, "--recovery", recovery, "--ratio", 0.3)
    plain, mended = compaction(tmp_path / "none"), compaction(tmp_path / "rankings")
    assert plain["step"] == mended["step"] == 0
    assert mended["step_loss_masked"] < 0.8 * plain["step_loss_masked"]
    assert mended["step_loss_compacted"] == pytest.approx(mended["step_loss_masked"], rel=1e-4)
    # The ranking is compared with magnitude from the same weights, and mended
    before, after = (report(tmp_path / name)["diagnostics"]["comparison"] for name in ("none", "rankings"))
    assert before["loss_dense"] == after["loss_dense"]
    assert all(after[name] < 0.8 * before[name] for name in ("loss_criterion", "loss_magnitude"))


@pytest.mark.slow
def test_criteria_without_batches_are_mended_too(tmp_path: Path) -> None:
    words = ("--preset", "one-shot", "--criterion", "magnitude", "--max_train_steps", 1, "--checkpointing_steps", 0)
    losses = []
    for recovery in ("none", "rankings"):
        run_here(tmp_path / recovery, *words, "--recovery", recovery)
        losses.append(compaction(tmp_path / recovery)["step_loss_masked"])
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.slow
def test_targets_of_recovery_at_rankings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the soft phase the dense model; in the hard phase the model with the masks that the last ranking led to.

    The teacher's blocks have hooks here, and so do copies of it.
    """
    calls = []

    def recorded(state, *args) -> None:
        calls.append((args[-1], {name: kept.bool().cpu() for name, kept in state.pruner.kept.items()}))
        plan_changes(state, *args)

    monkeypatch.setattr(prune_ddpm, "plan_changes", recorded)
    words = ("--recovery", "rankings", "--max_train_steps", 8, "--update_interval", 1, "--feature_distillation_weight", 0.03)
    run_here(tmp_path / "run", *words, "--checkpointing_steps", 0)
    before, kept = zip(*calls)
    phases = [update["phase"] for update in report(tmp_path / "run")["mask_updates"]]
    assert phases == ["soft", "soft", "hard"]
    assert [masks is None for masks in before] == [True, True, False]
    assert all(torch.equal(mask.cpu() == 1, kept[1][name]) for name, mask in before[2].items())


# When masks freeze, right before recovery; and between two rankings of the soft phase, where a part of the changes is made
RESUMED = {
    "compaction": (8, ("--recovery", "compaction")),
    "rankings": (1, ("--recovery", "rankings", "--max_train_steps", 8)),  # the soft phase ends at 2, the hard one at 4
    "bf16": (3, ("--recovery", "rankings", "--channels_last", "--mixed_precision", "bf16", "--distillation_weight", 0)),
}


@pytest.mark.parametrize(
    "name", ["rankings", *(pytest.param(name, marks=pytest.mark.slow) for name in ("compaction", "bf16"))]
)
def test_a_run_that_resumes_is_the_same(tmp_path: Path, name: str) -> None:
    step, words = RESUMED[name]
    words = (*words, "--checkpointing_steps", step)
    run, kept = uninterrupted(tmp_path, *words)
    place(kept, tmp_path / "again", step)
    assert (kept / f"checkpoint-{step}/recovery.safetensors").is_file() == (name != "compaction")
    with checkpoints_kept(tmp_path / "kept-again") as again:
        run_here(tmp_path / "again", *words, "--resume_from_checkpoint", "latest")
    assert ("step_loss_recovered" in compaction(run)) == (name == "compaction")
    assert_same_state(last_checkpoint(kept), last_checkpoint(again))
    assert_same_result(run, tmp_path / "again")
