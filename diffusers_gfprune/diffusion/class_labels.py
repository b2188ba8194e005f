"""Class labels of conditional models, and the null label for classifier-free guidance.

Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) extrapolates from the prediction without a label to the prediction
with one,

    eps = eps(x_t, null) + s (eps(x_t, c) - eps(x_t, null)).

One model makes both predictions. Its training replaces labels c by a null label with probability p. Pruning and training with
labels only would degrade the unconditional prediction, which the loss with labels does not show. A run therefore drops labels
in training steps, in calibration images and for the teacher, as the original training did. Samples have real classes, and both
losses are reported.

The config of a `UNet2DModel` does not contain the null label. By convention it follows the last class: a model of K labels on
data of K - 1 classes has the null label K - 1. A `DiTTransformer2DModel` of K classes always has the null label K.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..argument_fields import FRACTION, check_range

__all__ = [
    *("ClassLabels", "LabelDropout", "check_labels", "label_dropout_of", "make_label_dropout", "number_dropped"),
]

# Default probability, as used by Ho and Salimans and by DiT
LABEL_DROPOUT = 0.1


class ClassLabels(NamedTuple):
    """Class labels of a model.

    Attributes:
        count: Images have labels from 0 to `count - 1`.
        null_label: Label for "no label" that the architecture has; None: it has none, or one of `count` labels is used for it.
        argument: Argument of the model that gives `count`.
    """

    count: int
    null_label: int | None = None
    argument: str = "num_class_embeds"


def number_dropped(share: float, count: int) -> int:
    """How many of `count` labels or prompts are replaced: the rounded share, but at least one, and never all.

    With one, a few images also include the null condition. The last condition stays, however few images there are: without
    any, only predictions for the null condition would be seen.

    Args:
        share: Share to replace, in [0, 1); with 0, none is.
        count: Number of labels or prompts (>= 1).
    """
    return min(max(1, round(share * count)), count - 1) if share > 0 else 0


@dataclass(frozen=True)
class LabelDropout:
    """Random replacement of labels by the null label.

    Attributes:
        null_label: The label for "no label".
        probability: Share of labels that are replaced, in [0, 1).
    """

    null_label: int
    probability: float

    def one(self, label: int, uniform: float) -> int:
        """The null label if `uniform`, a random number in [0, 1), is below the probability; else the label."""
        return self.null_label if uniform < self.probability else label

    def several(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Replace a share of labels (see `number_dropped`).

        Args:
            labels: Integers with shape `(n,)`.
            generator: Random generator that selects the labels.
        """
        count, dropped = number_dropped(self.probability, len(labels)), labels.clone()
        dropped[torch.randperm(len(labels), generator=generator)[:count].to(labels.device)] = self.null_label
        return dropped


def make_label_dropout(
    num_class_embeds: int | None,
    null_label: int | None = None,
    label_dropout: float | None = None,
    num_classes: int | None = None,
) -> LabelDropout | None:
    """Label dropout for a model; None if it has no null label.

    Args:
        num_class_embeds: Number of labels of the model; None: it is unconditional.
        null_label: The null label (default: by convention).
        label_dropout: Share of labels to replace, in [0, 1) (default: `LABEL_DROPOUT`).
        num_classes: Number of classes of its data; None: unknown.

    Raises:
        ValueError: The model is unconditional, the null label is unknown, out of range, a class of the data or the only label,
            or `label_dropout` is out of range.
    """
    check_range(FRACTION, label_dropout=label_dropout)
    given = {"null_label": null_label, "label_dropout": label_dropout or None}
    if num_class_embeds is None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}={value} needs a class-conditional model, with num_class_embeds")
        return None
    if null_label is None:
        null_label = num_classes if num_class_embeds - 1 == num_classes else None  # by convention
    elif not 0 <= null_label < num_class_embeds:
        raise ValueError(f"null_label={null_label} must be from 0 to {num_class_embeds - 1}, the model's num_class_embeds - 1")
    elif num_class_embeds == 1:
        raise ValueError(f"null_label={null_label} must be None: it is the only label of the model, with num_class_embeds=1")
    elif num_classes is not None and null_label < num_classes:
        raise ValueError(f"null_label={null_label} must not be one of the {num_classes} classes of the data")
    if null_label is None:
        if label_dropout:
            known = "an unknown number of" if num_classes is None else str(num_classes)
            raise ValueError(
                f"label_dropout={label_dropout} needs null_label: it does not follow from num_class_embeds={num_class_embeds} "
                f"and {known} classes of the data"
            )
        return None
    return LabelDropout(null_label, LABEL_DROPOUT if label_dropout is None else label_dropout)


def label_dropout_of(
    labels: ClassLabels | None,
    null_label: int | None = None,
    label_dropout: float | None = None,
    num_classes: int | None = None,
) -> LabelDropout | None:
    """As `make_label_dropout`, for a model of any family.

    Args:
        labels: Labels of the model; None: it is unconditional.
        null_label: The null label (default: that of the architecture, or by convention).
        label_dropout: Share of labels to replace, in [0, 1) (default: `LABEL_DROPOUT`).
        num_classes: Number of classes of the data; None: unknown.

    Raises:
        ValueError: As in `make_label_dropout`; or the architecture has another null label, or the data other classes.
    """
    if labels is None or labels.null_label is None:
        return make_label_dropout(None if labels is None else labels.count, null_label, label_dropout, num_classes)
    check_range(FRACTION, label_dropout=label_dropout)
    if null_label not in (None, labels.null_label):
        raise ValueError(f"null_label={null_label} must be {labels.null_label}, as {labels.argument} of the model is")
    if num_classes is not None and num_classes != labels.count:
        raise ValueError(f"the data set has {num_classes} classes, but the model has {labels.argument}={labels.count}")
    return LabelDropout(labels.null_label, LABEL_DROPOUT if label_dropout is None else label_dropout)


def check_labels(labels: Iterable[int], null_label: int, what: str = "class_labels") -> None:
    """Check that labels of images do not contain the null label.

    Args:
        labels: Labels of images.
        null_label: The label for "no label".
        what: Name of the labels, for the error message.

    Raises:
        ValueError: An image has the null label.
    """
    if null_label in set(labels):
        raise ValueError(f"{what} has null_label={null_label}, which no image may have")
