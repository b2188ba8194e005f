"""formatting.py: numbers, and units of durations and sizes."""

from __future__ import annotations

import pytest

from diffusers_gfprune.formatting import format_count, format_duration, format_size


def test_counts() -> None:
    assert [format_count(count, "step") for count in (0, 1, 2, 1500)] == ["0 steps", "1 step", "2 steps", "1,500 steps"]
    assert [format_count(count, "batch", "batches") for count in (1, 2)] == ["1 batch", "2 batches"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7170, "120 min"), (7200, "2.0 h"), (1e6, "277.8 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "decimals", "words"),
    [
        (0, 1, "0.0 KiB"),
        (1536, 1, "1.5 KiB"),
        (2**20, 1, "1.0 MiB"),
        (2**20, 0, "1 MiB"),
        (1000 * 2**20, 1, "1,000.0 MiB"),
        (2**30, 0, "1.0 GiB"),
    ],
)
def test_sizes(count: int, decimals: int, words: str) -> None:
    assert format_size(count, decimals) == words
