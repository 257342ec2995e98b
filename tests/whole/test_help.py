"""What `--help` says: every option in full sentences, in a panel; its range, its choices and its default in one way."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from align.execution.options import Execution
from align.options import declared
from align.settings import LoopSettings, Settings
from featstore.runtime.options import words
from tests.support.commands import call

TOOLS = ("featstore", "align", "evaluate")

#: What no sentence about an option begins with: the objective does.
DANGLING = {"of", "at", "in", "for", "by", "with", "where", "which", "when", "only", "as"}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its name, in words as they are typed."""
    for tool in TOOLS:
        group: Any = typer.main.get_command(importlib.import_module(f"{tool}.cli").app)
        yield from ((f"{tool} {name}", command) for name, command in group.commands.items())


PARAMETERS = [pytest.param(each, id=f"{name} {each.name}") for name, command in commands() for each in command.params]


def wrong_sentence(text: str) -> str:
    """What is wrong with a help text; nothing where it is well said."""
    plain = text.replace("\\[", "[")
    if not plain[:1].isupper() or not plain.endswith("."):
        return "no capital letter or no full stop"
    if plain.partition(" ")[0].lower() in DANGLING or len(plain.split()) < 3:
        return "a fragment, no objective"
    if re.search(r"\bdefault", plain, re.IGNORECASE):
        return "a default that is not in brackets"
    if "hoices" in plain and not re.search(r"\. Choices: [^.]*\S\.$", plain):
        return "choices said another way"
    return ""


def wrong_option(option: Any) -> str:
    """What is wrong with how an option is declared; nothing where all is said."""
    if option.param_type_name == "argument":
        return wrong_sentence(option.help or "")
    switch = option.is_flag and not option.secondary_opts
    stated = isinstance(option.show_default, str) or (bool(option.show_default) and option.default is not None)
    kind = str(option.type_descriptor.annotation)
    if not option.rich_help_panel or option.rich_help_panel == "Options":
        return "no panel"
    if not (option.required or switch or stated):
        return "no default"
    if switch and option.default:
        return "a switch that is on"
    bounded = option.min is not None or "[x>" in (option.metavar or "") or "above 0" in (option.help or "")
    if re.search(r"\b(int|float)\b", kind) and not bounded:
        return "no range"
    return wrong_sentence(option.help or "")


@pytest.mark.parametrize("option", PARAMETERS)
def test_every_option_says_what_it_is_for(option: Any) -> None:
    assert wrong_option(option) == "", option.help


def test_every_command_says_what_it_does() -> None:
    for name, command in commands():
        for paragraph in command.help.split("\n\n"):
            text = " ".join(paragraph.split())
            assert text[0].isupper() or text.startswith("--"), (name, text)
            assert text.endswith("."), (name, text)
    for tool in TOOLS:
        assert wrong_sentence(importlib.import_module(f"{tool}.cli").app.info.help) == ""


def test_choices_that_are_checked_are_shown() -> None:
    helps = {each.name: each.help for name, command in commands() if name == "align train" for each in command.params}
    for settings in (Settings, LoopSettings, Execution):
        for name, (_, option) in declared(settings).items():
            for choice in option.choices:
                assert re.search(rf"Choices: .*\b{choice}\b", helps[name]), name


def test_one_option_is_said_in_one_way() -> None:
    """What several commands take has one panel, and so one place in the help."""
    for name in ("as_json", "device", "device_map", "dtype", "yes", "allow_pickle_weights"):
        panels = {each.rich_help_panel for _, command in commands() for each in command.params if each.name == name}
        assert len(panels) == 1, (name, panels)


def test_the_help_shows_range_choices_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(call(capsys, "align", "train", "--help").out.replace("│", " ").split())
    assert "[x>=1] Maximum number of epochs. [default: 10]" in shown
    assert "[x>0] Temperature of InfoNCE. [default: 0.07]" in shown
    assert "Choices: auto, float32, bfloat16. [default: auto]" in shown
    assert "Model whose states are mapped. [default: (the first model of the store)]" in shown


def option_of(**changes: Any) -> Any:
    """A parameter that is well declared but for some changes."""
    app = typer.Typer()
    said = {"help": "Number of trees.", "rich_help_panel": "Garden", "min": 1} | changes
    default = said.pop("value", 3)

    @app.command()
    def plant(trees: int = typer.Option(default, **said)) -> None:
        """Plant."""

    return next(each for each in typer.main.get_command(app).params if each.name == "trees")


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, ""),
        ({"help": None}, "no capital letter or no full stop"),
        ({"help": "number of trees."}, "no capital letter or no full stop"),
        ({"help": "Number of trees"}, "no capital letter or no full stop"),
        ({"help": "Of large gardens."}, "a fragment, no objective"),
        ({"help": "At most."}, "a fragment, no objective"),
        ({"help": "Number of trees; 3 by default."}, "a default that is not in brackets"),
        ({"help": "Number of trees (choices 1, 2)."}, "choices said another way"),
        ({"rich_help_panel": None}, "no panel"),
        ({"value": None}, "no default"),
        ({"value": None, "show_default": "as many as there are"}, ""),
        ({"min": None}, "no range"),
    ],
)
def test_what_is_badly_said_is_found(changes: dict[str, Any], wrong: str) -> None:
    assert wrong_option(option_of(**changes)) == wrong


def test_choices_follow_the_sentence() -> None:
    assert words("Kind of tree.", ("oak", "ash (in hedges)")) == "Kind of tree. Choices: oak, ash (in hedges)."
    assert words("Kind of tree.") == "Kind of tree."
