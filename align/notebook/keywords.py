"""Keyword arguments to the settings of a run: the names are those of the settings' fields."""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any

import numpy as np

from align.resources import choose_device
from align.settings import LoopSettings, Settings
from featstore.errors import SpecError
from featstore.runtime.quantities import parse_bytes

#: Layers of a model: ``"8,16"``, ``"25%,50%"``, ``[8, 16]``, ``8``.
Layers = str | int | Iterable[int | str]

_RUN = {entry.name: entry for entry in fields(Settings) if entry.name not in ("store", "loop")}
_LOOP = {entry.name: entry for entry in fields(LoopSettings)}
NAMES = (*_RUN, *_LOOP)


def make_settings(store: str, options: Mapping[str, Any]) -> Settings:
    """Settings as `align train` makes them of its options.

    Args:
        store: Path or URL of the store.
        options: By name of a field of :class:`Settings` or :class:`LoopSettings`. What is not there has the default of
            the command: a skip by type, and the device that is there.

    Raises:
        TypeError: An option that does not exist; the message names the nearest.
        SpecError: A value of the wrong type.
    """
    for name in options:
        if name not in NAMES:
            raise TypeError(f"align.train() has no option {name!r}{nearest(name, NAMES)}")
    # The defaults of the command that depend on other options.
    given = {"device": "auto", **{name: _plain(name, value) for name, value in options.items()}}
    if given.get("skip") is None:
        given["skip"] = "none" if given.get("type") == "reduced-rank" else "procrustes"
    own = {name: _typed(_RUN[name], value) for name, value in given.items() if name in _RUN}
    loop = {name: _typed(_LOOP[name], value) for name, value in given.items() if name in _LOOP}
    settings = Settings(store, **own)
    loop["device"] = choose_device(loop["device"], by_gradient=settings.by_gradient)
    return Settings(store, **own, loop=LoopSettings(**loop))


def nearest(name: str, known: Iterable[str]) -> str:
    """What to append to a message about an unknown name: the nearest known one, or all.

    Args:
        name: As typed.
        known: The names that there are.
    """
    near = difflib.get_close_matches(name, known := list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"


def layers_text(layers: Layers | None) -> str | None:
    """Layers as the commands read them.

    Args:
        layers: Text, a number, or several of them.

    Raises:
        SpecError: Something else.
    """
    if layers is None or isinstance(layers, str):
        return layers
    items: list[Any] = list(layers) if isinstance(layers, Iterable) else [layers]
    if items and all(type(item) is not bool and isinstance(item, str | numbers.Integral) for item in items):
        return ",".join(str(item) for item in items)
    raise SpecError(f"layers {layers!r}: write numbers such as [8, 16] or depths such as '0%,50%,100%'")


def bytes_of(memory: int | str) -> int:
    """An amount of memory: a number of bytes, or text such as ``500M``.

    Args:
        memory: As given.

    Raises:
        SpecError: Not a positive amount.
    """
    return parse_bytes(str(memory))


def _plain(name: str, value: Any) -> Any:
    """A value as the command has it."""
    if name == "layers":
        return layers_text(value)
    if name == "memory":
        return bytes_of(value)
    if name == "layer_map" and isinstance(value, Mapping):
        return ",".join(f"{source}:{target}" for source, target in value.items())
    if name == "components" and type(value) is not bool and isinstance(value, numbers.Integral):
        return str(value)
    return value


def _typed(entry: Field[Any], value: Any) -> Any:
    """The value in the plain type of its field: numpy's numbers are numbers, and an integer may stand for a float."""
    kinds = [kind.strip() for kind in str(entry.type).split("|")]
    if value is None and "None" in kinds:
        return None
    if isinstance(value, bool | np.bool_):
        if "bool" in kinds:
            return bool(value)
    elif isinstance(value, numbers.Integral) and "int" in kinds:
        return int(value)
    elif isinstance(value, numbers.Real) and "float" in kinds:
        return float(value)
    elif isinstance(value, str | os.PathLike) and "str" in kinds:
        return os.fspath(value)
    raise SpecError(f"{entry.name}={value!r}: expected {entry.type}")
