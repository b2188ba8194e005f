"""Arguments that say in which settings speed is measured, the same in every script that measures it."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusers_gfprune.evaluation.speed import DTYPES, SpeedSetting, parse_settings

__all__ = ["SpeedArguments"]


@dataclass
class SpeedArguments:
    """What speed is measured with: every combination of these lists."""

    speed_batch_sizes: list[int] = field(
        default_factory=lambda: [1, 16], metadata={"help": "Batch sizes that speed is measured at (0: it is not measured)."}
    )
    speed_dtypes: list[str] = field(
        default_factory=lambda: ["float32"], metadata={"help": f"Number types of it: {', '.join(DTYPES)}."}
    )
    speed_modes: list[str] = field(
        default_factory=lambda: ["eager"], metadata={"help": "Modes of it: eager, compiled, several if you like."}
    )
    speed_memory_formats: list[str] = field(
        default_factory=lambda: ["contiguous"],
        metadata={"help": "Memory formats of it: contiguous, channels_last, several if you like."},
    )

    def __post_init__(self) -> None:
        for size in self.speed_batch_sizes:
            if size < 1 and self.speed_batch_sizes != [0]:
                raise ValueError(f"speed_batch_sizes={size} must be at least 1, or 0 alone")
        self.speed_settings()

    def speed_settings(self) -> list[SpeedSetting]:
        """What speed is measured with, nothing if it is not measured.

        Raises:
            ValueError: A word is none of those that there are, or a list is empty.
        """
        if self.speed_batch_sizes == [0]:
            return []
        try:
            return parse_settings(self.speed_batch_sizes, self.speed_dtypes, self.speed_modes, self.speed_memory_formats)
        except ValueError as error:
            raise ValueError(f"speed_{error}") from error
