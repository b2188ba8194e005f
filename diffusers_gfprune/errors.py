"""Errors as users see them: one line, which says what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

__all__ = ["USER_ERRORS", "first_line", "one_line", "one_line_errors"]

# What is wrong with what the user gave, or with the machine
USER_ERRORS = (ValueError, OSError, SafetensorError, ImportError)


def one_line(error: BaseException) -> str:
    """All that an error says, joined to one line; the name of its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its type if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def one_line_errors(program: str, errors: tuple[type[BaseException], ...] = USER_ERRORS) -> Iterator[None]:
    """Inside, such an error ends the program with one line and status 1, without a traceback.

    Args:
        program: Its name, which the line starts with.
        errors: Types of errors; others are raised as they are.

    Raises:
        SystemExit: One was raised.
    """
    try:
        yield
    except errors as error:
        sys.exit(f"{program}: error: {one_line(error)}")
