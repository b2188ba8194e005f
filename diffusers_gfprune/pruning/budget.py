"""Budgets: from scores and a target cost to the units that each group keeps.

A group offers a ladder of widths, in channels: the sums of its units that are multiples of `channel_multiple` (and of the
heads, inside attention), down to a floor, and its dense width. Three ways of walking down the ladders until the share `ratio`
of the dense cost is gone:

- group: every group keeps the same share of its channels, found by bisection;
- sensitivity: a group loses the more, the more cost that saves and the less the group matters;
- global: the lowest-scored unit of all goes first, one after another.

All end with single steps of single groups towards the target, so that it is met to within one unit of one group.

Widths by sensitivity. Let S_g be the sum of the scores' absolute values in group g, W_g the cost of the whole group, and
S_g x_g^(1 + 1/beta) the damage of removing a share x_g of it: the last channels of a group are dearer than the first, which a
plain sum of scores, the case beta -> infinity, does not know. The least damage for sum_g W_g x_g = ratio sum_g W_g is at

    x_g  =  lambda (W_g / S_g)^beta

with lambda found by bisection; beta = 0 is the same share for all. The further the sums of a criterion spread, the smaller it
should be: 0.3 is for sums in the metric of predictions, those in the metric of weights and of other criteria spread over about
half as many decades (benchmarks/README.md has them, and other exponents).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .channel_groups import ChannelGroup
from .cost_model import CostModel

__all__ = [
    "BUDGET_TOLERANCE",
    "aligned_ladder",
    "allocate_by_sensitivity",
    "allocate_global",
    "allocate_per_group",
    "check_reachable",
    "hardware_multiple",
    "select_units",
    "width_ladder",
]

BUDGET_TOLERANCE = 0.01  # share of the dense cost
ATTENTION_UNITS = ("head_dim", "heads")
# Channels that kernels take at a time: CPUs with AVX-512; tensor cores in float32 (TF32), and in half precision, whose tiles
# of 64 channels an H100 gains by (benchmarks/README.md)
HARDWARE_MULTIPLES = {"cpu": 16, "cuda": 8, "cuda, half precision": 64}
# Widths that a group must have, beside its dense one, for blocks to be worth it: with four, the digits model loses too much
ALIGNED_WIDTHS = 5
_SMALLEST = 1e-12  # of the largest sensitivity, and of the largest share


def _reachable(sizes: Mapping[int, int]) -> list[int]:
    """Sums of any of the units, of which there are so many of each size, in ascending order."""
    sums = {0}
    for size, count in sizes.items():
        sums = {total + size * number for total in sums for number in range(count + 1)}
    return sorted(sums)


def width_ladder(
    group: ChannelGroup, channel_multiple: int = 1, min_keep_ratio: float = 0.0, attention_unit: str = "head_dim"
) -> list[int]:
    """Widths that a group may have, the dense one first.

    Args:
        group: The channel group.
        channel_multiple: Kept channels are a multiple of this (>= 1), or all.
        min_keep_ratio: Share of the channels that is always kept, in [0, 1].
        attention_unit: Inside attention, `"head_dim"` shrinks all heads alike, `"heads"` removes whole heads.

    Returns:
        Widths in descending order, each >= 1 and a sum of whole units (and the fixed channels).
    """
    floor = max(1, math.ceil(min_keep_ratio * group.num_channels))
    if group.attention is None:
        widths = [len(group.fixed) + width for width in _reachable(Counter(group.unit_sizes.tolist()))]
    else:
        heads, head_dim = group.heads, group.num_channels // group.heads
        step = heads if attention_unit == "head_dim" else head_dim
        widths = list(range(step, group.num_channels + 1, step))
    below = [width for width in widths if floor <= width < group.num_channels and width % channel_multiple == 0]
    return [group.num_channels, *reversed(below)]


def hardware_multiple(device: str, dtype: str = "float32") -> int:
    """Channels that a device's kernels take at a time; 1 where that is not known.

    Args:
        device: A type of device, as PyTorch names it.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
    """
    half = device == "cuda" and dtype != "float32"
    return HARDWARE_MULTIPLES.get("cuda, half precision" if half else device, 1)


def aligned_ladder(group: ChannelGroup, block: int, min_keep_ratio: float, attention_unit: str) -> list[int]:
    """`width_ladder` for kernels that compute channels in blocks.

    Full blocks are best, both for the layers that write the channels and for those that read them beside others. Where units
    hit too few of such widths for a group to lose what its scores say, it gets the largest width of each number of blocks: of
    units of ten nobody should keep five, since 50 channels take as long as 60 where a block has 16. Where these are too few,
    too, blocks of half the size are tried, of a quarter, ...

    Args:
        group: The channel group.
        block: Channels of a block (`hardware_multiple`), a power of two.
        min_keep_ratio: As in `width_ladder`.
        attention_unit: As in `width_ladder`.
    """
    reachable = width_ladder(group, 1, min_keep_ratio, attention_unit)
    while block > 1:
        full = [width for width in reachable if width % block == 0 or width == group.num_channels]
        largest: dict[int, int] = {}
        for width in reachable:  # in descending order
            largest.setdefault(math.ceil(width / block), width)
        for ladder in (full, list(largest.values())):
            if len(ladder) > ALIGNED_WIDTHS:
                return ladder
        block //= 2
    return reachable


def check_reachable(cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]]) -> None:
    """Refuse a budget that no widths on the ladders meet.

    Raises:
        ValueError: More is asked for than can be removed.
    """
    most = cost.removed(target, np.array([ladder[-1] for ladder in ladders]))
    if ratio > most + BUDGET_TOLERANCE:
        raise ValueError(
            f"ratio={ratio:g} of {target} cannot be removed: at most {most:.3f} can, with the floor and channel multiple "
            f"asked for (min_keep_ratio, channel_multiple), and norm groups that go as a whole"
            + ("; a larger latency_batch_size has less time that no width changes" if target == "latency" else "")
        )


def _nearest(ladder: Sequence[int], width: float) -> int:
    return min(range(len(ladder)), key=lambda rung: abs(ladder[rung] - width))


def _polish(
    cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]], rungs: list[int], moves: int = 500
) -> np.ndarray:
    """Take the single steps that bring the removed share closest to `ratio`, until none helps."""

    def kept(candidate: Sequence[int]) -> np.ndarray:
        return np.array([ladder[rung] for ladder, rung in zip(ladders, candidate)])

    gap = abs(cost.removed(target, kept(rungs)) - ratio)
    for _ in range(moves):
        best = None
        if gap > BUDGET_TOLERANCE / 20:
            for index, ladder in enumerate(ladders):
                for step in (-1, 1):
                    if not 0 <= rungs[index] + step < len(ladder):
                        continue
                    candidate = [*rungs[:index], rungs[index] + step, *rungs[index + 1 :]]
                    candidate_gap = abs(cost.removed(target, kept(candidate)) - ratio)
                    if candidate_gap < gap:
                        best, gap = candidate, candidate_gap
        if best is None:
            break
        rungs = best
    return kept(rungs)


def _nearer_end(
    cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]], ends: Sequence[list[int]]
) -> np.ndarray:
    """Of the polished widths on either side of the target, the nearer: where single steps are long, one can get stuck."""
    polished = [_polish(cost, target, ratio, ladders, rungs) for rungs in ends]
    return min(polished, key=lambda kept: abs(cost.removed(target, kept) - ratio))


def allocate_per_group(cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]]) -> np.ndarray:
    """Widths that remove `ratio` of the cost with (nearly) the same share kept in every group.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Widths that each group may have (`width_ladder`).

    Returns:
        Kept channels of each group, int64 with shape `(groups,)`.
    """
    return _allocate_in_proportion(cost, target, ratio, ladders, np.ones(len(ladders)))


def allocate_by_sensitivity(
    cost: CostModel,
    target: str,
    ratio: float,
    ladders: Sequence[Sequence[int]],
    scores: Sequence[Tensor],
    exponent: float,
) -> np.ndarray:
    """Widths that remove `ratio` of the cost where that costs much and matters little.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Widths that each group may have (`width_ladder`).
        scores: Scores of each group's units, on one scale for all groups, each with shape `(num_units,)`.
        exponent: beta >= 0 of the module's text; 0 is `allocate_per_group`.

    Returns:
        Kept channels of each group, int64 with shape `(groups,)`.
    """
    sensitivity = np.array([float(score.double().abs().sum()) for score in scores])
    saved = cost.marginal(target, cost.dense) * cost.dense
    # A group of zeros goes down to its floor first, but shares stay finite.
    gain = saved / np.maximum(sensitivity, _SMALLEST * sensitivity.max() if sensitivity.any() else 1.0)
    proportions = np.maximum((gain / gain.max()) ** exponent, _SMALLEST)
    return _allocate_in_proportion(cost, target, ratio, ladders, proportions)


def _allocate_in_proportion(
    cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]], proportions: np.ndarray
) -> np.ndarray:
    """Widths that remove `ratio` of the cost, with removed shares in given proportions > 0 as far as the ladders go."""

    def rungs_at(scale: float) -> list[int]:
        return [
            _nearest(ladder, (1 - min(scale * proportion, 1.0)) * ladder[0])
            for ladder, proportion in zip(ladders, proportions)
        ]

    low, high = 0.0, float(1 / proportions.min())  # where every group is at its floor
    for _ in range(40 + math.ceil(math.log2(high))):
        middle = (low + high) / 2
        kept = np.array([ladder[rung] for ladder, rung in zip(ladders, rungs_at(middle))])
        low, high = (middle, high) if cost.removed(target, kept) <= ratio else (low, middle)
    return _nearer_end(cost, target, ratio, ladders, [rungs_at(scale) for scale in (low, high)])


def _by_channel(group: ChannelGroup, scores: Tensor) -> np.ndarray:
    """Scores shared out among the channels of their units, in ascending order; fixed channels come last."""
    each = torch.repeat_interleave(scores.double().cpu() / group.unit_sizes, group.unit_sizes)
    return np.concatenate([np.sort(each.numpy()), np.full(len(group.fixed), np.inf)])


def allocate_global(
    cost: CostModel,
    target: str,
    ratio: float,
    ladders: Sequence[Sequence[int]],
    scores: Sequence[Tensor],
) -> np.ndarray:
    """Widths that remove `ratio` of the cost by taking the lowest-scored units of all groups first.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Widths that each group may have (`width_ladder`).
        scores: Comparable scores of each group's units, each with shape `(num_units,)`.

    Returns:
        Kept channels of each group, int64 with shape `(groups,)`.
    """
    ordered = [_by_channel(group, score) for group, score in zip(cost.groups, scores)]

    def unit_score(index: int, rung: int) -> float:
        """Mean score of the channels between two rungs."""
        first, last = (len(ordered[index]) - ladders[index][r] for r in (rung, rung + 1))
        return float(ordered[index][first:last].mean())

    rungs = before = [0] * len(ladders)
    kept = cost.dense.copy()
    heap = [(unit_score(index, 0), index) for index, ladder in enumerate(ladders) if len(ladder) > 1]
    heapq.heapify(heap)
    while heap and cost.removed(target, kept) < ratio:
        _, index = heapq.heappop(heap)
        before, rungs = rungs, [*rungs[:index], rungs[index] + 1, *rungs[index + 1 :]]
        kept[index] = ladders[index][rungs[index]]
        if rungs[index] + 1 < len(ladders[index]):
            heapq.heappush(heap, (unit_score(index, rungs[index]), index))
    return _nearer_end(cost, target, ratio, ladders, (rungs, before))


def select_units(group: ChannelGroup, scores: Tensor, keep: int, attention_unit: str = "head_dim") -> Tensor:
    """Keep the units of a group with the highest sum of scores; among equals, the first.

    Args:
        group: The channel group.
        scores: With shape `(num_units,)`.
        keep: Channels to keep, a width of the group's ladder.
        attention_unit: As in `width_ladder`.

    Returns:
        True for kept units, with shape `(num_units,)`.

    Raises:
        ValueError: Scores are not finite, or no units add up to so many channels.
    """
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores of {group.name} are not finite")
    if group.attention is None:
        return _best_units(group, scores, keep)
    head_dim = group.num_channels // group.heads
    by_head = scores.view(group.heads, head_dim)
    mask = torch.zeros_like(by_head, dtype=torch.bool)
    if attention_unit == "heads":
        heads = by_head.sum(dim=1).argsort(descending=True, stable=True)[: keep // head_dim]
        mask[heads] = True
    else:
        best = by_head.argsort(dim=1, descending=True, stable=True)[:, : keep // group.heads]
        mask.scatter_(1, best, True)
    return mask.view(-1)


def _best_units(group: ChannelGroup, scores: Tensor, keep: int) -> Tensor:
    """Of all sets of units with `keep` channels, the one with the highest sum of scores.

    Of the units of one size, the highest-scored are in it, so that it is enough to know how many of each size: all widths
    are built up size by size, each with its best sum so far.
    """
    best: dict[int, tuple[float, list[Tensor]]] = {len(group.fixed): (0.0, [])}
    for size in sorted(set(group.unit_sizes.tolist()), reverse=True):
        members = (group.unit_sizes == size).nonzero().flatten()
        ordered = members[scores[members].argsort(descending=True, stable=True)]
        sums = [0.0, *scores[ordered].double().cumsum(0).tolist()]
        wider: dict[int, tuple[float, list[Tensor]]] = {}
        for width, (total, chosen) in best.items():
            for number, value in enumerate(sums):
                reached = width + number * size
                if reached <= keep and (reached not in wider or total + value > wider[reached][0]):
                    wider[reached] = (total + value, [*chosen, ordered[:number]])
        best = wider
    if keep not in best:
        raise ValueError(f"keep={keep} of {group.name} must be a sum of its units and {len(group.fixed)} fixed channels")
    mask = torch.zeros(group.num_units, dtype=torch.bool)
    for chosen in best[keep][1]:
        mask[chosen] = True
    return mask
