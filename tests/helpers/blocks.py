"""Costs of a hand-made model of residual blocks, for known answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusers_gfprune.pruning.blocks import RemovableBlock
from diffusers_gfprune.pruning.channel_groups import ChannelGroup, GroupSlice
from diffusers_gfprune.pruning.cost_model import CostModel

HIDDEN = 10  # channels inside of each block


class BlockCosts(CostModel):
    """A model whose blocks have `HIDDEN` channels inside, in units of one, and cost `sizes` at their dense width.

    Groups are first those inside of each block, then the blocks. The rest of the model costs `rest`.
    """

    def __init__(self, sizes: Sequence[float], rest: float = 20.0) -> None:
        count = len(sizes)
        units = tuple((channel,) for channel in range(HIDDEN))
        self.sizes, self.rest, self.seconds = np.array(sizes, dtype=float), rest, None
        self.groups = [
            ChannelGroup(
                f"inside {k}", HIDDEN, (GroupSlice(f"layer {k}", "weight", 0, tuple(range(HIDDEN)), "output"),), units
            )
            for k in range(count)
        ]
        self.groups += [RemovableBlock(f"block {k}", 1, (), ((0,),), inside=frozenset({f"layer {k}"})) for k in range(count)]
        self.inner = {count + k: [k] for k in range(count)}
        self.dense = np.array([HIDDEN] * count + [1] * count, dtype=np.int64)

    def cost(self, target: str, widths: np.ndarray) -> float:
        inside, blocks = np.split(np.asarray(widths, dtype=float), 2)
        return float(self.rest + self.sizes @ (inside / HIDDEN * blocks))

    def ladders(self, channels: bool = True) -> list[list[int]]:
        """All widths from 1 on, or the dense ones only; and blocks."""
        inside = list(range(HIDDEN, 0, -1)) if channels else [HIDDEN]
        return [inside] * len(self.sizes) + [[1, 0]] * len(self.sizes)
