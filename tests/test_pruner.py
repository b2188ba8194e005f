"""A complete pruning run: scheduled rankings and masks, a met budget, and a compacted model that trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from diffusers_gfprune import GFPrunedUNet2DModel, GradientFlowPruner
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.pruning.cost_model import CostModel
from diffusers_gfprune.pruning.masking import dense_parameters
from helpers.architectures import build
from helpers.pruners import SCHEDULER, Script, batches, config, falling, images, mask_values, one_shot, rising, run, train_step

# --- the whole life ----------------------------------------------------------------------------------------------------


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("interpolate", [False, True], ids=["jumps", "interpolated"])
def test_whole_life(interpolate: bool):
    """Soft, hard, compaction, fine-tuning, with AdamW and an average: no state is lost."""
    unet = build("fine-units").train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    pruner = GradientFlowPruner(
        unet, config(criterion="gradient-flow", ratio=0.5, interpolate_masks=interpolate), noise_scheduler=SCHEDULER
    )
    ema = EMAModel(unet.parameters(), decay=0.9)
    calls, losses = [], []
    for step in range(pruner.config.total_steps):
        pruner.step(step, lambda step=step: calls.append(step) or batches())
        if pruner.finished:
            break
        losses.append(train_step(unet, optimizer, ema, seed=step))
    assert step == pruner.schedule.end_steps == 20
    assert calls == [update.step for update in pruner.history] == pruner.schedule.update_steps()
    assert [update.phase for update in pruner.history] == ["soft" if step < 10 else "hard" for step in calls]

    # The budget is met by what would be compacted, and by the model itself.
    assert mask_values(pruner) == [0.0, 1.0]
    last = pruner.history[-1]
    assert last.sparsity == pytest.approx(0.5, abs=0.01)
    dense_macs = count_macs(build("fine-units"))
    step_loss = StepLoss(images(), SCHEDULER, grid=8)
    masked_loss = step_loss(unet)
    small = pruner.compact(optimizer=optimizer, ema=ema)
    assert isinstance(small, GFPrunedUNet2DModel)
    assert 1 - count_macs(small) / dense_macs == pytest.approx(0.5, abs=0.01)
    assert (count_macs(small), count_parameters(small)) == (last.macs, last.params)

    # No sudden loss of information, and training continues.
    assert step_loss(small) == pytest.approx(masked_loss, rel=1e-4)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(ours is theirs for ours, theirs in zip(held, small.parameters(), strict=True))
    assert all(optimizer.state[parameter]["step"].item() == 20 for parameter in held)
    before = run(small)
    losses += [train_step(small, optimizer, ema, seed=step) for step in range(20, 40)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert not torch.equal(run(small), before)
    ema.copy_to(small.parameters())
    assert torch.isfinite(run(small)).all()


def test_published_masks_jump_at_rankings_and_hold_in_between():
    """As in the paper: pruned channels have p_t of their ranking, kept ones 1, and after N everything is binary."""
    pruner = GradientFlowPruner(build("fine-units"), config(interpolate_masks=False, mask_schedule="linear"))
    assert pruner.schedule.update_steps() == [3, 6, 9, 10, 13, 16, 19]
    for step in range(21):
        update = pruner.step(step, [])
        if step < 3:
            assert mask_values(pruner) == [1.0]
        elif step < 10:
            p_t = 1 - (step // 3 * 3) / 10
            assert mask_values(pruner) == pytest.approx([p_t, 1.0])
            assert pruner.history[-1].mask_value == pytest.approx(p_t)
        else:
            assert mask_values(pruner) == [0.0, 1.0]
        if update is not None:
            kept, channels = (
                sum(int((mask == 1).sum()) for mask in masks.values()) for masks in (pruner.unit_masks, pruner.masks)
            )
            assert (update.step, update.kept_units, update.kept_channels) == (step, kept, channels)
            assert update.mask_value == pruner.schedule.mask_value(step)


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize(
    ("interval", "rankings"),
    [(1, list(range(10)) + list(range(11, 20))), (3, [0, 3, 6, 9, 13, 16, 19]), (5, [0, 5, 15]), (20, [0])],
)
def test_interpolated_masks_move_in_straight_lines(interval: int, rankings: list[int]):
    """Each ranking sets the masks of the next one, and they reach them: no mask falls faster than p_t."""
    pruner = GradientFlowPruner(
        build("fine-units"), config(update_interval=interval, interpolate_masks=True, mask_schedule="linear")
    )
    assert pruner.schedule.update_steps() == rankings
    path = []
    for step in range(21):
        pruner.step(step, [])
        path.append(torch.cat(list(pruner.masks.values())))
    assert path[0].unique().tolist() == [1.0]
    soft = [step for step in rankings if step < 10]
    for start, goal in zip(soft, [*soft[1:], 10]):
        assert path[goal].unique().tolist() == pytest.approx([1 - goal / 10, 1.0])
        for step in range(start, goal + 1):
            torch.testing.assert_close(path[step], torch.lerp(path[start], path[goal], (step - start) / (goal - start)))
    for step in range(10, 21):
        assert path[step].unique().tolist() == [0.0, 1.0]


@pytest.mark.fast_variants(2)
@pytest.mark.parametrize("interpolate", [False, True], ids=["jumps", "interpolated"])
@pytest.mark.parametrize("attention_unit", ["head_dim", "heads"])
def test_sparsity_rises_to_the_target(interpolate: bool, attention_unit: str):
    """s_t of the schedule is what is gone at each ranking, as far as whole units allow."""
    options = {"ratio": 0.6, "sparsity_schedule": "cubic", "attention_unit": attention_unit, "interpolate_masks": interpolate}
    pruner = GradientFlowPruner(build("fine-units"), config(**options))
    for step in range(21):
        pruner.step(step, [])
    schedule = pruner.schedule
    for update in pruner.history:
        assert update.sparsity == pytest.approx(0.6 * schedule.sparsity(schedule.goal_step(update.step)), abs=0.01)
    sparsities = [update.sparsity for update in pruner.history]
    assert sparsities == sorted(sparsities)


def test_history_is_what_the_masks_did(scripted: list[Script]):
    """Revived and newly pruned units, counted on the masks from ranking to ranking."""
    scripted += [rising, falling, rising, rising, falling, rising, falling]
    options = {"criterion": "scripted", "interpolate_masks": False, "revival_margin": 0.0, "score_decay": 0.0}
    pruner = GradientFlowPruner(build("fine-units"), config(**options))
    total = sum(group.num_units for group in pruner.groups)
    before = torch.ones(total, dtype=torch.bool)
    cost = CostModel(build("fine-units"), pruner.groups)
    for step in range(21):
        update = pruner.step(step, batches())
        if update is None:
            continue
        kept = torch.cat([mask == 1 for mask in pruner.unit_masks.values()])
        assert update.kept_units == int(kept.sum())
        assert update.revived_units == int((kept & ~before).sum())
        assert update.newly_pruned_units == int((before & ~kept).sum())
        widths = np.array([int((mask == 1).sum()) for mask in pruner.masks.values()])
        assert (update.macs, update.params) == (cost.macs(widths), cost.parameters(widths))
        assert update.sparsity == pytest.approx(1 - cost.macs(widths) / cost.macs(cost.dense))
        assert update.to_dict() == {field: getattr(update, field) for field in update.__dataclass_fields__}
        before = kept
    assert sum(update.revived_units for update in pruner.history) > 0


def test_revived_units_known_answer(scripted: list[Script]):
    """Half of all units go, then the other half: every pruned unit comes back, every kept one goes."""
    scripted += [rising, falling]
    options = {"criterion": "scripted", "target": "channels", "ratio": 0.5, "revival_margin": 0.0, "score_decay": 0.0}
    pruner = GradientFlowPruner(build("fine-units"), config(soft_fraction=0.0, **options))
    total = sum(group.num_units for group in pruner.groups)  # all groups are even
    first, second = pruner.step(0, batches()), pruner.step(3, batches())
    assert (first.kept_units, first.revived_units, first.newly_pruned_units) == (total // 2, 0, total // 2)
    assert (second.kept_units, second.revived_units, second.newly_pruned_units) == (total // 2,) * 3
    mask = pruner.masks["conv_in"]
    assert torch.equal(mask, torch.tensor([1.0] * 16 + [0.0] * 16))
    heads = pruner.masks["mid_block.attentions.0.to_q"].view(4, 8)  # scores fall within each head
    assert torch.equal(heads, torch.tensor([1.0] * 4 + [0.0] * 4).expand(4, 8))


@pytest.mark.parametrize(("advantage", "revived"), [(0.1, 0), (0.3, 1)])
def test_revival_needs_clear_evidence(scripted: list[Script], advantage: float, revived: int):
    """With a margin of 0.2, a pruned unit comes back only if it beats a kept one by 0.2 of the mean score."""

    def first(name: str, units: int) -> Tensor:
        return torch.cat([torch.full((units // 2,), 0.5), torch.full((units - units // 2,), 1.5)])

    def second(name: str, units: int) -> Tensor:
        scores = first(name, units)
        if name == "conv_in":
            scores[0], scores[-1] = 1.0 + advantage / 2, 1.0 - advantage / 2  # the mean stays 1
        return scores

    scripted += [first, second]
    options = {"criterion": "scripted", "target": "channels", "ratio": 0.5, "revival_margin": 0.2, "score_decay": 0.0}
    pruner = GradientFlowPruner(build("fine-units"), config(soft_fraction=0.0, **options))
    pruner.step(0, batches())
    # Attention groups hold whole heads of low and of high scores; they are the same in both rankings.
    assert pruner.step(3, batches()).revived_units == revived
    assert pruner.masks["conv_in"][0] == revived
    assert pruner.masks["conv_in"][-1] == 1 - revived


@pytest.mark.parametrize("margin", [1e3, 1e9])
def test_a_large_margin_does_not_drown_the_scores(scripted: list[Script], margin: float):
    """Where nothing may come back, those that go next are still the lowest-scored of what is left."""
    scripted += [lambda name, units: 1 + 1e-3 * rising(name, units)] * 7
    options = {"criterion": "scripted", "target": "channels", "ratio": 0.5, "revival_margin": margin}
    pruner = GradientFlowPruner(build("fine-units"), config(**options))
    for step in range(21):
        pruner.step(step, batches())
    assert sum(update.newly_pruned_units > 0 for update in pruner.history) >= 2
    for group in pruner.groups:  # scores rise within every head
        mask = pruner.masks[group.name].view(group.heads, -1)
        assert torch.equal(mask, mask.sort(dim=1).values), group.name


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_scores_are_averaged_over_rankings(scripted: list[Script], decay: float):
    """score_t = d score_{t-1} + (1 - d) new, so that one noisy ranking does not decide."""
    scripted += [rising, falling, falling]
    options = {"criterion": "scripted", "score_decay": decay, "soft_fraction": 0.0}
    pruner = GradientFlowPruner(build("fine-units"), config(**options))
    expected = None
    for step, new in ((0, rising), (3, falling), (6, falling)):
        pruner.step(step, batches())
        fresh = {group.name: new(group.name, group.num_units) for group in pruner.groups}
        expected = fresh if expected is None else {n: decay * expected[n] + (1 - decay) * fresh[n] for n in fresh}
        for name, scores in pruner.scores.items():
            torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-4)


def test_batches_are_asked_for_only_when_due():
    """Calibration data may be expensive: a function is called at rankings, and never after the last."""
    calls = []
    pruner = GradientFlowPruner(build("fine-units"), config())
    for step in range(40):
        update = pruner.step(step, lambda step=step: calls.append(step) or [])
        assert (update is not None) == (calls[-1:] == [step])
        assert pruner.finished == (step >= 20)
    assert calls == pruner.schedule.update_steps()


def test_nothing_changes_once_finished():
    """Further calls of `step` must not change the compacted masks."""
    pruner = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.4))
    pruner.step(0, [])
    assert pruner.finished
    masks, output = pruner.masks, run(pruner.unet)
    assert pruner.step(0, pytest.fail) is None
    assert pruner.step(1, pytest.fail) is None
    assert len(pruner.history) == 1
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())
    assert torch.equal(run(pruner.unet), output)


def test_one_shot_preset():
    """One ranking, binary masks, done."""
    pruner = GradientFlowPruner(build("fine-units"), one_shot(criterion="gradient-flow", ratio=0.3), SCHEDULER)
    update = pruner.step(0, batches())
    assert pruner.finished
    assert (update.step, update.phase, update.mask_value) == (0, "hard", 0.0)
    assert mask_values(pruner) == [0.0, 1.0]
    assert count_macs(pruner.compact()) == update.macs


@pytest.mark.parametrize("depth", ["none", "allow"])
def test_a_second_pruner_of_a_model_is_refused(depth: str):
    """As when a cell of a notebook is run twice. The first one goes on; after `detach` there may be another."""
    unet = build("fine-units")
    first = GradientFlowPruner(unet, one_shot(depth=depth))
    with pytest.raises(ValueError, match=r"^the model already has channel masks: detach\(\) its GradientFlowPruner, or load"):
        GradientFlowPruner(unet, one_shot(depth=depth))
    first.step(0, [])
    assert mask_values(first) == [0.0, 1.0]
    GradientFlowPruner(first.detach(), one_shot(depth=depth))


def test_ranking_leaves_weights_gradients_and_mode_alone():
    """Scoring happens between training steps: accumulated gradients are not its to touch."""
    unet = build("fine-units").train()
    pruner = GradientFlowPruner(unet, one_shot(criterion="gradient-flow", ratio=0.3), SCHEDULER)
    for parameter in unet.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    weights = {name: parameter.detach().clone() for name, parameter in dense_parameters(unet).items()}
    pruner.step(0, batches())
    assert unet.training
    for name, parameter in dense_parameters(unet).items():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(parameter.grad, torch.full_like(parameter, 0.5))


# --- units that scores would keep --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["group", "sensitivity", "global"])
def test_units_that_scores_would_keep(ranking: str):
    """At the full budget, or at a share of it, by scores alone; masks and kept units stay as they are."""
    pruner = GradientFlowPruner(build("fine-units"), config(ratio=0.5, ranking=ranking, soft_fraction=0.0))
    scores = {group.name: rising(group.name, group.num_units) for group in pruner.groups}
    cost = pruner.cost
    for ratio, removed in ((None, 0.5), (0.25, 0.25), (0.0, 0.0)):
        kept = pruner.choose_units(scores, ratio)
        widths = np.array([int(group.per_channel(kept[group.name]).sum()) for group in pruner.groups])
        assert 1 - cost.macs(widths) / cost.macs(cost.dense) == pytest.approx(removed, abs=0.01)
        assert kept["conv_in"].tolist() == sorted(kept["conv_in"].tolist())  # the last units have the highest scores
    assert mask_values(pruner) == [1.0]
    assert all(flags.all() for flags in pruner.kept.values())


@pytest.mark.parametrize("ratio", [1.7, -0.1, float("nan")])
@pytest.mark.parametrize("ranking", ["group", "sensitivity"])
def test_a_ratio_out_of_range_is_refused(ranking: str, ratio: float):
    """It would lead to the narrowest model."""
    pruner = GradientFlowPruner(build("fine-units"), one_shot(ratio=0.5, ranking=ranking))
    scores = {group.name: rising(group.name, group.num_units) for group in pruner.groups}
    with pytest.raises(ValueError, match=rf"^ratio={ratio} must be in \[0, 1\]"):
        pruner.choose_units(scores, ratio)
