"""Which split of a data set trains and which one is held out, and what the plan of a run says of that."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..diffusion.class_labels import LabelDropout

__all__ = ["DataSummary", "held_out_candidates", "train_split"]


@dataclass(frozen=True)
class DataSummary:
    """Where the images of a run come from and how many there are; None is an unknown number, of a stream.

    Attributes:
        source: The argument that named the data set, and its value.
        splits: Images of every split.
        train: The split that trains.
        held_out: The split that is held out, in part or whole; the same as `train` if images of that are held out.
        num_train: Training images.
        num_held_out: Held-out images, as far as they can be used.
        enlarged: Whether the set is smaller than the model's images, and is scaled up.
        label_dropout: How labels are dropped, if the model has a null label.
    """

    source: str
    splits: Mapping[str, int | None]
    train: str
    held_out: str
    num_train: int | None
    num_held_out: int
    enlarged: bool = False
    label_dropout: LabelDropout | None = None

    def lines(self) -> list[str]:
        """Two lines for a plan, and a third one on dropped labels."""
        total = None if None in self.splits.values() else sum(self.splits.values())
        names = ", ".join(name if count is None else f"{name} ({count:,})" for name, count in self.splits.items())
        held_out = f"{self.num_held_out:,} held-out images of {self.held_out}"
        unused = [name for name in self.splits if name not in (self.train, self.held_out)]
        return [
            f"{self.source}, split{'s' if len(self.splits) > 1 else ''} {names}: {_number(total)} images in all",
            f"{_number(self.num_train)} training images of {self.train}, {held_out}"
            + (f"; not used: {', '.join(unused)}" if unused else "")
            + ("; all are scaled up to the model's size" if self.enlarged else ""),
            *self._dropped(),
        ]

    def _dropped(self) -> list[str]:
        if self.label_dropout is None:
            return []
        share, label = f"{self.label_dropout.probability:.0%}", self.label_dropout.null_label
        return [f"{share} of the labels are replaced by the null label {label} in training and scoring"]


def _number(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"


def train_split(splits: Collection[str], wanted: str | None, source: str) -> str:
    """The split to train on: the one that is asked for, else `train`, else the first one.

    Raises:
        ValueError: There is no such split.
    """
    if wanted is not None:
        return _checked(splits, wanted, "train_split_name", source)
    return "train" if "train" in splits else next(iter(splits))


def held_out_candidates(splits: Collection[str], wanted: str | None, train: str, source: str) -> list[str]:
    """Splits to hold out images of, the best one first: the one that is asked for, else `validation` and `test`.

    The training split, which stands last, is shared out.

    Raises:
        ValueError: There is no such split.
    """
    if wanted is not None:
        return [_checked(splits, wanted, "validation_split_name", source)]
    return [*(name for name in ("validation", "test") if name in splits and name != train), train]


def _checked(splits: Collection[str], name: str, argument: str, source: str) -> str:
    if name not in splits:
        raise ValueError(f"{argument}={name} is not a split of {source}, which has {', '.join(splits)}")
    return name
