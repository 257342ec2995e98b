"""Typed records of JSON objects for readers that need no package: frozen dataclasses, every member checked.

    @dataclass(frozen=True)
    class Mask:
        sink_threshold: Annotated[float, Bounds(0, exclusive=True)]

    mask = parse(Mask, {"sink_threshold": 5.0}, "zarr.json")

A member without a default is required; members that the class does not declare are let pass, as a newer version may
write them. Results of runs have records of their own (:mod:`featstore.runtime.records`), which keep such members.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from featstore.errors import MemberError

R = TypeVar("R")

#: Keys and indices that lead to a value.
Place = tuple[str | int, ...]
#: Takes a JSON value and its place, and gives what the record holds of it.
_Check = Callable[[Any, Place], Any]

#: Characters of a damaged value that a message shows.
_SHOWN = 40


@dataclass(frozen=True)
class Bounds:
    """What a number must lie within.

    Attributes:
        low: Least; None for no bound.
        high: Greatest; None for no bound.
        exclusive: Whether ``low`` itself is too small.
    """

    low: float | None = None
    high: float | None = None
    exclusive: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies within.

        Args:
            value: Not NaN.
        """
        low = self.low is None or (value > self.low if self.exclusive else value >= self.low)
        return low and (self.high is None or value <= self.high)

    @property
    def words(self) -> str:
        """What follows "a number"."""
        if self.low is not None and self.high is not None:
            return f" from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f" greater than {self.low:g}" if self.exclusive else f" of {self.low:g} or more"
        return "" if self.high is None else f" of {self.high:g} or less"


@dataclass(frozen=True)
class Matches:
    """What a text must look like.

    Attributes:
        pattern: Regular expression of the whole text.
        words: What it means.
    """

    pattern: str
    words: str


@dataclass(frozen=True)
class Items:
    """What a list must be beside its elements.

    Attributes:
        least: Fewest elements.
        unique: Whether each stands once.
        rising: Whether each is at least the one before it.
    """

    least: int = 0
    unique: bool = False
    rising: bool = False


class _WrongError(Exception):
    """A value is not what it must be: its place, and what was expected."""

    def __init__(self, place: Place, value: Any, expected: str) -> None:
        super().__init__(f"{pointer(place)} is {shown(value)}, expected {expected}")


class _AbsentError(_WrongError):
    """A member is missing."""

    def __init__(self, place: Place, name: str) -> None:
        Exception.__init__(self, f"{pointer(place)} has no {name!r}")


def parse(kind: type[R], content: Any, where: str, remedy: str = "restore it or extract again") -> R:
    """Make a record from a JSON value.

    Args:
        kind: A frozen dataclass.
        content: As parsed.
        where: Named in errors.
        remedy: What to do about damage, for the message.

    Raises:
        MemberError: A member is missing or not of its type; the message names the first such one.
    """
    try:
        hint: Any = kind
        found: R = _check_of(hint)(content, ())
    except _WrongError as wrong:
        raise MemberError(f"{where}: {wrong}; {remedy}") from None
    return found


def pointer(place: Sequence[str | int]) -> str:
    """A place in a document as a JSON pointer (RFC 6901), what does not print escaped.

    Args:
        place: Keys and indices.
    """
    parts = (str(key).replace("~", "~0").replace("/", "~1") for key in place)
    text = "".join(f"/{part}" for part in parts) or "/"
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN - 1]}…"


def shown(value: Any) -> str:
    """A JSON value in a few words.

    Args:
        value: Any.
    """
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**_SHOWN else "an integer of many digits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


# Checks ---------------------------------------------------------------------------------------------------------------


