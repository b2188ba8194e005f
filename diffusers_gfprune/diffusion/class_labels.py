"""Class labels of conditional models, and the null label that classifier-free guidance needs.

Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) extrapolates from what a model predicts without a label to what it
predicts with one,

    eps = eps(x_t, null) + s (eps(x_t, c) - eps(x_t, null)),

so that one model must know both. It is trained on images whose label c is replaced by a null label in a share p of all cases.
A model that is pruned and trained on with labels alone forgets the other half, and no loss with labels shows it. So a run
drops labels as the model's own training did, in its steps, in the images that scores are taken on and in what the teacher
sees; samples are of real classes, and both losses are reported.

A `UNet2DModel` does not say which label is the null label. By convention it is the one after the last class: a model of K
labels on data of K - 1 classes has the null label K - 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LABEL_DROPOUT", "LabelDropout", "check_labels", "find_null_label", "make_label_dropout", "real_labels"]

# Where a null label is known and no share is given: that of Ho and Salimans, and of DiT
LABEL_DROPOUT = 0.1


@dataclass(frozen=True)
class LabelDropout:
    """How labels are dropped.

    Attributes:
        null_label: What stands for no label.
        probability: Share of labels that it replaces, in [0, 1).
    """

    null_label: int
    probability: float

    def one(self, label: int, uniform: float) -> int:
        """The label, or the null label where a random number in [0, 1) is below the probability."""
        return self.null_label if uniform < self.probability else label

    def several(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Drop the rounded share of some labels, but at least one, so that even a few images tell of the null label.

        Args:
            labels: Integers with shape `(n,)`.
            generator: Chooses which.
        """
        count = max(1, round(self.probability * len(labels))) if self.probability > 0 else 0
        dropped = labels.clone()
        dropped[torch.randperm(len(labels), generator=generator)[:count].to(labels.device)] = self.null_label
        return dropped


def find_null_label(num_class_embeds: int | None, num_classes: int | None) -> int | None:
    """The null label of a model by convention, or None if there is none that is known.

    Args:
        num_class_embeds: Labels that the model takes; None: it is unconditional.
        num_classes: Classes of its data; None: not known.
    """
    if num_class_embeds is None or num_classes is None or num_class_embeds != num_classes + 1:
        return None
    return num_classes


def make_label_dropout(
    num_class_embeds: int | None,
    null_label: int | None = None,
    label_dropout: float | None = None,
    num_classes: int | None = None,
) -> LabelDropout | None:
    """How the labels of a model are to be dropped; None if it has no null label.

    Args:
        num_class_embeds: Labels that the model takes; None: it is unconditional.
        null_label: As given (default: found by convention).
        label_dropout: As given, in [0, 1) (default: `LABEL_DROPOUT`).
        num_classes: Classes of its data; None: not known.

    Raises:
        ValueError: The model is unconditional, has no such label, or none that is known; or the null label is a class.
    """
    if label_dropout is not None and not 0 <= label_dropout < 1:
        raise ValueError(f"label_dropout={label_dropout} must be in [0, 1)")
    given = {"null_label": null_label, "label_dropout": label_dropout or None}
    if num_class_embeds is None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}={value} needs a class-conditional model, with num_class_embeds")
        return None
    if null_label is None:
        null_label = find_null_label(num_class_embeds, num_classes)
    elif not 0 <= null_label < num_class_embeds:
        raise ValueError(f"null_label={null_label} must be from 0 to {num_class_embeds - 1}, the model's num_class_embeds - 1")
    elif num_classes is not None and null_label < num_classes:
        raise ValueError(f"null_label={null_label} is a class of the data, which has {num_classes}: it must be another label")
    if null_label is None:
        if label_dropout:
            known = "an unknown number of" if num_classes is None else str(num_classes)
            raise ValueError(
                f"label_dropout={label_dropout} needs null_label: it cannot be told from num_class_embeds={num_class_embeds} "
                f"of the model and {known} classes of the data"
            )
        return None
    return LabelDropout(null_label, LABEL_DROPOUT if label_dropout is None else label_dropout)


def check_labels(labels: Iterable[int], null_label: int, what: str = "class_labels") -> None:
    """Refuse labels of images among which the null label is.

    Args:
        labels: Of images.
        null_label: What stands for no label.
        what: Has these labels, for the message.

    Raises:
        ValueError: It is.
    """
    if null_label in set(labels):
        raise ValueError(f"{what} has null_label={null_label}, which no image may have")


def real_labels(num_class_embeds: int | None, numbers: range, null_label: int | None = None) -> Tensor | None:
    """Labels of samples by their number: the real classes in turn.

    Args:
        num_class_embeds: Labels that the model takes; None: it is unconditional.
        numbers: Of the samples.
        null_label: Left out.

    Returns:
        int64 with shape `(len(numbers),)`; None for an unconditional model.
    """
    if num_class_embeds is None:
        return None
    classes = torch.tensor([label for label in range(num_class_embeds) if label != null_label])
    return classes[torch.tensor(list(numbers), dtype=torch.long) % len(classes)]
