"""Removable blocks: residual branches that are kept or removed as a whole.

A residual block adds the output of a branch to a stream, y = (shortcut(x) + branch(x)) / factor. One mask value m that
multiplies the weight and bias of the last layers of the branch multiplies the branch:

    y = (shortcut(x) + m branch(x)) / factor

With m = 0, all parameters inside the branch can be removed, and the pruned class replaces the block by its shortcut
(`remote.pruned_layers.RemovedBlock`). A `RemovableBlock` is therefore a group with a single unit, of "width" 1 or 0. It is
masked, scored and compacted like other groups: its score is the derivative by its mask value, and it is chosen by the damage
and the saved cost of its removal. Which blocks are removable is a property of the family (`Family.removable_blocks`).

Channels inside a removed block are gone as well: their groups then have neither cost nor damage of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..families.lookup import family_of
from ..remote.pruned_layers import RemovedBlock
from .channel_groups import ChannelGroup, GroupSlice, trace_channel_groups

__all__ = ["DEPTHS", "RemovableBlock", "inner_groups", "removed_blocks", "trace_blocks", "trace_groups"]

DEPTHS = ("none", "allow", "only")


@dataclass(frozen=True)
class RemovableBlock(ChannelGroup):
    """A group with one unit: the branch of a residual block.

    Attributes:
        name: Name of the block in the dense model.
        slices: All rows of the last layers of the branch, with the role `"branch"`.
        inside: Names of all modules that are removed with the branch.
    """

    inside: frozenset[str] = field(default=frozenset(), repr=False)


def trace_blocks(unet: nn.Module) -> list[RemovableBlock]:
    """Find the removable blocks of a dense model, in the order of its modules."""
    modules = dict(unet.named_modules())
    blocks = []
    for name, layers in family_of(unet).removable_blocks(unet).items():
        slices = [
            GroupSlice(layer, parameter, 0, tuple(range(len(weight))), "branch")
            for layer in layers
            for parameter, weight in modules[layer].named_parameters(recurse=False)
        ]
        kept = {f"{name}.{inner}" for inner, _ in RemovedBlock(modules[name]).named_modules() if inner}
        inside = {f"{name}.{inner}".removesuffix(".") for inner, _ in modules[name].named_modules()} - kept
        blocks.append(RemovableBlock(name, 1, tuple(slices), ((0,),), inside=frozenset(inside)))
    return blocks


def trace_groups(unet: nn.Module, depth: str = "none") -> list[ChannelGroup]:
    """All groups of a dense model: channel groups, then removable blocks unless `depth` is `"none"`.

    Args:
        unet: The dense model.
        depth: One of `DEPTHS`.

    Raises:
        ValueError: The model cannot be pruned (`trace_channel_groups`), or has no removable block with `depth="only"`.
    """
    blocks = [] if depth == "none" else trace_blocks(unet)
    if depth == "only" and not blocks:
        raise ValueError("depth=only must be none or allow: the model has no block that can be removed")
    return [*trace_channel_groups(unet), *blocks]


def inner_groups(groups: Sequence[ChannelGroup]) -> dict[int, list[int]]:
    """By index of each block: the indices of the groups whose channels are inside of it only."""
    channels = {i: group for i, group in enumerate(groups) if not isinstance(group, RemovableBlock)}
    modules = {i: {piece.module for piece in group.slices} for i, group in channels.items()}
    return {
        index: [other for other, names in modules.items() if names <= block.inside]
        for index, block in enumerate(groups)
        if isinstance(block, RemovableBlock)
    }


def removed_blocks(groups: Sequence[ChannelGroup], masks: Mapping[str, Tensor]) -> list[RemovableBlock]:
    """Blocks whose mask, the only value of `masks[name]`, is 0 or False."""
    return [group for group in groups if isinstance(group, RemovableBlock) and not masks[group.name].any()]
