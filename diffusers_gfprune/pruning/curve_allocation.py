"""Allocation of widths by damage curves: the least sum of measured damage for a budget.

With D_g the curve of group g (`damage_curves`), n its width and C the cost of all widths together, the problem is

    min over n of   sum_g D_g(n_g)        such that   C(n) = (1 - ratio) C(dense)

with every n_g from the ladder of its group. That damage of several groups adds up is an approximation, since what one group
loses others may need. A factor that all groups have in common changes no allocation.

C is not a sum over groups, since a layer costs the product of two widths. The search therefore moves along ladders with exact
costs (`cost_model`, or the times of a `LatencyModel`). It starts from the same share of every group. (1) With costs that are
linear around the widths found so far, and so a sum over groups, dynamic programming over cost finds the best widths of all.
(2) Groups take up to three steps, alone or in pairs and in opposite directions, as long as the sum falls and the budget is
met. Both are repeated a few times, and the best widths on the way are taken.

A removable block (`blocks`) has the widths 1 and 0. Its damage replaces those of the groups inside. With blocks, the search
also starts from dense widths, where the group or block with the least rise of damage per saved cost takes the next step down
until the budget is met. Rises are those of the lower convex hull of a curve, so that a cheap step behind an expensive one is
reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .budget import BUDGET_TOLERANCE
from .cost_model import CostModel
from .damage_curves import DamageCurve

__all__ = ["allocate_by_curves"]

NEAR = BUDGET_TOLERANCE / 20  # of the dense cost: distance to the target that counts as met
REACH = 3  # rungs that a group moves at once in the local search
MOVES = 50  # of the local search in a round
SHORTLIST = 32  # pairs whose cost is computed exactly
GRAIN = 2e-5  # of the dense cost: resolution of the dynamic programming
ROUNDS = 5  # of the dynamic programming and the local search
LEAST_GAIN = 1e-9  # of the damage, for another move


@dataclass(frozen=True)
class _Move:
    """A group on another rung: index, rungs of all groups afterwards, rise of the damage, and saved share of the cost."""

    group: int
    rungs: np.ndarray
    rise: float
    saved: float


class _Search:
    """Rungs of all groups, and what moves change. The arguments are those of `allocate_by_curves`."""

    def __init__(self, cost: CostModel, target: str, ladders: Sequence[Sequence[int]], curves: Sequence[DamageCurve]) -> None:
        self.cost, self.target, self.ladders = cost, target, ladders
        self.damage = [np.array([curve.at(width) for width in ladder]) for curve, ladder in zip(curves, ladders)]
        self.hull = [_lower_hull(np.array(ladder), damage) for ladder, damage in zip(ladders, self.damage)]
        self.block_of = {index: block for block, inner in cost.inner.items() for index in inner}
        self._dense = cost.cost(target, cost.dense)

    def widths(self, rungs: np.ndarray) -> np.ndarray:
        """Kept channels of each group."""
        return np.array([ladder[rung] for ladder, rung in zip(self.ladders, rungs)])

    def removed(self, rungs: np.ndarray) -> float:
        """Removed share of the cost."""
        return 1 - self.cost.cost(self.target, self.widths(rungs)) / self._dense

    def total(self, rungs: np.ndarray, damage: Sequence[np.ndarray] | None = None) -> float:
        """Sum of the damage; groups inside of removed blocks are dense, and have none."""
        return float(sum(of_group[rung] for of_group, rung in zip(damage or self.damage, rungs)))

    def rank(self, rungs: np.ndarray, ratio: float) -> tuple[float, float]:
        """By how much a budget is missed, 0 if it is near; and the damage."""
        return max(abs(self.removed(rungs) - ratio) - NEAR, 0.0), self.total(rungs)

    def after(self, rungs: np.ndarray, group: int, rung: int) -> np.ndarray:
        """Rungs after a move; the removal of a block restores the groups inside."""
        moved = rungs.copy()
        moved[group] = rung
        moved[self.cost.inner.get(group, [])] = 0
        return moved

    def moves(self, rungs: np.ndarray, steps: Sequence[int], damage: Sequence[np.ndarray] | None = None) -> list[_Move]:
        """Moves of single groups by some numbers of rungs, downwards if these are positive."""
        before, share, found = self.total(rungs, damage), self.removed(rungs), []
        for group, ladder in enumerate(self.ladders):
            block = self.block_of.get(group)
            if block is not None and self.ladders[block][rungs[block]] == 0:
                continue
            for step in steps:
                if 0 <= rungs[group] + step < len(ladder):
                    moved = self.after(rungs, group, rungs[group] + step)
                    found.append(_Move(group, moved, self.total(moved, damage) - before, self.removed(moved) - share))
        return found


def _lower_hull(ladder: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """The largest convex function of the width that is nowhere above the damage, at the widths of a ladder."""
    hull = [0]
    for rung in range(1, len(ladder)):
        while len(hull) > 1:
            first, last = hull[-2:]
            slope = (damage[last] - damage[first]) / (ladder[first] - ladder[last])
            if (damage[rung] - damage[last]) / (ladder[last] - ladder[rung]) > slope:
                break
            hull.pop()
        hull.append(rung)
    return np.interp(-ladder, -ladder[hull], damage[hull])


def allocate_by_curves(
    cost: CostModel,
    target: str,
    ratio: float,
    ladders: Sequence[Sequence[int]],
    curves: Sequence[DamageCurve],
    start: Sequence[int],
) -> np.ndarray:
    """Widths that remove `ratio` of the cost with the least sum of damage.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Possible widths of each group (`budget.width_ladder`), also of blocks.
        curves: Damage curve of each group.
        start: Widths that meet the budget, such as those of `depth.plan_widths`, where the search starts.

    Returns:
        Kept channels of each group, 0 for removed blocks, int64 with shape `(groups,)`.
    """
    search = _Search(cost, target, ladders, curves)
    even = np.array([list(ladder).index(width) for ladder, width in zip(ladders, start)])
    starts = [even, _greedy(search, ratio)] if cost.inner else [even]
    found: list[np.ndarray] = []
    for point in starts:
        for _ in range(ROUNDS):  # each from the last widths, not the best ones: another point to be linear around
            point = _improve(search, ratio, _best_of_linear(search, ratio, point))
            if any(np.array_equal(point, earlier) for earlier in found):
                break
            found.append(point)
    best = min(found, key=lambda candidate: search.rank(candidate, ratio))
    return search.widths(best).astype(np.int64)


def _greedy(search: _Search, ratio: float) -> np.ndarray:
    """From dense widths, the group or block with the least rise of damage per saved cost takes the next step, until the budget
    is met."""
    rungs = np.zeros(len(search.ladders), dtype=np.int64)
    while search.removed(rungs) < ratio:
        saving = [move for move in search.moves(rungs, [1], search.hull) if move.saved > 0]
        if not saving:
            break
        rungs = min(saving, key=lambda move: move.rise / move.saved).rungs
    return rungs


def _best_of_linear(search: _Search, ratio: float, rungs: np.ndarray) -> np.ndarray:
    """The rungs with the least damage if the cost of each group does not depend on the others. Blocks stay as they are."""
    share = search.removed(rungs)
    gone = {index for block, inner in search.cost.inner.items() if search.ladders[block][rungs[block]] == 0 for index in inner}
    options: dict[int, np.ndarray] = {}  # cost that each rung saves, in grains, by group
    wanted = (ratio - share) / GRAIN
    for group, ladder in enumerate(search.ladders):
        if group not in gone and group not in search.cost.inner and len(ladder) > 1:
            saved = np.array([search.removed(search.after(rungs, group, rung)) for rung in range(len(ladder))])
            options[group] = np.rint((saved - saved.min()) / GRAIN).astype(np.int64)
            wanted += options[group][rungs[group]]
    if not options:
        return rungs
    least = np.zeros(1)  # damage by saved cost
    taken: list[np.ndarray] = []
    for group, sizes in options.items():
        wider = np.full(len(least) + int(sizes.max()), np.inf)
        choice = np.zeros(len(wider), dtype=np.int16)
        for rung, size in enumerate(sizes.tolist()):
            part = slice(size, size + len(least))
            better = least + search.damage[group][rung] < wider[part]
            wider[part] = np.where(better, least + search.damage[group][rung], wider[part])
            choice[part] = np.where(better, rung, choice[part])
        least = wider
        taken.append(choice)
    distance = np.abs(np.arange(len(least)) - wanted)
    distance[np.isinf(least)] = np.inf
    near = distance <= max(NEAR / GRAIN, distance.min())
    at = int(np.flatnonzero(near)[least[near].argmin()])
    found = rungs.copy()
    for (group, sizes), choice in zip(reversed(options.items()), reversed(taken)):
        found[group] = choice[at]
        at -= int(sizes[choice[at]])
    return found


def _improve(search: _Search, ratio: float, rungs: np.ndarray) -> np.ndarray:
    """Moves of one or two groups to lower damage, at a budget that is met, or met more nearly."""
    steps = [step for step in range(-REACH, REACH + 1) if step]
    for _ in range(MOVES):
        gap, damage = search.removed(rungs) - ratio, search.total(rungs)
        moves = search.moves(rungs, steps)
        if not moves:
            return rungs
        rises = np.array([move.rise for move in moves])
        saved = np.array([move.saved for move in moves])
        group = np.array([move.group for move in moves])
        block = np.array([search.block_of.get(index, -1) for index in group])
        excluded = (group[:, None] == group) | (group[:, None] == block) | (block[:, None] == group)
        pairs = np.where(excluded, np.inf, rises[:, None] + rises)
        rise = np.concatenate([rises, pairs[np.triu_indices(len(moves), 1)]])
        first, second = np.triu_indices(len(moves), 1)
        gaps = np.abs(gap + np.concatenate([saved, saved[first] + saved[second]]))
        missed = np.maximum(gaps - NEAR, 0)
        now = max(abs(gap) - NEAR, 0)
        better = np.isfinite(rise) & ((missed < now - 1e-12) | ((missed <= now) & (rise < -LEAST_GAIN * damage)))
        order = np.flatnonzero(better)
        order = order[np.lexsort((rise[order], np.round(missed[order], 9)))][:SHORTLIST]
        for candidate in order.tolist():
            chosen = [candidate] if candidate < len(moves) else [p[candidate - len(moves)] for p in (first, second)]
            moved = rungs
            for number in chosen:
                move = moves[number]
                moved = search.after(moved, move.group, int(move.rungs[move.group]))
            # The costs of two moves do not quite add up
            miss = max(abs(search.removed(moved) - ratio) - NEAR, 0)
            if miss < now - 1e-12 or (miss <= now and search.total(moved) < damage * (1 - LEAST_GAIN)):
                rungs = moved
                break
        else:
            return rungs
    return rungs
