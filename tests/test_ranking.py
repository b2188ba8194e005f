"""Rankings through the pruner: units chosen together meet the budget, stand once it is met, and survive a checkpoint."""

from __future__ import annotations

import pytest
import torch

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.one_shot import prune_unet
from diffusers_gfprune.scoring import importance, removals
from helpers.architectures import build
from helpers.pruners import SCHEDULER, batches, config, images, mask_values, one_shot

JOINT = {"criterion": "gradient-flow", "ranking": "joint"}


@pytest.mark.parametrize("target", ["macs", "params"])
@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_units_chosen_together_meet_the_budget(target: str, ratio: float) -> None:
    """Counted on the small model."""
    pruner = GradientFlowPruner(build("fine-units"), one_shot(target=target, ratio=ratio, **JOINT), SCHEDULER)
    update = pruner.step(0, batches())
    count = {"macs": count_macs, "params": count_parameters}[target]
    removed = 1 - count(pruner.compact()) / count(build("fine-units"))
    assert removed == pytest.approx(ratio, abs=0.01)
    assert update.sparsity == pytest.approx(removed, abs=1e-9)


def test_widths_stand_once_the_budget_is_met() -> None:
    pruner = GradientFlowPruner(build("fine-units"), config(ratio=0.5, revival_margin=0.0, **JOINT), SCHEDULER)
    widths, shares = [], []
    for step in range(21):
        if (update := pruner.step(step, batches())) is not None:
            widths.append(pruner.kept_channels().tolist())
            shares.append(update.sparsity)
    assert pruner.finished and mask_values(pruner) == [0.0, 1.0]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(0.5, abs=0.01)
    first = shares.index(shares[-1])
    assert 0 < first < len(shares) - 1 and all(now == widths[first] for now in widths[first:])


def test_a_run_continues_from_a_checkpoint_bit_for_bit() -> None:
    """Joint changes are part of the state until masks freeze; without them another choice would follow."""

    def pruner() -> GradientFlowPruner:
        return GradientFlowPruner(build("fine-units"), config(ratio=0.5, **JOINT), SCHEDULER)

    whole, first = pruner(), pruner()
    for step in range(21):
        whole.step(step, batches())
        if step < 8:
            first.step(step, batches())
    state = first.state_dict()
    assert any(name.startswith("changes/") for name in state["tensors"])
    resumed = pruner()
    resumed.load_state_dict(state)
    for step in range(8, 21):
        resumed.step(step, batches())
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    assert not any(name.startswith("changes/") for name in resumed.state_dict()["tensors"])
    without = {name: tensor for name, tensor in state["tensors"].items() if not name.startswith("changes/")}
    with pytest.raises(ValueError, match="must have joint changes for ranking=joint"):
        pruner().load_state_dict({**state, "tensors": without})


def test_the_first_choice_is_made_again_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    """With masks of 1/2 for the units that the first one removed, which are restored afterwards."""
    seen = []

    def spy(unet, *arguments):
        seen.append(torch.cat([mask.unique() for mask in unet.channel_masks.as_dict().values()]).unique().tolist())
        return importance.score_units_jointly(unet, *arguments)

    monkeypatch.setattr("diffusers_gfprune.ranking.score_units_jointly", spy)
    pruner = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.5, **JOINT), SCHEDULER)
    pruner.step(0, batches())
    assert seen == [[1.0], [0.5, 1.0]] and mask_values(pruner) == [0.0, 1.0]
    seen.clear()
    dense = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.5, score_at="dense", **JOINT), SCHEDULER)
    dense.step(0, batches())
    assert seen == [[1.0]]


@pytest.mark.parametrize("depth", ["none", "allow"])
def test_the_choice_with_the_least_measured_damage_is_kept(depth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the choices of the search, and that of widths by sensitivity."""
    measured: list[list[float]] = []

    def spy(*arguments) -> list[float]:
        damage = removals.removal_damage(*arguments)
        assert len(damage) == len(arguments[-1]) > 1
        measured.append(damage)
        chosen.append(arguments[-1][damage.index(min(damage))])
        return damage

    chosen: list[dict] = []
    monkeypatch.setattr("diffusers_gfprune.ranking.removal_damage", spy)
    pruner = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.4, depth=depth, **JOINT), SCHEDULER)
    pruner.step(0, batches())
    assert len(measured) == 1  # once, after the second scoring
    assert all(torch.equal(units, pruner.kept[name]) for name, units in chosen[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "magnitude", "ranking": "joint"}, "ranking=joint must have a criterion that measures joint changes"),
        ({**JOINT, "score_at": "masked"}, "score_at=masked must be midpoint or dense for ranking=joint"),
    ],
)
def test_what_cannot_be_ranked_together_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GFPruneConfig(**options)


def test_choosing_before_a_ranking_needs_widths() -> None:
    pruner = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.5, **JOINT), SCHEDULER)
    scores = {group.name: torch.ones(group.num_units) for group in pruner.groups}
    with pytest.raises(ValueError, match="units were not ranked yet"):
        pruner.choose_units(scores)
    chosen = pruner.choose_units(scores, widths=pruner.planned_widths)
    assert sum(int(units.sum()) for units in chosen.values()) < sum(group.num_units for group in pruner.groups)


def test_pruning_without_training_chooses_units_together() -> None:
    """By default, where the criterion measures joint changes."""

    def widths(**options) -> dict:
        return prune_unet(build("fine-units"), SCHEDULER, images(), ratio=0.4, **options).config.layer_channels

    assert widths() == widths(ranking="joint") != widths(ranking="sensitivity")
    assert widths(criterion="magnitude") == widths(criterion="magnitude", ranking="group")
