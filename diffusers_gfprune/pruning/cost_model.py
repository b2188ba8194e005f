"""Cost of a model as a function of the number of channels that each group keeps, without building the model.

Let n be the vector of kept channels. Every width is linear in n, and every cost is a sum of products of widths:

    in_l(n)  = a_l + A_l n          out_l(n) = b_l + B_l n
    MACs(n)  = sum_l positions_l area_l in_l out_l  +  sum_attentions 2 queries keys inner(n)
    parameters(n) = sum_l (area_l in_l out_l + bias_l out_l)  +  2 sum_norms channels(n)

A candidate takes microseconds, which makes a search for budgets possible. Latency is not of this form: a `LatencyModel`
predicts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from ..families.lookup import family_of
from ..metrics.model_size import layer_positions
from .channel_groups import ChannelGroup

__all__ = ["COUNTED_TARGETS", "TARGETS", "CostModel", "group_shares"]

COUNTED_TARGETS = ("macs", "params", "channels")  # latency is measured
TARGETS = (*COUNTED_TARGETS, "latency")
LATENCY_STEP = 32  # channels


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
            if piece.parameter == "weight":
                shares.setdefault((piece.module, piece.dim), np.zeros(len(groups)))[index] += 1
    return shares


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
        self.seconds = seconds
        self.dense = np.array([group.num_channels for group in groups], dtype=np.int64)
        positions = layer_positions(unet, sample_size)
        attentions = family_of(unet).attentions(unet)
        shares = group_shares(groups)

        def width(name: str, dim: int, size: int) -> tuple[float, np.ndarray]:
            row = shares.get((name, dim), np.zeros(len(self.groups)))
            return size - float(row @ self.dense), row

        rows: list[tuple] = []  # in and out widths, MACs per product, parameters per product and per output channel
        linear_macs = np.zeros(len(self.groups))
        norms: list[tuple[float, np.ndarray]] = []
        for name, module in unet.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                shape = module.weight.shape
                area = shape[2] * shape[3] if len(shape) == 4 else 1
                wide_in, wide_out = width(name, 1, shape[1]), width(name, 0, shape[0])
                rows.append((wide_in, wide_out, area * positions[name], area, 0.0 if module.bias is None else 1.0))
            elif isinstance(module, nn.Embedding):
                shape = module.weight.shape
                rows.append(((float(shape[0]), np.zeros(len(self.groups))), width(name, 1, shape[1]), 0, 1, 0.0))
            elif isinstance(module, nn.GroupNorm):
                norms.append(width(name, 0, module.num_channels))
            elif name in attentions:
                _, row = width(f"{name}.to_q", 0, module.to_q.out_features)
                linear_macs += 2 * positions[f"{name}.to_q"] * positions[f"{name}.to_k"] * row
        self._in0, self._in = np.array([r[0][0] for r in rows]), np.stack([r[0][1] for r in rows])
        self._out0, self._out = np.array([r[1][0] for r in rows]), np.stack([r[1][1] for r in rows])
        self._macs, self._area, self._bias = (np.array([r[k] for r in rows], dtype=float) for k in (2, 3, 4))
        self._attention = linear_macs
        self._norm0, self._norm = sum(n[0] for n in norms), sum((n[1] for n in norms), np.zeros(len(self.groups)))
        # Parameters of other layers (random Fourier features) do not change.
        counted = self.parameters(self.dense)
        self._other = sum(p.numel() for p in unet.parameters()) - counted

    _other = 0.0

    def _layer_widths(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._in0 + self._in @ widths, self._out0 + self._out @ widths

    def macs(self, widths: np.ndarray) -> float:
        """MACs of a forward pass at batch size 1 with `widths` channels in each group, an array of shape `(groups,)`."""
        wide_in, wide_out = self._layer_widths(widths)
        return float(self._macs @ (wide_in * wide_out) + self._attention @ widths)

    def parameters(self, widths: np.ndarray) -> float:
        """Number of parameters with `widths` channels in each group."""
        wide_in, wide_out = self._layer_widths(widths)
        products = self._area @ (wide_in * wide_out) + self._bias @ wide_out
        return float(products + 2 * (self._norm0 + self._norm @ widths) + self._other)

    def channels(self, widths: np.ndarray) -> float:
        """Total number of kept channels."""
        return float(np.sum(widths))

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
        """Cost of the last channel of each group, an array of shape `(groups,)`.

        Kernels compute in blocks, so that removing a single channel saves the time of a whole block or nothing. For
        `"latency"`, the cost is therefore the mean over `LATENCY_STEP` channels.
        """
        base = self.cost(target, widths)
        lengths = np.minimum(LATENCY_STEP, np.maximum(widths - 1, 1)) if target == "latency" else np.ones_like(widths)
        steps = np.diag(lengths)
        return np.array([base - self.cost(target, widths - step) for step in steps]) / lengths
