"""training/safeguards.py: non-finite values, divergence and lost workers end in one line with the remedy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusers_gfprune.data.decoding import BrokenImages
from diffusers_gfprune.objectives.objective import ObjectiveArguments
from diffusers_gfprune.pruning.schedules import PruningSchedule
from diffusers_gfprune.training import safeguards
from diffusers_gfprune.training.checkpointing import Checkpoints
from diffusers_gfprune.training.state import Curves

ROOT = Path(__file__).resolve().parents[2]


def make_run(folder: Path, *checkpoints: int, target_square: float = 1.0, **weights: float) -> SimpleNamespace:
    """As much of a run as is looked at, with checkpoints of some steps, a process and weights of the loss."""
    found = Checkpoints(folder / "run.training")
    for step in checkpoints:
        found.save(step, {}, {}, {}, {})
    args = SimpleNamespace(
        training=SimpleNamespace(learning_rate=0.1),
        model=SimpleNamespace(pretrained_model_name_or_path="model"),
        objective=ObjectiveArguments(**weights),
    )
    pipeline = SimpleNamespace(process=SimpleNamespace(target_square=target_square))
    return SimpleNamespace(accelerator=Accelerator(), args=args, checkpoints=found, pipeline=pipeline)


def make_state(step: int, recent=(), points=()) -> SimpleNamespace:
    curves = Curves(train_steps=[s for s, _ in points], train_loss=[loss for _, loss in points])
    pruner = SimpleNamespace(schedule=PruningSchedule(10, 20, 5))
    return SimpleNamespace(step=step, recent=list(recent), curves=curves, pruner=pruner, broken=BrokenImages(1))


def test_broken_images_of_all_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process reads its own; the limit is that of the run, and so is the list of a checkpoint."""
    others = ["a", "c"]
    monkeypatch.setattr(safeguards, "gather_object", lambda names: [*names, *others])
    broken = BrokenImages(3, ["a", "b"])
    safeguards.share_broken_images(SimpleNamespace(num_processes=1), broken)
    assert broken.to_list() == ["a", "b"]
    safeguards.share_broken_images(SimpleNamespace(num_processes=2), broken)
    assert broken.to_list() == ["a", "b", "c"]
    others += ["d"]
    with pytest.raises(ValueError, match="max_broken_images=3 is exceeded: 4 images"):
        safeguards.share_broken_images(SimpleNamespace(num_processes=2), broken)


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


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 1),
        ({"target_square": 2.0}, 2),  # flow matching
        ({"feature_distillation_weight": 3.0}, 4),
        ({"sensitivity_matching_weight": 0.1}, None),
    ],
)
def test_what_predicting_nothing_costs_depends_on_the_loss(tmp_path: Path, options: dict, limit: float | None) -> None:
    """Terms beside the prediction add to it; those without a scale switch the check off."""
    run = make_run(tmp_path, **options)
    for loss in ((limit or 1e9) - 0.1, (limit or 1e9) + 0.1):
        state = make_state(200, points=[(s, loss) for s in range(10, 201, 10)])
        if limit is not None and loss > limit:
            with pytest.raises(ValueError, match=f"the training loss was over {limit}, the loss of predicting zero"):
                safeguards.check_divergence(run, state)
        else:
            safeguards.check_divergence(run, state)


def test_losses_since_the_last_point_make_one(tmp_path: Path) -> None:
    state = make_state(12, [0.25, torch.tensor(0.75)], [(10, 0.1)])
    assert safeguards.record_loss(make_run(tmp_path), state) == 0.5
    assert (state.curves.train_steps, state.curves.train_loss, state.recent) == ([10, 12], [0.1, 0.5], [])


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    state = make_state(12)
    state.unet = torch.nn.Linear(2, 2)
    safeguards.check_weights(make_run(tmp_path / "fine"), state)
    state.unet.weight.data[0, 1] = torch.inf
    with pytest.raises(ValueError, match="weights are not finite after step 12: lower learning_rate=0.1; .*checkpoint-8 "):
        safeguards.check_weights(make_run(tmp_path, 8), state)


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


def test_settings_that_an_older_checkpoint_does_not_have_are_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {}, {"learning_rate": 0.1, "ratio": 0.5}, {}, {})
    now = {"learning_rate": 0.2, "ratio": 0.5, "eval_images": 1000}
    monkeypatch.setattr(safeguards, "run_settings", lambda args, accelerator: now)
    args = SimpleNamespace(checkpoints=SimpleNamespace(resume_from_checkpoint="latest"))
    assert safeguards.find_checkpoint(args, Accelerator(), checkpoints, {}).step == 3
    said = capsys.readouterr().err
    assert "changed setting: learning_rate was 0.1, is 0.2" in said and said.count("changed setting") == 1


def test_the_noise_schedule_of_an_older_checkpoint_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safeguards, "run_settings", lambda args, accelerator: {})
    args = SimpleNamespace(checkpoints=SimpleNamespace(resume_from_checkpoint="latest"))
    checkpoints, now = Checkpoints(tmp_path), {"seed": 0, "scheduler.beta_end": 0.02}
    checkpoints.save(3, {"seed": 0}, {}, {}, {})
    assert safeguards.find_checkpoint(args, Accelerator(), checkpoints, now).step == 3
    checkpoints.save(4, {"seed": 0, "scheduler.beta_end": 0.01}, {}, {}, {})
    with pytest.raises(ValueError, match=r"another run: scheduler.beta_end was 0.01, is 0.02$"):
        safeguards.find_checkpoint(args, Accelerator(), checkpoints, now)
