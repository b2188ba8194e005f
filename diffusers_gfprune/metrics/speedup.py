"""How many times as fast a model is as another one, with the spread of that figure, in numbers and in words.

Round r of a measurement (see `speed`) times both models a moment apart and gives a ratio q_r = t_first(r) / t_model(r). With
the ratios of n rounds in ascending order, q_(1) <= ... <= q_(n),

    speed-up = median q        interval = [q_(k), q_(n+1-k)]

for the largest k with which the interval holds the median that rounds without end would have with the probability

    1 - 2 P(B <= k - 1) >= CONFIDENCE,        B ~ Binomial(n, 1/2)

B counts the rounds below that median, so that nothing is assumed of how times are distributed, but that rounds are
independent of each other. Ten rounds have k = 2 (97.9 %), twenty k = 6 (95.9 %), and six are the fewest that do (96.9 %).

References:
    H. A. David and H. N. Nagaraja, Order Statistics, third edition (2003), section 7.1.
    https://doi.org/10.1002/0471722162
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["CONFIDENCE", "compare_speeds", "describe_speedup", "median_interval"]

CONFIDENCE = 0.95


def median_interval(values: Iterable[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """A confidence interval of the median, free of any distribution (see the module docstring).

    Args:
        values: Independent measurements of one thing.
        confidence: Probability with which the interval is to hold the median, in (0, 1).

    Returns:
        Its ends, two of the values; None where these are too few.

    Raises:
        ValueError: `confidence` is out of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1")
    ordered = sorted(values)
    k, below = 0, 0  # below: subsets of fewer than k + 1 rounds, of the 2^n that there are
    while 2 * (below := below + math.comb(len(ordered), k)) <= (1 - confidence) * 2 ** len(ordered):
        k += 1
    return (ordered[k - 1], ordered[-k]) if k else None


def describe_speedup(speedup: float, interval: Sequence[float] | None) -> str:
    """A speed-up in words, the same everywhere: `1.32 times as fast (1.28 to 1.35)`, `no difference (0.97 to 1.04)`.

    There is no difference where the interval, as it is printed, holds 1.

    Args:
        speedup: How many times as fast.
        interval: Of `median_interval`.
    """
    if interval is None:
        return f"{speedup:.2f} times as fast (too few rounds to say how surely)"
    low, high = (f"{end:.2f}" for end in interval)
    difference = "no difference" if float(low) <= 1 <= float(high) else f"{speedup:.2f} times as fast"
    return f"{difference} ({low} to {high})"


def compare_speeds(
    first: Sequence[Mapping], other: Sequence[Mapping], names: tuple[str, str] = ("dense", "pruned")
) -> list[dict]:
    """Rows of `measure_speed` as a line for each setting, to be read.

    Args:
        first: Rows of the model that the other is compared with.
        other: Rows of that other model, in the same settings.
        names: Of the two models.

    Returns:
        For each setting `title`, such as `batch 16, eager`, which has a dtype and a memory format where there are several of
        them; `first_ms` and `other_ms`, latencies, None where they could not be measured; `words`, the speed-up, or why there
        is none, in one line.

    Raises:
        KeyError: A field is missing.
        ValueError: The models were not measured in the same settings.
    """
    varying = [name for name in ("dtype", "memory_format") if len({row[name] for row in (*first, *other)}) > 1]
    lines = []
    for one, two in zip(first, other, strict=True):
        failed = [f"{name} not measured: {row['error']}" for name, row in zip(names, (one, two)) if "error" in row]
        lines.append(
            {
                "title": ", ".join([f"batch {two['batch_size']}", two["mode"], *(two[name] for name in varying)]),
                "first_ms": None if "error" in one else one["latency_ms"],
                "other_ms": None if "error" in two else two["latency_ms"],
                "words": failed[0] if failed else describe_speedup(two["speedup"], two["speedup_interval"]),
            }
        )
    return lines
