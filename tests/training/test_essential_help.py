"""`--help` of prune_ddpm.py shows the essential arguments, `--help_all` all of them, each with one default at most."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from diffusers_gfprune.evaluation.arguments import parse_evaluate_arguments
from diffusers_gfprune.training.arguments import GROUPS, parse_arguments
from diffusers_gfprune.training.essential_help import ESSENTIAL


def printed(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, parse: Callable = parse_arguments
) -> list[str]:
    """Lines of a help text on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse([word])
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()


def listed(lines: list[str]) -> set[str]:
    """Arguments that a help text explains."""
    words = [line.split()[0].rstrip(",") for line in lines if line.startswith("  -")]
    return {word.removeprefix("--") for word in words} - {"-h", "help", "help_all"}


def test_help_is_two_screens_of_what_matters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    lines = printed("--help", monkeypatch, capsys)
    assert len(lines) <= 104
    assert listed(lines) == {name for names in ESSENTIAL.values() for name in names}
    assert [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")] == ["options", *ESSENTIAL]
    text = " ".join(" ".join(lines).split())
    assert "Learning rate schedule, by its name in Diffusers. Choices: constant, constant_with_warmup" in text
    assert "in (0, 1). (default: 0.5)" in text and "--help_all show all arguments" in text
    assert "None" not in text and "False" not in text


@pytest.mark.parametrize("word", ["--help_all", "--help-all"])
def test_all_arguments_are_shown_when_asked_for(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    known = {field.name for group in GROUPS for field in dataclasses.fields(group) if field.init}
    found = listed(printed(word, monkeypatch, capsys))
    assert known <= found and {name for names in ESSENTIAL.values() for name in names} < known


def test_what_matters_is_listed_by_group() -> None:
    """A name that is in no group would be shown nowhere."""
    groups = {group._argument_group_name: {field.name for field in dataclasses.fields(group)} for group in GROUPS}
    assert all(set(names) <= groups[group] for group, names in ESSENTIAL.items())
    assert list(ESSENTIAL) == [group._argument_group_name for group in GROUPS]


def explained(lines: list[str]) -> dict[str, str]:
    """What a help text says of each argument, by its name."""
    texts: dict[str, str] = {}
    for line in lines:
        if line.startswith("  --"):
            name = line.split()[0]
            texts[name] = line
        elif texts and line.startswith("   "):
            texts[name] += f" {line.strip()}"
    return {name: " ".join(text.split()) for name, text in texts.items()}


@pytest.mark.parametrize(("parse", "word"), [(parse_arguments, "--help_all"), (parse_evaluate_arguments, "--help")])
def test_full_help_has_one_default_for_each_argument(
    parse: Callable, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    texts = explained(printed(word, monkeypatch, capsys, parse))
    assert len(texts) > 40
    assert {name: text for name, text in texts.items() if len(re.findall("default: ", text, re.IGNORECASE)) > 1} == {}
    assert {name: text for name, text in texts.items() if "default: None" in text or "default: False" in text} == {}
    assert texts["--train_split_name"].endswith("(default: train, else the first one).")
    assert texts["--speed_batch_sizes"].endswith("(default: 1 16)") and "VALUE [VALUE ...]" in texts["--speed_batch_sizes"]


def test_options_that_turn_something_off_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """`HfArgumentParser` gives them the help of the option that they turn off."""
    texts = explained(printed("--help_all", monkeypatch, capsys))
    assert texts["--interpolate_masks"].endswith("(default: True)")
    assert texts["--no_interpolate_masks"] == "--no_interpolate_masks Turns --interpolate_masks off."
