"""Time of a forward pass as a function of the number of channels that each group keeps, from measured layer times.

With n the vector of kept channels, e_l = 0 for layers inside of removed blocks and otherwise 1 (`cost_model`), w(l) the
workload of layer call l, and shares of the dense time from `layer_times`,

    layers(n) = sum_l e_l share_w(l)(in_l(n), out_l(n))
    r(n)      = layers(n) + rest (c calls(n) + (1 - c) volume(n))          rest = 1 - layers(dense)
    removed(n) = f(1 - r(n))

The rest is not in the table: additions, concatenations, the interpreter. A share c of it is proportional to the number of
layer calls, which widths do not change; the remainder to the activations that convolutions write. f is a monotone correction
by measured models (`calibration`).

Between the points of a table, shares are interpolated linearly along both widths. Convolutions compute channels in blocks of a
vector register or a tile: with blocks of 16, 33 channels take as long as 48. Their widths are therefore rounded up first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from ..pruning.channel_groups import ChannelGroup
from ..pruning.cost_model import block_of_modules, group_shares
from .layer_times import Grid
from .layer_workloads import AttentionProducts, Convolution, LayerCall, LinearLayer, Norm, trace_layer_calls

__all__ = ["Correction", "LatencyModel", "plan_grids"]

BLOCKS = {"cpu": 16, "cuda": 8}  # channels that a convolution computes together
# Shares of the largest width at which a layer is timed. In a runtime, each point is a model that is loaded, and has threads
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
RUNTIME_FRACTIONS = (1 / 8, 1 / 2, 1)
SAME = 0.02  # a correction treats predictions closer than this as equal


@dataclass(frozen=True)
class Correction:
    """Correction of predictions by measured models.

    Attributes:
        constant: c of the module docstring, in [0, 1].
        pairs: Predicted (1 - r) and measured shares of the dense time that models save.
        dense_seconds: Measured time of the dense forward pass in seconds.
    """

    constant: float = 1.0
    pairs: tuple[tuple[float, float], ...] = ()
    dense_seconds: float = 1.0

    def __call__(self, predicted: float) -> float:
        """f: piecewise linear and monotone through (0, 0) and the pairs, proportional beyond the last pair.

        Pairs with nearly the same prediction, and neighbours that are not in order, are replaced by their mean.

        Args:
            predicted: Predicted share of the dense time that is removed, without correction.

        Returns:
            The corrected share, in [0, 1].
        """
        x, y = self._knots
        if predicted > x[-1]:
            return min(predicted * y[-1] / x[-1] if x[-1] > 0 else predicted, 1.0)
        return float(np.interp(predicted, x, y))

    @property
    def _knots(self) -> tuple[list[float], list[float]]:
        # Isotonic regression by pooling adjacent violators. A block has the sum of measurements, and the predictions.
        blocks: list[tuple[float, list[float]]] = []
        for predicted, measured in sorted(pair for pair in self.pairs if pair[0] > SAME):
            blocks.append((max(measured, 0.0), [predicted]))
            while len(blocks) > 1 and (
                blocks[-1][1][0] - blocks[-2][1][-1] < SAME
                or blocks[-1][0] / len(blocks[-1][1]) < blocks[-2][0] / len(blocks[-2][1])
            ):
                total, predictions = blocks.pop()
                blocks[-1] = (blocks[-1][0] + total, blocks[-1][1] + predictions)
        x = [0.0, *(sum(predictions) / len(predictions) for _, predictions in blocks)]
        return x, [0.0, *(total / len(predictions) for total, predictions in blocks)]


def plan_grids(
    calls: Sequence[LayerCall], groups: Sequence[ChannelGroup], device_type: str, fractions: Sequence[float] = FRACTIONS
) -> tuple[list[Grid], list[int]]:
    """Choose the widths at which layers are timed. All possible widths lie between two points.

    Args:
        calls: Layer calls of the dense model.
        groups: Its channel groups.
        device_type: `"cpu"` or `"cuda"`.
        fractions: Shares of the largest width of a workload at which it is timed, besides dense widths.

    Returns:
        The grids, and the index of the grid for each call.
    """
    shares = group_shares(groups)
    widths: dict[tuple, tuple[set[int], set[int]]] = {}
    keys = []
    for call in calls:
        # Constant widths have separate tables: the three channels of an image are not on a curve with other widths
        fixed_in = call.wide_in if (call.module, 1) not in shares or not call.workload.two_sided else None
        fixed_out = call.wide_out if (call.module, 0) not in shares else None
        keys.append((call.workload, fixed_in, fixed_out))
        wide_in, wide_out = widths.setdefault(keys[-1], (set(), set()))
        wide_in.add(call.wide_in)
        wide_out.add(call.wide_out)
    grids = []
    for (workload, fixed_in, fixed_out), (wide_in, wide_out) in widths.items():
        steps = {Norm: "group_size", AttentionProducts: "heads"}
        step = next((name for kind, name in steps.items() if isinstance(workload, kind)), None)
        step = BLOCKS[device_type] if step is None else getattr(workload, step)
        sides = ((wide_in, fixed_in), (wide_out, fixed_out))
        grids.append(Grid(workload, *(_axis(wide, step, fixed is not None, fractions) for wide, fixed in sides)))
    order = {key: index for index, key in enumerate(widths)}
    return grids, [order[key] for key in keys]


def _axis(widths: set[int], step: int, fixed: bool, fractions: Sequence[float]) -> tuple[int, ...]:
    """Widths to time: those of dense layers, and smaller multiples of `step`."""
    largest = max(widths)
    if fixed:
        return (largest,)
    if largest <= len(fractions) * step:
        points = set(range(step, largest, step))
    else:
        points = {step * max(1, math.ceil(fraction * largest / step)) for fraction in fractions}
    return tuple(sorted({point for point in points if point <= largest} | widths))


class LatencyModel:
    """Predicts the time of every pruned version of a model.

    Args:
        unet: The dense model; only its configuration and device are read.
        groups: Its channel groups.
        sample_size: Height and width in pixels (default: the model's).
        runtime: The runtime for which times are predicted; None: PyTorch, on the model's device.

    Attributes:
        grids: The grids for `layer_shares`.
        calls: The layers of one dense forward pass, as points of the grids.
        correction: Correction by measured models.
        rest: Share of the dense time that is not in the table, set by `set_shares`.

    Raises:
        ValueError: The model is on a device other than a CPU or a CUDA GPU.
    """

    def __init__(
        self,
        unet: nn.Module,
        groups: Sequence[ChannelGroup],
        sample_size: int | tuple[int, int] | None = None,
        runtime: str | None = None,
    ) -> None:
        calls = trace_layer_calls(unet, sample_size)
        device_type = next(unet.parameters()).device.type if runtime is None else "cpu"
        block = BLOCKS.get(device_type)
        if block is None:
            raise ValueError(f"device={device_type} must be one of {', '.join(BLOCKS)} to prune for latency")
        self.dense = np.array([group.num_channels for group in groups], dtype=np.int64)
        self.grids, grid_of = plan_grids(calls, groups, device_type, FRACTIONS if runtime is None else RUNTIME_FRACTIONS)
        self.calls = [(grid, call.wide_in, call.wide_out) for call, grid in zip(calls, grid_of)]
        self.correction = Correction()
        self._tables: list[np.ndarray] = []

        # Calls of a table with the same widths are one row with a count
        shares, nothing, block_of = group_shares(groups), np.zeros(len(self.dense)), block_of_modules(groups)
        rows: dict[tuple, list] = {}
        volume0: dict[int, float] = defaultdict(float)  # by block
        volume: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(len(self.dense)))
        for call, grid in zip(calls, grid_of):
            row_in = shares.get((call.module, 1), nothing) if call.workload.two_sided else nothing
            row_out = shares.get((call.module, 0), nothing)
            inside = block_of.get(call.module, -1)
            key = (grid, call.wide_in, call.wide_out, row_in.tobytes(), row_out.tobytes(), inside)
            row = rows.setdefault(key, [row_in, row_out, 0])
            row[2] += 1
            if isinstance(call.workload, Convolution):
                volume[inside] += call.positions * row_out
                volume0[inside] += call.positions * (call.wide_out - float(row_out @ self.dense))
        self._volume_block = np.array(list(volume), dtype=np.int64)
        self._volume0 = np.array([volume0[inside] for inside in volume])
        self._volume = np.array(list(volume.values())).reshape(len(volume), len(self.dense))
        self._rows = np.stack([row[side] for side in (0, 1) for row in rows.values()])  # (2 rows, groups)
        dense_widths = np.array([key[side] for side in (1, 2) for key in rows])
        self._fixed = np.rint(dense_widths - self._rows @ self.dense).astype(np.int64)
        self._rows = self._rows.astype(np.int64)
        self._grid_of_row = [key[0] for key in rows]
        self._count = np.array([row[2] for row in rows.values()], dtype=float)
        self._block = np.array([key[5] for key in rows])

        # For every possible width of a layer, the index of the table point below it, and the fraction to the next point
        places, starts, size = [], {}, 0
        for index, grid in enumerate(self.grids):
            for side, axis in enumerate((grid.wide_in, grid.wide_out)):
                place = _places(axis, block if isinstance(grid.workload, (Convolution, LinearLayer)) else 1)
                starts[index, side] = size
                places.append(place)
                size += len(place)
        place = np.concatenate(places)
        self._start = np.array([starts[key[0], side] for side in (0, 1) for key in rows])
        self._index = place.astype(np.int64)
        self._weight = place - self._index
        shapes = [(len(grid.wide_in) + 1, len(grid.wide_out) + 1) for grid in self.grids]  # with an edge, see set_shares
        offsets = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
        self._offset = np.array([offsets[key[0]] for key in rows])
        self._stride = np.array([shapes[key[0]][1] for key in rows])

    def set_shares(self, tables: Sequence[np.ndarray]) -> None:
        """Set the measured times.

        Args:
            tables: Output of `layer_shares` for `grids`.

        Raises:
            ValueError: The tables belong to other grids.
        """
        shapes = [(len(grid.wide_in), len(grid.wide_out)) for grid in self.grids]
        if [np.shape(table) for table in tables] != shapes:
            raise ValueError("the table of layer times must match the grids of this model: measure it again")
        self._tables = [np.asarray(table, dtype=float) for table in tables]
        # The last point along each axis is repeated, so that every point has a next one
        self._flat = np.concatenate([np.pad(table, (0, 1), mode="edge").ravel() for table in self._tables])
        self._scale, self.rest = 1.0, 0.0
        layers = self._layers(self.dense)
        # Single layers can take longer than in the forward pass, where inputs are in the cache
        self._scale, self.rest = 1 / max(layers, 1.0), max(1 - layers, 0.0)

    def _layers(self, widths: np.ndarray) -> float:
        """layers(n) of the module docstring."""
        wide = self._fixed + self._rows @ widths
        place = self._start + wide
        index, weight = self._index[place], self._weight[place]
        half = len(self._count)
        corner = self._offset + index[:half] * self._stride + index[half:]
        flat, stride, along_in, along_out = self._flat, self._stride, weight[:half], weight[half:]
        near = flat[corner] * (1 - along_out) + flat[corner + 1] * along_out
        far = flat[corner + stride] * (1 - along_out) + flat[corner + stride + 1] * along_out
        return float(
            (self._scale * self._count * self._exists(widths, self._block) * (near * (1 - along_in) + far * along_in)).sum()
        )

    @staticmethod
    def _exists(widths: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """e of the module docstring, given the index of the block of each call, or -1."""
        return np.append(widths, 1)[blocks]

    def _relative_volume(self, widths: np.ndarray) -> float:
        def volume(widths: np.ndarray) -> float:
            return float(self._exists(widths, self._volume_block) @ (self._volume0 + self._volume @ widths))

        dense = volume(self.dense)
        return volume(widths) / dense if dense else 1.0  # transformers may have no convolution

    def _relative_calls(self, widths: np.ndarray) -> float:
        return float(self._count @ self._exists(widths, self._block)) / float(self._count.sum())

    def predicted(self, widths: np.ndarray) -> float:
        """1 - r(n): share of the dense time that is removed, without correction; in [0, 1] up to noise of the table."""
        widths = np.asarray(widths, dtype=np.int64)
        constant = self.correction.constant
        rest = constant * self._relative_calls(widths) + (1 - constant) * self._relative_volume(widths)
        return 1 - self._layers(widths) - self.rest * rest

    def removed(self, widths: np.ndarray) -> float:
        """Corrected share of the dense time that is removed, in [0, 1].

        Args:
            widths: Number of channels that each group keeps, integers with shape `(groups,)`.
        """
        return self.correction(self.predicted(widths))

    def seconds(self, widths: np.ndarray) -> float:
        """Time of a forward pass in seconds with `widths` channels in each group, for a `CostModel`."""
        return self.correction.dense_seconds * (1 - self.removed(widths))

    def explain(self, widths: np.ndarray, measured: float) -> float:
        """The constant c for which the prediction for `widths` equals a measured share, clamped to [0, 1]."""
        widths = np.asarray(widths, dtype=np.int64)
        volume = self._relative_volume(widths)
        room = self.rest * (self._relative_calls(widths) - volume)
        left = 1 - measured - self._layers(widths) - self.rest * volume
        return min(max(left / room, 0.0), 1.0) if room > 0 else 1.0

    def to_dict(self) -> dict:
        """Table and correction as JSON values, for checkpoints; floats are exact."""
        correction = {**self.correction.__dict__, "pairs": [list(pair) for pair in self.correction.pairs]}
        return {"shares": [table.tolist() for table in self._tables], "correction": correction}

    def load_dict(self, values: Mapping) -> None:
        """Load the output of `to_dict` for the same model.

        Raises:
            ValueError: The table is damaged or belongs to another model.
        """
        try:
            tables = [np.array(table, dtype=float) for table in values["shares"]]
            correction = Correction(**values["correction"])
            correction = replace(correction, pairs=tuple((float(p), float(m)) for p, m in correction.pairs))
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the table of layer times is damaged: {error}") from None
        self.set_shares(tables)
        self.correction = correction


def _places(axis: tuple[int, ...], block: int) -> np.ndarray:
    """Positions of widths 0, 1, ..., axis[-1] among the points of an axis, as fractional indices."""
    if len(axis) == 1:
        return np.zeros(axis[0] + 1)
    widths = np.arange(axis[-1] + 1)
    points = np.array(axis)
    next_point = points[np.searchsorted(points, widths)]
    widths = np.minimum(next_point, -(-widths // block) * block)
    return np.interp(widths, points, np.arange(len(points), dtype=float))
