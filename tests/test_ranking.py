"""Rankings through the pruner: units chosen together meet the budget, stand once it is met, and survive a checkpoint."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.one_shot import one_shot_config, prune_unet
from diffusers_gfprune.pruning.blocks import RemovableBlock
from diffusers_gfprune.pruning.depth import NEAR, saved_by_blocks
from diffusers_gfprune.scoring import group_damage, importance, removals
from helpers.architectures import build
from helpers.pruners import SCHEDULER, batches, config, images, mask_values, one_shot, quick_curves

JOINT = {"criterion": "gradient-flow", "ranking": "joint"}


@pytest.mark.fast_variants(2)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("depth", [pytest.param("none", marks=pytest.mark.slow), "allow"])
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


def test_the_checkpoint_of_a_finished_run_has_no_joint_changes() -> None:
    """The message does not say that units were never ranked."""
    first, resumed = (GradientFlowPruner(build("fine-units"), one_shot(ratio=0.5, **JOINT), SCHEDULER) for _ in range(2))
    first.step(0, batches())
    assert first.finished and first.choose_units(first.scores)
    resumed.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="^the checkpoint of a finished run has none: ranking=joint needs joint changes, or"):
        resumed.choose_units(resumed.scores)


@pytest.mark.slow
def test_pruning_without_training_and_recovery_chooses_units_together() -> None:
    """By default, where the criterion measures joint changes, and where blocks may go."""

    def widths(**options) -> dict:
        return prune_unet(build("fine-units"), SCHEDULER, images(), ratio=0.4, **options).config.layer_channels

    together, sensitivity = widths(ranking="joint"), widths(ranking="sensitivity")
    assert widths() == sensitivity != together == widths(recovery=False)
    assert widths(criterion="magnitude", recovery=False) == widths(criterion="magnitude", ranking="group")
    for depth in ("allow", "only"):
        assert one_shot_config(1, True, {"depth": depth}).ranking == "joint"


# --- widths by damage curves -------------------------------------------------------------------------------------------

CURVES = {"criterion": "gradient-flow", "ranking": "curves"}
quick = pytest.mark.usefixtures(quick_curves.__name__)


@pytest.mark.fast_variants(1)
@quick
@pytest.mark.slow
@pytest.mark.parametrize(("target", "criterion"), [("macs", "gradient-flow"), ("params", "magnitude")])
def test_widths_by_damage_curves_meet_the_budget(target: str, criterion: str) -> None:
    """Counted on the small model; criteria that need no images have curves, too."""
    options = {**CURVES, "target": target, "criterion": criterion}
    pruner = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.4, **options), SCHEDULER)
    assert pruner.damage_curves is None
    update = pruner.step(0, batches())
    count = {"macs": count_macs, "params": count_parameters}[target]
    removed = 1 - count(pruner.compact()) / count(build("fine-units"))
    assert removed == pytest.approx(0.4, abs=0.01) and update.sparsity == pytest.approx(removed, abs=1e-9)
    assert pruner.damage_curves.keys() == {group.name for group in pruner.groups}


@quick
@pytest.mark.slow
def test_damage_is_measured_once_and_survives_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first ranking; widths of later ones follow from it, and stand once the budget is met."""
    measured = []

    def spy(*arguments):
        measured.append(curves := group_damage.damage_curves(*arguments))
        return curves

    monkeypatch.setattr("diffusers_gfprune.ranking.damage_curves", spy)

    def pruner() -> GradientFlowPruner:
        return GradientFlowPruner(build("fine-units"), config(ratio=0.5, update_interval=5, ranking="curves"), SCHEDULER)

    whole, first = pruner(), pruner()
    widths = []
    for step in range(21):
        if (update := whole.step(step, batches())) is not None:
            widths.append((update.sparsity, whole.kept_channels().tolist()))
        if step < 8:
            first.step(step, batches())
    assert len(measured) == 2 and measured[0] == whole.damage_curves
    met = [kept for share, kept in widths if share > 0.49]
    assert len(widths) > len(met) > 1 and all(kept == met[0] for kept in met)
    state = json.loads(json.dumps(first.state_dict()["values"]))
    resumed = pruner()
    resumed.load_state_dict({"tensors": first.state_dict()["tensors"], "values": state})
    for step in range(8, 21):
        resumed.step(step, batches())
    assert len(measured) == 2 and resumed.damage_curves == whole.damage_curves
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    tensors = first.state_dict()["tensors"]
    with pytest.raises(ValueError, match="must have damage curves for ranking=curves"):
        pruner().load_state_dict({"tensors": tensors, "values": {**state, "curves": None}})
    with pytest.raises(ValueError, match="must have one damage curve for each channel group"):
        pruner().load_state_dict({"tensors": tensors, "values": {**state, "curves": {}}})


@pytest.mark.fast_variants(1)
@quick
@pytest.mark.slow
@pytest.mark.parametrize("depth", ["allow", "only"])
def test_damage_curves_choose_blocks(depth: str) -> None:
    """Where only blocks may go, they are the ones with the least measured damage."""
    options = {**CURVES, "depth": depth, "criterion": "magnitude", "ratio": 0.2}
    pruner = GradientFlowPruner(build("fine-units"), one_shot(**options), SCHEDULER)
    update = pruner.step(0, batches())
    assert update.sparsity == pytest.approx(0.2, abs=0.05 if depth == "only" else 0.01)
    blocks = {group.name for group in pruner.groups if isinstance(group, RemovableBlock)}
    removed = {name for name in blocks if not pruner.kept[name].any()}
    assert all(pruner.damage_curves[name].widths == (0,) for name in blocks)
    damage = {name: pruner.damage_curves[name].damages[0] for name in blocks}
    assert all(value > 0 for value in damage.values())
    if depth == "allow":
        return
    saved = saved_by_blocks(pruner.cost, "macs", pruner.cost.dense)
    shares = {pruner.groups[index].name: share for index, share in saved.items()}
    near = max(NEAR, abs(update.sparsity - 0.2)) - 1e-4
    others = [
        chosen
        for count in range(1, len(blocks))
        for chosen in combinations(sorted(blocks), count)
        if abs(sum(shares[name] for name in chosen) - 0.2) <= near
    ]
    assert removed and len(others) > 5
    least = sum(damage[name] for name in removed)
    assert all(sum(damage[name] for name in chosen) >= least * (1 - 1e-9) for chosen in others)


@quick
def test_damage_curves_need_a_ranking_and_images() -> None:
    pruner = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.5, **{**CURVES, "criterion": "magnitude"}), SCHEDULER)
    scores = {group.name: torch.ones(group.num_units) for group in pruner.groups}
    with pytest.raises(ValueError, match="units were not ranked yet: ranking=curves"):
        pruner.choose_units(scores)
    with pytest.raises(ValueError, match="damage curves need at least one calibration batch"):
        pruner.step(0, [])
