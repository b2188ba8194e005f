"""Schedules: training step -> phase, pruned share s_t of the target, mask value p_t of pruned channels.

With N = soft_steps, M = end_steps and f = t / N (arXiv 2501.09464, section III-B: linear s_t and p_t):

    soft phase   0 <= t < N    s_t = S rise(f)    p_t = 1 - rise(f)
    hard phase   N <= t < M    s_t = S            p_t = 0
    fine-tuning  M <= t        masks are frozen, the model is compacted

    linear       rise(f) = f
    cosine       rise(f) = (1 - cos(pi f)) / 2                       (Loshchilov and Hutter, arXiv 1608.03983)
    exponential  rise(f) = (1 - exp(-5 f)) / (1 - exp(-5))
    cubic        rise(f) = 1 - (1 - f)^3                             (Zhu and Gupta, arXiv 1710.01878, equation 1)

As published, masks change at rankings only: a channel pruned late in the soft phase falls from 1 to nearly 0 at once. With
`interpolate`, a ranking defines the masks at the *next* ranking, and masks are interpolated linearly until then. All masks
change continuously, and the last ranking before N leads to binary masks at N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SCHEDULES", "PruningSchedule", "rise"]

_SHAPES = {
    "linear": lambda f: f,
    "cosine": lambda f: (1 - math.cos(math.pi * f)) / 2,
    "exponential": lambda f: (1 - math.exp(-5 * f)) / (1 - math.exp(-5)),
    "cubic": lambda f: 1 - (1 - f) ** 3,
}
SCHEDULES = tuple(_SHAPES)


def rise(shape: str, fraction: float) -> float:
    """A curve that rises from 0 to 1.

    Args:
        shape: One of `SCHEDULES`.
        fraction: Position on the curve, clamped to [0, 1].

    Returns:
        A value in [0, 1], exactly 0 at 0 and 1 at 1.

    Raises:
        ValueError: The shape is unknown.
    """
    if shape not in _SHAPES:
        raise ValueError(f"schedule={shape} must be one of {', '.join(SCHEDULES)}")
    return _SHAPES[shape](min(max(fraction, 0.0), 1.0))


@dataclass(frozen=True)
class PruningSchedule:
    """Schedule of rankings, sparsity and mask values.

    Attributes:
        soft_steps: N, the first step of the hard phase (>= 0).
        end_steps: M, the step at which masks freeze (>= N).
        update_interval: Steps between two rankings (>= 1).
        sparsity_schedule: Shape of s_t.
        mask_schedule: Shape of 1 - p_t.
        interpolate: Whether masks of the soft phase are interpolated linearly between rankings.
    """

    soft_steps: int
    end_steps: int
    update_interval: int
    sparsity_schedule: str = "linear"
    mask_schedule: str = "linear"
    interpolate: bool = False

    def phase(self, step: int) -> str:
        """`"soft"`, `"hard"` or `"finetune"`."""
        return "soft" if step < self.soft_steps else "hard" if step < self.end_steps else "finetune"

    def sparsity(self, step: int) -> float:
        """s_t as a share of the target, in [0, 1]."""
        return rise(self.sparsity_schedule, step / self.soft_steps) if step < self.soft_steps else 1.0

    def mask_value(self, step: int) -> float:
        """p_t, the mask value of pruned channels, in [0, 1]."""
        return 1.0 - rise(self.mask_schedule, step / self.soft_steps) if step < self.soft_steps else 0.0

    def update_steps(self) -> list[int]:
        """All steps at which channels are ranked.

        With `interpolate`, they include 0, but not N, where the last goal is reached. Otherwise they include N.
        """
        if self.interpolate and self.soft_steps > 0:
            soft = range(0, self.soft_steps, self.update_interval)
            hard = range(self.soft_steps + self.update_interval, self.end_steps, self.update_interval)
        else:
            soft = range(self.update_interval, self.soft_steps, self.update_interval)
            hard = range(self.soft_steps, max(self.end_steps, self.soft_steps + 1), self.update_interval)
        return [*soft, *hard]

    def is_update(self, step: int) -> bool:
        """Whether channels are ranked at `step`."""
        smooth = self.interpolate and self.soft_steps > 0
        if step < self.soft_steps:
            return (step > 0 or smooth) and step % self.update_interval == 0
        if step == self.soft_steps:
            return not smooth
        return step < self.end_steps and (step - self.soft_steps) % self.update_interval == 0

    def next_update(self, step: int) -> int | None:
        """The first step after `step` at which channels are ranked; None: there is none."""
        return next((update for update in self.update_steps() if update > step), None)

    def goal_step(self, step: int) -> int:
        """The step whose s_t and p_t a ranking at `step` uses: with `interpolate` the next ranking or N, else `step`."""
        if self.interpolate and step < self.soft_steps:
            return min(step + self.update_interval, self.soft_steps)
        return step
