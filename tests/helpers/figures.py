"""Content of pictures: the Matplotlib figures of saved files, and cells of sample grids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image


@contextmanager
def saved_figures() -> Iterator[list[Figure]]:
    """Inside, figures are collected as they are saved; the files are written all the same."""
    figures: list[Figure] = []
    save = Figure.savefig

    def collect(figure: Figure, *arguments, **options) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    with mock.patch.object(Figure, "savefig", collect):
        yield figures


def lines(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Lines with a label, as x and y."""
    named = {str(line.get_label()): line for line in axis.get_lines()}
    return {
        label: (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for label, line in named.items()
        if not label.startswith("_")
    }


def cells(path: Path, columns: int, side: int = 8) -> np.ndarray:
    """Images of a sample grid of small square images, each enlarged to 48 pixels and set apart by 2 grey ones.

    Returns:
        uint8 with shape `(rows, columns, side, side, 3)`.
    """
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    scale = 48 // side
    pitch = side * scale + 2
    rows = (pixels.shape[0] - 2) // pitch
    assert pixels.shape == (rows * pitch + 2, columns * pitch + 2, 3)
    frame = pixels.copy()
    grid = np.empty((rows, columns, side, side, 3), dtype=np.uint8)
    for row in range(rows):
        for column in range(columns):
            area = np.s_[row * pitch + 2 : (row + 1) * pitch, column * pitch + 2 : (column + 1) * pitch]
            grid[row, column] = pixels[area][::scale, ::scale]
            assert (pixels[area] == grid[row, column].repeat(scale, 0).repeat(scale, 1)).all()
            frame[area] = 128
    assert (np.abs(frame.astype(int) - 128) <= 1).all()
    return grid
