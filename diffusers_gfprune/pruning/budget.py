"""Budgets: the widths that each group can have, and the units that it keeps at a width.

The possible widths of a group form a ladder: its dense width, and the sums of its units that are multiples of
`channel_multiple` (inside attention also of the heads), down to a floor. The ladder of a removable block is 1, 0. `allocation`
and `depth` choose widths from the ladders for a share `ratio` of the dense cost to remove.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from .blocks import RemovableBlock
from .channel_groups import ChannelGroup

__all__ = [
    "BUDGET_TOLERANCE",
    "aligned_ladder",
    "hardware_multiple",
    "select_units",
    "width_ladder",
]

BUDGET_TOLERANCE = 0.01  # share of the dense cost
ATTENTION_UNITS = ("head_dim", "heads")
# Channels that kernels process together: CPUs with AVX-512; tensor cores in float32 (TF32); tensor cores in half precision,
# where an H100 gains from tiles of 64 channels (benchmarks/README.md)
HARDWARE_MULTIPLES = {"cpu": 16, "cuda": 8, "cuda, half precision": 64}
# Narrow tensor cores take channels in eights: kernels pad other widths, or are not used for them
TENSOR_CORE_MULTIPLE = 8
# Kernels of attention compute heads in vectors of 8 or 4 channels, and pad others. By its source, memory-efficient attention
# of PyTorch takes multiples of 4 in float32, and of 8 in half precision, only
HEAD_MULTIPLES = (8, 4)
# Minimum number of widths below the dense one for a block size; with four, the digits model loses too much accuracy
ALIGNED_WIDTHS = 5


def _reachable(sizes: Mapping[int, int]) -> list[int]:
    """All sums of units, given the number of units of each size, in ascending order."""
    sums = {0}
    for size, count in sizes.items():
        sums = {total + size * number for total in sums for number in range(count + 1)}
    return sorted(sums)


def width_ladder(
    group: ChannelGroup, channel_multiple: int = 1, min_keep_ratio: float = 0.0, attention_unit: str = "head_dim"
) -> list[int]:
    """Possible widths of a group, the dense one first.

    Args:
        group: The channel group.
        channel_multiple: Widths below the dense one are multiples of this (>= 1).
        min_keep_ratio: Minimum share of channels to keep, in [0, 1].
        attention_unit: Inside attention, `"head_dim"` shrinks all heads equally, `"heads"` removes whole heads. Heads with
            normalized queries and keys are always removed whole.

    Returns:
        Widths in descending order, each >= 1 and a sum of whole units (and the fixed channels); 1 and 0 for a removable
        block.
    """
    if isinstance(group, RemovableBlock):
        return [1, 0]
    floor = max(1, math.ceil(min_keep_ratio * group.num_channels))
    if group.attention is None:
        widths = [len(group.fixed) + width for width in _reachable(Counter(group.unit_sizes.tolist()))]
    else:
        heads, head_dim = group.heads, group.num_channels // group.heads
        step = heads if attention_unit == "head_dim" and not group.whole_heads else head_dim
        widths = list(range(step, group.num_channels + 1, step))
    below = [width for width in widths if floor <= width < group.num_channels and width % channel_multiple == 0]
    return [group.num_channels, *reversed(below)]


def hardware_multiple(device: str, dtype: str = "float32") -> int:
    """Number of channels that kernels of a device process together; 1 if unknown.

    Args:
        device: PyTorch's device type.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
    """
    half = device == "cuda" and dtype != "float32"
    return HARDWARE_MULTIPLES.get("cuda, half precision" if half else device, 1)


def aligned_ladder(
    group: ChannelGroup, block: int, min_keep_ratio: float, attention_unit: str, least_multiple: int = 1
) -> list[int]:
    """`width_ladder` for kernels that compute channels in blocks.

    Full blocks are fastest, both for layers that write the channels and for layers that read them with others. If the sums of
    units give too few such widths, the ladder has the largest width for each number of blocks: with units of 10 channels and
    blocks of 16, 60 channels take the same time as 50. If these are also too few, the block size is halved, repeatedly.

    Of these widths, multiples of `least_multiple` come first, and inside attention heads of a multiple of 8 channels, or of 4
    (`HEAD_MULTIPLES`), if they leave a choice.

    Args:
        group: The channel group.
        block: Channels per block (`hardware_multiple`), a power of two.
        min_keep_ratio: As in `width_ladder`.
        attention_unit: As in `width_ladder`.
        least_multiple: Widths of the ladder are multiples of this where there are enough (>= 1).
    """
    reachable = width_ladder(group, 1, min_keep_ratio, attention_unit)
    multiples: tuple[int, ...] = (least_multiple,)
    if group.attention is not None and attention_unit == "head_dim" and not group.whole_heads:
        multiples = tuple(group.heads * multiple for multiple in HEAD_MULTIPLES)
    for multiple in multiples if block > 1 else ():
        aligned = [width for width in reachable if width % multiple == 0 or width == group.num_channels]
        if len(aligned) > ALIGNED_WIDTHS:
            reachable = aligned
            break
    while block > 1:
        full = [width for width in reachable if width % block == 0 or width == group.num_channels]
        largest: dict[int, int] = {}
        for width in reachable:  # in descending order
            largest.setdefault(math.ceil(width / block), width)
        for ladder in (full, list(largest.values())):
            if len(ladder) > ALIGNED_WIDTHS:
                return ladder
        block //= 2
    return reachable


def select_units(group: ChannelGroup, scores: Tensor, keep: int, attention_unit: str = "head_dim") -> Tensor:
    """Select the units of a group with the highest sum of scores; among equal scores, the first.

    Args:
        group: The channel group.
        scores: Scores with shape `(num_units,)`.
        keep: Number of channels to keep, a width of the group's ladder.
        attention_unit: As in `width_ladder`.

    Returns:
        True for kept units, with shape `(num_units,)`.

    Raises:
        ValueError: Scores are not finite, or no set of units has `keep` channels.
    """
    if not torch.isfinite(scores).all():
        raise ValueError(f"scores of {group.name} are not finite")
    if group.attention is None or group.whole_heads:
        return _best_units(group, scores, keep)
    head_dim = group.num_channels // group.heads
    by_head = scores.view(group.heads, head_dim)
    mask = torch.zeros_like(by_head, dtype=torch.bool)
    if attention_unit == "heads":
        heads = by_head.sum(dim=1).argsort(descending=True, stable=True)[: keep // head_dim]
        mask[heads] = True
    else:
        best = by_head.argsort(dim=1, descending=True, stable=True)[:, : keep // group.heads]
        mask.scatter_(1, best, True)
    return mask.view(-1)


def _best_units(group: ChannelGroup, scores: Tensor, keep: int) -> Tensor:
    """The set of units with `keep` channels and the highest sum of scores.

    It contains the highest-scored units of each size, so that only their numbers are unknown. Dynamic programming over sizes
    finds the best sum for every width.
    """
    best: dict[int, tuple[float, list[Tensor]]] = {len(group.fixed): (0.0, [])}
    for size in sorted(set(group.unit_sizes.tolist()), reverse=True):
        members = (group.unit_sizes == size).nonzero().flatten()
        ordered = members[scores[members].argsort(descending=True, stable=True)]
        sums = [0.0, *scores[ordered].double().cumsum(0).tolist()]
        wider: dict[int, tuple[float, list[Tensor]]] = {}
        for width, (total, chosen) in best.items():
            for number, value in enumerate(sums):
                reached = width + number * size
                if reached <= keep and (reached not in wider or total + value > wider[reached][0]):
                    wider[reached] = (total + value, [*chosen, ordered[:number]])
        best = wider
    if keep not in best:
        raise ValueError(f"keep={keep} of {group.name} must be a sum of its units and {len(group.fixed)} fixed channels")
    mask = torch.zeros(group.num_units, dtype=torch.bool)
    for chosen in best[keep][1]:
        mask[chosen] = True
    return mask
