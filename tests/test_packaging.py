"""setup.cfg: it lists all packages and files of an installation."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.resources
from pathlib import Path

import diffusers_gfprune
from helpers.scripts import ROOT

PACKAGE = Path(diffusers_gfprune.__file__).parent


def options() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def words(text: str) -> list[str]:
    """Lines of a list in setup.cfg."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_every_package_is_installed() -> None:
    """A package that is not listed works from a clone, and is missing after `pip install`."""
    config = options()["options"]
    folders = dict(line.split(" = ") for line in words(config["package_dir"]))
    inside = {
        ".".join(["diffusers_gfprune", *path.parent.relative_to(PACKAGE).parts]) for path in PACKAGE.rglob("__init__.py")
    }
    assert inside | set(folders) == set(words(config["packages"]))
    assert all((ROOT / folder).is_dir() for folder in folders.values())


def test_recipes_and_what_they_name_are_installed() -> None:
    patterns = words(options()["options.package_data"]["diffusers_gfprune.scripts"])
    folder = Path(str(importlib.resources.files("diffusers_gfprune.scripts")))
    wanted = [*folder.glob("recipes/*.yaml"), *folder.rglob("*.parquet")]
    for index in folder.glob("digits/*/model_index.json"):
        wanted += index.parent.rglob("*.*")
    names = [path.relative_to(folder).as_posix() for path in wanted if path.is_file()]
    assert len(names) > 8
    for name in names:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