@cache
def _check_of(hint: Any) -> _Check:
    """The check of a type hint; made once."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:])
    if hint in _SCALARS:
        return _SCALARS[hint]
    if origin is dict:
        return _object
    if hint is Any:
        return lambda value, _: value
    if origin is Literal:
        return _literal(arguments)
    if origin in (Union, types.UnionType):
        return _either([each for each in arguments if each is not type(None)], type(None) in arguments)
    if origin is tuple:
        return _list(_check_of(arguments[0]), Items())
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return _table(_check_of(arguments[0]), _check_of(arguments[1]))
    if dataclasses.is_dataclass(hint):
        return _record(hint)
    raise TypeError(f"no check of {hint!r}")


def _refuse(place: Place, value: Any, expected: str) -> NoReturn:
    raise _WrongError(place, value, expected)


def _integer(value: Any, place: Place) -> int:
    # A bool is an int to Python and to nobody else.
    return value if type(value) is int else _refuse(place, value, "an integer")


def _number(value: Any, place: Place) -> float:
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return value
    _refuse(place, value, "a finite number")


def _text(value: Any, place: Place) -> str:
    return value if type(value) is str else _refuse(place, value, "text")


def _flag(value: Any, place: Place) -> bool:
    return value if type(value) is bool else _refuse(place, value, "true or false")


def _object(value: Any, place: Place) -> dict[str, Any]:
    return value if type(value) is dict else _refuse(place, value, "an object")


_SCALARS: dict[Any, _Check] = {int: _integer, float: _number, str: _text, bool: _flag, dict: _object}


def _annotated(hint: Any, rules: tuple[Any, ...]) -> _Check:
    check = _check_of(hint)
    for rule in rules:
        if isinstance(rule, Bounds):
            check = _bounded(check, rule, "an integer" if hint is int else "a number")
        elif isinstance(rule, Matches):
            check = _matching(check, rule)
        elif isinstance(rule, Items):
            check = _list(_check_of(get_args(hint)[0]), rule)
    return check


def _bounded(check: _Check, bounds: Bounds, what: str) -> _Check:
    def bounded(value: Any, place: Place) -> Any:
        found = check(value, place)
        return found if bounds.holds(found) else _refuse(place, value, what + bounds.words)

    return bounded


def _matching(check: _Check, rule: Matches) -> _Check:
    pattern = re.compile(rule.pattern, re.DOTALL)

    def matching(value: Any, place: Place) -> Any:
        return check(value, place) if pattern.fullmatch(check(value, place)) else _refuse(place, value, rule.words)

    return matching


def _literal(choices: tuple[Any, ...]) -> _Check:
    def chosen(value: Any, place: Place) -> Any:
        if type(value) in (str, int) and value in choices:
            return value
        _refuse(place, value, f"one of {', '.join(map(repr, choices))}")

    return chosen


def _either(hints: list[Any], nullable: bool) -> _Check:
    checks = [_check_of(hint) for hint in hints]

    def either(value: Any, place: Place) -> Any:
        if value is None and nullable:
            return None
        for check in checks[:-1]:
            try:
                return check(value, place)
            except _WrongError:
                continue
        return checks[-1](value, place)

    return either


def _list(check: _Check, rule: Items) -> _Check:
    def listed(value: Any, place: Place) -> tuple[Any, ...]:
        if type(value) is not list:
            _refuse(place, value, "a list")
        found = tuple(check(each, (*place, at)) for at, each in enumerate(value))
        if len(found) < rule.least:
            _refuse(place, value, f"a list of {rule.least} or more")
        if rule.unique and len(set(found)) < len(found):
            at = next(at for at, each in enumerate(found) if each in found[:at])
            _refuse((*place, at), value[at], "what the list does not hold already")
        if rule.rising:
            for at in range(1, len(found)):
                if found[at] < found[at - 1]:
                    _refuse((*place, at), value[at], f"{shown(value[at - 1])} or more, as the list rises")
        return found

    return listed


def _table(check_key: _Check, check: _Check) -> _Check:
    def table(value: Any, place: Place) -> Mapping[str, Any]:
        members = _object(value, place)
        return types.MappingProxyType(
            {check_key(key, (*place, key)): check(each, (*place, key)) for key, each in members.items()}
        )

    return table


def _record(kind: Any) -> _Check:
    checks: dict[str, _Check] = {}
    required = {
        each.name
        for each in dataclasses.fields(kind)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }

    def record(value: Any, place: Place) -> Any:
        members = _object(value, place)
        if not checks:
            # Only now: a record may hold records of its own kind.
            hints = get_type_hints(kind, include_extras=True)
            checks.update({each.name: _check_of(hints[each.name]) for each in dataclasses.fields(kind)})
        given: dict[str, Any] = {}
        for name, check in checks.items():
            # A member whose name is a keyword has an underscore more here.
            key = name.removesuffix("_")
            if key in members:
                given[name] = check(members[key], (*place, key))
            elif name in required:
                raise _AbsentError(place, key)
        return kind(**given)

    return record
