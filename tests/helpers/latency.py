"""Made-up times of layers and models, in proportion to their MACs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from diffusers_gfprune.latency import calibration, layer_times
from diffusers_gfprune.latency.calibration import TimePair
from diffusers_gfprune.latency.layer_times import Grid, GridPoint
from diffusers_gfprune.latency.layer_workloads import Convolution, LinearLayer
from diffusers_gfprune.metrics.model_size import count_macs
from diffusers_gfprune.metrics.speed import PreparedForward


def shares_by_macs(grids: Sequence[Grid], calls: Sequence[GridPoint], layers: float) -> list[np.ndarray]:
    """A table in which the layers of the dense model take the share `layers` of its time."""

    def area(workload) -> float:
        if isinstance(workload, Convolution):
            return math.prod(workload.side) * math.prod(workload.kernel) / math.prod(workload.stride)
        return max(workload.tokens, 1) if isinstance(workload, LinearLayer) else 0.0

    tables = [area(grid.workload) * np.outer(grid.wide_in, grid.wide_out) for grid in grids]
    summed = sum(
        tables[index][grids[index].wide_in.index(wide_in), grids[index].wide_out.index(wide_out)]
        for index, wide_in, wide_out in calls
    )
    return [layers / summed * table for table in tables]


def time_by_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and models are prepared and run as ever, but what they are said to take does not depend on the machine's load."""
    prepare, measure = calibration.prepare_forward, layer_times.measure_shares

    def shares(dense, grids, calls, *arguments, **options) -> list[np.ndarray]:
        found = measure(dense, grids, calls, *arguments, **options)
        assert all(np.isfinite(table).all() and (table > 0).all() for table in found)
        return shares_by_macs(grids, calls, 0.8)

    def prepare_and_run(model, *arguments) -> PreparedForward:
        prepare(model, *arguments).forward()
        return PreparedForward(model, [])

    def pair(dense, small, *arguments) -> TimePair:
        share = 0.9 * (1 - count_macs(small) / count_macs(dense))
        return TimePair(share, 0.001, 0.02, 0.02 * (1 - share), 9)

    monkeypatch.setattr(layer_times, "measure_shares", shares)
    monkeypatch.setattr(calibration, "prepare_forward", prepare_and_run)
    monkeypatch.setattr(calibration, "time_pair", pair)
    monkeypatch.setattr(layer_times, "ROUNDS", (2, 2))
