"""Keyword arguments to the settings of a run: the names are those of the settings' fields."""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from align.maps.registry import map_type
from align.options import declared
from align.resources import choose_device
from align.settings import LoopSettings, Settings
from featstore.errors import SpecError
from featstore.runtime.quantities import parse_bytes

#: Layers of a model: ``"8,16"``, ``"25%,50%"``, ``[8, 16]``, ``8``.
Layers = str | int | Iterable[int | str]

_RUN, _LOOP = declared(Settings), declared(LoopSettings)
OPTIONS = {**_RUN, **_LOOP}


def make_settings(store: str, options: Mapping[str, Any]) -> Settings:
    """Settings as `align train` makes them of its options.

    Args:
        store: Path or URL of the store.
        options: By name of an option of :class:`Settings` or :class:`LoopSettings`. What is not there has the default
            of the command: that of the type of map, and the device that is there.

    Raises:
        TypeError: An option that does not exist; the message names the nearest.
        SpecError: A value of the wrong type, or no such type of map.
    """
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"align.train() has no option {name!r}{nearest(name, OPTIONS)}")
    given = {"device": "auto", **{name: _typed(name, _plain(name, value)) for name, value in options.items()}}
    own_defaults = map_type(given.get("type", _RUN["type"][0].default)).defaults
    for name, (entry, option) in OPTIONS.items():
        if option.by_type and given.get(name) is None:
            given[name] = own_defaults.get(name, entry.default)
    own, loop = ({name: given[name] for name in kind if name in given} for kind in (_RUN, _LOOP))
    settings = Settings(store, **own, loop=LoopSettings(**loop))
    device = choose_device(settings.loop.device, by_gradient=settings.by_gradient)
    return replace(settings, loop=replace(settings.loop, device=device))


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


def _typed(name: str, value: Any) -> Any:
    """The value in the plain type of its field: numpy's numbers are numbers, and an integer may stand for a float."""
    entry, option = OPTIONS[name]
    kinds = [kind.strip() for kind in str(entry.type).split("|")]
    if value is None and ("None" in kinds or option.by_type):
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
    raise SpecError(f"{name}={value!r}: expected {entry.type}")
