"""Allocation of widths: from scores and a target cost to the channels that each group keeps.

There are three ways to remove the share `ratio` of the dense cost:

- group: every group keeps the same share of its channels, found by bisection;
- sensitivity: a group loses more if this saves more cost and if its scores are lower;
- global: the channels with the lowest scores of all groups are removed first, unit by unit. Scores of units are divided by
  their number of channels, and by the mean over the channels of the group (`scoring.importance.normalize_scores`).

All end with single steps of single groups towards the target, so that it is met to within one unit of one group. Widths come
from the ladders of `budget`. The first two keep the blocks that the ladders leave (`with_blocks`), which `depth` chooses; the
third removes a block as any other unit.

Widths by sensitivity. Let S_g be the sum of absolute scores in group g, W_g the cost of the whole group, and
S_g x_g^(1 + 1/beta) the damage of removing a share x_g of it. The last channels of a group cause more damage than the first; a
plain sum of scores, the case beta -> infinity, ignores this. The damage for sum_g W_g x_g = ratio sum_g W_g is minimal at

    x_g  =  lambda (W_g / S_g)^beta

with lambda found by bisection; beta = 0 is the same share for all. A group without scores goes to its narrowest width before
the others lose anything to speak of; their shares stay in proportion. The exponent should be smaller for criteria whose sums
spread further: 0.3 suits sums in the metric of predictions. Sums in the metric of weights spread over about half as many
decades (measurements, also of other exponents: benchmarks/README.md).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from operator import neg

import numpy as np
import torch
from torch import Tensor

from .budget import BUDGET_TOLERANCE
from .channel_groups import ChannelGroup
from .cost_model import CostModel

__all__ = [
    "allocate_by_sensitivity",
    "allocate_global",
    "allocate_per_group",
    "sensitive_proportions",
    "with_blocks",
]

_SMALLEST = 1e-12  # of the largest sensitivity, and of the largest share
_LARGEST = 1e6  # share, relative to the median of groups with a score


def _nearest(ladder: Sequence[int], width: float) -> int:
    """Index of the nearest width in a ladder, which is in descending order; of two equally near ones, the wider."""
    below = bisect_left(ladder, -width, key=neg)
    if below in (0, len(ladder)):
        return min(below, len(ladder) - 1)
    return below - 1 if ladder[below - 1] - width <= width - ladder[below] else below


def _polish(
    cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]], rungs: list[int], moves: int = 500
) -> np.ndarray:
    """Take single steps that bring the removed share closer to `ratio`, until none does.

    Large steps can stall outside of the tolerance. Two steps at once, of two groups, are then tried.
    """

    def widths(candidate: Sequence[int]) -> np.ndarray:
        return np.array([ladder[rung] for ladder, rung in zip(ladders, candidate)])

    def gap_of(candidate: Sequence[int]) -> float:
        return abs(cost.removed(target, widths(candidate)) - ratio)

    def steps(rungs: list[int], first: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Every single step of the groups from `first` on, with the group's index."""
        for index in range(first, len(ladders)):
            for step in (-1, 1):
                if 0 <= rungs[index] + step < len(ladders[index]):
                    yield index, [*rungs[:index], rungs[index] + step, *rungs[index + 1 :]]

    gap = gap_of(rungs)
    for _ in range(moves):
        if gap <= BUDGET_TOLERANCE / 20:
            break
        candidates = (candidate for _, candidate in steps(rungs))
        best = min(candidates, key=gap_of, default=rungs)
        if gap_of(best) >= gap and gap > BUDGET_TOLERANCE:
            pairs = (second for index, first in steps(rungs) for _, second in steps(first, index + 1))
            best = min(pairs, key=gap_of, default=rungs)
        if gap_of(best) >= gap:
            break
        rungs, gap = best, gap_of(best)
    return widths(rungs)


def _nearer_end(
    cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]], ends: Sequence[list[int]]
) -> np.ndarray:
    """Polish the widths on both sides of the target and return the nearer ones: large steps can stall on one side.

    The blocks of each end stay as they are.
    """
    polished = []
    for rungs in ends:
        gone = frozenset(block for block in cost.inner if ladders[block][rungs[block]] == 0)
        fixed = with_blocks(cost, ladders, gone)
        inside = {index for block in cost.inner if block in gone for index in cost.inner[block]}
        start = [0 if index in cost.inner or index in inside else rung for index, rung in enumerate(rungs)]
        polished.append(_polish(cost, target, ratio, fixed, start))
    return min(polished, key=lambda widths: abs(cost.removed(target, widths) - ratio))


def with_blocks(cost: CostModel, ladders: Sequence[Sequence[int]], removed: Collection[int]) -> list[Sequence[int]]:
    """Ladders with one width for blocks, and for groups inside of removed blocks.

    Args:
        cost: The cost model.
        ladders: Possible widths of each group.
        removed: Indices of removed blocks.
    """
    fixed = list(ladders)
    for block, inner in cost.inner.items():
        fixed[block] = [0 if block in removed else 1]
        for index in inner if block in removed else ():
            fixed[index] = ladders[index][:1]
    return fixed


