"""From scores to the units that are kept: possible widths, the share that each group loses, and the units in each group.

    scores, joint changes  ->  blocks and widths of groups that meet the budget  ->  the best units of each group

`GFPruneConfig.ranking` determines how. `joint` chooses blocks, widths and units together (`pruning.joint`). The others first
allocate widths, by scores (`pruning.allocation`) or by measured damage (`pruning.curve_allocation`), with blocks according to
`GFPruneConfig.depth` (`pruning.depth`), then keep the highest-scored units of each group.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from .configuration import GFPruneConfig
from .pruning.allocation import allocate_by_sensitivity, allocate_global, allocate_per_group
from .pruning.blocks import RemovableBlock
from .pruning.budget import (
    BUDGET_TOLERANCE,
    TENSOR_CORE_MULTIPLE,
    aligned_ladder,
    hardware_multiple,
    select_units,
    width_ladder,
)
from .pruning.cost_model import CostModel
from .pruning.curve_allocation import allocate_by_curves
from .pruning.damage_curves import DamageCurve
from .pruning.depth import (
    check_reachable,
    choose_blocks,
    is_reachable,
    plan_widths,
    remove_by_sensitivity,
    remove_per_group,
    widths_stay,
)
from .pruning.joint import SEPARATE, UnitDamage, exchange_units, joint_candidates
from .scoring.importance import normalize_scores

__all__ = ["UnitChoice", "possible_widths"]

logger = logging.getLogger(__name__)


def possible_widths(cost: CostModel, config: GFPruneConfig, device_type: str) -> tuple[int, list[list[int]]]:
    """The channel multiple, and the possible widths of each group.

    With `channel_multiple="auto"`, the multiple is the largest block size, up to that of the target device, with which the
    budget can be met.

    Args:
        cost: The cost model.
        config: All options.
        device_type: PyTorch's type of the device used for pruning, for `target_device="auto"`.
    """
    multiple, least, attention_unit = config.channel_multiple, config.min_keep_ratio, config.attention_unit
    if config.depth == "only":
        dense = [width_ladder(group) if isinstance(group, RemovableBlock) else [group.num_channels] for group in cost.groups]
        return (1 if multiple == "auto" else multiple), dense
    if multiple != "auto":
        return multiple, [width_ladder(group, multiple, least, attention_unit) for group in cost.groups]
    device = device_type if config.target_device == "auto" else config.target_device
    multiple = hardware_multiple(device, config.latency_dtype)
    while True:
        narrow = min(multiple, TENSOR_CORE_MULTIPLE) if device == "cuda" else 1
        ladders = [aligned_ladder(group, multiple, least, attention_unit, narrow) for group in cost.groups]
        if multiple == 1:
            return multiple, ladders
        if is_reachable(cost, config.target, config.ratio, ladders):  # planning is slow where it cannot succeed
            widths = plan_widths(cost, config.target, config.ratio, ladders)
            if abs(cost.removed(config.target, widths) - config.ratio) <= BUDGET_TOLERANCE:
                return multiple, ladders
        multiple //= 2


def _check_ratio(ratio: float) -> None:
    """Check the share of a cost to remove.

    Raises:
        ValueError: It is not in [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio} must be in [0, 1]: it is the share of the target cost to remove")


