"""Joint choice of units: cancellations are used, budgets are met, and small cases reach the best of all choices."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_gfprune.pruning import joint, joint_search
from diffusers_gfprune.pruning.budget import BUDGET_TOLERANCE, select_units, width_ladder
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, trace_channel_groups
from diffusers_gfprune.pruning.cost_model import CostModel
from diffusers_gfprune.pruning.joint import UnitDamage, exchange_units, joint_candidates
from helpers.architectures import build
from helpers.joint import predicted_damage


def cost_of(name: str) -> CostModel:
    unet = build(name)
    return CostModel(unet, trace_channel_groups(unet))


def random_damage(cost: CostModel, rows: int = 64, seed: int = 0) -> UnitDamage:
    """Changes of units whose groups are decades apart, with a common part that adds up and cancels."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, 1, generator=generator)
    changes, separate = {}, {}
    for index, group in enumerate(cost.groups):
        own = torch.randn(rows, group.num_units, generator=generator)
        shared = common * torch.randn(group.num_units, generator=generator)
        changes[group.name] = (own + shared) * 10.0 ** (index % 3 - 2)
        separate[group.name] = changes[group.name].square().sum(dim=0)
    return UnitDamage(changes, separate)


def widths_of(groups: list[ChannelGroup], kept: dict[str, Tensor]) -> np.ndarray:
    return np.array([int(group.per_channel(kept[group.name]).sum()) for group in groups])


