"""Arguments of the functions that a notebook calls, checked where they enter.

A command's words have been typed by its parser; in Python anything can be given. Each function here returns the value
in its plain type, or raises a :class:`~featstore.errors.SpecError` that names the argument and the value.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import SpecError

#: Layers of a model: ``"8,16"``, ``"25%,50%"``, ``[8, 16]``, ``8``.
Layers = str | int | Iterable[int | str]
#: Characters of a wrong value that a message shows.
_SHOWN = 60


def shown(value: Any) -> str:
    """A value in a message: one line, and short.

    Args:
        value: As given.
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def as_path(name: str, value: Any) -> Path:
    """A place in the file system.

    Args:
        name: Of the argument.
        value: As given.

    Raises:
        SpecError: Not a path, or one that no file system has.
    """
    if isinstance(value, str | os.PathLike) and isinstance(place := os.fspath(value), str):
        if "\0" in place:
            raise SpecError(f"{name} {shown(value)} holds a null character, which no path can; leave it out")
        return Path(place)
    raise SpecError(f"{name} {shown(value)}: give a path, not {type(value).__name__}")


def several(name: str, value: Any, of: str) -> list[Any]:
    """Several values as a list.

    Args:
        name: Of the argument.
        value: As given.
        of: What to give several of, for the message.

    Raises:
        SpecError: Text, bytes, or something that holds no values.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return list(value)
    raise SpecError(f"{name} {shown(value)}: give {of}")


def typed(name: str, value: Any, kinds: str) -> Any:
    """A value in a plain type: numpy's numbers are numbers, and an integer may stand for a float.

    Args:
        name: Of the argument.
        value: As given.
        kinds: As annotated: ``bool``, ``int``, ``float``, ``str`` and ``None``, joined by ``|``.

    Raises:
        SpecError: A value of another type.
    """
    allowed = {kind.strip() for kind in kinds.split("|")}
    if value is None:
        if "None" in allowed:
            return None
    elif isinstance(value, bool | np.bool_):
        if "bool" in allowed:
            return bool(value)
    elif isinstance(value, numbers.Integral) and "int" in allowed:
        return int(value)
    elif isinstance(value, numbers.Real) and "float" in allowed:
        return float(value)
    elif isinstance(value, str | os.PathLike) and "str" in allowed and isinstance(os.fspath(value), str):
        return os.fspath(value)
    raise SpecError(f"{name}={shown(value)}: expected {kinds}")


def whole(name: str, value: Any, least: int) -> int:
    """A whole number that is large enough.

    Args:
        name: Of the argument.
        value: As given.
        least: The smallest allowed.

    Raises:
        SpecError: Another number, or something else.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral) or int(value) < least:
        raise SpecError(f"{name} {shown(value)}: give a whole number, {least} or more")
    return int(value)


def layers_text(layers: Layers | None) -> str | None:
    """Layers as the commands read them.

    Args:
        layers: Text, a number, or several of them.

    Raises:
        SpecError: Something else.
    """
    if layers is None or isinstance(layers, str):
        return layers
    items: list[Any] = [layers]
    if isinstance(layers, Iterable) and not isinstance(layers, bytes | Mapping):
        items = list(layers)
    if items and all(type(item) is not bool and isinstance(item, str | numbers.Integral) for item in items):
        return ",".join(str(item) for item in items)
    raise SpecError(f"layers {shown(layers)}: write numbers such as [8, 16] or depths such as '0%,50%,100%'")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to append to a message about an unknown name: the nearest known one, or all.

    Args:
        name: As typed.
        known: The names that there are.
    """
    near = difflib.get_close_matches(name, known := list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"


def check_keywords(function: Callable[..., Any], called: str, given: Mapping[str, Any]) -> None:
    """Refuse keywords that a function does not have, by the name under which people call it.

    Args:
        function: Which takes the keywords.
        called: Its name for people, such as ``align.cka``.
        given: The keywords.

    Raises:
        TypeError: One does not exist; the message names the nearest.
    """
    known = [
        name
        for name, each in inspect.signature(function).parameters.items()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name in given:
        if name not in known:
            raise TypeError(f"{called}() has no option {name!r}{nearest(name, known)}")
