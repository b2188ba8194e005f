"""training/safeguards.py: non-finite values, divergence and lost workers end in one line with the remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusers_gfprune.pruning.schedules import PruningSchedule
from diffusers_gfprune.training import safeguards
from diffusers_gfprune.training.checkpointing import Checkpoints
from diffusers_gfprune.training.state import Curves

ROOT = Path(__file__).resolve().parents[2]


def make_run(folder: Path, *checkpoints: int) -> SimpleNamespace:
    """As much of a run as is looked at, with checkpoints of some steps."""
    found = Checkpoints(folder / "run.training")
    for step in checkpoints:
        found.save(step, {}, {}, {}, {})
    args = SimpleNamespace(
        training=SimpleNamespace(learning_rate=0.1), model=SimpleNamespace(pretrained_model_name_or_path="model")
    )
    return SimpleNamespace(accelerator=Accelerator(), args=args, checkpoints=found)


def make_state(step: int, recent=(), points=()) -> SimpleNamespace:
    curves = Curves(train_steps=[s for s, _ in points], train_loss=[loss for _, loss in points])
    pruner = SimpleNamespace(schedule=PruningSchedule(10, 20, 5))
    return SimpleNamespace(step=step, recent=list(recent), curves=curves, pruner=pruner)


def test_mean_of_recent_losses(tmp_path: Path) -> None:
    state = make_state(12, [torch.tensor(0.25), 0.5, torch.tensor(0.75)])
    assert safeguards.mean_recent_loss(make_run(tmp_path), state) == 0.5
    assert state.recent == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_the_first_loss_that_is_not_finite_is_named(tmp_path: Path, loss: float) -> None:
    """With the newest checkpoint from before it: that of step 12 holds the weights that gave it."""
    state = make_state(14, [0.1, 0.1, loss, float("nan")])  # of steps 10, 11, 12, 13
    with pytest.raises(
        ValueError,
        match=rf"the loss is {loss} at step 12 \(hard pruning\): lower learning_rate=0.1, .*model; "
        r"the last good checkpoint is .*checkpoint-11 \(--resume_from_checkpoint checkpoint-11\)",
    ):
        safeguards.mean_recent_loss(make_run(tmp_path, 5, 11, 12), state)


def test_a_loss_over_that_of_predicting_nothing_for_long_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, 40, 150)
    points = [(s, 0.1 if s <= 100 else 1.5) for s in range(10, 201, 10)]
    with pytest.raises(ValueError, match=r"was over 1, .* from step 100 to step 200: lower learning_rate=0.1.*checkpoint-40 "):
        safeguards.check_divergence(run, make_state(200, points=points))
    safeguards.check_divergence(run, make_state(190, points=points[:-1]))  # not for long enough
    recovered = [*points[:-1], (200, 0.9)]
    safeguards.check_divergence(run, make_state(200, points=recovered))
    safeguards.check_divergence(run, make_state(50, points=[(s, 1.5) for s in range(10, 51, 10)]))


def test_the_death_of_a_loading_process_is_explained(tmp_path: Path) -> None:
    run, state = make_run(tmp_path, 7), make_state(7)
    with pytest.raises(
        ValueError,
        match=r"loading images failed because a loading process died: DataLoader worker \(pid 5\) is killed.*checkpoint-7 ",
    ):
        with safeguards.explained_worker_death(run, state):
            raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="something else"), safeguards.explained_worker_death(run, state):
        raise RuntimeError("something else")
