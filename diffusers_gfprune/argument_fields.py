"""Fields of argument dataclasses, from which command lines are generated, their help, and checks of their values."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any, NamedTuple, get_args, get_type_hints

__all__ = [
    *("FRACTION", "NOT_NEGATIVE", "POSITIVE", "SHARE", "ArgumentHelp", "Range"),
    *("argument", "at_least", "check_fields", "check_range", "check_types", "expand_home", "parse_dataclasses"),
]


def argument(default: Any = dataclasses.MISSING, help: str = "", choices: Sequence[str] | None = None) -> Any:
    """A field of a dataclass that `HfArgumentParser` reads.

    Args:
        default: Default value; a list is copied for every instance. Without a default, the argument is required.
        help: Text in `--help`.
        choices: Allowed values.
    """
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class ArgumentHelp(argparse.HelpFormatter):
    """Formatter of `--help`: each argument with one spelling, its choices, and its default if it has one.

    A default of None is left out, since the help text says what happens then, and so is that of a flag that is off.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = next(name for name in action.option_strings if name.startswith("--"))
        return f"{name} VALUE [VALUE ...]" if action.nargs == "+" else name

    def _get_help_string(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._StoreFalseAction):  # `HfArgumentParser` gives it the help of the positive option
            return f"Turns --{action.dest} off."
        text, default = action.help or "", action.default
        if action.choices and "Choices:" not in text:
            text += f" Choices: {', '.join(map(str, action.choices))}."
        if action.required or default in (None, argparse.SUPPRESS, []) or default is False:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


def parse_dataclasses(parser, words: Sequence[str]) -> list:
    """Parse a command line into dataclasses.

    Args:
        parser: An `HfArgumentParser`.
        words: The command line.

    Returns:
        An instance of each dataclass of the parser.

    Raises:
        ValueError: An argument is unknown. The message has the most similar one.
    """
    *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if not unknown:
        return parsed
    given = unknown[0].partition("=")[0]
    names = [field.name for group in parser.dataclass_types for field in dataclasses.fields(group) if field.init]
    similar = difflib.get_close_matches(given.lstrip("-").replace("-", "_"), names, n=1)
    hint = f"did you mean --{similar[0]}?" if similar and given.startswith("-") else "see --help"
    raise ValueError(f"unknown argument {given}: {hint}")


class Range(NamedTuple):
    """Allowed values of a number.

    Attributes:
        words: What a number must do, for error messages: `be at least 1`.
        holds: Whether a number is allowed.
    """

    words: str
    holds: Callable[[float], bool]


def at_least(bound: int) -> Range:
    """Numbers from a bound on."""
    return Range(f"be at least {bound}", lambda value: value >= bound)


NOT_NEGATIVE = Range("not be negative", lambda value: value >= 0)
POSITIVE = Range("be greater than 0", lambda value: value > 0)
FRACTION = Range("be in [0, 1)", lambda value: 0 <= value < 1)
SHARE = Range("be in [0, 1]", lambda value: 0 <= value <= 1)


def check_range(allowed: Range, **values: float | None) -> None:
    """Check numbers by name; None is allowed.

    Raises:
        ValueError: A number is not finite or not in the range.
    """
    for name, value in values.items():
        if value is not None and not allowed.holds(value):
            raise ValueError(f"{name}={value} must {allowed.words}")
        if value is not None and not math.isfinite(value):  # reports are JSON, which has no infinity
            raise ValueError(f"{name}={value} must be finite")


def check_fields(arguments: object, allowed: Range, *names: str) -> None:
    """Check attributes of an object as `check_range` does.

    Raises:
        ValueError: An attribute is not in the range.
    """
    check_range(allowed, **{name: getattr(arguments, name) for name in names})


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# Words for values of a type, and whether a value is one
TYPES: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: _is_number(value) and value % 1 == 0),  # neither NaN nor infinite
    float: ("a number", _is_number),
    str: ("text", lambda value: isinstance(value, str)),
}


def check_types(arguments: object, other: Collection[str] = ()) -> None:
    """Check the fields of a dataclass by their declared types. Whole numbers such as 1e4 become integers, in place.

    Args:
        arguments: The object.
        other: Names of fields that are not checked.

    Raises:
        ValueError: A value has another type.
    """
    for name, declared in get_type_hints(type(arguments)).items():
        kinds = get_args(declared) or (declared,)  # such as (int, NoneType)
        value = getattr(arguments, name)
        if name in other or (value is None and type(None) in kinds):
            continue
        words, holds = TYPES[kinds[0]]
        if not holds(value):
            raise ValueError(f"{name}={value!r} must be {words}")
        if kinds[0] is int:
            setattr(arguments, name, int(value))


def expand_home(arguments: object, *names: str) -> None:
    """Replace `~` at the start of paths, which shells leave in `--output_dir=~/x` as it is.

    Args:
        arguments: The object.
        names: Its attributes that are paths, or None.
    """
    for name in names:
        if (path := getattr(arguments, name)) is not None:
            setattr(arguments, name, os.path.expanduser(path))
