"""How the three commands say an option, each part in one way, and the options that several commands take.

A help text says the objective first, in full sentences. The choices of a word follow as "Choices: a, b."; the range of
a number and the default stand in brackets. A default in parentheses describes what is taken, any other is typed like
that. A switch is off where no default is shown. Square brackets in a help text are markup: write a backslash first.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

#: Panels of the help, which are the same in every command.
OPTIONS = "Options"
MODELS = "Models and layers"
TEXT = "Text"
STORE = "Store"
ANSWERS = "Text that the models write"
COMPUTATION = "Computation"
TRUST = "Trust"
OUTPUT = "Output"

#: The choices of ``--device`` and ``--dtype``.
DEVICES = ("auto", "cpu", "cuda", "cuda:N")
DTYPES = ("auto", "bfloat16", "float16", "float32")
#: The choices of ``--policy``.
POLICY_WORDS = (
    "end (at every end that is not inside a character)",
    "word (only at ends of words)",
    "byte (also inside characters)",
)


def words(text: str, choices: Iterable[str] = ()) -> str:
    """A help text with its choices.

    Args:
        text: Full sentences.
        choices: Each as it is typed, with what it means in parentheses where that is not plain.
    """
    listed = ", ".join(choices)
    return f"{text} Choices: {listed}." if listed else text


def option(
    text: str,
    *names: str,
    panel: str,
    default: str | None = None,
    choices: Iterable[str] = (),
    least: float | None = None,
    takes: str | None = None,
) -> Any:
    """A typer option.

    Args:
        text: Its help, in full sentences.
        *names: As it is typed, where that does not follow from the parameter's name.
        panel: Panel of the help.
        default: What is taken where it is left out, for a parameter whose own default does not say it.
        choices: Of a word.
        least: The smallest number that is taken.
        takes: Type and range of a number that whoever takes it checks in its own words, such as ``int range x>=1``.
    """
    return typer.Option(
        *names,
        help=words(text, choices),
        rich_help_panel=panel,
        min=least,
        metavar=None if takes is None else "<{}> [{}]".format(*takes.rsplit(" ", 1)),
        show_default=True if default is None else default,
    )


Json = Annotated[bool, option("Print one JSON object on stdout and nothing else there.", "--json", panel=OUTPUT)]
StorePath = Annotated[Path, typer.Argument(help="Path of the store.")]
Device = Annotated[str, option("Device to compute on.", panel=COMPUTATION, choices=DEVICES)]
DeviceMap = Annotated[
    str | None,
    option(
        "Spread a model over several devices, instead of --device: auto, balanced, or a JSON file of {MODULE: DEVICE}.",
        panel=COMPUTATION,
        default="one device",
    ),
]
Dtype = Annotated[str, option("Number type to compute in.", panel=COMPUTATION, choices=DTYPES)]
MovedModels = Annotated[
    list[str] | None,
    option(
        "A model that is elsewhere now, as NAME=REF; repeat it for several. REF is a hub id\\[@revision], a directory, "
        "or a GGUF file.",
        "--model",
        panel=MODELS,
        default="where the files say",
    ),
]
Yes = Annotated[
    bool,
    option(
        "Use the models and texts that files of a store or a run name and you have not named. They are "
        "shown before they are used.",
        "--yes",
        panel=TRUST,
    ),
]
Pickles = Annotated[
    bool,
    option(
        "Read pickled weights, which can run code, where a model has no others.", "--allow-pickle-weights", panel=TRUST
    ),
]
