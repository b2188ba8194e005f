"""Choice of the columns of a data set: images, and the class labels or captions that a model takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import datasets
import pyarrow

from ..errors import first_line
from ..model_spec import ModelSpec
from .captions import caption_column
from .decoding import NETWORK_ERRORS

__all__ = ["Columns", "find_columns", "load_errors", "usable_split"]

logger = logging.getLogger(__name__)

# Errors of `datasets`
LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException),
    *NETWORK_ERRORS,
)


class Columns(NamedTuple):
    """Names of columns; None if there is none, or none is requested."""

    image: str | None
    label: str | None = None
    caption: str | None = None

    def names(self) -> list[str]:
        """All names, that of the images first."""
        return [name for name in self if name is not None]

    def conditioning(self) -> dict[str, str]:
        """Names of the columns that a model needs beside images, by what they hold."""
        held = {"class labels": self.label, "captions": self.caption}
        return {what: name for what, name in held.items() if name is not None}


@contextmanager
def load_errors(source: str) -> Iterator[None]:
    """Raise errors of `datasets` as a ValueError of one line."""
    try:
        yield
    except LOAD_ERRORS as error:
        chain = [error] if error.__cause__ is None else [error, error.__cause__]  # the cause often has the details
        reasons = [first_line(each) for each in chain]
        raise ValueError(f"{source} cannot be loaded: {': '.join(dict.fromkeys(reasons))}") from error


def find_columns(rows, requested: Columns, source: str, spec: ModelSpec) -> Columns:
    """Columns of a data set that a model needs.

    Args:
        rows: The training split.
        requested: Requested columns.
        source: Name of the data set, for messages.
        spec: Images and conditioning that the model takes.

    Raises:
        ValueError: A column is missing.
    """
    image = _column(rows, requested.image, datasets.Image, "image_column")
    if image is None:
        raise ValueError(f"{source} has no column of type Image, only {rows.column_names}: cast it with `datasets`")
    label = caption = None
    if spec.labels is not None:
        label = _column(rows, requested.label, datasets.ClassLabel, "label_column")
        if label is None:
            raise ValueError(f"the model is class conditional, but {rows.column_names} holds no class labels")
        _warn_of_order(getattr(rows.features[label], "names", None) or (), label)
    if spec.vector_size is not None:
        label = _vector_column(rows, requested.label, spec.vector_size)
    if spec.prompts is not None:
        caption = caption_column(rows, requested.caption)
    return Columns(image, label, caption)


def usable_split(
    splits: Mapping[str, object], candidates: Sequence[str], columns: Columns, count: int, source: str, train: str
) -> str:
    """The first candidate for held-out images that has the labels or captions that a model needs.

    Args:
        splits: Splits of the data set.
        candidates: Names of splits, in order of preference.
        columns: Columns of the training split.
        count: Number of first images that are looked at.
        source: Name of the data set, for messages.
        train: Name of the training split, which is usable.

    Raises:
        ValueError: The only candidate lacks them, and is not the training split.
    """
    for name in candidates:
        lacking = None
        for what, column in columns.conditioning().items() if name != train else ():
            with load_errors(source):
                if not _has_values(splits[name], column, count):
                    lacking = f"split {name} has no {what} in column {column}"
                    break
        if lacking is None:
            return name
        if len(candidates) == 1:
            raise ValueError(f"validation_split_name={name}: {lacking} of {source}, and the model needs them")
        logger.warning("%s of %s, but the model needs them: another split is used for held-out images", lacking, source)
    return train


def _has_values(rows, column: str, count: int) -> bool:
    """Whether any of the first images has a label or a caption; test splits of many data sets have -1 instead."""
    if column not in (rows.column_names or [column]):
        return False
    rows = rows.select_columns([column])
    values = rows[:count][column] if isinstance(rows, datasets.Dataset) else [row[column] for row in islice(rows, count)]
    return not values or any(value is not None and value != -1 for value in values)


def _warn_of_order(names: Sequence[str], column: str) -> None:
    """Warn if classes are named by numbers in another order: `datasets` sorts the names of class folders as texts."""
    if not names or not all(name.isdecimal() for name in names) or [*map(int, names)] == sorted(map(int, names)):
        return
    number, name = next((i, name) for i, name in enumerate(names) if i and int(name) < int(names[i - 1]))
    logger.warning(
        "classes of column %s are in the order of their names as texts, so that class %s has label %d: if the model was "
        "trained with labels in the order of the numbers, write all numbers with the same number of digits (02, 10)",
        *(column, name, number),
    )


def _vector_column(rows, requested: str | None, size: int) -> str:
    """Column of conditioning vectors: the requested one, else the only one of floating-point lists."""
    if requested is not None and requested not in rows.column_names:
        raise ValueError(f"label_column={requested} is not a column of the data set, which has {rows.column_names}")
    found = [name for name, feature in rows.features.items() if _is_vector(feature, size)]
    if requested is not None:
        found = [name for name in found if name == requested]
    if len(found) == 1:
        return found[0]
    named = f"label_column={requested} must be a column" if requested is not None else "the data set must have one column"
    raise ValueError(f"{named} of lists of {size} floating-point values, which the model takes as class_labels")


def _is_vector(feature, size: int) -> bool:
    values = getattr(feature, "feature", None)  # of a list
    length = getattr(feature, "length", -1)
    return length in (-1, size) and isinstance(values, datasets.Value) and values.dtype.startswith("float")


def _column(rows, requested: str | None, kind: type, argument: str) -> str | None:
    if requested is not None:
        if requested not in rows.column_names:
            raise ValueError(f"{argument}={requested} is not a column of the data set, which has {rows.column_names}")
        if kind is datasets.Image and not isinstance(rows.features[requested], datasets.Image):
            raise ValueError(f"{argument}={requested} must be a column of images")
        return requested
    columns = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(columns) > 1:
        logger.warning(
            "%s=%s is used, the first of the columns %s: pass another one if it is wrong", argument, columns[0], columns
        )
    return columns[0] if columns else None
