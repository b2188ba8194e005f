"""Blocks chosen by hand, as people remove them without a criterion, until a budget is met.

- Diffusion transformers lose every other block, starting with the second: 1, 3, 5, ..., then 2, 4, .... This is the usual
  baseline of work on depth, such as TinyFusion (Fang et al., arXiv 2412.01199).
- UNets lose blocks in the three steps of BK-SDM (Kim et al., arXiv 2305.15798): (1) in every stage, the residual block and
  attention after the first pair, outer stages first; (2) the middle stage; (3) what is left, from the inner stages outwards.
  BK-SDM removes all of a step, here blocks are removed one after another, so that the budget is met as nearly as possible.

Only blocks that the package can remove are candidates (`Family.removable_blocks`).
"""

from __future__ import annotations

import copy
import re

import torch
from diffusers import ModelMixin

from diffusers_gfprune import GFPruneConfig, GradientFlowPruner
from diffusers_gfprune.families.lookup import family_of

__all__ = ["order_by_hand", "remove_by_hand"]


def order_by_hand(model: ModelMixin) -> list[str]:
    """All removable blocks of a dense model, in the order in which they are removed."""
    blocks = list(family_of(model).removable_blocks(model))
    if family_of(model).component == "transformer":
        return sorted(blocks, key=lambda name: (int(name.rpartition(".")[2]) % 2 == 0, int(name.rpartition(".")[2])))
    return sorted(blocks, key=lambda name: _step(name, len(model.config.down_block_types)))


def _step(name: str, stages: int) -> tuple[int, int]:
    """Step of BK-SDM in which a block of a UNet is removed, and its place there."""
    if name.startswith("mid_block"):
        return 2, 0
    side, stage, pair = re.match(r"(down|up)_blocks\.(\d+)\.\w+\.(\d+)", name).groups()
    depth = int(stage) if side == "down" else stages - 1 - int(stage)
    return (1, depth) if int(pair) > 0 else (3, -depth)


def remove_by_hand(model: ModelMixin, ratio: float) -> tuple[ModelMixin, list[str]]:
    """Remove blocks by hand to a budget of MACs.

    Args:
        model: The dense model; it is not modified.
        ratio: Share of the MACs to remove, in (0, 1).

    Returns:
        The pruned model whose removed share is nearest to the ratio, and the names of its removed blocks.
    """
    config = GFPruneConfig(total_steps=1, criterion="random", ratio=ratio, depth="allow")
    pruner = GradientFlowPruner(copy.deepcopy(model), config)
    order, misses = order_by_hand(model), []
    for name in order:
        pruner.set_masks({name: torch.zeros(1)})
        misses.append(abs(pruner.cost.removed("macs", pruner.kept_channels()) - ratio))
    count = misses.index(min(misses)) + 1
    pruner.set_masks(dict.fromkeys(order[count:], torch.ones(1)))
    return pruner.compact(), order[:count]
