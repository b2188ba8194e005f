"""Damage curves: measured points, what lies between them, and the widths that follow from them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from diffusers_gfprune.pruning.blocks import RemovableBlock
from diffusers_gfprune.pruning.budget import width_ladder
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.cost_model import CostModel
from diffusers_gfprune.pruning.curve_allocation import NEAR, allocate_by_curves
from diffusers_gfprune.pruning.damage_curves import DamageCurve, measured_widths
from diffusers_gfprune.pruning.depth import plan_widths
from helpers.architectures import build
from helpers.blocks import HIDDEN, BlockCosts


def power_curve(ladder: list[int], size: float, power: float) -> DamageCurve:
    """The points that would be measured of size * x^power."""
    widths = measured_widths(ladder)
    return DamageCurve(ladder[0], tuple(widths), tuple(size * (1 - width / ladder[0]) ** power for width in widths))


# --- curves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ladder", "expected"),
    [
        (list(range(32, 2, -1)), [24, 16, 8, 3]),  # shares of 1/4, 1/2, 3/4, and the narrowest width
        ([80, 70, 50, 30], [70, 50, 30]),  # of two equally near ones, the wider
        ([48, 24], [24]),
        ([1, 0], [0]),  # a removable block
        ([48], []),
    ],
)
def test_few_widths_are_measured(ladder: list[int], expected: list[int]) -> None:
    assert measured_widths(ladder) == expected


@pytest.mark.parametrize("power", [1.0, 2.0, 4.5])
def test_a_power_law_is_found_from_its_points(power: float) -> None:
    ladder = list(range(40, 3, -1))
    curve = power_curve(ladder, 0.7, power)
    expected = [0.7 * (1 - width / 40) ** power for width in ladder]
    assert [curve.at(width) for width in ladder] == pytest.approx(expected, rel=1e-9)


def test_a_curve_passes_its_points_and_never_falls() -> None:
    """Measured damage may fall where more is removed, or be nothing at all."""
    curve = DamageCurve(20, (15, 10, 5, 2), (0.0, 0.4, 0.3, 0.5))
    values = [curve.at(width) for width in range(20, 1, -1)]
    assert values == sorted(values) and values[0] == 0 and all(value < 1e-20 for value in values[:6])
    assert [curve.at(width) for width in (10, 5, 2)] == pytest.approx([0.4, 0.4, 0.5])


def test_below_the_first_point_damage_rises_at_least_in_proportion() -> None:
    """A flat curve would make the first units cost all of the damage."""
    curve = DamageCurve(20, (10, 5), (0.4, 0.4))
    assert [curve.at(width) for width in (15, 18)] == pytest.approx([0.2, 0.08])
    assert DamageCurve(8, (4,), (0.6,)).at(6) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, (6, 6), (0.1, 0.2)), r"widths=\(6, 6\) must descend from 8"),
        ((8, (8,), (0.1,)), r"widths=\(8,\) must descend from 8"),
        ((8, (6, 4), (0.1,)), "with one of 1 damages each"),
        ((8, (6,), (-0.1,)), r"damages=\(-0.1,\) must be numbers >= 0"),
        ((8, (6,), (float("nan"),)), "must be numbers >= 0"),
    ],
)
def test_bad_points_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DamageCurve(*arguments)


def test_widths_outside_of_a_curve_are_refused() -> None:
    curve = DamageCurve(8, (6, 4), (0.1, 0.2))
    for width in (3, 9):
        with pytest.raises(ValueError, match=f"width={width} must be between 4 and 8"):
            curve.at(width)
    with pytest.raises(ValueError, match="width=7 must be between 8 and 8"):
        DamageCurve(8).at(7)


def test_curves_are_read_back() -> None:
    curve = DamageCurve(8, (6, 4), (0.1, 0.2))
    assert DamageCurve.from_dict(curve.to_dict()) == curve
    with pytest.raises(ValueError, match="a damage curve must have dense, widths and damages"):
        DamageCurve.from_dict({"dense": 8})


# --- allocation --------------------------------------------------------------------------------------------------------


def allocated(cost: CostModel, target: str, ratio: float, ladders: list[list[int]], curves: list[DamageCurve]) -> np.ndarray:
    """Widths by damage curves, from the same share of every group."""
    return allocate_by_curves(cost, target, ratio, ladders, curves, plan_widths(cost, target, ratio, ladders))


def total(curves: list[DamageCurve], widths: np.ndarray) -> float:
    return sum(curve.at(int(width)) for curve, width in zip(curves, widths))


@pytest.mark.fast_variants(1)
@pytest.mark.parametrize("target", ["macs", "params", "channels"])
def test_widths_are_those_of_a_search_through_all(target: str) -> None:
    """Four groups of 14 widths, and the others dense: of 38,416 choices, none that meets the budget does 2 % less damage."""
    unet = build("fine-units")
    cost = CostModel(unet, trace_channel_groups(unet))
    free = np.argsort(-cost.marginal(target, cost.dense) * cost.dense, kind="stable")[:4]
    parts = range(16, 2, -1)
    ladders = [[n * k // 16 for k in parts] if index in free else [n] for index, n in enumerate(cost.dense.tolist())]
    ratio = cost.removed(target, np.array([ladder[len(ladder) // 2] for ladder in ladders]))
    generator = np.random.default_rng(0)
    curves = [power_curve(ladder, float(10 ** generator.uniform(-3, 0)), generator.uniform(1, 4)) for ladder in ladders]
    found = allocated(cost, target, ratio, ladders, curves)
    tables = [{width: curve.at(width) for width in ladder} for curve, ladder in zip(curves, ladders)]
    least = min(
        sum(table[width] for table, width in zip(tables, widths))
        for widths in product(*ladders)
        if abs(cost.removed(target, np.array(widths)) - ratio) <= NEAR
    )
    assert cost.removed(target, found) == pytest.approx(ratio, abs=NEAR)
    assert least * (1 - 1e-9) <= total(curves, found) <= least * 1.02


def test_shares_follow_from_lagrange_multipliers() -> None:
    """Groups that cost the same and do A x^2: the removed shares are as 1 / A."""
    cost = BlockCosts([1.0, 1.0, 1.0, 1.0], rest=0.0)
    cost.inner, cost.groups, cost.dense = {}, cost.groups[:4], np.full(4, 1000)
    cost.cost = lambda target, widths: float(np.sum(widths))
    ladders = [list(range(1000, 0, -1))] * 4
    sizes = [1.0, 2.0, 4.0, 8.0]
    found = allocated(cost, "macs", 0.3, ladders, [power_curve(ladders[0], size, 2.0) for size in sizes])
    share = 1.2 / sum(1 / size for size in sizes)
    assert (1 - found / 1000).tolist() == pytest.approx([share / size for size in sizes], abs=0.004)


def test_a_cheap_step_behind_an_expensive_one_is_reached() -> None:
    """All of the first group's damage is done by its first unit; two units of the other do more than that."""
    cost = BlockCosts([1.0, 1.0], rest=0.0)
    cost.inner, cost.groups, cost.dense = {}, cost.groups[:2], np.full(2, 8)
    cost.cost = lambda target, widths: float(np.sum(widths))
    ladders = [[8, 6, 4, 2]] * 2
    curves = [DamageCurve(8, (6, 4, 2), (0.5, 0.5, 0.5)), DamageCurve(8, (6, 4, 2), (0.3, 0.6, 0.9))]
    assert allocated(cost, "macs", 6 / 16, ladders, curves).tolist() == [2, 8]


