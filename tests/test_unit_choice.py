"""unit_choice.py: what meets the budget comes before what does less damage, and times need not fall with the width."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from diffusers_gfprune import GFPruneConfig, unit_choice
from diffusers_gfprune.pruning.blocks import trace_groups
from diffusers_gfprune.pruning.budget import BUDGET_TOLERANCE, width_ladder
from diffusers_gfprune.pruning.cost_model import CostModel
from diffusers_gfprune.pruning.depth import remove_by_sensitivity
from diffusers_gfprune.pruning.joint import UnitDamage, joint_candidates
from diffusers_gfprune.unit_choice import UnitChoice
from helpers.architectures import CIFAR10, build


def timed(name: str, time_of: Callable[[CostModel, np.ndarray], float], depth: str = "none") -> CostModel:
    """A model whose forward takes the given time."""
    unet = build(name)
    groups = trace_groups(unet, depth)
    counted = CostModel(unet, groups)
    return CostModel(unet, groups, seconds=lambda widths: time_of(counted, widths))


def random_scores(cost: CostModel, rows: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (rows,) if rows else ()
    return {group.name: torch.rand(*size, group.num_units, generator=generator) for group in cost.groups}


def widths_of(cost: CostModel, kept: dict[str, torch.Tensor]) -> np.ndarray:
    return np.array([int(group.per_channel(kept[group.name]).sum()) for group in cost.groups])


def in_blocks_of_16(cost: CostModel, widths: np.ndarray) -> float:
    """As kernels do, which compute 16 channels at a time."""
    return cost.macs(np.minimum(-(-widths // 16) * 16, cost.dense))


@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_steps_that_save_nothing_alone_do_not_end_the_search(ratio: float) -> None:
    """Kernels take as long for 17 channels as for 32: a group loses several units at once, or none."""
    cost = timed("fine-units", in_blocks_of_16)
    damage = UnitDamage(random_scores(cost, rows=16), {name: 0.01 * s for name, s in random_scores(cost).items()})
    kept = joint_candidates(cost, "latency", ratio, [width_ladder(group, 1, 0.1) for group in cost.groups], damage)[0]
    assert cost.removed("latency", widths_of(cost, kept)) == pytest.approx(ratio, abs=2 * BUDGET_TOLERANCE)


def test_a_choice_that_removes_too_little_is_not_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model does no damage, and would be taken for that."""
    cost = timed("fine-units", lambda cost, widths: cost.macs(widths))
    config = GFPruneConfig.from_preset("one-shot", target="latency", ratio=0.3, total_steps=1, ranking="joint")
    choice, scores = UnitChoice(cost, config, "cpu"), random_scores(cost)
    dense = {name: torch.ones_like(values, dtype=torch.bool) for name, values in scores.items()}
    found = choice.joint_units(0.3, scores, random_scores(cost, rows=4))
    assert len(found) == 2
    monkeypatch.setattr(unit_choice, "joint_candidates", lambda *arguments: [dense])
    (only,) = choice.joint_units(0.3, scores, random_scores(cost, rows=4))
    assert all(torch.equal(only[name], found[1][name]) for name in only)


def test_large_units_are_removed_as_often_as_small_ones() -> None:
    """By random scores of units, whatever their scale in each group."""
    with torch.device("meta"):
        unet = UNet2DModel(**CIFAR10)
    cost = CostModel(unet, trace_groups(unet))
    options = {"criterion": "random", "ranking": "global", "ratio": 0.3, "total_steps": 1, "channel_multiple": 1}
    choice = UnitChoice(cost, GFPruneConfig.from_preset("one-shot", **options), "cpu")
    removed: dict[int, list[float]] = {}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        scores = {
            group.name: torch.rand(group.num_units, generator=generator) * 10.0 ** (index % 3)
            for index, group in enumerate(cost.groups)
        }
        for group, width in zip(cost.groups, choice.widths(0.3, scores)):
            if group.num_units:
                size = round(group.unit_sizes.float().mean().item())
                removed.setdefault(size, []).append(1 - (width - len(group.fixed)) / group.unit_sizes.sum().item())
    shares = {size: np.mean(values) for size, values in removed.items()}
    assert min(shares) == 1 and max(shares) > 8
    assert max(shares.values()) < 1.5 * min(shares.values()), shares


def test_times_that_fall_with_the_width_are_no_savings() -> None:
    """On a GPU at batch size 1, a narrower layer is at times the slower one."""
    odd = 3

    def time_of(cost: CostModel, widths: np.ndarray) -> float:
        slope = cost.marginal("macs", cost.dense)[odd]
        return cost.macs(widths) + 2 * slope * (cost.dense[odd] - widths[odd])

    cost = timed("one-channel-per-norm-group", time_of, "allow")
    assert cost.marginal("latency", cost.dense)[odd] < 0 and odd not in cost.inner
    ladders, scores = [width_ladder(group) for group in cost.groups], list(random_scores(cost).values())
    widths = remove_by_sensitivity(cost, "latency", 0.4, ladders, scores, 0.3)
    assert cost.removed("latency", widths) == pytest.approx(0.4, abs=BUDGET_TOLERANCE)


def test_what_cannot_be_reached_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """For large models, the search for the nearest widths takes minutes."""
    cost = timed("fine-units", lambda cost, widths: cost.macs(widths))
    monkeypatch.setattr(unit_choice, "plan_widths", lambda *arguments: pytest.fail("planned"))
    config = GFPruneConfig(target="macs", ratio=0.999, total_steps=10)
    with pytest.raises(ValueError, match="ratio=0.999 of macs cannot be removed: the maximum is"):
        UnitChoice(cost, config, "cpu")
