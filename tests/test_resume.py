"""Runs that go on from a checkpoint end where an uninterrupted run ends, bit for bit, in every phase."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from resume_helpers import (
    STEPS,
    TEACHER,
    assert_same_result,
    assert_same_state,
    checkpoints_kept,
    last_checkpoint,
    place,
    run_here,
)

# What else a run can be made of, all at once
VARIANT = [
    *("--gradient_accumulation_steps", 2, "--distillation_weight", 0.5),
    *("--feature_distillation_weight", 0.1, "--gradient_checkpointing", "--mixed_precision", "bf16", "--use_8bit_adam"),
    *("--dataloader_num_workers", 1, "--random_flip", "--streaming", "--shuffle_buffer_size", 50),
]


def uninterrupted(folder: Path, *arguments: object) -> tuple[Path, Path]:
    """A finished run, and the checkpoints of all its steps."""
    with checkpoints_kept(folder / "kept") as kept:
        run_here(folder / "run", "--checkpoints_total_limit", 0, *arguments)
    return folder / "run", kept


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return uninterrupted(tmp_path_factory.mktemp("reference"))


def test_a_finished_run_leaves_no_checkpoints(reference: tuple[Path, Path]) -> None:
    run, kept = reference
    assert [path.name for path in run.parent.iterdir()].count("run.training") == 0
    assert {path.name for path in kept.iterdir()} == {f"checkpoint-{step}" for step in range(1, STEPS + 1)}


# In the soft phase, on the step of a ranking and between rankings; at N; in the hard phase, on the step of a ranking; right
# before compaction at M and right after it; with nothing but the results left to do
@pytest.mark.parametrize("step", [2, 3, 6, 8, 12, 13, STEPS])
def test_going_on_ends_in_the_same_state(reference: tuple[Path, Path], tmp_path: Path, step: int) -> None:
    run, kept = reference
    place(kept, tmp_path / "run", step)
    with checkpoints_kept(tmp_path / "kept") as again:
        run_here(tmp_path / "run", "--checkpoints_total_limit", 0, "--resume_from_checkpoint", "latest")
    assert_same_state(last_checkpoint(kept), last_checkpoint(again))
    assert_same_result(run, tmp_path / "run")


def test_checkpoints_change_nothing(reference: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = reference
    run_here(tmp_path / "run", "--checkpointing_steps", 0)
    assert_same_result(run, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_every_option_goes_on_exactly(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    _, kept = uninterrupted(tmp_path, *VARIANT)
    place(kept, tmp_path / "again", 5)
    with checkpoints_kept(tmp_path / "kept-again") as again:
        run_here(tmp_path / "again", *VARIANT, "--resume_from_checkpoint", "checkpoint-5")
    assert_same_state(last_checkpoint(kept), last_checkpoint(again))


def test_a_truncated_checkpoint_is_said_and_the_one_before_taken(
    reference: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, kept = reference
    place(kept, tmp_path / "run", 15)
    damaged = tmp_path / "run.training/checkpoint-15/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:10_000])
    run_here(tmp_path / "run", "--resume_from_checkpoint", "latest")
    printed = capsys.readouterr()
    assert "checkpoint-15/optimizer.safetensors has 10000 bytes, not" in printed.err
    assert "going on from checkpoint-14" in printed.out
    assert_same_result(run, tmp_path / "run")


def test_latest_starts_from_the_beginning_where_there_is_none(
    reference: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, _ = reference
    run_here(tmp_path / "run", "--resume_from_checkpoint", "latest")
    assert "starting from the beginning" in capsys.readouterr().out
    assert_same_result(run, tmp_path / "run")


OTHER_RUNS = {
    "seed": (["--seed", 1], "seed was 0, is 1"),
    "budget": (["--ratio", 0.3, "--target", "params"], "ratio was 0.5, is 0.3; target was macs, is params"),
    "schedule": (["--hard_fraction", 0.4], "hard_fraction was 0.5, is 0.4"),
    "average": (["--use_ema", "false"], "use_ema was True, is False"),
    "steps": (["--max_train_steps", 48], "max_train_steps was 24, is 48"),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(reference: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    arguments, message = OTHER_RUNS[name]
    place(reference[1], tmp_path / "run", 5)
    with pytest.raises(ValueError, match=f"checkpoint-5 is a checkpoint of another run: {message}"):
        run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"run.training"}


def test_a_checkpoint_of_another_model_is_refused(reference: tuple[Path, Path], tmp_path: Path) -> None:
    place(reference[1], tmp_path / "run", 5)
    shutil.copytree(TEACHER, tmp_path / "model")
    path = tmp_path / "model/unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"another run: unet.norm_eps was 1e-\d+, is 0.001$"):
        run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", "--pretrained_model_name_or_path", tmp_path / "model")


def test_changed_settings_are_listed(reference: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place(reference[1], tmp_path / "run", 20)
    run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", "--learning_rate", 1e-3, "--distillation_weight", 0.25)
    listed = [line for line in capsys.readouterr().err.splitlines() if "going on with another setting" in line]
    assert len(listed) == 2
    assert any(line.endswith("learning_rate was 0.0002, is 0.001") for line in listed)
    assert any("distillation_weight was" in line and line.endswith("is 0.25") for line in listed)


def test_checkpoints_of_a_run_that_did_not_end_are_not_overwritten(reference: tuple[Path, Path], tmp_path: Path) -> None:
    place(reference[1], tmp_path / "run", 3)
    with pytest.raises(ValueError, match="holds checkpoints of a run that did not end: go on with --resume_from_checkpoint"):
        run_here(tmp_path / "run")
    assert len(list((tmp_path / "run.training").glob("checkpoint-*"))) == 3


def test_nan_stops_before_the_last_good_checkpoint_is_overwritten(reference: tuple[Path, Path], tmp_path: Path) -> None:
    place(reference[1], tmp_path / "run", 13)
    diverging = ("--learning_rate", 1e30, "--max_grad_norm", 1e30)
    with pytest.raises(
        ValueError, match=r"the l.*lower learning_rate=1e\+30.*; the last good checkpoint is .*checkpoint-1\d "
    ):
        run_here(tmp_path / "run", "--resume_from_checkpoint", "latest", *diverging)
    assert (tmp_path / "run.training/checkpoint-13").is_dir()
    run_here(tmp_path / "run", "--resume_from_checkpoint", "checkpoint-13")
    assert_same_result(reference[0], tmp_path / "run")
