"""User errors, printed as one line without a traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

__all__ = ["USER_ERRORS", "first_line", "one_line", "one_line_errors", "portable_error"]

# Errors caused by the user's input or by the machine
USER_ERRORS = (ValueError, OSError, SafetensorError, ImportError)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error message; the name of its type if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def portable_error(error: Exception) -> str:
    """First line of an error, at most 300 characters, without local folders in paths, since results are published."""
    reason = re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", first_line(error) if str(error).strip() else "no message")
    return f"{type(error).__name__}: {reason}"[:300]


@contextmanager
def one_line_errors(program: str, errors: tuple[type[BaseException], ...] = USER_ERRORS) -> Iterator[None]:
    """Context in which user errors end the program with one line and exit status 1, without a traceback.

    Args:
        program: Name of the program, printed first.
        errors: Types of errors to catch; others propagate.

    Raises:
        SystemExit: One of these errors was raised.
    """
    try:
        yield
    except errors as error:
        sys.exit(f"{program}: error: {one_line(error)}")
