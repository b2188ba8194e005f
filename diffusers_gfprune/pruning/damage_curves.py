"""Damage curves: what the narrowing of one group costs, measured at a few widths.

Let n be the channels of a group, k those it keeps, and x = (n - k) / n the removed share. The damage D(x) is measured at a few
widths of the group's ladder (`scoring.group_damage`), and D(0) = 0. Between two measured shares a < b, the curve is the power
law through both. Below the first one it has the power of the first interval:

    log D(x) = log D(a) + p (log x - log a)          p = log(D(b) / D(a)) / log(b / a)

Beyond the last measured share, which is the narrowest width, there is nothing to choose. With measured damage that falls where
more is removed, because of few images or because a part of a group does harm alone, a curve is raised to the largest damage
before, so that it never falls. The power is at least 1 below the first share: damage without further removals is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["SHARES", "DamageCurve", "measured_widths"]

SHARES = (0.25, 0.5, 0.75)  # removed shares that are measured, besides the narrowest width
_LEAST = 1e-30  # damage that counts as none, for logarithms


def measured_widths(ladder: Sequence[int]) -> list[int]:
    """The widths of a group whose damage is measured: those nearest to `SHARES`, and the narrowest.

    Args:
        ladder: Possible widths in descending order, the dense one first (`budget.width_ladder`).

    Returns:
        Widths in descending order without the dense one; none if the ladder has no other width.
    """
    narrower = list(ladder[1:])
    if not narrower:
        return []
    wanted = [min(narrower, key=lambda width: abs(width - (1 - share) * ladder[0])) for share in SHARES]
    return sorted({*wanted, narrower[-1]}, reverse=True)


@dataclass(frozen=True)
class DamageCurve:
    """Damage of a group as a function of its width.

    Attributes:
        dense: Channels of the dense group.
        widths: Measured widths in descending order, all below `dense`.
        damages: Measured damage at these widths, >= 0.
    """

    dense: int
    widths: tuple[int, ...] = ()
    damages: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        widths = (self.dense, *self.widths)
        if len(self.widths) != len(self.damages) or any(a <= b for a, b in zip(widths, widths[1:])):
            raise ValueError(
                f"widths={self.widths} must descend from {self.dense}, with one of {len(self.damages)} damages each"
            )
        if not all(0 <= damage < math.inf for damage in self.damages):
            raise ValueError(f"damages={self.damages} must be numbers >= 0")

    def at(self, width: int) -> float:
        """Damage at a width, from the narrowest measured one to `dense`: that of the module docstring, which never falls.

        Raises:
            ValueError: The width is outside of this range.
        """
        if not (self.widths or (self.dense,))[-1] <= width <= self.dense:
            raise ValueError(f"width={width} must be between {(self.widths or (self.dense,))[-1]} and {self.dense}")
        if width == self.dense:
            return 0.0
        shares = [1 - w / self.dense for w in self.widths]
        raised = [max(_LEAST, *self.damages[: i + 1]) for i in range(len(self.damages))]
        if width in self.widths:
            return raised[self.widths.index(width)]
        share = 1 - width / self.dense
        after = next(i for i, measured in enumerate(shares) if measured >= share)
        low = max(after - 1, 0)
        if low + 1 >= len(shares):  # one measured width only
            return raised[0] * share / shares[0]
        power = math.log(raised[low + 1] / raised[low]) / math.log(shares[low + 1] / shares[low])
        if after == 0:
            power = max(1.0, power)
        return raised[low] * (share / shares[low]) ** power

    def to_dict(self) -> dict:
        """Fields for JSON."""
        return {"dense": self.dense, "widths": list(self.widths), "damages": list(self.damages)}

    @classmethod
    def from_dict(cls, values: Mapping) -> DamageCurve:
        """Read the output of `to_dict`.

        Raises:
            ValueError: A field is missing or out of range.
        """
        try:
            return cls(int(values["dense"]), tuple(map(int, values["widths"])), tuple(map(float, values["damages"])))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a damage curve must have dense, widths and damages, not {values}") from error
