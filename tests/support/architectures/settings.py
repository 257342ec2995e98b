"""What `settings.yaml` says of each type: read once, checked, never changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Own:
    """What one type needs beyond the small sizes.

    Attributes:
        values: Values of its configuration.
        derived: Fields that it must not be given.
    """

    values: dict[str, Any]
    derived: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why transformers cannot build a type.

    Attributes:
        error: What it raises, as a regular expression on ``"NameOfError: message"``.
        because: The reason, in words.
    """

    error: str
    because: str

    def explains(self, error: Exception) -> bool:
        """Whether this is what was raised."""
        return re.match(self.error, described(error), re.DOTALL) is not None


@dataclass(frozen=True)
class Settings:
    """The whole file.

    Attributes:
        small: A value for every field of this name.
        small_though_null: Those of them that are set even where the default is null.
        kinds: Fields that name the kind of each block; a tiny model has all kinds in turn.
        kinds_first_once: The same, but the first kind comes once, at the bottom.
        types: By name of the type.
        variants: By ``type@variant``: values over those of the type.
        unbuildable: By name of the type.
    """

    small: dict[str, Any]
    small_though_null: tuple[str, ...]
    kinds: tuple[str, ...]
    kinds_first_once: tuple[str, ...]
    types: dict[str, Own]
    variants: dict[str, dict[str, Any]]
    unbuildable: dict[str, Refusal]

    def own(self, name: str) -> Own:
        """What a type, or ``type@variant``, needs.

        Raises:
            KeyError: A variant that the file does not have.
        """
        kind, _, variant = name.partition("@")
        own = self.types.get(kind, Own({}))
        return Own({**own.values, **self.variants[name]}, own.derived) if variant else own


@cache
def settings() -> Settings:
    """The settings, as the file has them."""
    read = yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text(encoding="utf-8"))
    return Settings(
        small=read["small"],
        small_though_null=tuple(read["small_though_null"]),
        kinds=tuple(read["kinds"]),
        kinds_first_once=tuple(read["kinds_first_once"]),
        types={
            name: Own(entry.pop("set", {}), tuple(entry.pop("derived", ())), **entry)
            for name, entry in ((name, dict(entry)) for name, entry in read["types"].items())
        },
        variants=read["variants"],
        unbuildable={name: Refusal(**entry) for name, entry in read["unbuildable"].items()},
    )


def described(error: Exception) -> str:
    """An error as ``"NameOfError: message"``."""
    return f"{type(error).__name__}: {str(error).strip()}"
