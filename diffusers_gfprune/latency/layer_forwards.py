"""Forward passes of single layers, which the table of layer times is measured with: in PyTorch, or in a runtime.

In PyTorch, layers always run eagerly. In a runtime, each point of the table has a session of its own, and the layers of the
dense forward pass have one session together (`runtimes.forwards`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ..runtimes.forwards import Layer, layer_calls, sequence_call
from .layer_workloads import Inputs, Workload

__all__ = ["EagerLayers", "Forward", "Layers", "Point", "RuntimeLayers"]

Forward = Callable[[], object]
Point = tuple[Workload, int, int]  # with input and output channels


class Layers(Protocol):
    """How layers run."""

    def forwards(self, grids: Sequence[Sequence[Point]]) -> Iterator[list[Forward]]:
        """Forward passes of the points of each grid, created when they are asked for."""
        ...

    def sequence(self, points: Sequence[Point]) -> Forward:
        """One call of all layers, one after the other, each with weights of its own."""
        ...


class EagerLayers:
    """Layers run eagerly.

    Args:
        inputs: Creates the inputs of layers.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def forwards(self, grids: Sequence[Sequence[Point]]) -> Iterator[list[Forward]]:
        """See `Layers`."""
        return ([self._forward(point) for point in points] for points in grids)

    def sequence(self, points: Sequence[Point]) -> Forward:
        """See `Layers`."""
        forwards = [self._forward(point) for point in points]
        return lambda: [forward() for forward in forwards][-1]

    def _forward(self, point: Point) -> Forward:
        module, tensors = _layer(point, self.inputs)
        return lambda: module(*tensors)


class RuntimeLayers:
    """Layers run in a runtime.

    Args:
        inputs: Creates the inputs of layers, on the CPU in float32.
        runtime: One of `runtimes.requirements.RUNTIMES`.
    """

    def __init__(self, inputs: Inputs, runtime: str) -> None:
        self.inputs, self.runtime = inputs, runtime

    def forwards(self, grids: Sequence[Sequence[Point]]) -> Iterator[list[Forward]]:
        """See `Layers`."""
        calls = layer_calls((_layer(point, self.inputs) for points in grids for point in points), self.runtime)
        return (list(itertools.islice(calls, len(points))) for points in grids)

    def sequence(self, points: Sequence[Point]) -> Forward:
        """See `Layers`."""
        return sequence_call([_layer(point, self.inputs) for point in points], self.runtime)


def _layer(point: Point, inputs: Inputs) -> Layer:
    workload, wide_in, wide_out = point
    return workload.layer(wide_in, wide_out, inputs)
