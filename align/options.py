"""An option of a command, declared once: meaning, default, bounds and choices stand beside the field it fills.

From the fields of a settings class come its validation (:func:`check_values`), the parameters of a command
(:func:`takes`), and the settings that the command was given (:func:`values`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from inspect import Parameter, signature
from typing import Annotated, Any, TypeVar, get_type_hints

from featstore.errors import SpecError
from featstore.runtime.options import OPTIONS
from featstore.runtime.options import option as said


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

    @property
    def shown(self) -> str:
        """The range as the help has it, such as ``x>=1``."""
        return f"x{'>' if self.open else '>='}{self.least:g}"

    def holds(self, value: float) -> bool:
        """Whether a number is in range; NaN and infinity never are.

        Args:
            value: The number.
        """
        return (value > self.least if self.open else value >= self.least) and value < math.inf


#: Types of fields that hold whole numbers.
_WHOLE = (int, int | None)

POSITIVE_COUNT = Range("must be at least 1", 1)
POSITIVE = Range("must be a positive number", 0, open=True)
NOT_NEGATIVE = Range("must not be negative", 0)


@dataclass(frozen=True)
class Option:
    """What a command says of an option, and which values it takes.

    Attributes:
        help: Full sentences for people, the objective first; the choices are added to them.
        panel: Panel of the help.
        range: Of a number.
        choices: Of a word; empty for any.
        shown: The choices as the help lists them, where they are checked elsewhere or one needs an explanation.
        left_out: What leaving it out means, where the field's default does not say it.
        by_type: Whether leaving it out means the map type's own default.
        typed: The default as people type it, where the field holds something else; None for the field's own.
        parse: Makes the field's value of what was typed; None where they are the same.
    """

    help: str
    panel: str | None = None
    range: Range | None = None
    choices: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    left_out: str | None = None
    by_type: bool = False
    typed: str | None = None
    parse: Callable[[str], Any] | None = None


def option(default: Any, help: str, **more: Any) -> Any:  # noqa: A002 - as typer calls it
    """A dataclass field that is an option.

    Args:
        default: Of the field.
        help: A sentence for people.
        **more: The other attributes of :class:`Option`.
    """
    return field(default=default, metadata={"option": Option(help, **more)})


def flag(name: str) -> str:
    """An option as people type it.

    Args:
        name: Of the field.
    """
    return f"--{name.replace('_', '-')}"


def declared(settings: type[Any]) -> dict[str, tuple[Field[Any], Option]]:
    """The fields of a settings class that are options, by name.

    Args:
        settings: A dataclass.
    """
    return {entry.name: (entry, entry.metadata["option"]) for entry in fields(settings) if "option" in entry.metadata}


def check_values(settings: Any) -> None:
    """Validate each option by itself.

    Args:
        settings: An instance of a settings class.

    Raises:
        SpecError: A number out of range, or a word that is no choice.
    """
    for name, (_, own) in declared(type(settings)).items():
        value = getattr(settings, name)
        if value is None:
            continue
        if own.range is not None and not own.range.holds(value):
            raise SpecError(f"{flag(name)} {value}: {own.range.words}")
        if own.choices and value not in own.choices:
            raise SpecError(f"{flag(name)} {value!r}: choose one of {', '.join(own.choices)}")


def values(settings: type[Any], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a settings class from what a command was given.

    Args:
        settings: A dataclass.
        given: By parameter; what is no field is left alone.
        defaults: Of options that have a default by type.
    """
    found: dict[str, Any] = {}
    for name, (entry, own) in declared(settings).items():
        if name in given:
            value = own.parse(given[name]) if own.parse is not None else given[name]
            found[name] = defaults.get(name, entry.default) if own.by_type and value is None else value
    return found


_F = TypeVar("_F", bound=Callable[..., Any])


def takes(*settings: type[Any], only: Collection[str] | None = None) -> Callable[[_F], _F]:
    """Give a command the options that settings classes declare, in place of its ``**given``.

    Args:
        *settings: Dataclasses.
        only: Only these fields; None for all.
    """

    def with_options(command: _F) -> _F:
        own = signature(command, eval_str=True)
        written = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        first = [p for p in written if p.kind is not Parameter.KEYWORD_ONLY]
        rest = [p for p in written if p.kind is Parameter.KEYWORD_ONLY]
        made = [p for kind in settings for p in _parameters(kind, only)]
        # typer reads the signature and calls the command by name.
        command.__signature__ = own.replace(parameters=[*first, *made, *rest])  # type: ignore[attr-defined]
        return command

    return with_options


def _parameters(settings: type[Any], only: Collection[str] | None) -> Iterator[Parameter]:
    hints = get_type_hints(settings)
    for name, (entry, own) in declared(settings).items():
        if only is not None and name not in only:
            continue
        kind, default = hints[name], entry.default
        if own.typed is not None:
            kind, default = str, own.typed
        elif own.by_type:
            kind, default = kind | None, None
        # A flag that is off by default has no --no- form.
        forms = [flag(name)] if default is False else []
        info = said(
            own.help,
            *forms,
            panel=own.panel or OPTIONS,
            default="that of the type" if own.by_type else own.left_out,
            choices=own.shown or own.choices,
            takes=None if own.range is None else f"{'int' if kind in _WHOLE else 'float'} range {own.range.shown}",
        )
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])
