"""User errors, printed as one line without a traceback, and errors of the Hub's client."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError

__all__ = [
    "HUB_ERRORS",
    "TOKEN",
    "USER_ERRORS",
    "first_line",
    "hub_error_reason",
    "one_line",
    "one_line_errors",
    "portable_error",
]

# Errors caused by the user's input or by the machine
USER_ERRORS = (ValueError, OSError, SafetensorError, ImportError)
TOKEN = re.compile(r"\b(hf_|hf_oauth_|api_org_)[A-Za-z0-9]{20,}|(?<=Bearer )[^\s'\"]+")
# Connection errors of the client are not OSErrors, and failed uploads of large files raise a RuntimeError.
HUB_ERRORS = (OSError, HTTPError, RuntimeError)
CONNECTION_ERRORS = (HTTPError, ConnectionError, TimeoutError, RuntimeError)


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


def hub_error_reason(error: Exception) -> str:
    """Describe an error of the Hub's client (one of `HUB_ERRORS`), with a hint how to fix it."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HUB_ERRORS):
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "no access token was found: log in with `hf auth login`, or pass one"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such branch"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    known = {
        401: "the access token is missing, wrong or expired: log in with `hf auth login`, or pass one",
        403: "the access token does not have write access",
        404: "the repository does not exist, or the access token has no access to it",
        507: "the server has no storage left",
    }
    if status in known:
        return known[status]
    if status is not None and status >= 500:
        return f"the server returned status {status}"
    said = TOKEN.sub("***", one_line(error))
    return f"the connection failed: {said}" if status is None and isinstance(error, CONNECTION_ERRORS) else said
