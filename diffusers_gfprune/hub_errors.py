"""Errors of the Hub's client, and messages for the user."""

from __future__ import annotations

import re

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, RevisionNotFoundError

from .errors import one_line

__all__ = ["HUB_ERRORS", "TOKEN", "reason"]

TOKEN = re.compile(r"\b(hf_|hf_oauth_|api_org_)[A-Za-z0-9]{20,}|(?<=Bearer )[^\s'\"]+")
# Connection errors of the client are not OSErrors, and failed uploads of large files raise a RuntimeError.
HUB_ERRORS = (OSError, HTTPError, RuntimeError)


def reason(error: Exception) -> str:
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
    return said if status is not None else f"the connection failed: {said}"
