"""Durations and sizes as they are printed."""

from __future__ import annotations

__all__ = ["format_duration", "format_size"]


def format_duration(seconds: float) -> str:
    """Seconds, minutes from two minutes on, or hours from two hours on."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def format_size(count: float, decimals: int = 1) -> str:
    """Bytes in KiB, in MiB from 1 MiB on, or in GiB from 1 GiB on.

    Args:
        count: Bytes.
        decimals: Of KiB and MiB; GiB have one.
    """
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    unit, name = (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
    return f"{count / unit:,.{decimals}f} {name}"
