"""Recipes: the command line of a whole run in one YAML file, `--recipe FILE` or `--recipe NAME` for those in `recipes/`.

A recipe maps names of arguments to values, one a line:

    pretrained_model_name_or_path: google/ddpm-cifar10-32
    learning_rate: 2e-4
    use_ema: true
    update_interval:        # nothing, or null: left at its default

`expand_recipe` turns it into words in front of the user's own, so that one parser reads, converts and checks both. What
comes later wins:

    defaults  <  preset  <  recipe  <  keys of a preset named on the command line  <  the rest of the command line

There is one preset: that of the command line in place of the recipe's, if both name one. Values reach the parser as they are
written: `2e-4`, which YAML 1.1 takes for text, is a number there, and `no`, which YAML takes for a truth value, is the name of
a precision. Paths are relative to the working directory, as on the command line; one that starts with `{recipe_dir}` is
relative to the folder of the recipe, wherever the package is installed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.resources
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import yaml

from ..errors import first_line

__all__ = ["expand_recipe", "read_recipe", "shipped_recipes"]

FOLDER = Path(str(importlib.resources.files("diffusers_gfprune.scripts"))) / "recipes"
RECIPE_DIR = "{recipe_dir}"
NULL = "tag:yaml.org,2002:null"
# A file that is shared is no place for a token, and a recipe names no other recipe.
REFUSED = {
    "hub_token": "a secret: log in with `hf auth login`, or set HF_TOKEN",
    "recipe": "the name of another recipe: a recipe stands alone",
}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the scripts."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _find(name: str) -> Path:
    """The file of a recipe: a shipped name comes before a file that happens to be called like it."""
    path = FOLDER / f"{name}.yaml" if name in shipped_recipes() else Path(name)
    if not path.is_file():
        raise ValueError(f"recipe={name} is neither a file nor one of the recipes shipped: {', '.join(shipped_recipes())}")
    return path


def _compose(name: str, path: Path) -> yaml.Node | None:
    """The document as nodes, which keep the text of a value and both of two equal keys."""
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe={name} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ValueError(f"recipe={name} is not YAML: {problem}{where}") from error


def _with_folder(value: str, folder: Path) -> str:
    """A value, with `{recipe_dir}` as a path: inside the working directory a relative one, as a user would write it."""
    if not value.startswith(RECIPE_DIR):
        return value
    path = os.path.normpath(f"{folder.resolve()}/{value.removeprefix(RECIPE_DIR)}")
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def read_recipe(name: str, known: Collection[str]) -> dict[str, str]:
    """Read and check a recipe.

    Args:
        name: A path, or the name of a shipped recipe.
        known: Names of all arguments, with underscores.

    Returns:
        Values as they are written, by argument name with underscores; those left at their defaults (null) are absent.

    Raises:
        ValueError: There is no such file, or it is not a flat YAML mapping of distinct known arguments that are no secret.
    """
    path = _find(name)
    document = _compose(name, path)
    if not isinstance(document, yaml.MappingNode):
        raise ValueError(f"recipe={name} must be a mapping of arguments to values")
    values: dict[str, str | None] = {}
    for key, value in document.value:
        where = f"recipe={name}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{where}: the name of an argument must be a single word")
        argument = key.value.replace("-", "_")
        if argument in REFUSED:
            raise ValueError(f"{where}: {argument} is {REFUSED[argument]}")
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{where}: {key.value} is no argument{hint}")
        if argument in values:
            raise ValueError(f"{where}: {argument} is given twice")
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"{where}: {argument} must be a single value, not a {value.id}")
        values[argument] = None if value.tag == NULL else _with_folder(value.value, path.parent)
    return {argument: value for argument, value in values.items() if value is not None}


def expand_recipe(
    words: Sequence[str], known: Collection[str], presets: Mapping[str, Mapping[str, object]] | None = None
) -> list[str]:
    """Put the content of the recipe that a command line names in front of it.

    The result is for a parser that takes the last of several values and then makes the preset it finds its defaults, as
    `parse_arguments` does. For the keys of a preset on the command line to come after the recipe, the recipe's values of them
    are left out. `--recipe` itself stays among the words: the parser must know it.

    Args:
        words: The command line, with `--recipe NAME` or `--recipe=NAME` at most once.
        known: Names of all arguments of the parser, with underscores.
        presets: What each value of `--preset` sets, by argument name.

    Returns:
        `--name=value` for every value of the recipe, then `words` unchanged; only these without a recipe.

    Raises:
        ValueError: More than one recipe, or one that cannot be used (see `read_recipe`).
    """
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--recipe", action="append", default=[])
    first_look.add_argument("--preset")
    given, _ = first_look.parse_known_args(list(words))
    if not given.recipe:
        return list(words)
    if len(given.recipe) > 1:
        raise ValueError(f"recipe={', '.join(given.recipe)} names {len(given.recipe)} recipes: there can be one")
    replaced = (presets or {}).get(given.preset, {})
    recipe = read_recipe(given.recipe[0], known)
    return [*(f"--{name}={value}" for name, value in recipe.items() if name not in replaced), *words]
