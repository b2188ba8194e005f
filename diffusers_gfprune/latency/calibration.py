"""Calibration of latency budgets: measured models correct the predictions, and the result is measured, too.

A table of layer times predicts which widths save time. The saving of a whole model differs by a few percent, and by much more
if a compiler fuses layers. Models of planned widths are therefore built and timed alternately with the dense model:

1. the narrowest model on the ladders determines the constant part of the time that the table does not explain;
2. a model with the widths planned for the requested ratio is measured. The pair (predicted, measured) corrects the prediction
   (`Correction`), and widths are planned again, until measurement and ratio agree.

The correction that is left is the one by which the nearest of these models was planned: planning again leads to its widths.

The measured share of a pair of models is a median over rounds. Each round times both models once, in alternating order:

    share = median_r (1 - t_small(r) / t_dense(r))        spread = 1.25 sigma / sqrt(rounds)

Sigma is computed from the quartiles of the rounds and is therefore robust to a few rounds with other load on the machine.
Rounds continue until the spread is small enough or the time limit is reached.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ..metrics.model_size import spatial_size
from ..metrics.speed import SpeedSetting, compilation, prepare_forward, seconds_of, timed_device
from .layer_forwards import Forward
from .layer_times import Timer
from .model import Correction, LatencyModel

__all__ = ["LATENCY_TOLERANCE", "LatencyCheck", "TimePair", "calibrate", "latency_meter"]

logger = logging.getLogger(__name__)

LATENCY_TOLERANCE = 0.05  # error as a share of the dense time above which the user is warned
CLOSE_ENOUGH = 0.01  # the same, above which widths are planned again
MODELS = 4  # maximum number of measured models of planned widths
ROUNDS = (7, 3000)  # minimum, maximum
SPREAD = 0.004  # of a measured share, at which rounds stop


@dataclass(frozen=True)
class TimePair:
    """Times of a dense and a small model, measured alternately.

    Attributes:
        share: Share of the dense time that the small model saves; below 0 if it is slower.
        spread: Standard error of `share`.
        dense_seconds: Median time of the dense forward pass, in seconds.
        seconds: Median time of the small forward pass, in seconds.
        rounds: Number of rounds.
    """

    share: float
    spread: float
    dense_seconds: float
    seconds: float
    rounds: int


def _summary(rounds: Sequence[tuple[float, float]]) -> TimePair:
    """Summarize rounds of (dense, small) seconds."""
    shares = [1 - small / dense for dense, small in rounds]
    low, _, high = statistics.quantiles(shares, n=4)
    sigma = (high - low) / 1.349  # of a normal distribution with these quartiles
    return TimePair(
        statistics.median(shares),
        1.253 * sigma / len(shares) ** 0.5,
        statistics.median(dense for dense, _ in rounds),
        statistics.median(small for _, small in rounds),
        len(rounds),
    )


def time_pair(dense: Forward, small: Forward, device: torch.device, seconds: float, timer: Timer = seconds_of) -> TimePair:
    """Time two forward passes alternately, as described in the module docstring.

    Args:
        dense: Forward pass of the dense model.
        small: Forward pass of the small model.
        device: Device of both.
        seconds: Time limit in seconds, beyond the minimum number of rounds (> 0).
        timer: Returns the seconds of a call on a device.
    """
    for forward in (dense, small) * 2:
        timer(forward, device)
    rounds: list[tuple[float, float]] = []
    least, most = ROUNDS
    spent = 0.0
    while len(rounds) < least or (len(rounds) < most and spent < seconds and _summary(rounds).spread > SPREAD):
        if len(rounds) % 2 == 0:
            rounds.append((timer(dense, device), timer(small, device)))
        else:
            rounds.append((timer(small, device), timer(dense, device))[::-1])
        spent += sum(rounds[-1])
    return _summary(rounds)


@contextlib.contextmanager
def latency_meter(
    dense: nn.Module,
    setting: SpeedSetting,
    sample_size: int | tuple[int, int] | None = None,
    seconds: float = 20.0,
) -> Iterator[Callable[[nn.Module], TimePair]]:
    """Context of a function that measures the time that small models save.

    The compiled or exported dense model is reused for all of them, and released at the end. They must take the same inputs and
    be on the same device.

    Args:
        dense: The dense model, without masks, on the target device. A copy is measured.
        setting: Batch size, dtype and mode.
        sample_size: Height and width in pixels (default: the model's).
        seconds: Time limit for a pair of models in seconds, beyond the minimum number of rounds (> 0).
    """
    device, size = timed_device(dense, setting), spatial_size(dense, sample_size)
    with compilation(setting, MODELS + 2):
        dense_forward = prepare_forward(dense, setting, size).forward

        @torch.no_grad()
        def measure(small: nn.Module) -> TimePair:
            return time_pair(dense_forward, prepare_forward(small, setting, size).forward, device, seconds)

        yield measure


def calibrate(
    model: LatencyModel,
    ratio: float,
    narrowest: np.ndarray,
    plan: Callable[[], np.ndarray | None],
    measure: Callable[[np.ndarray], TimePair],
) -> list[dict]:
    """Correct a latency model by measured models, in place (see the module docstring).

    Args:
        model: The latency model, with its table and without a correction.
        ratio: Share of the dense time to remove, in (0, 1).
        narrowest: Minimum number of channels of each group, with shape `(groups,)`.
        plan: Returns the widths that remove `ratio` according to the current `model`; None: it is out of reach.
        measure: Builds a model with the given widths and times it.

    Returns:
        For every measured model, `predicted` before the measurement, `measured`, `spread` and `rounds`; last the one with the
        widths that `plan` returns from now on, if the ratio is in reach.
    """
    measurements = []

    def measured(widths: np.ndarray) -> TimePair:
        pair = measure(widths)
        measurements.append(
            {"predicted": model.removed(widths), "measured": pair.share, "spread": pair.spread, "rounds": pair.rounds}
        )
        model.correction = replace(model.correction, dense_seconds=pair.dense_seconds)
        return pair

    def learn(widths: np.ndarray, pair: TimePair) -> None:
        pairs = (*model.correction.pairs, (model.predicted(widths), pair.share))
        model.correction = replace(model.correction, pairs=pairs)

    pair = measured(narrowest)
    model.correction = replace(model.correction, constant=model.explain(narrowest, pair.share))
    learn(narrowest, pair)
    tried: list[tuple[float, Correction, dict]] = []  # error, correction by which widths were planned, measurement
    for _ in range(MODELS):
        correction, widths = model.correction, plan()
        if widths is None:
            break
        pair = measured(widths)
        tried.append((abs(pair.share - ratio), correction, measurements[-1]))
        if tried[-1][0] <= max(CLOSE_ENOUGH, 2 * pair.spread):
            break
        learn(widths, pair)
    if not tried:
        return measurements  # out of reach: the budget raises an error
    error, model.correction, nearest = min(tried, key=lambda each: each[0])
    if error > LATENCY_TOLERANCE:
        logger.warning(
            "ratio=%g of latency is not met: the nearest of %d measured models saves %.1f %%",
            ratio,
            len(measurements),
            100 * nearest["measured"],
        )
    return [*(each for each in measurements if each is not nearest), nearest]


@dataclass(frozen=True)
class LatencyCheck:
    """Requested, predicted and measured savings, as shares of the dense time.

    Attributes:
        setting: Settings of the forward passes.
        asked: The requested ratio.
        predicted: Prediction of the calibrated latency model.
        pair: Measurement of the compacted and the dense model.
    """

    setting: SpeedSetting
    asked: float
    predicted: float
    pair: TimePair

    @property
    def missed(self) -> bool:
        """Whether the measurement differs from the ratio by more than `LATENCY_TOLERANCE`."""
        return abs(self.pair.share - self.asked) > LATENCY_TOLERANCE

    def __str__(self) -> str:
        times = f"{1000 * self.pair.dense_seconds:.3g} -> {1000 * self.pair.seconds:.3g} ms"
        return (
            f"time of a forward ({self.setting.describe()}): asked for {self.asked:.1%} less, predicted {self.predicted:.1%}, "
            f"measured {self.pair.share:.1%} +- {self.pair.spread:.1%} ({times})"
        )

    def warn(self) -> None:
        """Log a warning if the budget was missed."""
        if self.missed:
            logger.warning("%s: the error is more than %.0f %% of the dense time", self, 100 * LATENCY_TOLERANCE)

    def to_dict(self) -> dict:
        """JSON values: the attributes, and `words`, the text of the check."""
        return {**dataclasses.asdict(self), "words": str(self)}
