"""Joint choice of units: meet a budget with the least predicted change of the predictions.

Let v_u be the change of the predictions f to first order when unit u is removed (`scoring.natural_gradient`), and I_u the sum
of E |v_c|^2 over the channels c of u. Changes of different units add up or cancel, also between groups: a block whose last
layer looks expensive alone can be cheap to remove together with an earlier one. The damage of removing a set R of units, with
R_g in group g, is estimated by

    D(R) = E |sum_{u in R} v_u|^2 + sum_g (n_g / k_g) sum_{u in R_g} I_u

The first term is the joint first-order change. The second holds what remains if changes do not cancel as predicted; it grows
as a group keeps k_g of its n_g channels, since the first-order change underestimates the damage of the last channels.

`changes` holds r^T v_u for random probes r as rows, scaled so that their sum of squares is the mean:

    E |sum_{u in R} v_u|^2 = |sum_{u in R} changes[:, u]|^2

The first-order change of a set R is most accurate around the midpoint of its removal. There, masks are 1/2 in R, and an
expansion to second order predicts the same change f(1) - f(1 - 1_R) as one to first order:

    f(1) - f(1 - 1_R) = sum_{u in R} df/dm_u(1 - 1_R / 2) + terms of third order

R is not known before it is chosen. A first choice is made from the derivatives of the dense model, and a second from those at
its midpoint. Later rankings use the midpoint of the choice before them.

A removable block is a unit, too: its removal replaces the changes of all units inside by its own (`joint_search`).

The search is greedy, followed by local search. (1) Single steps of single groups down their ladders, by the least rise of D
per saved cost. (2) Units are exchanged within groups, and pairs of groups take a step in opposite directions, as long as D
falls; the same steps bring the cost to the target. (3) With removable blocks, the search runs with and without them, and goes
on from the lower D: a block is removed or restored, other groups widen or narrow until the budget is met, and the result is
kept if D is lower.

The damage of a block is measured, that of channels is predicted, and predictions of many channels are too low or too high by a
common factor. Choices with other blocks are therefore candidates as well (`joint_candidates`), which are measured in the end
(`scoring.removals`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from .blocks import RemovableBlock
from .budget import BUDGET_TOLERANCE
from .channel_groups import ChannelGroup
from .cost_model import CostModel
from .joint_search import LEAST_GAIN, SHORTLIST, Search, Step, UnitDamage

__all__ = ["SEPARATE", "UnitDamage", "exchange_units", "joint_candidates"]

SEPARATE = 1.0  # weight of the second term of D, for what fills `UnitDamage.separate`
ROUNDS = 5  # of local search
MOVES = 300  # of pairs of groups in a round
NEAR = 5e-4  # of the dense cost: distance to the target where the search stops
NEAR_BY_BLOCKS = BUDGET_TOLERANCE / 2  # the same if only blocks are removed
GAP_DECIMALS = 9  # of the dense cost: distances to the target that count as equal
TRADES = 4  # blocks that are tried in a round
CANDIDATES = 6  # sets of removed blocks


class _StepCosts:
    """Cost of steps, remembered until a layer of the group has other widths."""

    def __init__(self, cost: CostModel, target: str) -> None:
        self._cost, self._target = cost, target
        self._dense = cost.cost(target, cost.dense)
        groups_of: dict[str, set[int]] = {}
        places = [
            group.inside if isinstance(group, RemovableBlock) else {piece.module for piece in group.slices}
            for group in cost.groups
        ]
        for index, modules in enumerate(places):
            for module in modules:
                groups_of.setdefault(module, set()).add(index)
        self._neighbours = [sorted(set().union(*(groups_of[module] for module in modules))) for modules in places]
        self._saved: list[dict[int, float]] = [{} for _ in cost.groups]

    def removed(self, widths: np.ndarray) -> float:
        """Share of the dense cost that is removed."""
        return 1 - self._cost.cost(self._target, widths) / self._dense

    def saved(self, widths: np.ndarray, step: Step) -> float:
        """Share of the dense cost that a step saves."""
        known = self._saved[step.group]
        if step.width not in known:
            after = widths.copy()
            after[step.group] = step.width
            known[step.width] = self.removed(after) - self.removed(widths)
        return known[step.width]

    def forget(self, group: int | None = None) -> None:
        """Forget costs that depend on the width of a group (default: all)."""
        if group is None:
            for known in self._saved:
                known.clear()
            return
        for index in self._neighbours[group]:
            self._saved[index].clear()


def joint_candidates(
    cost: CostModel,
    target: str,
    ratio: float,
    ladders: Sequence[Sequence[int]],
    damage: UnitDamage,
    attention_unit: str = "head_dim",
) -> list[dict[str, Tensor]]:
    """Choices of units for a budget that differ in their removed blocks, with the least predicted damage first.

    Args:
        cost: The cost model.
        target: One of `TARGETS`.
        ratio: Share of the dense cost to remove, in [0, 1].
        ladders: Possible widths of each group (`budget.width_ladder`).
        damage: Measured changes of all units.
        attention_unit: As in `width_ladder`.

    Returns:
        At most `CANDIDATES` choices: True for kept units by group name, each with shape `(num_units,)`. All miss the budget by
        as little as the first; without removable blocks, there is one.
    """
    search, costs = Search(cost.groups, damage, attention_unit), _StepCosts(cost, target)
    rungs = [np.array(ladder) for ladder in ladders]
    only_blocks = all(len(ladder) == 1 for index, ladder in enumerate(rungs) if index not in search.inner)
    near = NEAR_BY_BLOCKS if only_blocks else NEAR
    best = _BestByBlocks(search, costs, ratio, near)
    _search(search, costs, ratio, rungs, near)
    best.note()
    if search.inner and not only_blocks:
        search.return_to(Search(cost.groups, damage, attention_unit).state())
        costs.forget()
        _search(search, costs, ratio, [rung[:1] if index in search.inner else rung for index, rung in enumerate(rungs)], near)
        best.note()
        best.return_to_first()
        while _trade_block(search, costs, ratio, rungs, near, best):
            pass
    return best.units()


class _BestByBlocks:
    """The state with the lowest rank (`_rank`) for each set of removed blocks that the search has visited."""

    def __init__(self, search: Search, costs: _StepCosts, ratio: float, near: float) -> None:
        self._search, self._costs, self._ratio, self._near = search, costs, ratio, near
        self._states: dict[frozenset[int], tuple[tuple[float, float], tuple]] = {}

    def note(self) -> tuple[float, float]:
        """Remember the present state if it is the best with its blocks; returns its rank."""
        removed = frozenset(block for block in self._search.inner if self._search.widths[block] == 0)
        rank = _rank(self._search, self._costs, self._ratio, self._near)
        if removed not in self._states or rank < self._states[removed][0]:
            self._states[removed] = rank, self._search.state()
        return rank

    def _in_order(self) -> list[tuple[tuple[float, float], tuple]]:
        return sorted(self._states.values(), key=lambda noted: noted[0])

    def return_to_first(self) -> None:
        """Go back to the state with the lowest rank."""
        self._search.return_to(self._in_order()[0][1])
        self._costs.forget()

    def units(self) -> list[dict[str, Tensor]]:
        """Kept units of the best states, those that miss the budget by more than the first left out."""
        ordered = self._in_order()
        chosen = []
        for (missed, _), state in ordered[:CANDIDATES]:
            if missed <= ordered[0][0][0]:
                self._search.return_to(state)
                chosen.append(self._search.units())
        return chosen


def _search(search: Search, costs: _StepCosts, ratio: float, rungs: Sequence[np.ndarray], near: float) -> None:
    """Greedy, then local search, from the current state."""
    _remove_greedily(search, costs, ratio, rungs)
    for _ in range(ROUNDS):
        if not _move_pairs(search, costs, ratio, rungs, near) + search.exchange():
            break


def _rank(search: Search, costs: _StepCosts, ratio: float, near: float) -> tuple[float, float]:
    """By how much the budget is missed, 0 if it is near; and D."""
    return max(0.0, abs(costs.removed(search.widths) - ratio) - near), search.damage()


def _trade_block(
    search: Search, costs: _StepCosts, ratio: float, rungs: Sequence[np.ndarray], near: float, best: _BestByBlocks
) -> bool:
    """Remove or restore a block against the widths of other groups, if D falls. Returns whether it did."""
    rank, state = _rank(search, costs, ratio, near), search.state()
    price = max((refund for refund, _ in _widenings(search, costs, rungs)), default=0.0)
    steps = []
    for block in search.inner:
        step = search.step(block, rungs[block], 1 if search.widths[block] else -1)
        if step is not None:
            gain = price * costs.saved(search.widths, step) - search.damage_after(step.change, step.separate)
            steps.append((gain, step))
    for _, step in sorted(steps, key=lambda pair: pair[0], reverse=True)[:TRADES]:
        search.take(step)
        costs.forget()
        _restore_greedily(search, costs, ratio, rungs)
        _search(search, costs, ratio, rungs, near)
        missed, damage = best.note()
        if (missed, damage) < (rank[0], rank[1] * (1 - LEAST_GAIN)):
            return True
        search.return_to(state)
        costs.forget()
    return False


def _restore_greedily(search: Search, costs: _StepCosts, ratio: float, rungs: Sequence[np.ndarray]) -> None:
    """Widen the group that avoids the most damage per cost until the budget is not exceeded. Blocks stay as they are."""
    while costs.removed(search.widths) > ratio:
        best = max(_widenings(search, costs, rungs), key=lambda pair: pair[0], default=None)
        if best is None:
            return
        search.take(best[1])
        costs.forget(best[1].group)


def _widenings(search: Search, costs: _StepCosts, rungs: Sequence[np.ndarray]) -> Iterator[tuple[float, Step]]:
    """Steps that widen a group of channels, each with the damage that it avoids per share of the cost."""
    for index, ladder in enumerate(rungs):
        step = None if index in search.inner else search.step(index, ladder, -1)
        if step is not None:
            adds = max(-costs.saved(search.widths, step), LEAST_GAIN)
            yield -search.damage_after(step.change, step.separate) / adds, step


def exchange_units(
    groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor], damage: UnitDamage, attention_unit: str = "head_dim"
) -> dict[str, Tensor]:
    """Exchange units within groups while the predicted damage falls; the widths of groups do not change.

    Args:
        groups: The channel groups.
        kept: True for the units to start from, by group name.
        damage: Measured changes of all units.
        attention_unit: As in `width_ladder`.

    Returns:
        True for kept units by group name.
    """
    search = Search(groups, damage, attention_unit)
    search.start_from(kept)
    for _ in range(ROUNDS):
        if not search.exchange():
            break
    return search.units()


def _saving_step(search: Search, costs: _StepCosts, index: int, ladder: np.ndarray) -> Step | None:
    """The step of a group down to its next width that saves something: kernels compute channels in blocks."""
    step = search.step(index, ladder, 1)
    while step is not None and costs.saved(search.widths, step) <= 0:
        step = search.step(index, ladder[ladder < step.width], 1)
    return step


def _remove_greedily(search: Search, costs: _StepCosts, ratio: float, rungs: Sequence[np.ndarray]) -> None:
    """Take the step with the least damage per saved cost until the budget is reached."""
    while costs.removed(search.widths) < ratio:
        best: tuple[float, Step] | None = None
        for index, ladder in enumerate(rungs):
            step = _saving_step(search, costs, index, ladder)
            if step is None:
                continue
            price = search.damage_after(step.change, step.separate) / costs.saved(search.widths, step)
            if best is None or price < best[0]:
                best = price, step
        if best is None:
            return
        search.take(best[1])
        costs.forget(best[1].group)


def _move_pairs(search: Search, costs: _StepCosts, ratio: float, rungs: Sequence[np.ndarray], close: float) -> int:
    """Take steps of one or two groups, to within `close` of the budget, then to lower damage. Returns their number."""
    for moves in range(MOVES):
        both = [
            (_saving_step(search, costs, index, ladder), search.step(index, ladder, -1)) for index, ladder in enumerate(rungs)
        ]
        steps = [step for pair in both for step in pair if step is not None]
        if not steps:
            return moves
        changes = np.stack([step.change for step in steps], axis=1)
        alone = np.array([search.damage_after(step.change, step.separate) for step in steps])
        group = np.array([step.group for step in steps])
        block = search.block_of[group]
        excluded = (group[:, None] == group) | (group[:, None] == block) | (block[:, None] == group)
        pairs = np.where(excluded, np.inf, alone[:, None] + alone + 2 * changes.T @ changes)
        saved = np.array([costs.saved(search.widths, step) for step in steps])
        rises = np.concatenate([alone, pairs.ravel()])
        gap = costs.removed(search.widths) - ratio
        gaps = np.abs(gap + np.concatenate([saved, (saved[:, None] + saved).ravel()]))
        most = max(close, abs(gap) * (1 - LEAST_GAIN))  # distance to the target after the step
        near = np.isfinite(rises) & (gaps <= close)
        if abs(gap) <= close:
            near &= rises < -LEAST_GAIN * search.damage()
            candidates = np.flatnonzero(near)[np.argsort(rises[near], kind="stable")]
        elif near.any():
            candidates = np.flatnonzero(near)[np.argsort(rises[near], kind="stable")]
        else:  # among equally near ones, such as blocks of the same size, those with the least damage
            gaps = np.round(gaps, GAP_DECIMALS)
            chosen = np.isfinite(rises) & (gaps < most)
            if not chosen.any():
                most = round(abs(gap), GAP_DECIMALS)
                chosen = (gaps == most) & (rises < -LEAST_GAIN * search.damage())
            candidates = np.flatnonzero(chosen)[np.lexsort((rises[chosen], gaps[chosen]))]
        # The costs of two steps do not quite add up, so that candidates are checked
        for candidate in candidates[:SHORTLIST].tolist():
            pair = [candidate] if candidate < len(steps) else divmod(candidate - len(steps), len(steps))
            widths = search.widths.copy()
            for number in pair:
                widths[steps[number].group] = steps[number].width
            if round(abs(costs.removed(widths) - ratio), GAP_DECIMALS) <= most:
                for number in pair:
                    search.take(steps[number])
                    costs.forget(steps[number].group)
                break
        else:
            return moves
    return MOVES
