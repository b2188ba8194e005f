"""latency/calibration.py: predictions are corrected by measurements, within the spread of the measurements."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch

from diffusers_gfprune.latency.calibration import LatencyCheck, TimePair, calibrate, time_pair
from diffusers_gfprune.latency.model import Correction
from diffusers_gfprune.metrics.speed import SpeedSetting

CPU = torch.device("cpu")
SETTING = SpeedSetting(1, "float32")


class Straight:
    """A model of time with one width of 100 channels, in proportion to which half of the time goes, and a rest without c."""

    def __init__(self) -> None:
        self.correction = Correction()

    def predicted(self, kept: np.ndarray) -> float:
        return float(1 - kept[0] / 100)

    def removed(self, kept: np.ndarray) -> float:
        return self.correction(self.predicted(kept))

    def explain(self, kept: np.ndarray, measured: float) -> float:
        return 0.5

    def plan(self, ratio: float) -> np.ndarray | None:
        """The width that removes a share, as a budget would find it; None: even a width of 10 removes less."""
        if self.removed(np.array([10])) < ratio:
            return None
        return np.array([min(range(1, 101), key=lambda width: abs(self.removed(np.array([width])) - ratio))])


def run(truth, ratio: float) -> tuple[Straight, list[dict]]:
    model = Straight()
    found = calibrate(
        model,
        ratio,
        np.array([10]),
        lambda: model.plan(ratio),
        lambda kept: TimePair(truth(1 - kept[0] / 100), 0.001, 2.0, 1.0, 9),
    )
    return model, found


@pytest.mark.parametrize("truth", [lambda x: x, lambda x: 0.8 * x, lambda x: x**2, lambda x: x**0.75, lambda x: x**3])
def test_what_is_asked_for_is_measured_in_the_end(truth) -> None:
    """Whatever the shape of the error, if less time comes of less width."""
    model, found = run(truth, 0.4)
    assert truth(1 - model.plan(0.4)[0] / 100) == pytest.approx(0.4, abs=0.015)
    assert len(found) <= 5
    assert model.correction.dense_seconds == 2.0 and model.correction.constant == 0.5
    assert found[0]["measured"] == truth(0.9)


def test_the_plan_in_the_end_is_a_measured_one(caplog: pytest.LogCaptureFixture) -> None:
    """The nearest, where a machine answers otherwise each time and no model comes near; its measurement is the last."""
    answers = iter([0.9, 0.3, 0.47, 0.33, 0.5])  # of the narrowest model, then of planned ones
    measured = {}

    def truth(wanted: float) -> float:
        measured[round(wanted, 2)] = next(answers)
        return measured[round(wanted, 2)]

    model, found = run(truth, 0.4)
    assert [each["measured"] for each in found] == [0.9, 0.3, 0.33, 0.5, 0.47]
    assert measured[round(1 - model.plan(0.4)[0] / 100, 2)] == 0.47
    assert "ratio=0.4 of latency is not met: the nearest of 5 measured models saves 47.0 %" in caplog.text


def test_a_right_prediction_is_measured_once() -> None:
    """Beside the narrowest model: nothing is to be learnt from more."""
    assert len(run(lambda x: x, 0.4)[1]) == 2


def test_what_is_out_of_reach_is_found_at_once() -> None:
    """Only the narrowest model is built, and the error names the largest possible reduction."""
    model, found = run(lambda x: 0.3 * x, 0.4)
    assert len(found) == 1
    assert model.removed(np.array([10])) == pytest.approx(0.27)


def test_other_load_does_not_move_a_measured_share() -> None:
    """Every seventh call takes ten times as long; the small model takes 0.6 of the dense one's time."""
    load = itertools.cycle([1.0, 1.02, 1.0, 0.98, 1.0, 1.01, 10.0])
    pair = time_pair(lambda: 1.0, lambda: 0.6, CPU, 60.0, lambda call, device: call() * next(load))
    assert pair.share == pytest.approx(0.4, abs=0.01)
    assert pair.dense_seconds == pytest.approx(1.0, rel=0.03) and pair.seconds == pytest.approx(0.6, rel=0.03)
    assert 0 < pair.spread < 0.05


def test_rounds_stop_when_the_share_is_known_or_the_time_is_up() -> None:
    quiet = time_pair(lambda: 1.0, lambda: 0.6, CPU, 60.0, lambda call, device: call())
    assert quiet.rounds == 7 and quiet.spread == 0
    noise = itertools.cycle([1.0, 3.0, 2.0])
    assert time_pair(lambda: 1.0, lambda: 0.6, CPU, 60.0, lambda call, device: call() * next(noise)).rounds > 15


def test_the_check_says_what_was_asked_for_and_what_came_out(caplog: pytest.LogCaptureFixture) -> None:
    """One line; a warning if it is more than 5 % of the dense time off."""
    check = LatencyCheck(SETTING, 0.4, 0.402, TimePair(0.391, 0.008, 0.0139, 0.0084, 9))
    assert str(check) == (
        "time of a forward (batch 1, float32, eager): asked for 40.0% less, predicted 40.2%, measured 39.1% +- 0.8% "
        "(13.9 -> 8.4 ms)"
    )
    missed = LatencyCheck(SETTING, 0.4, 0.4, TimePair(0.34, 0.008, 0.0139, 0.0092, 9))
    with caplog.at_level(logging.WARNING):
        check.warn()
        assert not caplog.records
        missed.warn()
    assert "measured 34.0%" in caplog.text and "more than 5 %" in caplog.text
    assert missed.to_dict()["pair"]["share"] == 0.34
