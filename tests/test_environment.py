"""conftest.py and helpers/environment.py: tests use no network, and none of the user's caches."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
from huggingface_hub import constants

from helpers.environment import isolate


def test_what_is_set_outside_does_not_matter(tmp_path: Path) -> None:
    given = {
        **{"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": "/home/me", "HF_HUB_CACHE": "/home/me/hub"},
        **{"HF_DATASETS_CACHE": "/home/me/datasets", "HF_TOKEN": "secret", "PATH": "/bin"},
    }
    isolate(given, tmp_path)
    assert given == {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/bin"}


def test_this_process_and_those_that_it_starts_are_isolated() -> None:
    """The folder is one that the tests made, and is removed after them."""
    home = Path(os.environ["HF_HOME"])
    assert home.name.startswith("diffusers-gfprune-tests-") and os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE and Path(constants.HF_HOME) == home
    assert Path(datasets.config.HF_DATASETS_CACHE).is_relative_to(home)
