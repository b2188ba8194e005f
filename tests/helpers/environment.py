"""Environment variables of all tests, also in processes that they start. It is used before anything reads them."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["isolate"]

# Variables of the Hub's clients that would overrule those below
OFFLINE = ("HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
PLACES = ("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def isolate(environment: MutableMapping[str, str], home: Path) -> None:
    """Allow no network, whatever is set, and keep the user's caches and token out of tests.

    Args:
        environment: The variables, which are changed.
        home: Folder for all caches.
    """
    for name in (*OFFLINE, *PLACES, *TOKENS):
        environment.pop(name, None)
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
