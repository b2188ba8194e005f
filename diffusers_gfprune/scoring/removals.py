"""Measured damage of removing whole sets of units, to choose among a few candidates.

For a set R of removed units, with masks 1_R that are 0 in R and 1 elsewhere, the damage is the mean squared change of the
predictions f over calibration images with their noise and timesteps:

    damage(R) = E |f(1) - f(1_R)|^2 / (values of an image)

This is what scores predict (`natural_gradient`). It takes one forward pass for each candidate, and one with all masks at 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..configuration import GFPruneConfig
from ..diffusion.batch import DiffusionBatch
from ..distributed import mean_over_ranks
from ..pruning.channel_groups import ChannelGroup
from .context import equal_batches
from .importance import scoring_context

__all__ = ["removal_damage"]


def removal_damage(
    unet: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[DiffusionBatch],
    process,
    config: GFPruneConfig,
    candidates: Sequence[Mapping[str, Tensor]],
) -> list[float]:
    """Measure the damage of each candidate. Weights, masks and mode of the model are not changed.

    Args:
        unet: The masked model.
        groups: Its channel groups.
        batches: Calibration batches; with several processes, the rows of this rank.
        process: Scheduler of the model, or its process.
        config: All options.
        candidates: True for kept units by group name, each with shape `(num_units,)`.

    Returns:
        Damage of each candidate, >= 0; the same on every rank.

    Raises:
        ValueError: As `importance.score_units`.
    """
    with scoring_context(unet, groups, batches, process, config) as (_, context):
        masks = context.unet.channel_masks
        total = torch.zeros(len(candidates), dtype=torch.float64, device=context.device)
        for batch in context.batches:
            with torch.no_grad(), masks.suspended():
                dense = context.predictions(batch)
            share = equal_batches(batch, context.batches)
            for number, kept in enumerate(candidates):
                with torch.no_grad(), masks.replaced({name: units.float() for name, units in kept.items()}):
                    total[number] += (context.predictions(batch) - dense).double().square().mean() / share
    mean_over_ranks([total])
    return total.tolist()
