"""Formatting of numbers, durations and sizes."""

from __future__ import annotations

__all__ = ["format_count", "format_duration", "format_size"]


def format_count(count: int, one: str, several: str | None = None) -> str:
    """A number and its noun, as in "1 step" and "1,500 steps".

    Args:
        count: The number.
        one: The singular.
        several: The plural (default: the singular with an s).
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def format_duration(seconds: float) -> str:
    """Format a duration: in seconds below two minutes, in minutes below two hours, else in hours."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def format_size(count: float, decimals: int = 1) -> str:
    """Format a size: in KiB below 1 MiB, in MiB below 1 GiB, else in GiB.

    Args:
        count: Number of bytes.
        decimals: Decimals of KiB and MiB; GiB have one.
    """
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    unit, name = (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
    return f"{count / unit:,.{decimals}f} {name}"