def allocate_per_group(cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]]) -> np.ndarray:
    """Widths that remove `ratio` of the cost with (nearly) the same share kept in every group.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Possible widths of each group (`width_ladder`).

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
    """Widths that remove `ratio` of the cost, more from groups with high cost and low scores.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Possible widths of each group (`width_ladder`).
        scores: Scores of each group's units, on the same scale for all groups, each with shape `(num_units,)`.
        exponent: beta of the module docstring (>= 0); 0 is equal to `allocate_per_group`.

    Returns:
        Kept channels of each group, int64 with shape `(groups,)`.
    """
    proportions = sensitive_proportions(cost, target, ladders, scores, exponent)
    return _allocate_in_proportion(cost, target, ratio, ladders, proportions)


def sensitive_proportions(
    cost: CostModel, target: str, ladders: Sequence[Sequence[int]], scores: Sequence[Tensor], exponent: float
) -> np.ndarray:
    """(W_g / S_g)^beta of the module docstring, up to a factor, > 0 with shape `(groups,)`. Arguments are those of
    `allocate_by_sensitivity`."""
    sensitivity = np.array([float(score.double().abs().sum()) for score in scores])
    sensitivity[list(cost.inner)] = 0.0  # blocks have no width
    widest = np.array([ladder[0] for ladder in ladders])
    saved = np.maximum(cost.marginal(target, widest), 0.0) * widest  # measured times can fall with the width
    # A group of zeros reaches its floor first, but shares stay finite.
    least = _SMALLEST * sensitivity.max() if sensitivity.any() else 1.0
    gain = saved / np.maximum(sensitivity, least)
    gain[list(cost.inner)] = 0.0
    most = gain.max() or 1.0
    scored = gain[(sensitivity > least) & (gain > 0)]
    if exponent > 0 and len(scored):  # the shares of others are in proportion, however large that of a group of zeros
        most = min(most, np.median(scored) * 10 ** min(math.log10(_LARGEST) / exponent, 300.0))
    proportions = np.maximum(np.minimum(gain / most, 1.0) ** exponent, _SMALLEST)
    proportions[list(cost.inner)] = 1.0
    return proportions


def _allocate_in_proportion(
    cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]], proportions: np.ndarray
) -> np.ndarray:
    """Widths that remove `ratio` of the cost, with removed shares in given proportions (> 0) as far as ladders allow."""

    def rungs_at(scale: float) -> list[int]:
        return [
            _nearest(ladder, (1 - min(scale * proportion, 1.0)) * ladder[0])
            for ladder, proportion in zip(ladders, proportions)
        ]

    low, high = 0.0, float(1 / proportions.min())  # where every group is at its floor
    for _ in range(40 + math.ceil(math.log2(high))):
        middle = (low + high) / 2
        widths = np.array([ladder[rung] for ladder, rung in zip(ladders, rungs_at(middle))])
        low, high = (middle, high) if cost.removed(target, widths) <= ratio else (low, middle)
    return _nearer_end(cost, target, ratio, ladders, [rungs_at(scale) for scale in (low, high)])


def _by_channel(group: ChannelGroup, scores: Tensor) -> np.ndarray:
    """Scores divided equally among the channels of each unit, in ascending order; fixed channels are last."""
    each = torch.repeat_interleave(scores.double().cpu() / group.unit_sizes, group.unit_sizes)
    return np.concatenate([np.sort(each.numpy()), np.full(len(group.fixed), np.inf)])


def allocate_global(
    cost: CostModel,
    target: str,
    ratio: float,
    ladders: Sequence[Sequence[int]],
    scores: Sequence[Tensor],
) -> np.ndarray:
    """Widths that remove `ratio` of the cost, the lowest-scored units of all groups first.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Possible widths of each group (`width_ladder`), also of blocks.
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
    widths = cost.dense.copy()
    block_of = {index: block for block, inner in cost.inner.items() for index in inner}
    heap = [(unit_score(index, 0), index) for index, ladder in enumerate(ladders) if len(ladder) > 1]
    heapq.heapify(heap)
    while heap and cost.removed(target, widths) < ratio:
        _, index = heapq.heappop(heap)
        if index in block_of and widths[block_of[index]] == 0:
            continue  # its channels are gone with their block
        before, rungs = rungs, [*rungs[:index], rungs[index] + 1, *rungs[index + 1 :]]
        widths[index] = ladders[index][rungs[index]]
        if rungs[index] + 1 < len(ladders[index]):
            heapq.heappush(heap, (unit_score(index, rungs[index]), index))
    return _nearer_end(cost, target, ratio, ladders, (rungs, before))