class UnitChoice:
    """Chooses units for a budget.

    Attributes:
        channel_multiple: Widths below the dense one are multiples of this.
        ladders: Possible widths of each group.
        planned_widths: Widths with the same share of every group and of the blocks, which do not depend on scores.

    Args:
        cost: The cost model.
        config: All options.
        device_type: PyTorch's type of the device used for pruning.

    Raises:
        ValueError: The budget cannot be met.
    """

    def __init__(self, cost: CostModel, config: GFPruneConfig, device_type: str) -> None:
        self.cost, self.config = cost, config
        self.channel_multiple, self.ladders = possible_widths(cost, config, device_type)
        check_reachable(cost, config.target, config.ratio, self.ladders)
        self.planned_widths = plan_widths(cost, config.target, config.ratio, self.ladders)

    @property
    def widths_are_planned(self) -> bool:
        """Whether a run ends with `planned_widths`; otherwise widths or blocks depend on scores."""
        return self.config.ranking == "group" and not self.cost.inner

    def widths(
        self, ratio: float, scores: Mapping[str, Tensor], curves: Mapping[str, DamageCurve] | None = None
    ) -> np.ndarray:
        """Kept channels of each group, with shape `(groups,)`, for rankings that allocate widths before units.

        Args:
            ratio: Share of the target cost to remove, in [0, 1].
            scores: Scores by group name, each with shape `(num_units,)`.
            curves: With `ranking="curves"`, the damage curve of each group by name.

        Raises:
            ValueError: The ratio is out of range.
        """
        _check_ratio(ratio)
        cost, target, ladders = self.cost, self.config.target, self.ladders
        if ratio == 0:
            return cost.dense
        if self.widths_are_planned:
            return allocate_per_group(cost, target, ratio, ladders)
        ordered, exponent = [scores[group.name] for group in cost.groups], self.config.sensitivity_exponent
        damage = {block: float(ordered[block].abs().sum()) for block in cost.inner}
        if self.config.ranking == "curves":
            of_groups = [curves[group.name] for group in cost.groups]
            damage = {block: of_groups[block].at(0) for block in cost.inner}
        if widths_stay(cost, ladders):
            return choose_blocks(cost, target, ratio, damage)
        if self.config.ranking == "curves":
            even = plan_widths(cost, target, ratio, ladders)
            return allocate_by_curves(cost, target, ratio, ladders, of_groups, even)
        if self.config.ranking == "sensitivity" and not (cost.inner and exponent == 0):
            return self._sensitive_widths(ratio, ordered)
        if self.config.ranking in ("group", "sensitivity"):
            return remove_per_group(cost, target, ratio, ladders, damage)
        comparable = normalize_scores(scores, cost.groups)
        return allocate_global(cost, target, ratio, ladders, [comparable[group.name] for group in cost.groups])

    def _sensitive_widths(self, ratio: float, scores: Sequence[Tensor]) -> np.ndarray:
        """Widths by sensitivity, and blocks if they are removable, from the scores of each group."""
        allocate = remove_by_sensitivity if self.cost.inner else allocate_by_sensitivity
        return allocate(self.cost, self.config.target, ratio, self.ladders, scores, self.config.sensitivity_exponent)

    def best_units(self, scores: Mapping[str, Tensor], widths: np.ndarray) -> dict[str, Tensor]:
        """The highest-scored units of each group: True for kept units by group name, each with shape `(num_units,)`."""
        return {
            group.name: select_units(group, scores[group.name], int(width), self.config.attention_unit)
            for group, width in zip(self.cost.groups, widths)
        }

    def joint_units(
        self,
        ratio: float,
        scores: Mapping[str, Tensor],
        changes: Mapping[str, Tensor],
        bonus: Mapping[str, Tensor] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Choices of units with a low predicted change of the predictions: those of `pruning.joint`, the lowest first, and
        widths by sensitivity with the highest-scored units of each group.

        Both predictions fail at times: the first where changes do not add up, the second where damage does not follow the
        assumed curve. They are to be measured (`scoring.removals`).

        Args:
            ratio: Share of the target cost to remove, in [0, 1].
            scores: Scores of single units by group name.
            changes: Joint changes by group name (`JointScores.changes`).
            bonus: Further damage of removing each unit by group name; groups may be left out (default: none).
            start: True for the units to start from; widths of groups are not changed then (default: all units).

        Returns:
            Choices that meet the budget, or are as near to it as the nearest; one with `start`. True for kept units by group
            name, each with shape `(num_units,)`.

        Raises:
            ValueError: The ratio is out of range.
        """
        _check_ratio(ratio)
        separate = {name: SEPARATE * values.double() + (bonus or {}).get(name, 0) for name, values in scores.items()}
        damage, attention_unit = UnitDamage(changes, separate), self.config.attention_unit
        if start is not None:
            return [exchange_units(self.cost.groups, start, damage, attention_unit)]
        cost, target, ladders = self.cost, self.config.target, self.ladders
        choices = joint_candidates(cost, target, ratio, ladders, damage, attention_unit)
        if ratio == 0 or widths_stay(cost, ladders) or self.config.sensitivity_exponent == 0:
            return choices
        ranked = {name: values.double() + (bonus or {}).get(name, 0) for name, values in scores.items()}
        widths = self._sensitive_widths(ratio, [scores[group.name] for group in cost.groups])
        choices = [*choices, self.best_units(ranked, widths)]
        # The least damage is that of a choice that removes too little
        missed = [max(abs(cost.removed(target, self._widths_of(units)) - ratio), BUDGET_TOLERANCE) for units in choices]
        return [units for units, by in zip(choices, missed) if by <= min(missed) + BUDGET_TOLERANCE / 2]

    def _widths_of(self, kept: Mapping[str, Tensor]) -> np.ndarray:
        """Channels of each group with the units that are kept."""
        groups = self.cost.groups
        return np.array([int(g.unit_sizes[kept[g.name].cpu()].sum()) + len(g.fixed) for g in groups], dtype=np.int64)

    def warn_if_missed(self, share: float) -> None:
        """Warn if the removed share of the target cost is not the one asked for."""
        if abs(share - self.config.ratio) > BUDGET_TOLERANCE:
            logger.warning(
                "ratio=%.3f of %s is not met: the nearest with whole norm groups, depth=%s, channel_multiple=%d, "
                "attention_unit=%s, min_keep_ratio=%g is %.3f",
                self.config.ratio,
                self.config.target,
                self.config.depth,
                self.channel_multiple,
                self.config.attention_unit,
                self.config.min_keep_ratio,
                share,
            )
