"""A resumed pruner is bit-identical to an uninterrupted one; damaged state is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_gfprune import GradientFlowPruner
from diffusers_gfprune.pruning.masking import dense_parameters
from diffusers_gfprune.pruning.pruner_state import MaskPath, plan_settings
from helpers.architectures import build
from helpers.pruners import SCHEDULER, batches, config, run

TO_Q = "mid_block.attentions.0.to_q"


def move_weights(pruner: GradientFlowPruner, step: int) -> None:
    """Stands for a training step: weights are a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    for parameter in dense_parameters(pruner.unet).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def written(state: dict, folder: Path) -> dict:
    """The state as files give it back."""
    save_file(state["tensors"], folder / "pruner.safetensors")
    (folder / "pruner.json").write_text(json.dumps(state["values"]))
    return {"tensors": load_file(folder / "pruner.safetensors"), "values": json.loads((folder / "pruner.json").read_text())}


def everything(pruner: GradientFlowPruner) -> tuple:
    """What a pruner has done so far, as values that can be compared."""
    scores = pruner.scores and {name: values.tolist() for name, values in pruner.scores.items()}
    masks, kept = ({name: values.tolist() for name, values in d.items()} for d in (pruner.masks, pruner.kept))
    return masks, kept, scores, list(pruner.history), pruner.finished


def step(pruner: GradientFlowPruner, number: int) -> tuple:
    """One step of a run, and what came of it."""
    move_weights(pruner, number)
    pruner.step(number, batches())
    return everything(pruner)


@pytest.fixture(scope="module")
def twins() -> tuple[GradientFlowPruner, GradientFlowPruner]:
    """Two pruners of equal models; tests copy the state of the first, or load over that of the second."""
    return tuple(GradientFlowPruner(build("fine-units"), config(), SCHEDULER) for _ in range(2))


def fresh(pruner: GradientFlowPruner, **options) -> GradientFlowPruner:
    """A pruner before its first step, with other options of schedule and scores: a copy, since tracing takes its time."""
    found = copy.deepcopy(pruner, {id(group): group for group in pruner.groups})
    found.config = config(**options)
    found.schedule = found.config.schedule()
    return found


# --- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("interpolate", [False, True], ids=["jumps", "interpolated"])
def test_going_on_from_any_step(twins: tuple, tmp_path: Path, interpolate: bool):
    """Between rankings, on the step of one, in either phase, at the last step and after it: all masks to come are the same."""
    whole, resumed = (fresh(pruner, interpolate_masks=interpolate) for pruner in twins)
    states, life = [written(whole.state_dict(), tmp_path)], []
    for number in range(22):
        life.append(step(whole, number))
        states.append(written(whole.state_dict(), tmp_path))
    assert whole.finished and len(whole.history) >= 7
    values = {value for masks, *_ in life for mask in masks.values() for value in mask}
    assert len(values) > (10 if interpolate else 4)
    for first, state in enumerate(states):
        resumed.load_state_dict(state)  # over what the last round left
        assert everything(resumed)[0] == (life[first - 1][0] if first > 0 else everything(twins[0])[0])
        for number in range(first, 22):
            assert step(resumed, number) == life[number], (first, number)


def test_going_on_with_scores_by_gradients(twins: tuple, tmp_path: Path):
    """Averaged scores are part of the state: without them, the next ranking would forget all earlier ones."""
    whole, resumed = (fresh(pruner, criterion="gradient-flow") for pruner in twins)
    for number in (0, 1, 2):
        step(whole, number)
    state = written(whole.state_dict(), tmp_path)
    resumed.load_state_dict(state)
    assert [step(resumed, number) for number in (3, 4)] == [step(whole, number) for number in (3, 4)]
    forgetful = fresh(twins[1], criterion="gradient-flow")
    forgetful.load_state_dict(state)
    forgetful.ranking.scores = None
    step(forgetful, 3)
    assert not torch.equal(forgetful.scores["conv_in"], whole.scores["conv_in"])


def test_the_state_does_not_follow_the_pruner(twins: tuple):
    """Saved before the next step, written down after it."""
    pruner = fresh(twins[0])
    step(pruner, 0)
    state = pruner.state_dict()
    before = copy.deepcopy(state)
    for number in range(1, 21):
        step(pruner, number)
    assert state["values"] == before["values"]
    assert all(torch.equal(tensor, before["tensors"][name]) for name, tensor in state["tensors"].items())


