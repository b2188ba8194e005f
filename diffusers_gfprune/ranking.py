"""Rankings during a run: units are scored, scores are averaged, and the units to keep are chosen.

Rankings are noisy. Scores are averaged over rankings (`score_decay`), and a pruned unit is revived only if it is clearly
better than a kept one (`revival_margin`).

With `ranking="curves"`, the damage of narrowing each group is measured at the first ranking, before weights have trained with
masks (`scoring.group_damage`), and gives the widths of all rankings.

With `ranking="joint"`, there are a few choices with different widths and blocks. The one with the least measured damage is
taken (`scoring.removals`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from .configuration import GFPruneConfig
from .diffusion.batch import DiffusionBatch
from .pruning.damage_curves import DamageCurve
from .scoring.group_damage import damage_curves
from .scoring.importance import average_scores, score_units, score_units_jointly
from .scoring.removals import removal_damage
from .unit_choice import UnitChoice

__all__ = ["Ranking"]


class Ranking:
    """Scores of all rankings so far, and what is chosen by them.

    Attributes:
        scores: Averaged scores by group name, each with shape `(num_units,)`; None before the first ranking.
        changes: Averaged joint changes, each with shape `(rows, num_units)`; None without `ranking="joint"`.
        curves: Damage curves by group name; None before the first ranking, and without `ranking="curves"`.

    Args:
        unet: The masked model.
        process: The process of the model's training.
        config: All options.
        choice: Chooses units for the budget.
    """

    def __init__(self, unet: nn.Module, process, config: GFPruneConfig, choice: UnitChoice) -> None:
        self.unet, self.process, self.config, self.choice = unet, process, config, choice
        self.scores: dict[str, Tensor] | None = None
        self.changes: dict[str, Tensor] | None = None
        self.curves: dict[str, DamageCurve] | None = None

    def rank(
        self,
        batches: Sequence[DiffusionBatch],
        share: float,
        kept: Mapping[str, Tensor],
        widths: np.ndarray | None,
        number: int = 0,
    ) -> dict[str, Tensor]:
        """Score units, and choose those to keep.

        Args:
            batches: Calibration batches; with several processes, the rows of this rank.
            share: Share of the budget to meet, in [0, 1].
            kept: True for the units that are kept so far, by group name.
            widths: Channels that each group must keep, with shape `(groups,)`, if they are fixed: they are those of `kept`.
            number: Number of rankings before (>= 0).

        Returns:
            True for kept units by group name, each with shape `(num_units,)`.
        """
        before = self.scores, self.changes, self.curves
        try:
            return self._rank(batches, share, kept, widths, number)
        except BaseException:  # such as memory that ran out: the ranking can be repeated, and the state saved
            self.scores, self.changes, self.curves = before
            raise

    def _rank(
        self,
        batches: Sequence[DiffusionBatch],
        share: float,
        kept: Mapping[str, Tensor],
        widths: np.ndarray | None,
        number: int,
    ) -> dict[str, Tensor]:
        first = self.scores is None
        self._score(batches, kept, self.config.score_decay, number)
        if self.config.ranking == "curves" and self.curves is None:
            self.curves = self._measure(batches)
        chosen = self._choose(share, kept, widths)
        if first and self.config.score_at == "midpoint" and not all(units.all() for units in chosen[0].values()):
            self._score(batches, chosen[0], 0.0, number)
            chosen = self._choose(share, kept, widths)
        if len(chosen) == 1:
            return chosen[0]
        groups = self.choice.cost.groups
        damage = removal_damage(self.unet, groups, batches, self.process, self.config, chosen)
        return chosen[damage.index(min(damage))]

    def _score(self, batches: Sequence[DiffusionBatch], kept: Mapping[str, Tensor], decay: float, number: int) -> None:
        """Score units, with masks of 1/2 for those that are not kept if `score_at="midpoint"`, and average with before."""
        arguments = (self.unet, self.choice.cost.groups, batches, self.process, self.config)
        halved = {name: torch.where(units, 1.0, 0.5) for name, units in kept.items()}
        at_midpoint = self.config.score_at == "midpoint"
        with self.unet.channel_masks.replaced(halved) if at_midpoint else nullcontext():
            if self.config.ranking == "joint":
                joint = score_units_jointly(*arguments, number)
                latest = joint.scores, joint.changes
            else:
                latest = score_units(*arguments), None
        self.scores, self.changes = average_scores((self.scores, self.changes), latest, decay)

    def _measure(self, batches: Sequence[DiffusionBatch]) -> dict[str, DamageCurve]:
        """Damage curves of all groups with the units that have the lowest scores removed first."""
        groups, ladders = self.choice.cost.groups, self.choice.ladders
        return damage_curves(self.unet, groups, batches, self.process, self.config, self.scores, ladders)

    def _choose(self, share: float, kept: Mapping[str, Tensor], widths: np.ndarray | None) -> list[dict[str, Tensor]]:
        """Choose units by the averaged scores, with a bonus for kept units. Several choices are to be measured."""
        ratio, margin, ranking = share * self.config.ratio, self.config.revival_margin, self.config.ranking
        pruned = any((~units).any() for units in kept.values())
        # In float64: in float32, adding a large bonus would lose digits of the scores of kept units.
        bonus = {
            name: margin * values.double().abs().mean() * kept[name]
            for name, values in self.scores.items()
            if (pruned if ranking == "joint" else (~kept[name]).any())
        }
        if ranking == "joint":
            start = None if widths is None else kept
            return self.choice.joint_units(ratio, self.scores, self.changes, bonus, start)
        ranked = {name: values + bonus.get(name, 0) for name, values in self.scores.items()}
        if widths is None:
            # Kept blocks have a bonus if others were removed. That of channels would bias sensitivities
            blocks = [self.choice.cost.groups[index].name for index in self.choice.cost.inner]
            chosen = dict(self.scores) if ranking == "sensitivity" else dict(ranked)
            if not all(kept[name].all() for name in blocks):
                chosen |= {name: self.scores[name] * (1 + margin * kept[name]) for name in blocks}
            widths = self.choice.widths(ratio, chosen, self.curves)
        return [self.choice.best_units(ranked, widths)]
