"""Predicted damage of a choice of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffusers_gfprune.pruning.channel_groups import ChannelGroup
from diffusers_gfprune.pruning.joint_search import Search, UnitDamage


def predicted_damage(groups: Sequence[ChannelGroup], kept: Mapping[str, Tensor], damage: UnitDamage) -> float:
    """D of the units that are not kept."""
    search = Search(groups, damage, "head_dim")
    search.start_from(kept)
    return search.damage()