@pytest.mark.fast_variants(4)
@pytest.mark.parametrize("attention_unit", ["head_dim", "heads"])
@pytest.mark.parametrize("target", ["macs", "params", "channels"])
@pytest.mark.parametrize("name", ["fine-units", "one-channel-per-norm-group"])
def test_the_budget_is_met_with_widths_of_the_ladders(name: str, target: str, attention_unit: str) -> None:
    cost = cost_of(name)
    ladders = [width_ladder(group, 1, 0.1, attention_unit) for group in cost.groups]
    for ratio in (0.1, 0.5, 0.7):
        kept = joint_candidates(cost, target, ratio, ladders, random_damage(cost), attention_unit)[0]
        widths = widths_of(cost.groups, kept)
        assert cost.removed(target, widths) == pytest.approx(ratio, abs=BUDGET_TOLERANCE)
        assert all(width in ladder for width, ladder in zip(widths, ladders))
        for group in (group for group in cost.groups if group.attention is not None):
            heads = kept[group.name].view(group.heads, -1).sum(dim=1).tolist()
            assert (
                len(set(heads)) == 1 if attention_unit == "head_dim" else set(heads) <= {0, group.num_channels // group.heads}
            )


def test_nothing_is_removed_at_ratio_zero() -> None:
    cost = cost_of("fine-units")
    kept = joint_candidates(cost, "macs", 0.0, [width_ladder(group) for group in cost.groups], random_damage(cost))[0]
    assert all(units.all() for units in kept.values())


def test_units_that_cancel_are_removed_together() -> None:
    """Each of two units changes predictions more than all others, and both together change nothing."""
    cost = cost_of("fine-units")
    damage = random_damage(cost)
    first, second = "down_blocks.1.resnets.0.conv1", "mid_block.resnets.0.conv1"
    changes = {name: torch.randn_like(values) for name, values in damage.changes.items()}
    large = torch.full((64,), 30.0)
    changes[first][:, 3], changes[second][:, 5] = large, -large
    nothing = {name: torch.zeros(values.shape[1]) for name, values in changes.items()}
    damage, ladders = UnitDamage(changes, nothing), [width_ladder(group, 1, 0.1) for group in cost.groups]
    kept = joint_candidates(cost, "channels", 0.5, ladders, damage)[0]
    assert kept[first][3] == kept[second][5]
    alone = {name: values.square().sum(dim=0) for name, values in changes.items()}
    choice = {
        group.name: select_units(group, alone[group.name], int(width))
        for group, width in zip(cost.groups, widths_of(cost.groups, kept))
    }
    assert predicted_damage(cost.groups, kept, damage) < 0.5 * predicted_damage(cost.groups, choice, damage)


def tiny_groups() -> list[ChannelGroup]:
    """Three groups of five units of one and two channels."""
    units = ((0,), (1, 2), (3,), (4, 5), (6,))
    return [ChannelGroup(name, 7, slices=(), units=units) for name in "abc"]


class ChannelCount:
    """A cost model in which every channel costs the same."""

    def __init__(self, groups: list[ChannelGroup]) -> None:
        self.groups, self.dense = groups, np.array([group.num_channels for group in groups])

    def cost(self, target: str, widths: np.ndarray) -> float:
        return float(widths.sum())


@pytest.mark.parametrize("seed", range(5))
def test_small_cases_come_near_the_best_of_all_choices(seed: int) -> None:
    """21 channels, 9 of them removed: 2^15 sets of units, searched exhaustively."""
    groups = tiny_groups()
    cost, ladders = ChannelCount(groups), [width_ladder(group, 1, 0.1) for group in groups]
    damage = random_damage(cost, rows=64, seed=seed)
    kept = joint_candidates(cost, "channels", 9 / 21, ladders, damage)[0]
    assert widths_of(groups, kept).sum() == 12
    sizes = torch.cat([group.unit_sizes for group in groups]).numpy()
    sets = np.array(list(product([False, True], repeat=15)))
    parts = [slice(0, 5), slice(5, 10), slice(10, 15)]
    left = np.stack([7 - sets[:, part] @ sizes[part] for part in parts], axis=1)
    possible = (sets @ sizes == 9) & (left > 0).all(axis=1)
    sets, left = sets[possible], left[possible]
    changes = torch.cat([damage.changes[name] for name in "abc"], dim=1).double().numpy()
    separate = torch.cat([damage.separate[name] for name in "abc"]).double().numpy()
    by_group = np.stack([sets[:, part] @ separate[part] for part in parts], axis=1)
    damages = np.square(changes @ sets.T).sum(axis=0) + (by_group * (7 / left) ** joint_search.LOAD).sum(axis=1)
    ours = predicted_damage(groups, kept, damage)
    assert np.isclose(damages, ours).any() and damages.min() <= ours * (1 + 1e-6)
    assert (damages < ours * (1 - 1e-6)).mean() < 0.01


def test_exchanges_keep_widths_and_lower_the_damage() -> None:
    cost = cost_of("fine-units")
    damage = random_damage(cost)
    generator = torch.Generator().manual_seed(3)
    start = {
        group.name: select_units(group, torch.rand(group.num_units, generator=generator), width_ladder(group)[-1])
        for group in cost.groups
    }
    kept = exchange_units(cost.groups, start, damage)
    assert widths_of(cost.groups, kept).tolist() == widths_of(cost.groups, start).tolist()
    assert predicted_damage(cost.groups, kept, damage) < predicted_damage(cost.groups, start, damage)
    again = exchange_units(cost.groups, kept, damage)
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_the_second_search_improves_on_the_greedy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = cost_of("fine-units")
    damage, ladders = random_damage(cost), [width_ladder(group, 1, 0.1) for group in cost.groups]
    found = predicted_damage(cost.groups, joint_candidates(cost, "macs", 0.5, ladders, damage)[0], damage)
    monkeypatch.setattr(joint, "ROUNDS", 0)
    greedy = predicted_damage(cost.groups, joint_candidates(cost, "macs", 0.5, ladders, damage)[0], damage)
    assert found < 0.98 * greedy


def test_the_same_damage_gives_the_same_choice() -> None:
    cost = cost_of("fine-units")
    ladders = [width_ladder(group, 1, 0.1) for group in cost.groups]
    first, second = (joint_candidates(cost, "macs", 0.5, ladders, random_damage(cost))[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
