"""Cost of a model as a function of what each group keeps, without building the model.

Let n be the vector of kept channels; for a removable block (`blocks`), n is 1, or 0 without it. Every width is linear in n,
and every cost is a sum of products of widths. Layers inside a block exist if the block does, e_l(n) = n_block(l); others
always do:

    in_l(n)  = a_l + A_l n          out_l(n) = b_l + B_l n
    MACs(n)  = sum_l e_l positions_l area_l in_l out_l  +  sum_attentions 2 e queries keys inner(n)
    parameters(n) = sum_l e_l (area_l in_l out_l + bias_l out_l)  +  2 sum_norms e channels(n)  +  others
    channels(n) = sum_groups e n

A candidate takes microseconds, which makes a search for budgets possible. Latency is not of this form: a `LatencyModel`
predicts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..families.lookup import family_of
from ..metrics.model_size import layer_positions, tokens_of_attention
from .blocks import RemovableBlock, inner_groups
from .channel_groups import ChannelGroup

__all__ = ["COUNTED_TARGETS", "TARGETS", "CostModel", "block_of_modules", "group_shares"]

COUNTED_TARGETS = ("macs", "params", "channels")  # latency is measured
TARGETS = (*COUNTED_TARGETS, "latency")
LATENCY_STEP = 32  # channels
LAYERS = (nn.Conv2d, nn.Linear, nn.Embedding, nn.GroupNorm)  # whose parameters depend on widths


def group_shares(groups: Sequence[ChannelGroup]) -> dict[tuple[str, int], np.ndarray]:
    """How often each group occurs along a dimension of a weight: rows of A and B in the module docstring.

    Args:
        groups: The channel groups of a model.

    Returns:
        Arrays of shape `(groups,)` by module name and dimension of its weight (0 or 1); dimensions without a group are left
        out.
    """
    shares: dict[tuple[str, int], np.ndarray] = {}
    for index, group in enumerate(groups):
        for piece in group.slices:
            if piece.parameter == "weight" and piece.role != "branch":
                shares.setdefault((piece.module, piece.dim), np.zeros(len(groups)))[index] += 1
    return shares


def block_of_modules(groups: Sequence[ChannelGroup]) -> dict[str, int]:
    """Index of the removable block that each module is inside of; modules outside of all blocks are left out."""
    return {name: index for index, group in enumerate(groups) if isinstance(group, RemovableBlock) for name in group.inside}


class CostModel:
    """Costs of every pruned version of a model.

    Args:
        unet: The dense (or masked) model; only shapes are read.
        groups: Its channel groups.
        sample_size: Height and width in pixels for counting MACs (default: the model's).
        seconds: Time of a forward pass as a function of kept channels, an array of shape `(groups,)`, such as
            `LatencyModel.seconds`. It is the cost of the target `"latency"`.
    """

    def __init__(
        self,
        unet: nn.Module,
        groups: Sequence[ChannelGroup],
        sample_size: int | tuple[int, int] | None = None,
        seconds: Callable[[np.ndarray], float] | None = None,
    ) -> None:
        self.groups = list(groups)
        self.inner = inner_groups(groups)
        self.seconds = seconds
        self.dense = np.array([group.num_channels for group in groups], dtype=np.int64)
        positions = layer_positions(unet, sample_size)
        attentions = family_of(unet).attentions(unet)
        shares, block_of = group_shares(groups), block_of_modules(groups)
        nothing = np.zeros(len(self.groups))
        one = 1.0, nothing

        def width(name: str, dim: int, size: int) -> tuple[float, np.ndarray]:
            row = shares.get((name, dim), nothing)
            return size - float(row @ self.dense), row

        # In and out widths, MACs per product, parameters per product and per output channel, block
        rows: list[tuple] = []
        modules = dict(unet.named_modules())
        for name, module in modules.items():
            block = block_of.get(name, -1)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                shape = module.weight.shape
                area, bias = (shape[2] * shape[3] if len(shape) == 4 else 1), float(module.bias is not None)
                wide_in, wide_out = width(name, 1, shape[1]), width(name, 0, shape[0])
                rows.append((wide_in, wide_out, area * positions[name], area, bias, block))
            elif isinstance(module, nn.Embedding):
                shape = module.weight.shape
                rows.append(((float(shape[0]), nothing), width(name, 1, shape[1]), 0, 1, 0.0, block))
            elif isinstance(module, nn.GroupNorm):
                rows.append((one, width(name, 0, module.num_channels), 0, 0, 2.0, block))
            elif name in attentions:
                queries, keys = tokens_of_attention(name, positions)
                rows.append((one, width(f"{name}.to_q", 0, module.to_q.out_features), 2 * queries * keys, 0, 0.0, block))
        # Layer norms and random Fourier features have a constant size
        for name, module in modules.items():
            others = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            if others and not isinstance(module, (*LAYERS, ParametrizationList)):  # the latter hold masked weights of layers
                rows.append((one, one, 0, others, 0.0, block_of.get(name, -1)))
        self._in0, self._in = np.array([r[0][0] for r in rows]), np.stack([r[0][1] for r in rows])
        self._out0, self._out = np.array([r[1][0] for r in rows]), np.stack([r[1][1] for r in rows])
        self._macs, self._area, self._bias = (np.array([r[k] for r in rows], dtype=float) for k in (2, 3, 4))
        self._block = np.array([r[5] for r in rows])
        self._channels = np.array([not isinstance(group, RemovableBlock) for group in groups], dtype=float)

    def _exists(self, widths: np.ndarray) -> np.ndarray:
        """e of the module docstring for each row."""
        return np.append(widths, 1)[self._block]

    def _layer_widths(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._in0 + self._in @ widths, self._out0 + self._out @ widths

    def macs(self, widths: np.ndarray) -> float:
        """MACs of a forward pass at batch size 1 with `widths` channels in each group, an array of shape `(groups,)`."""
        wide_in, wide_out = self._layer_widths(widths)
        return float((self._macs * self._exists(widths)) @ (wide_in * wide_out))

    def parameters(self, widths: np.ndarray) -> float:
        """Number of parameters with `widths` channels in each group."""
        wide_in, wide_out = self._layer_widths(widths)
        return float(self._exists(widths) @ (self._area * wide_in * wide_out + self._bias * wide_out))

    def present(self, widths: np.ndarray) -> np.ndarray:
        """Kept channels of each group, 0 for groups inside of removed blocks, int64 with shape `(groups,)`."""
        left = np.array(widths, dtype=np.int64)
        for block, inner in self.inner.items():
            if left[block] == 0:
                left[inner] = 0
        return left

    def channels(self, widths: np.ndarray) -> float:
        """Total number of kept channels."""
        return float(self._channels @ self.present(widths))

    def cost(self, target: str, widths: np.ndarray) -> float:
        """The cost for `target`, one of `TARGETS`.

        Raises:
            ValueError: The target is unknown, or it is `"latency"` and `seconds` is not set.
        """
        if target not in TARGETS:
            raise ValueError(f"target={target} must be one of {', '.join(TARGETS)}")
        if target == "latency" and self.seconds is None:
            raise ValueError("target=latency needs measured times: pass seconds, such as those of a LatencyModel")
        costs = {"macs": self.macs, "params": self.parameters, "channels": self.channels, "latency": self.seconds}
        return costs[target](widths)

    def removed(self, target: str, widths: np.ndarray) -> float:
        """Share of the dense cost that is removed, in [0, 1]."""
        return 1.0 - self.cost(target, widths) / self.cost(target, self.dense)

    def marginal(self, target: str, widths: np.ndarray) -> np.ndarray:
        """Cost of the last channel of each group, and of each kept block, an array of shape `(groups,)`.

        Kernels compute in blocks, so that removing a single channel saves the time of a whole block or nothing. For
        `"latency"`, the cost is therefore the mean over `LATENCY_STEP` channels.
        """
        base = self.cost(target, widths)
        lengths = np.minimum(LATENCY_STEP, np.maximum(widths - 1, 1)) if target == "latency" else np.ones_like(widths)
        steps = np.diag(np.minimum(lengths, widths))
        return np.array([base - self.cost(target, widths - step) for step in steps]) / lengths
