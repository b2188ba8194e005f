"""Captions of images: which column holds them, and every different caption once, since encoding one takes time.

A row has one caption, or a list of them, of which a random one is used in each draw, as in Diffusers' training scripts. A row
without a caption has an empty one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import datasets
import numpy as np

__all__ = ["CAPTION_DROPOUT", "RowCaptions", "caption_column", "read_captions"]

# Names of a column of captions, in order of preference
USUAL_NAMES = ("caption", "captions", "text", "prompt", "prompts")
# Share of captions that are replaced by the empty prompt, as used by Stable Diffusion and by Ho and Salimans for labels
CAPTION_DROPOUT = 0.1
ROWS = 10_000  # read at once


class RowCaptions:
    """Captions of the rows of a split, as numbers of different texts.

    Args:
        numbers: Numbers of the captions of all rows, one row after the other.
        counts: Number of captions of each row (>= 1).
    """

    def __init__(self, numbers: Sequence[int], counts: Sequence[int]) -> None:
        self.numbers = np.asarray(numbers, dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def of(self, row: int, uniform: float = 0.0) -> int:
        """Number of a row's caption; a random number in [0, 1) selects one of several."""
        first, end = self.first[row : row + 2]
        return int(self.numbers[first + int(uniform * (end - first))])


def caption_column(rows: datasets.Dataset, requested: str | None) -> str:
    """Column of captions: the requested one, else the first with a usual name, else the only column of texts.

    Raises:
        ValueError: There is no such column, or it holds no texts.
    """
    texts = [name for name, feature in rows.features.items() if _is_text(feature)]
    if requested is not None:
        if requested not in rows.column_names:
            raise ValueError(f"caption_column={requested} is not a column of the data set, which has {rows.column_names}")
        if requested not in texts:
            raise ValueError(f"caption_column={requested} must be a column of texts, or of lists of texts")
        return requested
    usual = [name for name in USUAL_NAMES if name in texts]
    if usual or len(texts) == 1:
        return (usual or texts)[0]
    raise ValueError(
        f"the model takes captions: pass caption_column, a column of texts; the data set has {rows.column_names}"
        + (f", of which {texts} hold texts" if texts else ", none of which holds texts")
    )


def _is_text(feature: object) -> bool:
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def read_captions(splits: Sequence[datasets.Dataset], column: str) -> tuple[list[str], list[RowCaptions], int]:
    """Captions of splits.

    Args:
        splits: Data sets with this column.
        column: Name of the column.

    Returns:
        All different captions, in order of their first row; captions of each split's rows, as numbers of these; and the
        number of rows without a caption.
    """
    known: dict[str, int] = {}
    found, missing = [], 0
    for rows in splits:
        numbers, counts = [], []
        for value in _values(rows, column):
            given = [text for text in ([value] if isinstance(value, str) else value or []) if text is not None]
            missing += not given
            for text in given or [""]:
                numbers.append(known.setdefault(text, len(known)))
            counts.append(max(1, len(given)))
        found.append(RowCaptions(numbers, counts))
    return list(known), found, missing


def _values(rows: datasets.Dataset, column: str) -> Iterator[str | list[str] | None]:
    for batch in rows.select_columns([column]).iter(batch_size=ROWS):
        yield from batch[column]
