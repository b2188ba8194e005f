"""Checks of published configurations, for which nothing is allocated."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import pytest
from torch import nn

from diffusers_gfprune.pruning.allocation import allocate_per_group
from diffusers_gfprune.pruning.budget import width_ladder
from diffusers_gfprune.pruning.channel_groups import ChannelGroup
from diffusers_gfprune.pruning.cost_model import CostModel


def fields(kind: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Arguments of a model by name."""
    return {name: found for name, found in inspect.signature(kind.__init__).parameters.items() if name != "self"}


def check_plans(model: nn.Module, groups: Sequence[ChannelGroup], *units: str) -> None:
    """30 and 50 % of the MACs and of the parameters are met within 1 %, with these units of attention.

    Widths are multiples of 16, which makes ladders short.
    """
    cost = CostModel(model, groups)
    for unit in units:
        ladders = [width_ladder(group, 16, 0.0, unit) for group in groups]
        for target in ("macs", "params"):
            for ratio in (0.3, 0.5):
                widths = allocate_per_group(cost, target, ratio, ladders)
                assert cost.removed(target, widths) == pytest.approx(ratio, abs=0.01), (unit, target, ratio)
