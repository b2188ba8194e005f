"""Width and depth in one budget: which blocks are removed, besides the widths of all that stays.

Let R be a set of removed blocks. A block b costs its own measured damage E_b and saves all that is inside at its current
widths. There are four ways to remove the share `ratio` of the dense cost:

- sensitivity: R and the widths have the least predicted damage

      D(R)  =  sum_{b in R} E_b  +  sum_{g outside of R} S_g x_g^(1 + 1/beta)

  where the shares x_g are those by which the rest meets the budget (`allocation`). With the Lagrange multiplier mu of the
  budget, a block goes when E_b is less than the damage of thinning it plus mu times the cost of keeping it. This price selects
  candidates; a candidate is accepted if D, with widths allocated anew, is lower. The search starts without removed blocks, so
  that D is never higher than that of widths alone.
- group: all blocks together are a group of their own, which loses the same share as every group of channels; those with the
  lowest score for what they save go first.
- global: a block is a unit like any other (`allocation.allocate_global`).
- blocks only: the set with the least sum of E_b whose cost is within half of the tolerance of the budget, or the nearest.
  The cost of blocks is additive, so that dynamic programming over cost finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .allocation import allocate_by_sensitivity, allocate_per_group, sensitive_proportions, with_blocks
from .budget import BUDGET_TOLERANCE
from .cost_model import CostModel

__all__ = [
    "check_reachable",
    "choose_blocks",
    "is_reachable",
    "plan_widths",
    "remove_by_sensitivity",
    "remove_per_group",
    "saved_by_blocks",
    "widths_stay",
]

NEAR = BUDGET_TOLERANCE / 2  # of the dense cost: a budget counts as met in comparisons
GRAIN = 1e-5  # of the dense cost: resolution of the dynamic programming
SHORTLIST = 8  # candidates whose widths are allocated in each round
FINALISTS = 4  # sets whose widths are rounded to ladders in the end
REFINEMENTS = 5  # of the wanted share, where costs of blocks do not quite add up


def saved_by_blocks(cost: CostModel, target: str, widths: np.ndarray) -> dict[int, float]:
    """Share of the dense cost that the removal of each kept block saves at given widths, by index of the block."""
    saved = {}
    for block in cost.inner:
        without = np.array(widths)
        without[block] = 0
        saved[block] = cost.removed(target, without) - cost.removed(target, widths)
    return saved


def widths_stay(cost: CostModel, ladders: Sequence[Sequence[int]]) -> bool:
    """Whether only blocks can be removed."""
    return bool(cost.inner) and all(len(ladder) == 1 for index, ladder in enumerate(ladders) if index not in cost.inner)


def is_reachable(cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]]) -> bool:
    """Whether the narrowest widths of the ladders save enough for a budget."""
    return ratio <= cost.removed(target, np.array([ladder[-1] for ladder in ladders])) + BUDGET_TOLERANCE


def check_reachable(cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]]) -> None:
    """Check that the ladders can meet a budget.

    Raises:
        ValueError: The ratio is larger than the share that can be removed.
    """
    if not is_reachable(cost, target, ratio, ladders):
        most = cost.removed(target, np.array([ladder[-1] for ladder in ladders]))
        if widths_stay(cost, ladders):
            limits = "depth=only, which removes blocks and no channels; with depth=allow more can be removed"
        else:
            limits = "the given min_keep_ratio and channel_multiple, since norm groups are removed as a whole"
            limits += "" if cost.inner else "; with depth=allow, blocks can be removed, too"
        raise ValueError(
            f"ratio={ratio:g} of {target} cannot be removed: the maximum is {most:.3f} with {limits}"
            + ("; with a larger latency_batch_size more can be removed" if target == "latency" else "")
        )


def plan_widths(cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]]) -> np.ndarray:
    """Widths for a budget that do not depend on scores: the same share of every group, and of the blocks.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Possible widths of each group (`budget.width_ladder`).

    Returns:
        Kept channels of each group, 0 for removed blocks, int64 with shape `(groups,)`.
    """
    if not cost.inner:
        return allocate_per_group(cost, target, ratio, ladders)
    alike = dict.fromkeys(cost.inner, 1.0)
    if widths_stay(cost, ladders):
        return choose_blocks(cost, target, ratio, alike)
    return remove_per_group(cost, target, ratio, ladders, alike)


def _missed(share: float, ratio: float, near: float = NEAR) -> float:
    """By how much a removed share misses a budget; 0 if it is near."""
    return max(0.0, abs(share - ratio) - near)


# --- blocks only -------------------------------------------------------------------------------------------------------


def choose_blocks(cost: CostModel, target: str, ratio: float, damage: Mapping[int, float]) -> np.ndarray:
    """Remove `ratio` of the cost by blocks only, with the least sum of their damage.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        damage: Damage of removing each block, by its index.

    Returns:
        Kept channels of each group, 0 for removed blocks, int64 with shape `(groups,)`.
    """
    saved = saved_by_blocks(cost, target, cost.dense)
    wanted, best = ratio, cost.dense
    for _ in range(REFINEMENTS):
        widths = cost.dense.copy()
        widths[_knapsack(saved, damage, wanted)] = 0
        gap = cost.removed(target, widths) - ratio
        if abs(gap) < abs(cost.removed(target, best) - ratio) or best is cost.dense:
            best = widths
        if abs(gap) <= NEAR:
            return widths
        wanted -= gap
    return best


def _knapsack(saved: Mapping[int, float], damage: Mapping[int, float], wanted: float) -> list[int]:
    """Blocks with the least damage that save the wanted share, to within `NEAR` if possible."""
    sizes = {block: max(0, round(share / GRAIN)) for block, share in saved.items()}
    least = np.full(sum(sizes.values()) + 1, np.inf)  # damage by saved cost
    least[0] = 0.0
    taken = []
    for block, size in sizes.items():
        candidate = np.full_like(least, np.inf)
        candidate[size:] = least[: len(least) - size] + damage[block]
        better = candidate < least
        least = np.where(better, candidate, least)
        taken.append((block, size, better))
    distance = np.abs(np.arange(len(least)) - wanted / GRAIN)
    distance[np.isinf(least)] = np.inf
    near = distance <= max(NEAR / GRAIN, distance.min())
    at = int(np.flatnonzero(near)[least[near].argmin()])
    chosen = []
    for block, size, better in reversed(taken):
        if better[at]:
            chosen.append(block)
            at -= size
    return chosen


# --- blocks and widths -------------------------------------------------------------------------------------------------


def remove_per_group(
    cost: CostModel, target: str, ratio: float, ladders: Sequence[Sequence[int]], damage: Mapping[int, float]
) -> np.ndarray:
    """Remove `ratio` of the cost, with the same share of the blocks as of the channels of every group.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Possible widths of each group (`budget.width_ladder`).
        damage: Damage of removing each block, by its index.

    Returns:
        Kept channels of each group, 0 for removed blocks, int64 with shape `(groups,)`.
    """
    saved = saved_by_blocks(cost, target, cost.dense)
    order = sorted(cost.inner, key=lambda block: damage[block] / max(saved[block], GRAIN))
    channels = np.array([index not in cost.inner for index in range(len(cost.groups))])
    tried: dict[int, tuple[tuple[float, float], np.ndarray]] = {}

    def excess(count: int) -> float:
        """Share of removed blocks minus that of removed channels, when the first `count` blocks are removed."""
        widths = allocate_per_group(cost, target, ratio, with_blocks(cost, ladders, order[:count]))
        left, dense = (cost.present(np.where(channels, n, widths))[channels].sum() for n in (widths, cost.dense))
        difference = count / len(order) - (1 - left / dense)
        tried[count] = (_missed(cost.removed(target, widths), ratio), abs(difference)), widths
        return difference

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if excess(middle) >= 0 else (middle + 1, high)
    for count in {low, max(low - 1, 0)} - tried.keys():
        excess(count)
    # Near the largest budget, the narrowest channels do not save enough without more blocks
    for count in range(low + 1, len(order) + 1):
        if min(missed for (missed, _), _ in tried.values()) <= BUDGET_TOLERANCE - NEAR:
            break
        if count not in tried:
            excess(count)
    return min(tried.values(), key=lambda candidate: candidate[0])[1]


@dataclass(frozen=True)
class _Point:
    """Widths for a set of removed blocks.

    Attributes:
        removed: Indices of removed blocks.
        widths: Kept channels, not only those of ladders.
        price: Rise of the damage per share of the cost that narrower widths save; infinite if there are none.
        rank: By how much the budget is missed, and the damage.
    """

    removed: frozenset[int]
    widths: np.ndarray
    price: float
    rank: tuple[float, float]


class _Search:
    """Search for the blocks that `remove_by_sensitivity` removes; the arguments are the same."""

    def __init__(
        self,
        cost: CostModel,
        target: str,
        ratio: float,
        ladders: Sequence[Sequence[int]],
        scores: Sequence[Tensor],
        exponent: float,
    ) -> None:
        self.cost, self.target, self.ratio, self.ladders = cost, target, ratio, ladders
        self.scores, self.exponent = scores, exponent
        self.power = 1 + 1 / exponent
        self.sums = np.array([float(score.double().abs().sum()) for score in scores])
        self.points: dict[frozenset[int], _Point] = {}

    def damages(self, widths: np.ndarray) -> np.ndarray:
        """Terms of D, with shape `(groups,)`."""
        shares = 1 - widths / self.cost.dense
        damages = self.sums * shares**self.power
        blocks = list(self.cost.inner)
        damages[blocks] = self.sums[blocks] * shares[blocks]
        for block, inner in self.cost.inner.items():
            if widths[block] == 0:
                damages[inner] = 0.0
        return damages

    def point(self, removed: frozenset[int]) -> _Point:
        """Widths that meet the budget with a set of removed blocks."""
        if removed not in self.points:
            self.points[removed] = self._make_point(removed)
        return self.points[removed]

    def _make_point(self, removed: frozenset[int]) -> _Point:
        ladders = with_blocks(self.cost, self.ladders, removed)
        proportions = sensitive_proportions(self.cost, self.target, ladders, self.scores, self.exponent)
        widest, least = (np.array([ladder[end] for ladder in ladders]) for end in (0, -1))

        def widths_at(scale: float) -> np.ndarray:
            return np.maximum(np.rint(widest * (1 - np.minimum(scale * proportions, 1.0))), least).astype(np.int64)

        low, high = 0.0, float(1 / proportions.min())
        for _ in range(30 + int(np.ceil(np.log2(high)))):
            middle = (low + high) / 2
            below = self.cost.removed(self.target, widths_at(middle)) <= self.ratio
            low, high = (middle, high) if below else (low, middle)
        widths, narrower = widths_at(high), widths_at(1.05 * high)
        share = self.cost.removed(self.target, widths)
        damage = float(self.damages(widths).sum())
        saves = self.cost.removed(self.target, narrower) - share
        price = (float(self.damages(narrower).sum()) - damage) / saves if saves > 0 else np.inf
        return _Point(removed, widths, price, (_missed(share, self.ratio), damage))

    def candidates(self, point: _Point) -> list[frozenset[int]]:
        """Sets with one block more or less, the most promising ones first."""
        gains = {}
        damages = self.damages(point.widths)
        for block in self.cost.inner:
            other = point.widths.copy()
            other[block] = 1 - other[block]
            saved = self.cost.removed(self.target, other) - self.cost.removed(self.target, point.widths)
            rise = float(self.damages(other).sum() - damages.sum())
            gains[block] = saved / max(rise, 1e-30) if np.isinf(point.price) else point.price * saved - rise
        order = sorted(gains, key=gains.get, reverse=True)[:SHORTLIST]
        return [point.removed ^ {block} for block in order]

    def best(self) -> list[frozenset[int]]:
        """No block, and the sets with the lowest rank on the way to a set that no single change improves."""
        now = self.point(frozenset())
        while True:
            points = [self.point(removed) for removed in self.candidates(now)]
            best = min(points, key=lambda point: point.rank)
            if not best.rank < now.rank:
                break
            now = best
        order = sorted(self.points.values(), key=lambda point: (point.rank, sorted(point.removed)))
        return list(dict.fromkeys([frozenset(), *(point.removed for point in order[:FINALISTS])]))


def remove_by_sensitivity(
    cost: CostModel,
    target: str,
    ratio: float,
    ladders: Sequence[Sequence[int]],
    scores: Sequence[Tensor],
    exponent: float,
) -> np.ndarray:
    """Remove `ratio` of the cost by blocks and widths, with the least predicted damage D.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Possible widths of each group (`budget.width_ladder`).
        scores: Scores of each group's units, on the same scale for all groups, each with shape `(num_units,)`; those of
            blocks are E_b.
        exponent: beta (> 0).

    Returns:
        Kept channels of each group, 0 for removed blocks, int64 with shape `(groups,)`.
    """
    search = _Search(cost, target, ratio, ladders, scores, exponent)
    found = []
    for removed in search.best():
        widths = allocate_by_sensitivity(cost, target, ratio, with_blocks(cost, ladders, removed), scores, exponent)
        missed = _missed(cost.removed(target, widths), ratio, BUDGET_TOLERANCE)  # ladders are coarser than the search
        rank = missed, float(search.damages(widths).sum())
        found.append((rank, len(removed), widths))
    return min(found, key=lambda candidate: candidate[:2])[2]
