"""Keyword arguments to the settings of a run: the names are those of the settings' fields."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from align.maps.registry import map_type
from align.options import declared
from align.resources import choose_device
from align.settings import LoopSettings, Settings
from featstore.runtime.arguments import layers_text, nearest, typed
from featstore.runtime.quantities import parse_bytes
from featstore.text.roles import roles_text

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
    if name == "roles":
        return roles_text(value)
    if name == "memory":
        return bytes_of(value)
    if name == "layer_map" and isinstance(value, Mapping):
        return ",".join(f"{source}:{target}" for source, target in value.items())
    if name == "components" and type(value) is not bool and isinstance(value, numbers.Integral):
        return str(value)
    return value


def _typed(name: str, value: Any) -> Any:
    """The value in the plain type of its field; nothing, where the type of map decides."""
    entry, option = OPTIONS[name]
    return None if value is None and option.by_type else typed(name, value, str(entry.type))
