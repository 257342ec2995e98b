"""The flags of an extraction, typed on a command line or passed as arguments, parsed into settings."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featstore.errors import SpecError
from featstore.extraction.settings import Settings
from featstore.models.attention import parse_attention
from featstore.runtime.quantities import parse_budget, parse_bytes

#: Smallest value of every flag that is a number.
MINIMUM: dict[str, float] = {
    "max_documents": 1,
    "max_document_bytes": 4,
    "window_bytes": 4,
    "batch_tokens": 1,
    "shard_rows": 256,
    "sink_threshold": 1.0,
    "seed": 0,
    "generate": 1,
    "temperature": 0.0,
}
#: Where to write, where to compute, with how much memory and how much trust.
_NEVER_FROM_A_STORE = ("store", "device", "device_map", "moments_memory", "yes", "allow_pickle_weights")
#: Flags whose name is not that of the settings' field.
_FLAG = {"form": "format", "attention": "attn"}


def parse_settings(given: Mapping[str, Any], *, moments: bool = False, moments_only: bool = False) -> Settings:
    """Settings from the flags that were given; the others keep their defaults, or are taken from the store.

    Args:
        given: Values by field of :class:`Settings`; None stands for a flag that was not given. ``model`` and ``layers``
            hold texts as on the command line, ``max_tokens`` and ``moments_memory`` numbers or such as 1M.
        moments: Also store the moments.
        moments_only: Store moments and no rows.

    Raises:
        SpecError: A value of another kind, or one that is too small; the message names the flag.
    """
    chosen = {name: _PARSERS[name](name, value) for name, value in given.items() if value is not None}
    always = {name: chosen.pop(name) for name in _NEVER_FROM_A_STORE if name in chosen}
    if moments or moments_only:
        chosen["moments"] = "only" if moments_only else "add"
    return Settings(**always, **chosen, given=frozenset(chosen))


def flag(field: str) -> str:
    """A field of the settings as it is typed.

    Args:
        field: Name of the field.
    """
    return f"--{_FLAG.get(field, field).replace('_', '-')}"


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SpecError(f"{flag(name)} {value!r}: give it as text, not as {type(value).__name__}")
    return value


def _texts(name: str, values: Any) -> tuple[str, ...]:
    return tuple(_text(name, value) for value in values)


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise SpecError(f"{flag(name)} {value!r}: give a path, not {type(value).__name__}")
    return Path(value)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise SpecError(f"{flag(name)} {value!r}: give a whole number, not {type(value).__name__}")
    return int(_least(name, operator.index(value)))


def _real(name: str, value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    return float(_least(name, number, shown=value))


def _least(name: str, number: float, shown: Any = None) -> float:
    # Written so that NaN is refused.
    if not number >= MINIMUM[name]:
        raise SpecError(
            f"{flag(name)} {number if shown is None else shown!r}: give a number of at least {MINIMUM[name]:g}"
        )
    return number


def _finite(name: str, value: Any) -> float:
    number = _real(name, value)
    if math.isinf(number):
        raise SpecError(f"{flag(name)} {value!r}: give a finite number")
    return number


def _share(name: str, value: Any) -> float:
    try:
        number = float("nan") if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number <= 1:
        raise SpecError(f"{flag(name)} {value!r}: give a number above 0 and at most 1")
    return number


def _budget(name: str, value: Any) -> int | None:
    del name
    return parse_budget(str(value))


def _memory(name: str, value: Any) -> int:
    del name
    return parse_bytes(str(value))


def _device_map(name: str, value: Any) -> Any:
    # Models are known where there is torch; reading a store's settings needs none.
    from featstore.models.devices import parse_device_map

    del name
    return parse_device_map(value)


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{flag(name)} {value!r}: give True or False, not {type(value).__name__}")
    return value


def _attention(name: str, value: Any) -> str:
    return parse_attention(_text(name, value), flag(name))


_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "attention": _attention,
    "yes": _switch,
    "allow_pickle_weights": _switch,
    "model": _texts,
    "layers": _texts,
    "store": _path,
    "generate_with": _texts,
    "max_tokens": _budget,
    "moments_memory": _memory,
    "device_map": _device_map,
    **dict.fromkeys(
        (
            "dataset",
            "text_field",
            "normalise",
            "control_tokens",
            "form",
            "layout",
            "layer_0",
            "device",
            "dtype",
        ),
        _text,
    ),
    **dict.fromkeys(
        ("max_documents", "max_document_bytes", "window_bytes", "batch_tokens", "shard_rows", "seed", "generate"),
        _whole,
    ),
    "sink_threshold": _real,
    "temperature": _finite,
    "top_p": _share,
}
