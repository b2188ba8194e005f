"""A budget in time that holds: measured models correct the predictions, and the result is measured, too.

A table of layer times predicts which widths save time; what a whole model loses is up to a few percent more or less, and up to
much more where a compiler joins layers. So models of planned widths are built and timed in turn with the dense one:

1. the narrowest model that the ladders allow says how much of what the table does not explain is constant;
2. widths planned for the ratio that is asked for are built and measured; the pair (predicted, measured) bends the prediction
   (`Correction`), and widths are planned anew, until measurement and ratio agree.

The measured share of a pair of models is a median over rounds, in each of which both are timed once, in alternating order:

    share = median_r (1 - t_small(r) / t_dense(r))        spread = 1.25 sigma / sqrt(rounds)

with sigma from the quartiles of the rounds, which a few rounds of other load on the machine do not move. Rounds go on until
the spread is small enough, or the time is up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from ..metrics.model_size import spatial_size
from ..metrics.speed import SpeedSetting, compilation, prepare_forward, seconds_of
from .layer_times import Timer
from .layer_workloads import Forward
from .model import LatencyModel

__all__ = ["LATENCY_TOLERANCE", "LatencyCheck", "LatencyMeter", "TimePair", "calibrate"]

logger = logging.getLogger(__name__)

LATENCY_TOLERANCE = 0.05  # share of the dense time that a pruned model may be off, before the user is warned
CLOSE_ENOUGH = 0.01  # the same, before widths are planned anew
MODELS = 4  # of planned widths that are measured at most
ROUNDS = (7, 3000)  # at least, at most
SPREAD = 0.004  # of a measured share, at which no more rounds are needed


@dataclass(frozen=True)
class TimePair:
    """Times of a dense and a small model, measured in turn.

    Attributes:
        share: Share of the dense time that the small model saves; below 0 if it is slower.
        spread: Standard error of `share`.
        dense_seconds: Median time of the dense forward.
        seconds: Median time of the small forward.
        rounds: In which both were timed once.
    """

    share: float
    spread: float
    dense_seconds: float
    seconds: float
    rounds: int


def _summary(rounds: Sequence[tuple[float, float]]) -> TimePair:
    """Rounds of (dense, small) seconds as one finding."""
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
    """Time two forwards in turn, as the module docstring says.

    Args:
        dense: The one that counts as 1.
        small: The other.
        device: Where both run.
        seconds: After which no further round starts (> 0); a few are made in any case.
        timer: Seconds of a call on a device.
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


class LatencyMeter:
    """Measures small models against one dense model.

    Args:
        dense: The dense model, without masks, on the device that is meant. A copy is measured.
        setting: Batch size, dtype, and whether models are compiled.
        sample_size: Height and width in pixels (default: the model's).
        seconds: That a pair of models is timed for at most, beyond a few rounds (> 0).

    Use it as a context: compiled code of the dense model is kept from pair to pair, and dropped at the end.
    """

    def __init__(
        self,
        dense: nn.Module,
        setting: SpeedSetting,
        sample_size: int | tuple[int, int] | None = None,
        seconds: float = 20.0,
    ) -> None:
        self.setting, self.seconds = setting, seconds
        self._device = next(dense.parameters()).device
        self._size = spatial_size(dense, sample_size)
        self._model: nn.Module | None = dense
        self._dense: Forward | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> LatencyMeter:
        self._stack.enter_context(compilation(self.setting, MODELS + 2))
        return self

    def __exit__(self, *details: object) -> None:
        self._dense = None
        self._stack.close()

    @torch.no_grad()
    def measure(self, small: nn.Module) -> TimePair:
        """The time that `small`, a model for the same inputs on the same device, saves."""
        if self._dense is None:
            _, _, self._dense = prepare_forward(self._model, self.setting, self._size, self._device)
        _, _, forward = prepare_forward(small, self.setting, self._size, self._device)
        return time_pair(self._dense, forward, self._device, self.seconds)


def calibrate(
    model: LatencyModel,
    ratio: float,
    narrowest: np.ndarray,
    plan: Callable[[], np.ndarray],
    measure: Callable[[np.ndarray], TimePair],
) -> list[dict]:
    """Correct a model of time by measured models, in place (see the module docstring).

    Args:
        model: With its table, and without a correction.
        ratio: Share of the dense time that is to be removed, in (0, 1).
        narrowest: Fewest channels that each group may keep, with shape `(groups,)`.
        plan: The widths that remove `ratio` according to `model` as it is then.
        measure: Builds the model of some widths and times it.

    Returns:
        For every measured model `predicted` before it was measured, `measured`, `spread` and `rounds`.
    """
    found = []

    def measured(kept: np.ndarray) -> TimePair:
        pair = measure(kept)
        found.append({"predicted": model.removed(kept), "measured": pair.share, "spread": pair.spread, "rounds": pair.rounds})
        model.correction = replace(model.correction, dense_seconds=pair.dense_seconds)
        return pair

    def learn(kept: np.ndarray, pair: TimePair) -> None:
        pairs = (*model.correction.pairs, (model.predicted(kept), pair.share))
        model.correction = replace(model.correction, pairs=pairs)

    pair = measured(narrowest)
    model.correction = replace(model.correction, constant=model.explain(narrowest, pair.share))
    learn(narrowest, pair)
    if pair.share <= ratio:
        return found  # out of reach: the budget says so
    for _ in range(MODELS):
        kept = plan()
        pair = measured(kept)
        if abs(pair.share - ratio) <= max(CLOSE_ENOUGH, 2 * pair.spread):
            break  # and nothing is learnt, so that these widths stay the ones that are planned
        learn(kept, pair)
    return found


@dataclass(frozen=True)
class LatencyCheck:
    """What was asked for, what was expected and what was got, as shares of the dense time that are gone.

    Attributes:
        setting: How both models were run.
        asked: The ratio asked for.
        predicted: By the calibrated model of time.
        pair: The compacted model, measured against the dense one.
    """

    setting: SpeedSetting
    asked: float
    predicted: float
    pair: TimePair

    @property
    def missed(self) -> bool:
        """Whether the measurement is off by more than `LATENCY_TOLERANCE`."""
        return abs(self.pair.share - self.asked) > LATENCY_TOLERANCE

    def __str__(self) -> str:
        times = f"{1000 * self.pair.dense_seconds:.3g} -> {1000 * self.pair.seconds:.3g} ms"
        return (
            f"time of a forward ({self.setting.describe()}): asked for {self.asked:.1%} less, predicted {self.predicted:.1%}, "
            f"measured {self.pair.share:.1%} +- {self.pair.spread:.1%} ({times})"
        )

    def warn(self) -> None:
        """Say aloud that the result is not what was asked for."""
        if self.missed:
            logger.warning("%s: more than %.0f %% of the dense time off", self, 100 * LATENCY_TOLERANCE)

    def to_dict(self) -> dict:
        """JSON values: the attributes, and `words`, the check in one line."""
        return {**dataclasses.asdict(self), "words": str(self)}
