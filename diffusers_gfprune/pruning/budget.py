"""Budgets: from scores and a target cost to the units that each group keeps.

The possible widths of a group form a ladder: its dense width, and the sums of its units that are multiples of
`channel_multiple` (inside attention also of the heads), down to a floor. There are three ways to remove the share `ratio` of
the dense cost:

- group: every group keeps the same share of its channels, found by bisection;
- sensitivity: a group loses more if this saves more cost and if its scores are lower;
- global: the lowest-scored units of all groups are removed first.

All end with single steps of single groups towards the target, so that it is met to within one unit of one group.

Widths by sensitivity. Let S_g be the sum of absolute scores in group g, W_g the cost of the whole group, and
S_g x_g^(1 + 1/beta) the damage of removing a share x_g of it. The last channels of a group cause more damage than the first; a
plain sum of scores, the case beta -> infinity, ignores this. The damage for sum_g W_g x_g = ratio sum_g W_g is minimal at

    x_g  =  lambda (W_g / S_g)^beta

with lambda found by bisection; beta = 0 is the same share for all. The exponent should be smaller for criteria whose sums
spread further: 0.3 suits sums in the metric of predictions. Sums in the metric of weights spread over about half as many
decades (measurements, also of other exponents: benchmarks/README.md).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import neg

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
# Channels that kernels process together: CPUs with AVX-512; tensor cores in float32 (TF32); tensor cores in half precision,
# where an H100 gains from tiles of 64 channels (benchmarks/README.md)
HARDWARE_MULTIPLES = {"cpu": 16, "cuda": 8, "cuda, half precision": 64}
# Minimum number of widths below the dense one for a block size; with four, the digits model loses too much accuracy
ALIGNED_WIDTHS = 5
_SMALLEST = 1e-12  # of the largest sensitivity, and of the largest share


def _reachable(sizes: Mapping[int, int]) -> list[int]:
    """All sums of units, given the number of units of each size, in ascending order."""
    sums = {0}
    for size, count in sizes.items():
        sums = {total + size * number for total in sums for number in range(count + 1)}
    return sorted(sums)


def width_ladder(
    group: ChannelGroup, channel_multiple: int = 1, min_keep_ratio: float = 0.0, attention_unit: str = "head_dim"
) -> list[int]:
    """Possible widths of a group, the dense one first.

    Args:
        group: The channel group.
        channel_multiple: Widths below the dense one are multiples of this (>= 1).
        min_keep_ratio: Minimum share of channels to keep, in [0, 1].
        attention_unit: Inside attention, `"head_dim"` shrinks all heads equally, `"heads"` removes whole heads.

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
    """Number of channels that kernels of a device process together; 1 if unknown.

    Args:
        device: PyTorch's device type.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
    """
    half = device == "cuda" and dtype != "float32"
    return HARDWARE_MULTIPLES.get("cuda, half precision" if half else device, 1)


def aligned_ladder(group: ChannelGroup, block: int, min_keep_ratio: float, attention_unit: str) -> list[int]:
    """`width_ladder` for kernels that compute channels in blocks.

    Full blocks are fastest, both for layers that write the channels and for layers that read them with others. If the sums of
    units give too few such widths, the ladder has the largest width for each number of blocks: with units of 10 channels and
    blocks of 16, 60 channels take the same time as 50. If these are also too few, the block size is halved, repeatedly.

    Args:
        group: The channel group.
        block: Channels per block (`hardware_multiple`), a power of two.
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
    """Check that the ladders can meet a budget.

    Raises:
        ValueError: The ratio is larger than the share that can be removed.
    """
    most = cost.removed(target, np.array([ladder[-1] for ladder in ladders]))
    if ratio > most + BUDGET_TOLERANCE:
        raise ValueError(
            f"ratio={ratio:g} of {target} cannot be removed: the maximum is {most:.3f} with the given min_keep_ratio and "
            f"channel_multiple, since norm groups are removed as a whole"
            + ("; with a larger latency_batch_size more can be removed" if target == "latency" else "")
        )


def _nearest(ladder: Sequence[int], width: float) -> int:
    """Index of the nearest width in a ladder, which is in descending order; of two equally near ones, the wider."""
    below = bisect_left(ladder, -width, key=neg)
    if below in (0, len(ladder)):
        return min(below, len(ladder) - 1)
    return below - 1 if ladder[below - 1] - width <= width - ladder[below] else below


def _polish(
    cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]], rungs: list[int], moves: int = 500
) -> np.ndarray:
    """Take single steps that bring the removed share closer to `ratio`, until none does."""

    def widths(candidate: Sequence[int]) -> np.ndarray:
        return np.array([ladder[rung] for ladder, rung in zip(ladders, candidate)])

    gap = abs(cost.removed(target, widths(rungs)) - ratio)
    for _ in range(moves):
        best = None
        if gap > BUDGET_TOLERANCE / 20:
            for index, ladder in enumerate(ladders):
                for step in (-1, 1):
                    if not 0 <= rungs[index] + step < len(ladder):
                        continue
                    candidate = [*rungs[:index], rungs[index] + step, *rungs[index + 1 :]]
                    candidate_gap = abs(cost.removed(target, widths(candidate)) - ratio)
                    if candidate_gap < gap:
                        best, gap = candidate, candidate_gap
        if best is None:
            break
        rungs = best
    return widths(rungs)


def _nearer_end(
    cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]], ends: Sequence[list[int]]
) -> np.ndarray:
    """Polish the widths on both sides of the target and return the nearer ones: large steps can stall on one side."""
    polished = [_polish(cost, target, ratio, ladders, rungs) for rungs in ends]
    return min(polished, key=lambda widths: abs(cost.removed(target, widths) - ratio))


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
    sensitivity = np.array([float(score.double().abs().sum()) for score in scores])
    saved = cost.marginal(target, cost.dense) * cost.dense
    # A group of zeros reaches its floor first, but shares stay finite.
    gain = saved / np.maximum(sensitivity, _SMALLEST * sensitivity.max() if sensitivity.any() else 1.0)
    proportions = np.maximum((gain / gain.max()) ** exponent, _SMALLEST)
    return _allocate_in_proportion(cost, target, ratio, ladders, proportions)


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
        ladders: Possible widths of each group (`width_ladder`).
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
    heap = [(unit_score(index, 0), index) for index, ladder in enumerate(ladders) if len(ladder) > 1]
    heapq.heapify(heap)
    while heap and cost.removed(target, widths) < ratio:
        _, index = heapq.heappop(heap)
        before, rungs = rungs, [*rungs[:index], rungs[index] + 1, *rungs[index + 1 :]]
        widths[index] = ladders[index][rungs[index]]
        if rungs[index] + 1 < len(ladders[index]):
            heapq.heappush(heap, (unit_score(index, rungs[index]), index))
    return _nearer_end(cost, target, ratio, ladders, (rungs, before))


def select_units(group: ChannelGroup, scores: Tensor, keep: int, attention_unit: str = "head_dim") -> Tensor:
    """Select the units of a group with the highest sum of scores; among equal scores, the first.

    Args:
        group: The channel group.
        scores: Scores with shape `(num_units,)`.
        keep: Number of channels to keep, a width of the group's ladder.
        attention_unit: As in `width_ladder`.

    Returns:
        True for kept units, with shape `(num_units,)`.

    Raises:
        ValueError: Scores are not finite, or no set of units has `keep` channels.
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
    """The set of units with `keep` channels and the highest sum of scores.

    It contains the highest-scored units of each size, so that only their numbers are unknown. Dynamic programming over sizes
    finds the best sum for every width.
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
