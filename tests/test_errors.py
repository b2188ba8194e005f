"""errors.py: a failing program prints one line."""

from __future__ import annotations

import pytest

from diffusers_gfprune.errors import first_line, hub_error_reason, one_line, one_line_errors


@pytest.mark.parametrize(
    ("said", "joined", "first"),
    [("two\n  lines", "two lines", "two"), ("\n a  b \n", "a b", "a  b"), ("", "ValueError", "ValueError")],
)
def test_what_an_error_says(said: str, joined: str, first: str) -> None:
    assert (one_line(ValueError(said)), first_line(ValueError(said))) == (joined, first)


def test_errors_of_users_end_the_program() -> None:
    with pytest.raises(SystemExit, match="^work.py: error: two lines$"), one_line_errors("work.py"):
        raise ValueError("two\n  lines")
    with pytest.raises(RuntimeError, match="ours"), one_line_errors("work.py"):
        raise RuntimeError("ours")
    with pytest.raises(SystemExit, match="^work.py: error: ours$"), one_line_errors("work.py", (RuntimeError,)):
        raise RuntimeError("ours")


def test_only_errors_of_the_connection_are_said_to_be() -> None:
    """A card that the Hub refuses is refused again."""
    assert hub_error_reason(ValueError("Invalid metadata in README.md")) == "Invalid metadata in README.md"
    assert hub_error_reason(PermissionError(13, "Permission denied")) == "[Errno 13] Permission denied"
    assert hub_error_reason(ConnectionResetError("reset")) == "the connection failed: reset"
