"""What the Hub's client raises, and what to tell the user about it."""

from __future__ import annotations

import re

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, RevisionNotFoundError

from .errors import one_line

__all__ = ["HUB_ERRORS", "TOKEN", "reason"]

TOKEN = re.compile(r"\b(hf_|hf_oauth_|api_org_)[A-Za-z0-9]{20,}|(?<=Bearer )[^\s'\"]+")
# Connection errors of the client are not OSErrors, and failed uploads of large files come as a RuntimeError.
HUB_ERRORS = (OSError, HTTPError, RuntimeError)


def reason(error: Exception) -> str:
    """What went wrong between here and the Hub (one of `HUB_ERRORS`), for whoever has to put it right."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HUB_ERRORS):
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no access token: log in with `hf auth login`, or pass one"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such branch"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    known = {
        401: "the access token is missing, wrong or expired: log in with `hf auth login`, or pass one",
        403: "the access token may not write there",
        404: "there is no such repository, or the access token may not see it",
        507: "the server has no room left",
    }
    if status in known:
        return known[status]
    if status is not None and status >= 500:
        return f"the server answered {status}"
    said = TOKEN.sub("***", one_line(error))
    return said if status is not None else f"the connection failed: {said}"
