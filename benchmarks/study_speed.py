"""Measured speed of the study's rows, and quality at equal measured time.

`study_latency.py` measures q, how many times as fast as the dense model a pruned one is; 1 / q is its time as a share of the
dense model's. A method with rows at several budgets gives points (time, quality), one for each budget. Between two points,
quality is interpolated linearly in time, for each seed. Outside of its points nothing is extrapolated: the nearest point
stands for it, and tables say so.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from study_records import (
    BUDGETS,
    CHANNELS,
    DEFAULT,
    DISTANCE,
    PLAIN,
    Found,
    figure,
    of_part,
    spread,
    title_of,
    widths_key,
    widths_of,
)

__all__ = [
    *("NOT_MEASURED", "OURS", "Outside", "Speed", "Speeds", "at_time", "equal_time_table", "load_speeds", "quality_at"),
    "series",
]

NOT_MEASURED = "Not measured yet: run `python benchmarks/study_latency.py`."
QUALITY = ("distance", "ssim_to_dense")
OURS = (DEFAULT, PLAIN)  # what rivals are compared with: the first that was measured at all budgets


@dataclass(frozen=True)
class Speed:
    """Speed-up of a row over the dense model.

    Attributes:
        ratio: Mean over the seeds that were measured.
        low: Lowest end of their intervals.
        high: Highest end of their intervals.
    """

    ratio: float
    low: float
    high: float

    @property
    def time(self) -> float:
        """Time of a forward pass as a share of the dense model's."""
        return 1 / self.ratio

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


Speeds = dict[str, dict[int, Speed]]  # by setting and batch size


def load_speeds(path: Path, data: Mapping[str, Found]) -> dict[str, Speeds]:
    """Speeds of rows, from those of their runs that were measured with the widths that they have now.

    Args:
        path: Results of `study_latency.py`; without the file, there are no speeds.
        data: Runs by data set.
    """
    measured = json.loads(path.read_text())["rows"] if path.is_file() else {}
    return {dataset: _speeds(found, measured.get(dataset, {})) for dataset, found in data.items()}


def _speeds(found: Found, measured: dict) -> Speeds:
    speeds: Speeds = {}
    for name, runs in found.items():
        known = [(measured.get(name, {}).get(str(run["seed"])), widths_of(run, found)) for run in runs]
        rows = [row for row, widths in known if row is not None and widths is not None and row["widths"] == widths_key(widths)]
        if not rows:
            continue
        speeds[name] = {}
        for batch_size in rows[0]["speed"]:
            each = [row["speed"][batch_size] for row in rows]
            lows, highs = zip(*(one["interval"] for one in each))
            mean = statistics.mean(one["speedup"] for one in each)
            speeds[name][int(batch_size)] = Speed(mean, min(lows), max(highs))
    return speeds


def batch_sizes(speeds: Speeds) -> list[int]:
    """Batch sizes that rows were measured at, in ascending order."""
    return sorted({batch_size for by_batch in speeds.values() for batch_size in by_batch})


def series(name: str, found: Found, speeds: Speeds) -> list[str]:
    """The rows of a method that have a measured time, from the mildest budget to the strictest."""
    return [name + ending for ending in BUDGETS if name + ending in found and name + ending in speeds]


@dataclass(frozen=True)
class Outside:
    """A time that is outside of a method's points.

    Attributes:
        end: `"fastest"` or `"slowest"`, the nearest point.
        time: Its time.
    """

    end: str
    time: float


def at_time(points: Sequence[tuple[float, float]], time: float) -> tuple[float, Outside | None]:
    """Quality at a time.

    Args:
        points: Time and quality of each row (at least one).
        time: The time.

    Returns:
        The quality, linear between two points; and `Outside` if it is that of the nearest point instead.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("points is empty: there must be at least one")
    points = sorted(points)
    for end, (place, value), beyond in (
        ("fastest", points[0], time < points[0][0]),
        ("slowest", points[-1], time > points[-1][0]),
    ):
        if beyond:
            return value, Outside(end, place)
    for (before, low), (after, high) in zip(points, points[1:]):
        if before <= time <= after and after > before:
            return low + (high - low) * (time - before) / (after - before), None
    return points[0][1], None


def quality_at(
    names: Sequence[str], found: Found, dataset: str, speeds: Speeds, batch_size: int, column: str, time: float
) -> tuple[list[float], Outside | None]:
    """Quality of a method at a time, for each seed that all of its rows have.

    Args:
        names: Rows of the method (`series`).
        found: Runs of the data set.
        dataset: The data set.
        speeds: Its measured speeds.
        batch_size: Batch size of the time.
        column: `"distance"` or `"ssim_to_dense"`.
        time: Share of the dense model's time.

    Raises:
        ValueError: The rows have no seed in common.
    """
    runs = {name: {run["seed"]: run for run in found[name]} for name in names}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))
    if not seeds:
        raise ValueError(f"{', '.join(names)} have no seed in common")
    values, outside = [], None
    for seed in seeds:
        points = [(speeds[name][batch_size].time, figure(runs[name][seed], dataset, column)) for name in names]
        value, outside = at_time(points, time)
        values.append(value)
    return values, outside


def our_rows(found: Found, speeds: Speeds, batch_size: int) -> list[str]:
    """The rows that rivals are compared with (`OURS`); none if nothing was measured at all budgets."""
    for name in OURS:
        rows = [row for row in series(name, found, speeds) if batch_size in speeds[row]]
        if len(rows) == len(BUDGETS):
            return rows
    return []


def equal_time_table(found: Found, dataset: str, speeds: Speeds, batch_size: int) -> str:
    """A table of our method and each rival at the same measured time, under a line that names our method.

    A rival with rows at several budgets is interpolated to the time of each row of ours. For a rival with one row, ours is
    interpolated to the time of that row.
    """
    own = our_rows(found, speeds, batch_size)
    if not own:
        return NOT_MEASURED
    distance = next(iter(found.values()))[0]["evaluation"]["distances"][DISTANCE[dataset]]["title"]
    ours = next(name for name in OURS if name in own)
    lines = [
        f"Ours: {title_of(ours)}.",
        "",
        f"| rival | time / dense time | {distance}: ours | rival | SSIM to dense: ours | rival | interpolated |",
        "|---" * 7 + "|",
    ]
    for rival in (*CHANNELS, *of_part("main"), *of_part("earlier")):
        theirs = [name for name in series(rival, found, speeds) if batch_size in speeds[name]]
        if rival == ours or not theirs:
            continue
        many = len(theirs) > 1
        moved, word = (theirs, "rival") if many else (own, "ours")
        for row in own if many else theirs:
            time = speeds[row][batch_size].time
            cells = []
            for column in QUALITY:
                still = [figure(run, dataset, column) for run in found[row]]
                values, outside = quality_at(moved, found, dataset, speeds, batch_size, column, time)
                cells += [spread(v) for v in ((still, values) if many else (values, still))]
            note = word if outside is None else f"none: the {outside.end} row of {word} is at {outside.time:.2f}"
            lines.append(f"| {title_of(rival)} | {time:.2f} | {' | '.join(cells)} | {note} |")
    return "\n".join(lines)
