"""An option of a command, declared once: meaning, default, bounds and choices stand beside the field it fills.

From the fields of a settings class both its validation (:func:`check_values`) and the parameters of a command
(:func:`parameters`) are made.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

from featstore.errors import SpecError


@dataclass(frozen=True)
class Range:
    """Which numbers an option takes.

    Attributes:
        words: What a number out of range is told.
        least: The smallest number.
        open: Whether that one itself is out of range.
    """

    words: str
    least: float
    open: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in range; NaN and infinity never are.

        Args:
            value: The number.
        """
        return (value > self.least if self.open else value >= self.least) and value < math.inf


POSITIVE_COUNT = Range("must be at least 1", 1)
POSITIVE = Range("must be a positive number", 0, open=True)
NOT_NEGATIVE = Range("must not be negative", 0)


@dataclass(frozen=True)
class Option:
    """What a command says of an option, and which values it takes.

    Attributes:
        help: A sentence for people.
        panel: Panel of the help; None for the first.
        range: Of a number.
        choices: Of a word; empty for any.
        by_type: Whether leaving it out means the map type's own default.
        hidden: Whether commands fill it by other means.
    """

    help: str = ""
    panel: str | None = None
    range: Range | None = None
    choices: tuple[str, ...] = ()
    by_type: bool = False
    hidden: bool = False


def option(
    default: Any = MISSING,
    help: str = "",  # noqa: A002 - as typer calls it
    *,
    panel: str | None = None,
    range: Range | None = None,  # noqa: A002 - the option's
    choices: tuple[str, ...] = (),
    by_type: bool = False,
    hidden: bool = False,
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: Of the field; none if it must be given.
        help: A sentence for people; the choices are added to it.
        panel: Panel of the help.
        range: Of a number.
        choices: Of a word.
        by_type: Whether leaving it out means the map type's own default.
        hidden: Whether commands fill it by other means.
    """
    return field(default=default, metadata={"option": Option(help, panel, range, choices, by_type, hidden)})


def flag(name: str) -> str:
    """An option as people type it.

    Args:
        name: Of the field.
    """
    return f"--{name.replace('_', '-')}"


def declared(settings: type[Any]) -> Iterator[tuple[Field[Any], Option]]:
    """The fields of a settings class that are options.

    Args:
        settings: A dataclass.
    """
    for entry in fields(settings):
        if "option" in entry.metadata:
            yield entry, entry.metadata["option"]


def check_values(settings: Any) -> None:
    """Validate each option by itself.

    Args:
        settings: An instance of a settings class.

    Raises:
        SpecError: A number out of range, or a word that is no choice.
    """
    for entry, own in declared(type(settings)):
        value = getattr(settings, entry.name)
        if value is None:
            continue
        if own.range is not None and not own.range.holds(value):
            raise SpecError(f"{flag(entry.name)} {value}: {own.range.words}")
        if own.choices and value not in own.choices:
            raise SpecError(f"{flag(entry.name)} {value!r}: choose one of {', '.join(own.choices)}")


def parameters(settings: type[Any], names: Collection[str] | None = None) -> dict[str, Parameter]:
    """The parameters of a typer command that fill a settings class.

    Args:
        settings: A dataclass.
        names: Only these fields; None for all that are not hidden.
    """
    import typer

    hints = get_type_hints(settings)
    made = {}
    for entry, own in declared(settings):
        if own.hidden or (names is not None and entry.name not in names):
            continue
        kind = hints[entry.name]
        # A flag that is off by default has no --no- form.
        forms = [flag(entry.name)] if entry.default is False else []
        shown = f"{own.help.rstrip('.')}: {', '.join(own.choices)}." if own.choices else own.help
        info = typer.Option(*forms, help=shown, rich_help_panel=own.panel)
        default = None if own.by_type or entry.default is MISSING else entry.default
        if default is None and type(None) not in getattr(kind, "__args__", ()):
            kind = kind | None
        made[entry.name] = Parameter(
            entry.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )
    return made
