"""Speed-up of a model over another one, with a confidence interval.

Round r of a measurement (see `speed`) times both models directly after each other and gives a ratio
q_r = t_first(r) / t_model(r). With the ratios of n rounds in ascending order, q_(1) <= ... <= q_(n),

    speed-up = median q        interval = [q_(k), q_(n+1-k)]

for the largest k such that the interval contains the true median with probability

    1 - 2 P(B <= k - 1) >= CONFIDENCE,        B ~ Binomial(n, 1/2)

B is the number of rounds below the true median. The interval assumes independent rounds, but no distribution of times. Ten
rounds give k = 2 (97.9 %), twenty k = 6 (95.9 %). At least six rounds are needed (96.9 %).

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
    """A distribution-free confidence interval of the median (see the module docstring).

    Args:
        values: Independent measurements of one quantity.
        confidence: Minimum probability that the interval contains the median, in (0, 1).

    Returns:
        The ends of the interval, which are two of the values; None if there are too few values.

    Raises:
        ValueError: `confidence` is out of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1")
    ordered = sorted(values)
    k, below = 0, 0  # below: number of subsets of at most k rounds, of 2^n subsets; exact, as both exceed any float
    while 2 * (below := below + math.comb(len(ordered), k)) / 2 ** len(ordered) <= 1 - confidence:
        k += 1
    return (ordered[k - 1], ordered[-k]) if k else None


def describe_speedup(speedup: float, interval: Sequence[float] | None) -> str:
    """A speed-up as text: `1.32 times as fast (1.28 to 1.35)`, or `no difference (0.97 to 1.04)`.

    There is no difference if the interval, as printed, contains 1.

    Args:
        speedup: Ratio of times.
        interval: Confidence interval from `median_interval`.
    """
    if interval is None:
        return f"{speedup:.2f} times as fast (too few rounds for a confidence interval)"
    low, high = (f"{end:.2f}" for end in interval)
    difference = "no difference" if float(low) <= 1 <= float(high) else f"{speedup:.2f} times as fast"
    return f"{difference} ({low} to {high})"


def compare_speeds(dense: Sequence[Mapping], pruned: Sequence[Mapping]) -> list[dict]:
    """Readable lines, one for each setting, from rows of `measure_speed`.

    Args:
        dense: Rows of the dense model.
        pruned: Rows of the pruned model, in the same settings.

    Returns:
        A dict for each setting: `title`, such as `batch 16, eager`, with dtype, memory format and device if they vary;
        `first_ms` and `other_ms`, the latencies, None if not measured; `words`, the speed-up, or the reason why it was not
        measured.

    Raises:
        KeyError: A field is missing.
        ValueError: The models were not measured in the same settings.
    """
    rows = (*dense, *pruned)
    varying = [name for name in ("dtype", "memory_format", "device") if len({row.get(name) for row in rows}) > 1]
    lines = []
    for one, two in zip(dense, pruned, strict=True):
        failed = [f"{name} not measured: {row['error']}" for name, row in (("dense", one), ("pruned", two)) if "error" in row]
        lines.append(
            {
                "title": ", ".join([f"batch {two['batch_size']}", two["mode"], *(two[name] for name in varying)]),
                "first_ms": None if "error" in one else one["latency_ms"],
                "other_ms": None if "error" in two else two["latency_ms"],
                "words": failed[0] if failed else describe_speedup(two["speedup"], two["speedup_interval"]),
            }
        )
    return lines
