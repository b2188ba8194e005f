"""Choice of the training split and the held-out split, and their summary for the plan of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..diffusion.class_labels import LabelDropout

__all__ = ["DataSummary", "held_out_candidates", "train_split"]


@dataclass(frozen=True)
class DataSummary:
    """Source and numbers of images of a run. A number is None if it is unknown, as for a stream.

    Attributes:
        source: Argument that named the data set, and its value.
        splits: Number of images of every split.
        train: Name of the training split.
        held_out: Name of the split of the held-out images, which may be the training split.
        num_train: Number of training images.
        num_held_out: Number of usable held-out images.
        enlarged: Whether images are smaller than the model's size, and enlarged.
        label_dropout: Rule for dropping labels, if the model has a null label.
        notes: Further lines about latents and captions.
    """

    source: str
    splits: Mapping[str, int | None]
    train: str
    held_out: str
    num_train: int | None
    num_held_out: int
    enlarged: bool = False
    label_dropout: LabelDropout | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Two lines for the plan, and further ones about dropped labels, latents and captions, if any."""
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
            *self.notes,
        ]

    def _dropped(self) -> list[str]:
        if self.label_dropout is None:
            return []
        share, label = f"{self.label_dropout.probability:.0%}", self.label_dropout.null_label
        return [f"{share} of the labels are replaced by the null label {label} in training and scoring"]


def _number(count: int | None) -> str:
    return "an unknown number of" if count is None else f"{count:,}"


def train_split(splits: Collection[str], requested: str | None, source: str) -> str:
    """The split to train on: the requested one, else `train`, else the first one.

    Raises:
        ValueError: There is no such split.
    """
    if requested is not None:
        return _checked(splits, requested, "train_split_name", source)
    return "train" if "train" in splits else next(iter(splits))


def held_out_candidates(splits: Collection[str], requested: str | None, train: str, source: str) -> list[str]:
    """Splits to take held-out images from, in order of preference: the requested one, else `validation`, `test` and `train`.

    If it is the training split, its images are divided.

    Raises:
        ValueError: There is no such split.
    """
    if requested is not None:
        return [_checked(splits, requested, "validation_split_name", source)]
    return [*(name for name in ("validation", "test") if name in splits and name != train), train]


def _checked(splits: Collection[str], name: str, argument: str, source: str) -> str:
    if name not in splits:
        raise ValueError(f"{argument}={name} is not a split of {source}, which has {', '.join(splits)}")
    return name
