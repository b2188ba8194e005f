"""Made-up times of models that are exported all the same."""

from __future__ import annotations

import pytest

from diffusers_gfprune.latency import calibration, layer_times
from diffusers_gfprune.latency.calibration import TimePair
from diffusers_gfprune.metrics.model_size import count_macs
from diffusers_gfprune.metrics.speed import PreparedForward


def time_by_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is prepared and run once, and is then said to take a time in proportion to its MACs.

    Layers are timed, but shortly: what calibration makes of them does not depend on the load of the machine.
    """
    prepare = calibration.prepare_forward

    def prepare_and_run(model, *arguments) -> PreparedForward:
        prepare(model, *arguments).forward()
        return PreparedForward(model, [])

    def pair(dense, small, *arguments) -> TimePair:
        share = 1 - count_macs(small) / count_macs(dense)
        return TimePair(share, 0.001, 0.02, 0.02 * (1 - share), 9)

    monkeypatch.setattr(calibration, "prepare_forward", prepare_and_run)
    monkeypatch.setattr(calibration, "time_pair", pair)
    monkeypatch.setattr(layer_times, "SECONDS", 0.2)
    monkeypatch.setattr(layer_times, "DENSE_SECONDS", 1.0)
