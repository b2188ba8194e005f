"""State of the search for a joint choice of units: what is kept, and what single steps change.

D and its terms are those of `joint`. The search moves *items*: units, or whole heads of attention. A step takes a group to the
next width of its ladder with the cheapest items; its change of D follows from sums over rows of the joint changes, so that the
sum of two steps of different groups is exact.

A removable block is a group with one item. The change of its removal is that of all channels inside, so that the step which
removes it restores the items inside, whose changes would otherwise be counted twice. Groups inside of a removed block have no
steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .blocks import inner_groups
from .channel_groups import ChannelGroup

__all__ = ["LEAST_GAIN", "LOAD", "SHORTLIST", "Items", "Search", "Step", "UnitDamage"]

LOAD = 1.0  # power of (dense / kept channels) in the second term of D
SHORTLIST = 32  # candidates that are looked at in full: units of a group on each side of an exchange, pairs of steps
LEAST_GAIN = 1e-6  # of D, for another move


@dataclass(frozen=True)
class UnitDamage:
    """What D depends on.

    Attributes:
        changes: Joint changes by group name, each with shape `(rows, num_units)`, with the same rows in every group.
        separate: Damage of each unit on its own by group name, >= 0, each with shape `(num_units,)`.
    """

    changes: Mapping[str, Tensor]
    separate: Mapping[str, Tensor]


class Items:
    """What the search keeps or removes in one group: units, or whole heads.

    Attributes:
        unit_of: Item of each unit, with shape `(num_units,)`.
        sizes: Channels of each item.
        parts: Indices of items. All parts lose the same number of channels: the heads of attention, otherwise one part.
    """

    def __init__(self, group: ChannelGroup, attention_unit: str) -> None:
        head_dim = group.num_channels // group.heads
        shrinks = group.attention is not None and not group.whole_heads
        whole_heads = shrinks and attention_unit == "heads"
        self.unit_of = np.arange(group.num_units) // (head_dim if whole_heads else 1)
        self.sizes = np.bincount(self.unit_of, weights=group.unit_sizes.numpy()).astype(np.int64)
        each_head = shrinks and not whole_heads
        self.parts = np.arange(len(self.sizes)).reshape(group.heads if each_head else 1, -1)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over the units of each item, along the last dimension."""
        if len(self.sizes) == values.shape[-1]:
            return values
        return values.reshape(*values.shape[:-1], len(self.sizes), -1).sum(axis=-1)

    def cheapest(self, pool: np.ndarray, values: np.ndarray, channels: int) -> np.ndarray | None:
        """Items of a pool with `channels` channels together and the lowest sum of values; None if no set fits.

        Args:
            pool: True for the items to choose from.
            values: Value of each item.
            channels: Number of channels, > 0.
        """
        share, rest = divmod(channels, len(self.parts))
        chosen = [self._cheapest_of(part[pool[part]], values, share) for part in self.parts]
        return None if rest or any(items is None for items in chosen) else np.concatenate(chosen)

    def _cheapest_of(self, items: np.ndarray, values: np.ndarray, channels: int) -> np.ndarray | None:
        items = items[np.argsort(values[items], kind="stable")]
        best: dict[int, tuple[float, list[np.ndarray]]] = {0: (0.0, [])}
        for size in np.unique(self.sizes[items])[::-1].tolist():
            members = items[self.sizes[items] == size][: channels // size]
            sums = [0.0, *np.cumsum(values[members]).tolist()]
            wider: dict[int, tuple[float, list[np.ndarray]]] = {}
            for width, (total, chosen) in best.items():
                for number, value in enumerate(sums[: (channels - width) // size + 1]):
                    reached = width + number * size
                    if reached not in wider or total + value < wider[reached][0]:
                        wider[reached] = (total + value, [*chosen, members[:number]])
            best = wider
        return np.concatenate(best[channels][1]) if channels in best else None

    def exchangeable(self, out: np.ndarray, back: np.ndarray) -> np.ndarray:
        """Whether each item of `out` may be replaced by each of `back`, with shape `(len(out), len(back))`."""
        part = np.empty(len(self.sizes), dtype=np.int64)
        part[self.parts] = np.arange(len(self.parts))[:, None]
        return (part[out][:, None] == part[back]) & (self.sizes[out][:, None] == self.sizes[back])


@dataclass(frozen=True)
class Step:
    """A step of one group to another width.

    Attributes:
        group: Index of the group.
        items: Items that are removed or restored, as indices of the search.
        width: Channels of the group afterwards.
        change: Sum of their changes, with the sign of the step, with shape `(rows,)`.
        separate: Likewise the sum of their separate damage.
        inside: Removed items inside of a block that the step removes, which are restored.
    """

    group: int
    items: np.ndarray
    width: int
    change: np.ndarray
    separate: float
    inside: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class Search:
    """State of the search: which items are kept, and the joint change of those removed.

    Attributes:
        kept: True for kept items of all groups.
        change: Sum of the changes of removed items, with shape `(rows,)`.
        widths: Kept channels of each group.
        inner: Indices of the groups inside of each block, by its index.
        block_of: Index of the block that each group is inside of, or -1, with shape `(groups,)`.
    """

    def __init__(self, groups: Sequence[ChannelGroup], damage: UnitDamage, attention_unit: str) -> None:
        self.groups = groups
        self.inner = inner_groups(groups)
        self.block_of = np.full(len(groups), -1)
        for block, inner in self.inner.items():
            self.block_of[inner] = block
        self.items = [Items(group, attention_unit) for group in groups]
        tables = [
            tuple(items.sums(values[group.name].double().cpu().numpy()) for values in (damage.changes, damage.separate))
            for group, items in zip(groups, self.items)
        ]
        self._changes = np.concatenate([changes for changes, _ in tables], axis=1)
        self._separate = np.concatenate([separate for _, separate in tables])
        self._squares = np.square(self._changes).sum(axis=0)
        ends = np.cumsum([0, *(len(items.sizes) for items in self.items)])
        self._at = [slice(*pair) for pair in zip(ends, ends[1:])]
        self._dense = np.array([group.num_channels for group in groups], dtype=np.int64)
        self.kept = np.ones(ends[-1], dtype=bool)
        self.change = np.zeros(len(self._changes))
        self.widths = self._dense.copy()

    def start_from(self, kept: Mapping[str, Tensor]) -> None:
        """Keep the given units, bool by group name."""
        for index, (group, items, at) in enumerate(zip(self.groups, self.items, self._at)):
            units = kept[group.name].cpu().numpy()
            self.kept[at][items.unit_of] = units
            self.widths[index] = int(group.unit_sizes[units].sum()) + len(group.fixed)
        for block in self.inner:
            if self.widths[block] == 0:
                self._restore_inside(block)
        self.change = self._changes[:, ~self.kept].sum(axis=1)

    def _restore_inside(self, block: int) -> None:
        for index in self.inner[block]:
            self.kept[self._at[index]] = True
            self.widths[index] = self._dense[index]

    def state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is kept, for `return_to`."""
        return self.kept.copy(), self.change.copy(), self.widths.copy()

    def return_to(self, state: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        """Go back to an earlier `state`."""
        self.kept, self.change, self.widths = (values.copy() for values in state)

    def damage(self) -> float:
        """D of the removed items."""
        separate = sum(self._separate_of(index, self.widths[index]) for index in range(len(self.groups)))
        return float(self.change @ self.change + separate)

    def _load(self, index: int, width: int) -> float:
        """Factor of the separate damage of a group that keeps `width` channels."""
        return float((self._dense[index] / max(width, 1)) ** LOAD)

    def _separate_of(self, index: int, width: int, more: float = 0.0) -> float:
        """Separate damage of a group with `width` channels, and `more` of it than now before the factor."""
        at = self._at[index]
        return (float(self._separate[at][~self.kept[at]].sum()) + more) * self._load(index, width)

    def units(self) -> dict[str, Tensor]:
        """True for kept units by group name."""
        return {
            group.name: torch.from_numpy(self.kept[at][items.unit_of])
            for group, items, at in zip(self.groups, self.items, self._at)
        }

    def _marginal(self, index: int) -> np.ndarray:
        """Change of D when an item of a group is removed, if it is kept, or restored, if it is not, at the group's width."""
        at = self._at[index]
        sign = np.where(self.kept[at], 1.0, -1.0)
        separate = self._separate[at] * self._load(index, self.widths[index])
        return sign * (2 * (self.change @ self._changes[:, at]) + separate) + self._squares[at]

    def step(self, index: int, ladder: np.ndarray, sign: int) -> Step | None:
        """The cheapest step of a group to the next width of its ladder: downwards with `sign` 1, upwards with -1."""
        at, width, block = self._at[index], self.widths[index], self.block_of[index]
        if block >= 0 and self.widths[block] == 0:
            return None
        next_widths = ladder[ladder < width] if sign > 0 else ladder[ladder > width][::-1]
        pool, values = self.kept[at] == (sign > 0), None
        for reached in next_widths.tolist():
            values = self._marginal(index) if values is None else values
            items = self.items[index].cheapest(pool, values, abs(int(width) - reached))
            if items is not None:
                items = items + at.start
                change = sign * self._changes[:, items].sum(axis=1)
                more = sign * float(self._separate[items].sum())
                separate = self._separate_of(index, reached, more) - self._separate_of(index, int(width))
                if index in self.inner and sign > 0:
                    return self._without_block(Step(index, items, reached, change, separate))
                return Step(index, items, reached, change, separate)
        return None

    def _without_block(self, step: Step) -> Step:
        """The removal of a block, with the items inside restored."""
        inside = [np.flatnonzero(~self.kept[self._at[index]]) + self._at[index].start for index in self.inner[step.group]]
        inside = np.concatenate([*inside, np.zeros(0, dtype=np.int64)])
        separate = sum(self._separate_of(index, int(self.widths[index])) for index in self.inner[step.group])
        change = step.change - self._changes[:, inside].sum(axis=1)
        return Step(step.group, step.items, step.width, change, step.separate - separate, inside)

    def damage_after(self, change: np.ndarray, separate: float) -> float:
        """Change of D by a change of the predictions and of separate damage."""
        return float(2 * self.change @ change + change @ change + separate)

    def take(self, step: Step) -> None:
        """Take a step."""
        self.kept[step.items] = step.width > self.widths[step.group]
        self.change = self.change + step.change
        self.widths[step.group] = step.width
        if step.group in self.inner and step.width == 0:
            self._restore_inside(step.group)

    def exchange(self) -> int:
        """Exchange a kept for a removed unit within groups while D falls, and return the number of exchanges."""
        exchanged = 0
        for index, (items, at) in enumerate(zip(self.items, self._at)):
            for _ in range(len(items.sizes)):
                values, kept = self._marginal(index), self.kept[at]
                out, back = (
                    side[np.argsort(values[side], kind="stable")[:SHORTLIST]] for side in map(np.flatnonzero, (kept, ~kept))
                )
                if not (len(out) and len(back)):
                    break
                columns = self._changes[:, at]
                gain = values[out][:, None] + values[back] - 2 * columns[:, out].T @ columns[:, back]
                gain = np.where(items.exchangeable(out, back), gain, np.inf)
                row, column = np.unravel_index(gain.argmin(), gain.shape)
                if gain[row, column] >= -LEAST_GAIN * self.damage():
                    break
                leaving, returning = out[row] + at.start, back[column] + at.start
                self.change = self.change + self._changes[:, leaving] - self._changes[:, returning]
                self.kept[leaving], self.kept[returning] = False, True
                exchanged += 1
        return exchanged
