"""Runs that resume from a checkpoint are bit-identical to uninterrupted runs, in every phase."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffusers_gfprune.training import timestep_density
from helpers.resume import (
    STEPS,
    TEACHER,
    assert_same_result,
    assert_same_state,
    checkpoints_kept,
    last_checkpoint,
    place,
    run_here,
    uninterrupted,
)

# What else a run can be made of, all at once
VARIANT = [
    *("--gradient_accumulation_steps", 2, "--distillation_weight", 0.5),
    *("--feature_distillation_weight", 0.1, "--gradient_checkpointing", "--mixed_precision", "bf16", "--use_8bit_adam"),
    *("--dataloader_num_workers", 1, "--random_flip", "--streaming", "--shuffle_buffer_size", 50),
]


def test_a_finished_run_leaves_no_checkpoints(whole_run: tuple[Path, Path]) -> None:
    run, kept = whole_run
    assert [path.name for path in run.parent.iterdir()].count("run.training") == 0
    assert {path.name for path in kept.iterdir()} == {f"checkpoint-{step}" for step in range(1, STEPS + 1)}


# In the soft phase, on the step of a ranking and between rankings; at N; in the hard phase, on the step of a ranking; right
# before compaction at M and right after it; with nothing but the results left to do
@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 4, 8)), 6, 9, STEPS])
def test_going_on_ends_in_the_same_state(whole_run: tuple[Path, Path], tmp_path: Path, step: int) -> None:
    run, kept = whole_run
    place(kept, tmp_path / "run", step)
    with checkpoints_kept(tmp_path / "kept") as again:
        run_here(tmp_path / "run", "--checkpointing_steps", STEPS, "--resume_from_checkpoint", "latest")
    assert_same_state(last_checkpoint(kept), last_checkpoint(again))
    assert_same_result(run, tmp_path / "run")


def test_the_density_of_timesteps_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle of an interval between two changes; runs of other tests end before its first change."""
    monkeypatch.setattr(timestep_density, "PARTS", 4)
    monkeypatch.setattr(timestep_density, "UPDATE_STEPS", 2)
    words = ("--preset", "one-shot", "--criterion", "random", "--max_train_steps", 6)
    _, kept = uninterrupted(tmp_path, *words)
    place(kept, tmp_path / "again", 3)
    with checkpoints_kept(tmp_path / "kept-again") as again:
        run_here(tmp_path / "again", *words, "--resume_from_checkpoint", "latest")
    states = [last_checkpoint(folder).values["timestep_density"] for folder in (kept, again)]
    assert states[0] == states[1] and all(len(set(totals)) > 2 for totals in states[0]["totals"])
    assert_same_state(last_checkpoint(kept), last_checkpoint(again))


@pytest.mark.slow
def test_every_option_goes_on_exactly(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    few = ("--max_train_steps", 8)  # the soft phase ends at 2, the hard one at 4
    _, kept = uninterrupted(tmp_path, *VARIANT, *few)
    place(kept, tmp_path / "again", 1)
    with checkpoints_kept(tmp_path / "kept-again") as again:
        run_here(tmp_path / "again", *VARIANT, *few, "--resume_from_checkpoint", "checkpoint-1")
    assert_same_state(last_checkpoint(kept), last_checkpoint(again))


def test_a_truncated_checkpoint_is_said_and_the_one_before_taken(
    whole_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, kept = whole_run
    place(kept, tmp_path / "run", 12)
    damaged = tmp_path / "run.training/checkpoint-12/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:10_000])
    run_here(tmp_path / "run", "--resume_from_checkpoint", "latest")
    printed = capsys.readouterr()
    assert "checkpoint-12/optimizer.safetensors has 10000 bytes, not" in printed.err
    assert "resuming from checkpoint-11" in printed.out
    assert_same_result(run, tmp_path / "run")


@pytest.mark.slow
def test_latest_starts_from_the_beginning_and_checkpoints_change_nothing(
    whole_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And leaves none, without which a run is the same."""
    run, _ = whole_run
    run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", "--checkpointing_steps", 0)
    assert "starting from the beginning" in capsys.readouterr().out
    assert_same_result(run, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


OTHER_RUNS = {
    "seed": (["--seed", 1], "seed was 0, is 1"),
    "budget": (["--ratio", 0.3, "--target", "params"], "ratio was 0.5, is 0.3; target was macs, is params"),
    "schedule": (["--hard_fraction", 0.4], "hard_fraction was 0.5, is 0.4"),
    "average": (["--use_ema", "false"], "use_ema was True, is False"),
    "steps": (["--max_train_steps", 32], "max_train_steps was 16, is 32"),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(whole_run: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    arguments, message = OTHER_RUNS[name]
    place(whole_run[1], tmp_path / "run", 5)
    with pytest.raises(ValueError, match=f"checkpoint-5 is a checkpoint of another run: {message}"):
        run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"run.training"}


def test_a_checkpoint_of_another_model_is_refused(whole_run: tuple[Path, Path], tmp_path: Path) -> None:
    place(whole_run[1], tmp_path / "run", 5)
    shutil.copytree(TEACHER, tmp_path / "model")
    path = tmp_path / "model/unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"another run: unet.norm_eps was 1e-\d+, is 0.001$"):
        run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", "--pretrained_model_name_or_path", tmp_path / "model")


def test_a_checkpoint_of_another_noise_schedule_is_refused(whole_run: tuple[Path, Path], tmp_path: Path) -> None:
    place(whole_run[1], tmp_path / "run", 5)
    shutil.copytree(TEACHER, tmp_path / "model")
    path = tmp_path / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match=r"another run: scheduler.prediction_type was epsilon, is v_prediction$"):
        run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", "--pretrained_model_name_or_path", tmp_path / "model")


def test_changed_settings_are_listed(whole_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place(whole_run[1], tmp_path / "run", 14)
    run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", "--learning_rate", 1e-3, "--distillation_weight", 0.25)
    listed = [line for line in capsys.readouterr().err.splitlines() if "resuming with a changed setting" in line]
    assert len(listed) == 2
    assert any(line.endswith("learning_rate was 0.0002, is 0.001") for line in listed)
    assert any("distillation_weight was" in line and line.endswith("is 0.25") for line in listed)


def test_checkpoints_of_a_run_that_did_not_end_are_not_overwritten(whole_run: tuple[Path, Path], tmp_path: Path) -> None:
    place(whole_run[1], tmp_path / "run", 3)
    with pytest.raises(ValueError, match="contains checkpoints of an unfinished run: resume with --resume_from_checkpoint"):
        run_here(tmp_path / "run")
    assert len(list((tmp_path / "run.training").glob("checkpoint-*"))) == 3


@pytest.mark.slow
def test_nan_stops_before_the_last_good_checkpoint_is_overwritten(whole_run: tuple[Path, Path], tmp_path: Path) -> None:
    place(whole_run[1], tmp_path / "run", 9)
    diverging = ("--learning_rate", 1e30, "--max_grad_norm", 1e30)
    with pytest.raises(
        ValueError, match=r"the l.*lower learning_rate=1e\+30.*; the last good checkpoint is .*checkpoint-(9|1\d) "
    ):
        run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", *diverging)
    assert (tmp_path / "run.training/checkpoint-9").is_dir()
    run_here(tmp_path / "run", "--resume_from_checkpoint", "checkpoint-9")
    assert_same_result(whole_run[0], tmp_path / "run")
