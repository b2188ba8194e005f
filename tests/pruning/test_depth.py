"""Width and depth in one budget: which blocks go, besides the widths of what stays."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_gfprune.pruning.allocation import allocate_by_sensitivity, allocate_global, with_blocks
from diffusers_gfprune.pruning.blocks import trace_groups
from diffusers_gfprune.pruning.budget import BUDGET_TOLERANCE, width_ladder
from diffusers_gfprune.pruning.cost_model import CostModel
from diffusers_gfprune.pruning.depth import (
    NEAR,
    check_reachable,
    choose_blocks,
    plan_widths,
    remove_by_sensitivity,
    remove_per_group,
    saved_by_blocks,
)
from diffusers_gfprune.pruning.joint import UnitDamage, joint_candidates
from helpers.architectures import build
from helpers.blocks import HIDDEN, BlockCosts
from helpers.joint import predicted_damage

MACS = "macs"


def scores_of(cost: CostModel, blocks: dict[int, float], inside: float = 1.0) -> list[Tensor]:
    """Scores of units: `inside` in sum for every group of channels, and those of blocks by index."""
    return [
        torch.tensor([blocks[index]]) if index in cost.inner else torch.full((group.num_units,), inside / group.num_units)
        for index, group in enumerate(cost.groups)
    ]


@cache
def unet_costs() -> CostModel:
    unet = build("one-channel-per-norm-group")
    return CostModel(unet, trace_groups(unet, "allow"))


# --- ladders and costs -------------------------------------------------------------------------------------------------


def test_a_block_is_kept_or_removed() -> None:
    cost = BlockCosts([10, 20, 30, 20])
    assert all(width_ladder(cost.groups[block], 16, 0.5, "heads") == [1, 0] for block in cost.inner)
    assert saved_by_blocks(cost, MACS, cost.dense) == pytest.approx({4: 0.1, 5: 0.2, 6: 0.3, 7: 0.2})


def test_a_block_saves_what_is_inside_at_its_current_width() -> None:
    """Channels inside of a removed block are not counted."""
    cost = BlockCosts([10, 20, 30, 20])
    half = np.array([HIDDEN, HIDDEN, HIDDEN // 2, HIDDEN, 1, 0, 1, 1])
    assert saved_by_blocks(cost, MACS, half) == pytest.approx({4: 0.1, 5: 0.0, 6: 0.15, 7: 0.2})
    assert cost.present(half).tolist() == [HIDDEN, 0, HIDDEN // 2, HIDDEN, 1, 0, 1, 1]
    unet = unet_costs()
    for block, inner in unet.inner.items():
        without = unet.dense.copy()
        without[block] = 0
        narrow = without.copy()
        narrow[inner] = 1
        for target in ("macs", "params", "channels"):
            assert unet.cost(target, narrow) == unet.cost(target, without) < unet.cost(target, unet.dense)


def test_what_cannot_be_reached_is_refused_and_names_depth() -> None:
    cost = BlockCosts([10, 20, 30, 20])
    check_reachable(cost, MACS, 0.8, cost.ladders(channels=False))
    with pytest.raises(ValueError, match=r"^ratio=0.85 of macs .* the maximum is 0.800 with depth=only, which removes blocks"):
        check_reachable(cost, MACS, 0.85, cost.ladders(channels=False))
    cost.inner = {}
    with pytest.raises(
        ValueError, match=r"^ratio=0.85 of macs .* maximum is 0.720 .*; with depth=allow, blocks can be removed"
    ):
        check_reachable(cost, MACS, 0.85, [list(range(HIDDEN, 0, -1))] * 4 + [[1]] * 4)


# --- blocks only -------------------------------------------------------------------------------------------------------


def test_blocks_only_known_answers() -> None:
    cost = BlockCosts([10, 20, 30, 20])

    def removed(ratio: float, *damage: float) -> list[int]:
        widths = choose_blocks(cost, MACS, ratio, dict(zip(cost.inner, damage)))
        assert (widths[:4] == HIDDEN).all()
        return [k for k in range(4) if widths[4 + k] == 0]

    assert removed(0.3, 1, 1, 5, 9) == [0, 1]  # two cheap ones together rather than one
    assert removed(0.3, 1, 1, 1.5, 9) == [2]
    assert removed(0.5, 9, 1, 9, 1) in ([1, 3], [1, 2], [2, 3])  # the nearest: 0.4 is not near
    assert removed(0.04, 1, 1, 1, 1) == [] and removed(0.06, 1, 1, 1, 1) == [0]
    assert removed(0.99, 1, 1, 1, 1) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_blocks_only_is_the_best_of_all_sets(seed: int) -> None:
    """Against all sets of eight blocks."""
    generator = np.random.default_rng(seed)
    cost = BlockCosts(generator.integers(1, 20, size=8))
    damage = dict(zip(cost.inner, generator.random(8)))
    ratio = 0.4 * float(cost.sizes.sum() / cost.cost(MACS, cost.dense))
    sets = []
    for flags in product((0, 1), repeat=8):
        widths = np.array([HIDDEN] * 8 + list(flags))
        gap = abs(cost.removed(MACS, widths) - ratio)
        sets.append((gap, sum(damage[8 + k] for k in range(8) if not flags[k])))
    widths = choose_blocks(cost, MACS, ratio, damage)
    gap = abs(cost.removed(MACS, widths) - ratio)
    found = sum(value for block, value in damage.items() if widths[block] == 0)
    near = [value for distance, value in sets if distance <= NEAR - 1e-4]
    if near:
        assert gap <= NEAR + 1e-9 and found <= min(near) + 1e-9
    else:
        assert gap <= min(distance for distance, _ in sets) + 1e-4


# --- blocks and widths -------------------------------------------------------------------------------------------------


def test_the_same_share_of_blocks_and_channels() -> None:
    """Four equal blocks: at half of both, a quarter of their cost is left."""
    cost = BlockCosts([20, 20, 20, 20])
    widths = remove_per_group(cost, MACS, 0.6, cost.ladders(), {4: 3.0, 5: 1.0, 6: 4.0, 7: 2.0})
    assert widths.tolist() == [5, HIDDEN, 5, HIDDEN, 1, 0, 1, 0]  # those with the lowest damage go
    assert plan_widths(cost, MACS, 0.6, cost.ladders())[4:].sum() == 2
    assert (remove_per_group(cost, MACS, 0.0, cost.ladders(), dict.fromkeys(cost.inner, 1.0)) == cost.dense).all()


@pytest.mark.parametrize("seed", [0, 2])
def test_nearly_everything_that_can_go_goes(seed: int) -> None:
    """With the same share of the blocks as of the channels, the narrowest channels would not save enough."""
    unet = build("three-levels")
    cost = CostModel(unet, trace_groups(unet, "allow"))
    ladders = [width_ladder(group, 1, 0.1, "head_dim") for group in cost.groups]
    most = cost.removed("channels", np.array([ladder[-1] for ladder in ladders]))
    scores = torch.rand(len(cost.groups), generator=torch.Generator().manual_seed(seed)).tolist()
    widths = remove_per_group(cost, "channels", most - 0.002, ladders, {block: scores[block] for block in cost.inner})
    assert cost.removed("channels", widths) == pytest.approx(most - 0.002, abs=BUDGET_TOLERANCE)


def test_a_block_goes_when_it_costs_less_than_thinning() -> None:
    cost, exponent = BlockCosts([40, 40]), 0.3
    ladders = cost.ladders()
    widths = remove_by_sensitivity(cost, MACS, 0.4, ladders, scores_of(cost, {2: 1e-3, 3: 100.0}), exponent)
    assert widths.tolist() == [HIDDEN, HIDDEN, 0, 1]  # exactly the budget, for next to nothing
    widths = remove_by_sensitivity(cost, MACS, 0.6, ladders, scores_of(cost, {2: 1e-3, 3: 100.0}), exponent)
    assert widths.tolist() == [HIDDEN, 5, 0, 1]  # and the rest in the other block
    precious = scores_of(cost, {2: 100.0, 3: 100.0})
    widths = remove_by_sensitivity(cost, MACS, 0.6, ladders, precious, exponent)
    kept = with_blocks(cost, ladders, [])
    assert widths.tolist() == allocate_by_sensitivity(cost, MACS, 0.6, kept, precious, exponent).tolist()
    assert widths[2:].tolist() == [1, 1]
    # What widths alone cannot reach needs a block, whatever it costs
    assert remove_by_sensitivity(cost, MACS, 0.79, ladders, precious, exponent)[2:].sum() < 2


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("target", ["macs", "params"])
def test_depth_is_never_worse_than_widths_by_its_own_model(target: str, ratio: float) -> None:
    cost, exponent = unet_costs(), 0.3
    generator = torch.Generator().manual_seed(0)
    ladders = [width_ladder(group, 1, 0.1) for group in cost.groups]
    for level in (1e-3, 0.3, 10.0):
        blocks = {block: level * float(torch.rand(1, generator=generator)) for block in cost.inner}
        scores = scores_of(cost, blocks)
        sums = np.array([float(score.sum()) for score in scores])

        def damage(widths: np.ndarray) -> float:
            present = cost.present(widths) > 0  # of groups of channels: outside of removed blocks
            terms = sums * (1 - widths / cost.dense) ** (1 + 1 / exponent)  # noqa: B023
            return sum(term for i, term in enumerate(terms) if present[i] or i in cost.inner)  # noqa: B023

        found = remove_by_sensitivity(cost, target, ratio, ladders, scores, exponent)
        alone = allocate_by_sensitivity(cost, target, ratio, with_blocks(cost, ladders, []), scores, exponent)
        assert cost.removed(target, found) == pytest.approx(ratio, abs=BUDGET_TOLERANCE)
        assert damage(found) <= damage(alone) * (1 + 1e-9)
        gone = sum(found[block] == 0 for block in cost.inner)
        assert gone > 0 if level == 1e-3 else (gone == 0 if level == 10.0 else True)


def test_global_removes_blocks_as_units() -> None:
    cost = BlockCosts([40, 40])
    scores = scores_of(cost, {2: 1e-3, 3: 1e3}, inside=HIDDEN)
    assert allocate_global(cost, MACS, 0.4, cost.ladders(), scores).tolist() == [HIDDEN, HIDDEN, 0, 1]
    assert allocate_global(cost, MACS, 0.6, cost.ladders(), scores).tolist() == [HIDDEN, 5, 0, 1]
    late = scores_of(cost, {2: 1e3, 3: 1e3}, inside=HIDDEN)
    assert allocate_global(cost, MACS, 0.6, cost.ladders(), late)[2:].tolist() == [1, 1]


# --- joint choice ------------------------------------------------------------------------------------------------------


def random_damage(cost: CostModel, level: float, seed: int = 0, rows: int = 32) -> UnitDamage:
    """Changes of channels of size 1, and of blocks of size `level`."""
    generator = torch.Generator().manual_seed(seed)
    changes = {
        group.name: torch.randn(rows, group.num_units, generator=generator) * (level if index in cost.inner else 1.0)
        for index, group in enumerate(cost.groups)
    }
    return UnitDamage(changes, {name: values.square().sum(dim=0) for name, values in changes.items()})


def widths_of(cost: CostModel, kept: dict[str, Tensor]) -> np.ndarray:
    return np.array([int(group.per_channel(kept[group.name]).sum()) for group in cost.groups])


def test_units_inside_of_a_removed_block_are_not_counted_twice() -> None:
    cost = BlockCosts([40, 40])
    damage = random_damage(cost, 1.0)
    everything = {group.name: torch.ones(group.num_units, dtype=torch.bool) for group in cost.groups}
    without = everything | {"block 0": torch.zeros(1, dtype=torch.bool)}
    inside = torch.arange(HIDDEN) < 3
    expected = 2 * float(damage.changes["block 0"].double().square().sum())  # together, and separately
    assert predicted_damage(cost.groups, without, damage) == pytest.approx(expected)
    assert predicted_damage(cost.groups, without | {"inside 0": inside}, damage) == pytest.approx(expected)
    assert predicted_damage(cost.groups, without | {"inside 1": inside}, damage) > expected


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("level", [0.1, 3.0, 30.0])
def test_joint_depth_is_never_worse_than_joint_widths(level: float, ratio: float) -> None:
    cost = BlockCosts([20, 15, 25, 10, 10])
    ladders = cost.ladders()
    for seed in range(3):
        damage = random_damage(cost, level, seed)
        found = joint_candidates(cost, MACS, ratio, ladders, damage)[0]
        alone = joint_candidates(cost, MACS, ratio, [ladder if len(ladder) > 2 else [1] for ladder in ladders], damage)[0]
        assert cost.removed(MACS, widths_of(cost, found)) == pytest.approx(ratio, abs=BUDGET_TOLERANCE)
        assert predicted_damage(cost.groups, found, damage) <= predicted_damage(cost.groups, alone, damage) * (1 + 1e-9)
        gone = sum(not found[cost.groups[block].name].item() for block in cost.inner)
        assert gone > 0 if level == 0.1 else True
        assert all(found[f"inside {k}"].all() for k in range(5) if not found[f"block {k}"])


def test_joint_choice_of_blocks_only() -> None:
    """Changes that cancel are used."""
    cost = BlockCosts([20, 20, 20, 20])
    damage = random_damage(cost, 1.0)
    changes = dict(damage.changes)
    changes["block 3"] = -changes["block 1"]
    damage = UnitDamage(changes, dict.fromkeys(changes, torch.zeros(1)) | {f"inside {k}": torch.zeros(10) for k in range(4)})
    kept = joint_candidates(cost, MACS, 0.4, cost.ladders(channels=False), damage)[0]
    assert [k for k in range(4) if not kept[f"block {k}"]] == [1, 3]
    assert all(kept[f"inside {k}"].all() for k in range(4))


@pytest.mark.parametrize("seed", range(4))
def test_joint_choice_of_blocks_for_a_budget_between_two_numbers_of_them(seed: int) -> None:
    """One block saves 16 %, two save 32 %: for 20 %, the block with the least damage is removed."""
    cost = BlockCosts([16] * 5)
    damage = random_damage(cost, 1.0, seed)
    everything = {group.name: torch.ones(group.num_units, dtype=torch.bool) for group in cost.groups}
    single = [
        predicted_damage(cost.groups, everything | {f"block {k}": torch.zeros(1, dtype=torch.bool)}, damage) for k in range(5)
    ]
    kept = joint_candidates(cost, MACS, 0.2, cost.ladders(channels=False), damage)[0]
    assert [k for k in range(5) if not kept[f"block {k}"]] == [int(np.argmin(single))]