def test_loaded_tensors_are_copies(twins: tuple):
    """Tensors read from a file may be modified afterwards."""
    whole, resumed = fresh(twins[0]), fresh(twins[1])
    step(whole, 0)
    state = whole.state_dict()
    resumed.load_state_dict(state)
    for tensor in state["tensors"].values():
        tensor.zero_()
    assert everything(resumed) == everything(whole)


def test_masks_set_by_hand_go_on(twins: tuple, tmp_path: Path):
    """They may leave other units than the last ranking did, or none at exactly 1."""
    whole, resumed = fresh(twins[0]), fresh(twins[1])
    for number in range(12):
        step(whole, number)
    whole.set_masks({"conv_in": torch.full((32,), 0.3), TO_Q: torch.ones(32)})
    resumed.load_state_dict(written(whole.state_dict(), tmp_path))
    assert everything(resumed) == everything(whole)
    assert [step(resumed, number) for number in range(12, 21)] == [step(whole, number) for number in range(12, 21)]


def test_names_are_as_documented(twins: tuple):
    """Checkpoints outlive versions of this code."""
    pruner = fresh(twins[0])
    names = {group.name for group in pruner.groups}
    first = pruner.state_dict()
    assert set(first["tensors"]) == {f"{family}/{name}" for family in ("masks", "kept") for name in names}
    assert first["values"] == {
        "groups": {group.name: group.num_units for group in pruner.groups},
        "path": None,
        "history": [],
        "finished": False,
        "by_hand": False,
        "latency": None,
        "curves": None,
        "plan": plan_settings(pruner.config),
        "planned_for": "cpu",
    }
    update = step(pruner, 0) and pruner.history[0]
    later = pruner.state_dict()
    families = ("masks", "kept", "scores", "path_start", "path_goal")
    assert set(later["tensors"]) == {f"{family}/{name}" for family in families for name in names}
    assert later["values"]["path"] == {"start_step": 0, "goal_step": 3}
    assert later["values"]["history"] == [update.to_dict()]


# --- after compaction --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(twins: tuple) -> GradientFlowPruner:
    """A pruner at the end of its schedule."""
    pruner = fresh(twins[0])
    for number in range(21):
        step(pruner, number)
    return pruner


def test_resuming_after_compaction(twins: tuple, finished: GradientFlowPruner, tmp_path: Path):
    """The dense model, masked, gives the small model that the checkpoint's weights fit into."""
    small = finished.compact()
    resumed = fresh(twins[1])
    resumed.load_state_dict(written(finished.state_dict(), tmp_path))
    assert everything(resumed) == everything(finished)
    again = resumed.compact()
    assert again.config == small.config
    again.load_state_dict(small.state_dict())
    assert torch.equal(run(again), run(small))
    assert resumed.step(21, pytest.fail) is None


def test_state_without_a_masked_model(finished: GradientFlowPruner, tmp_path: Path):
    """After detach, masks are known still: from a checkpoint, for reports, and for another one; the model stays dense."""
    pruner = GradientFlowPruner(build("fine-units"), config(), SCHEDULER)
    masks, dense = pruner.masks, pruner.detach()
    assert {name: mask.tolist() for name, mask in pruner.masks.items()} == {n: m.tolist() for n, m in masks.items()}
    before = run(dense)
    state = written(finished.state_dict(), tmp_path)
    pruner.load_state_dict(state)
    assert everything(pruner) == everything(finished)
    assert torch.equal(run(dense), before) and not hasattr(dense, "channel_masks")
    assert pruner.compaction_plan().layer_channels == finished.compaction_plan().layer_channels
    again = pruner.state_dict()
    assert again["values"] == state["values"]
    assert all(torch.equal(again["tensors"][name], tensor) for name, tensor in state["tensors"].items())
    pruner.finished = False
    with pytest.raises(ValueError, match="the masks of the model were removed"):
        pruner.step(3, batches())
    with pytest.raises(ValueError, match="the masks of the model were removed"):
        pruner.set_masks({})


# --- refusals ----------------------------------------------------------------------------------------------------------


def tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict], None]:
    """Replace a tensor of the state, or remove it."""

    def apply(state: dict) -> None:
        found = change(state["tensors"].pop(name))
        if found is not None:
            state["tensors"][name] = found

    return apply


def value(change: Callable[[dict], object]) -> Callable[[dict], None]:
    """Change the values of the state in place."""
    return lambda state: change(state["values"])


DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "a mask is missing": (tensor("masks/conv_in", lambda t: None), "has no masks/conv_in"),
    "scores are missing": (tensor("scores/conv_in", lambda t: None), "has no scores/conv_in"),
    "a path is missing": (tensor("path_goal/conv_in", lambda t: None), "has no path_goal/conv_in"),
    "one too many": (lambda s: s["tensors"].update(other=torch.ones(1)), "1 unexpected tensors, such as other"),
    "path is not expected": (value(lambda v: v.update(path=None)), "unexpected tensors"),
    "shape": (tensor("masks/conv_in", lambda t: t[:-1]), r"masks/conv_in .* shape \(7,\), not .*\(8,\)"),
    "dtype": (tensor("kept/conv_in", lambda t: t.float()), "kept/conv_in .* is torch.float32.* not torch.bool"),
    "NaN": (tensor("masks/conv_in", lambda t: t * float("nan")), "masks/conv_in .* NaN or infinity"),
    "NaN in scores": (tensor("scores/conv_in", lambda t: t / 0), "scores/conv_in .* NaN or infinity"),
    "above one": (tensor("masks/conv_in", lambda t: t * 2), r"masks/conv_in .* outside \[0, 1\]"),
    "below zero": (tensor("path_start/conv_in", lambda t: t - 1.5), r"path_start/conv_in .* outside \[0, 1\]"),
    "no channel left": (tensor("path_goal/conv_in", lambda t: t * 0), "leaves none of its 32 channels"),
    "kept without a mask": (tensor("kept/conv_in", lambda t: ~t), "kept/conv_in .* does not match its masks"),
    "count": (value(lambda v: v["history"][-1].update(kept_units=3)), "keeps .* units, but its history has 3"),
    "no values": (lambda s: s.pop("values"), "incomplete or malformed: KeyError"),
    "no history": (value(lambda v: v.pop("history")), "incomplete or malformed: KeyError"),
    "history of another version": (value(lambda v: v["history"][-1].update(flops=1)), "incomplete or malformed"),
    "order of history": (value(lambda v: v["history"].reverse()), "history .* in the order of their steps"),
    "history of words": (value(lambda v: v["history"][-1].update(sparsity="half")), "history .* must be mask updates"),
    "phase": (value(lambda v: v["history"][-1].update(phase="late")), "history .* must be mask updates"),
    "path backwards": (value(lambda v: v["path"].update(goal_step=1)), "path=.* 0 <= start_step < goal_step"),
    "path of words": (value(lambda v: v.update(path="there")), "path=there"),
    "another group": (value(lambda v: v["groups"].update(other=3)), "only the state has channel group other"),
    "one group less": (value(lambda v: v["groups"].pop("conv_in")), "only the model has channel group conv_in"),
    "another width": (value(lambda v: v["groups"].update(conv_in=4)), "conv_in has 4 units, not 8"),
}


@pytest.mark.fast_variants(8)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state_is_refused(twins: tuple, damage: str):
    """Before anything is changed."""
    whole, resumed = fresh(twins[0]), fresh(twins[1])
    for number in range(5):
        step(whole, number)
    state = whole.state_dict()
    change, expected = DAMAGE[damage]
    change(state)
    before = everything(resumed)
    with pytest.raises(ValueError, match=expected):
        resumed.load_state_dict(state)
    assert everything(resumed) == before


def test_state_of_another_architecture_is_refused(twins: tuple):
    """By the first group that differs."""
    other = GradientFlowPruner(build("two-layers"), config(), SCHEDULER)
    with pytest.raises(ValueError, match="belongs to another model: conv_in has 0 units, not 8"):
        twins[0].load_state_dict(other.state_dict())


# --- paths -------------------------------------------------------------------------------------------------------------


def test_a_path_ends_exactly_at_its_goal():
    """Zeros and ones, not what arithmetic makes of them."""
    path = MaskPath(3, 10, {"a": torch.tensor([1.0, 0.7])}, {"a": torch.tensor([0.0, 1.0])})
    assert path.at(3)["a"].tolist() == pytest.approx([1.0, 0.7])
    assert path.at(5)["a"].tolist() == pytest.approx([5 / 7, 0.7 + 0.3 * 2 / 7])
    assert path.at(10)["a"].tolist() == path.at(99)["a"].tolist() == [0.0, 1.0]
