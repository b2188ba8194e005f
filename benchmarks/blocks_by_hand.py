"""Blocks chosen by hand, as people remove them without a criterion, until a budget is met.

- Diffusion transformers lose every other block, starting with the second: 1, 3, 5, ..., then 2, 4, .... This is the usual
  baseline of work on depth, such as TinyFusion (Fang et al., arXiv 2412.01199).
- UNets lose blocks in the three steps of BK-SDM (Kim et al., arXiv 2305.15798): (1) pairs of a residual block and an
  attention, outer stages first: in down stages all but the first, in up stages all but the first and the last; (2) the middle
  stage; (3) what is left, from the inner stages outwards. BK-SDM removes all of a step, here blocks are removed one after
  another, so that the budget is met as nearly as possible. Up stages have one pair more than down stages: where these have
  one, nothing is removed in step (1).

Only blocks that the package can remove are candidates (`Family.removable_blocks`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

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
    return sorted(blocks, key=lambda name: _step(name, [len(stage.resnets) for stage in model.up_blocks]))


def _step(name: str, pairs: Sequence[int]) -> tuple[int, int]:
    """Step of BK-SDM in which a block of a UNet is removed, and its place there; `pairs` are the numbers of the up stages."""
    if name.startswith("mid_block"):
        return 2, 0
    side, *places = re.match(r"(down|up)_blocks\.(\d+)\.\w+\.(\d+)", name).groups()
    stage, pair = map(int, places)
    depth = stage if side == "down" else len(pairs) - 1 - stage
    kept = pair == 0 or (side == "up" and pair == pairs[stage] - 1)  # after step (1)
    return (3, -depth) if kept else (1, depth)


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
