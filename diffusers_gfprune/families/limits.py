"""Limits for the arguments of a model whose config comes from the Hub.

The check raises for arguments that are invalid, give non-finite outputs, or allocate too much memory.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

__all__ = ["MAX_WIDTH", "ConfigLimits", "check_freq_shift", "check_patches", "check_sample_size", "is_int", "refuse"]

MAX_WIDTH = 2**16  # channels of a layer
MAX_SIDE = 2**14  # pixels of an image
MAX_SAMPLE_VALUES = 2**30  # total values of an image
MAX_POSITION_VALUES = 2**26  # of the position embeddings of patches, which are computed while loading


def is_int(value) -> bool:
    """Whether a value of a config is an integer; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def refuse(name: str, value, wanted: str) -> NoReturn:
    """Raise a `ValueError` for an argument with a wrong value."""
    raise ValueError(f"{name}={reprlib.repr(value)} must be {wanted}")


@dataclass(frozen=True)
class ConfigLimits:
    """Accepted values for each argument of a dense model.

    Attributes:
        integers: Minimum and maximum of integer arguments.
        numbers: Minimum and maximum of arguments that are integers or floating-point numbers.
        choices: Accepted values of other arguments.
        lists: Arguments that are lists of 1 to 16 such values.
        optional: Arguments that may be None.
        either: Arguments that are one such value or a list of them.
    """

    integers: Mapping[str, tuple[int, int]]
    numbers: Mapping[str, tuple[float, float]]
    choices: Mapping[str, tuple]
    lists: frozenset[str]
    optional: frozenset[str]
    either: frozenset[str] = frozenset()

    def check(self, config: Mapping) -> None:
        """Check all arguments except `sample_size`.

        Arguments without limits, such as those of a later Diffusers, must be plain JSON values.

        Raises:
            ValueError: For the first argument with a wrong value.
        """
        for name, value in config.items():
            if name in self.lists or (name in self.either and isinstance(value, (list, tuple))):
                if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 16:
                    refuse(name, value, "a list with 1 to 16 entries")
                for entry in value:
                    self._check_value(name, entry)
            elif name != "sample_size" and not (value is None and name in self.optional):
                self._check_value(name, value)

    def _check_value(self, name: str, value) -> None:
        if name in self.integers:
            low, high = self.integers[name]
            if not is_int(value) or not low <= value <= high:
                refuse(name, value, f"an integer from {low} to {high}")
        elif name in self.numbers:
            low, high = self.numbers[name]
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
                refuse(name, value, f"a number from {low:g} to {high:g}")
        elif name in self.choices:
            prefix = "UNetRes" if name in self.lists and isinstance(value, str) else ""  # prefix of blocks in old Diffusers
            plain = value.removeprefix(prefix) if prefix else value
            if not any(type(plain) is type(choice) and plain == choice for choice in self.choices[name]):
                refuse(name, value, f"one of {', '.join(map(str, self.choices[name]))}")
        else:
            entries = value if isinstance(value, (list, tuple)) else [value]
            plain = all(entry is None or isinstance(entry, (bool, str, int, float)) for entry in entries)
            finite = all(math.isfinite(entry) for entry in entries if isinstance(entry, float))
            if not plain or len(entries) > 64 or not finite:
                refuse(name, value, "a finite number, a string, a boolean, or a list of up to 64 of them")


def check_sample_size(size, channels: int, multiple: int) -> None:
    """Check that a `sample_size` is not too large and can be halved at each level of the model.

    Args:
        size: One side, both sides, or None.
        channels: Number of channels of a sample.
        multiple: Both sides must be multiples of this.
    """
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    fits = len(sides) == 2 and all(is_int(side) and 1 <= side <= MAX_SIDE and side % multiple == 0 for side in sides)
    if size is not None and not (fits and channels * sides[0] * sides[1] <= MAX_SAMPLE_VALUES):
        most = f"{MAX_SAMPLE_VALUES // channels} pixels in all"
        refuse("sample_size", size, f"one or two multiples of {multiple}, up to {MAX_SIDE} and with at most {most}")


def check_freq_shift(shift: float, channels: int, because: str) -> None:
    """Check that all frequencies of sinusoidal embeddings with `channels` values are finite: half of them minus the shift is a
    divisor. `because` names the argument that sets the channels."""
    last = max(channels // 2 - 1, 0)
    if shift > last:
        refuse("freq_shift", shift, f"a number from 0 to {last} for {because}")


def check_patches(config: Mapping) -> None:
    """Check that a transformer of square samples divides them into patches, and that it can compute their positions."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    size, patch, hidden = config["sample_size"], config["patch_size"], heads * head_dim
    if hidden > MAX_WIDTH or hidden % 4:  # each axis has sines and cosines
        wanted = f"an integer whose product with num_attention_heads={heads} is a multiple of 4 and at most {MAX_WIDTH}"
        refuse("attention_head_dim", head_dim, wanted)
    if not is_int(size):
        refuse("sample_size", size, "an integer, since samples are square")
    if size % patch:
        refuse("sample_size", size, f"a multiple of patch_size={patch}")
    check_sample_size(size, config["in_channels"], patch)
    if (size // patch) ** 2 * hidden > MAX_POSITION_VALUES:
        refuse("sample_size", size, f"at most {MAX_POSITION_VALUES // hidden} patches of patch_size={patch} in all")
