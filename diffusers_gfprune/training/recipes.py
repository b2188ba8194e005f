"""Recipes: the command line of a run in a YAML file, `--recipe FILE`, or `--recipe NAME` for those in `recipes/`.

A recipe maps argument names to values, one per line:

    pretrained_model_name_or_path: google/ddpm-cifar10-32
    learning_rate: 2e-4
    use_ema: true
    speed_batch_sizes: [1, 16]
    update_interval:        # empty or null: the default

`expand_recipe` puts the recipe in front of the user's arguments, so that one parser reads, converts and checks both. Later
values take precedence:

    defaults  <  preset  <  recipe  <  keys of a preset named on the command line  <  the rest of the command line

A preset on the command line replaces that of the recipe. Values are passed to the parser as written: `2e-4`, which YAML 1.1
reads as text, is a number, and `no`, which YAML reads as a boolean, is the name of a precision. Paths are relative to the
working directory, as on the command line. A path that starts with `{recipe_dir}` is relative to the recipe's folder, one that
starts with `~/` to the user's.
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
# Recipes are shared, so they must not contain tokens; and they cannot be nested.
REFUSED = {
    "hub_token": "a secret; log in with `hf auth login`, or set HF_TOKEN",
    "recipe": "the name of another recipe; recipes cannot be nested",
}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the scripts."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _find(name: str) -> Path:
    """The file of a recipe; shipped names take precedence over files of the same name."""
    path = FOLDER / f"{name}.yaml" if name in shipped_recipes() else Path(name)
    if not path.is_file():
        raise ValueError(f"recipe={name} is neither a file nor a shipped recipe: {', '.join(shipped_recipes())}")
    return path


def _compose(name: str, path: Path) -> yaml.Node | None:
    """The document as nodes, which preserve the text of values and duplicate keys."""
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
    """Replace `{recipe_dir}` by the folder, as a relative path if it is inside the working directory, and `~` as shells do."""
    if value.startswith("~/"):
        return os.path.expanduser(value)
    if not value.startswith(RECIPE_DIR):
        return value
    path = os.path.normpath(f"{folder.resolve()}/{value.removeprefix(RECIPE_DIR)}")
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def read_recipe(name: str, known: Collection[str], lists: Collection[str] = ()) -> dict[str, str | list[str]]:
    """Read and check a recipe.

    Args:
        name: A path, or the name of a shipped recipe.
        known: Names of all arguments, with underscores.
        lists: Those that take several values.

    Returns:
        Values as written, by argument name with underscores; of a YAML sequence, a list. Null values are left out.

    Raises:
        ValueError: The file does not exist, or is not a flat YAML mapping of distinct, known and non-secret arguments.
    """
    path = _find(name)
    document = _compose(name, path)
    if not isinstance(document, yaml.MappingNode):
        raise ValueError(f"recipe={name} must be a mapping of arguments to values")
    values: dict[str, str | list[str] | None] = {}
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
            raise ValueError(f"{where}: {key.value} is not an argument{hint}")
        if argument in values:
            raise ValueError(f"{where}: {argument} is given twice")
        if isinstance(value, yaml.SequenceNode) and argument in lists:
            if not value.value or not all(isinstance(entry, yaml.ScalarNode) for entry in value.value):
                raise ValueError(f"{where}: {argument} must be a list of one or more single values")
            values[argument] = [_with_folder(entry.value, path.parent) for entry in value.value]
            continue
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"{where}: {argument} must be a single value, not a {value.id}")
        values[argument] = None if value.tag == NULL else _with_folder(value.value, path.parent)
    return {argument: value for argument, value in values.items() if value is not None}


def expand_recipe(
    words: Sequence[str],
    known: Collection[str],
    presets: Mapping[str, Mapping[str, object]] | None = None,
    lists: Collection[str] = (),
) -> list[str]:
    """Put the content of a recipe in front of the command line that names it.

    The parser must use the last of several values, and take its defaults from the preset, as `parse_arguments` does. If the
    command line names a preset, the recipe's values for the preset's keys are left out. `--recipe` itself is kept, so the
    parser must accept it.

    Args:
        words: The command line, with `--recipe NAME` or `--recipe=NAME` at most once.
        known: Names of all arguments of the parser, with underscores.
        presets: Values that each `--preset` sets, by argument name.
        lists: Names of the arguments that take several values.

    Returns:
        `--name=value` for every value of the recipe, or `--name` and the values of a list, then `words` unchanged; without a
        recipe, `words` alone.

    Raises:
        ValueError: There is more than one recipe, or it is not valid (see `read_recipe`).
    """
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--recipe", action="append", default=[])
    first_look.add_argument("--preset")
    given, _ = first_look.parse_known_args(list(words))
    if not given.recipe:
        return list(words)
    if len(given.recipe) > 1:
        raise ValueError(f"recipe={', '.join(given.recipe)} names {len(given.recipe)} recipes; only one is allowed")
    replaced = (presets or {}).get(given.preset, {})
    recipe = read_recipe(given.recipe[0], known, lists)
    found: list[str] = []
    for name, value in recipe.items():
        if name not in replaced:
            found += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return [*found, *words]