def test_a_block_goes_when_that_does_less_damage() -> None:
    """Its damage replaces that of the channels inside."""
    cost = BlockCosts([40.0, 40.0])
    curves = [
        DamageCurve(HIDDEN, (5, 1), (0.4, 1.0)),
        DamageCurve(HIDDEN, (5, 1), (0.4, 1.0)),
        DamageCurve(1, (0,), (0.1,)),
        DamageCurve(1, (0,), (3.0,)),
    ]
    widths = allocated(cost, "macs", 0.4, cost.ladders(), curves)
    assert widths.tolist() == [HIDDEN, HIDDEN, 0, 1]
    assert allocated(cost, "macs", 0.0, cost.ladders(), curves).tolist() == [HIDDEN, HIDDEN, 1, 1]
    assert all(isinstance(cost.groups[block], RemovableBlock) for block in cost.inner)


def test_whole_models_meet_the_budget_to_a_unit() -> None:
    with torch.device("meta"):
        unet = build("one-channel-per-norm-group")
    cost = CostModel(unet, trace_channel_groups(unet))
    ladders = [width_ladder(group, 1, 0.1) for group in cost.groups]
    generator = np.random.default_rng(0)
    curves = [power_curve(ladder, float(10 ** generator.uniform(-3, 0)), generator.uniform(1, 4)) for ladder in ladders]
    for ratio in (0.3, 0.7):
        widths = allocated(cost, "macs", ratio, ladders, curves)
        assert cost.removed("macs", widths) == pytest.approx(ratio, abs=NEAR)
