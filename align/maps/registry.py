"""The types of map: one record for each says how it is fitted, which options it has and what holds of it.

A new type is two files: a record named ``TYPE`` in a module of :mod:`align.maps.types`, where it is found without being
listed anywhere, and the module that solves for it or builds what is trained. The record names that module by
reference, so that asking about a type imports neither a solver nor torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Literal

from align.maps.formula import LINEAR, Formula
from featstore.errors import SpecError


@dataclass(frozen=True)
class MapType:
    """A type of map.

    Attributes:
        name: What people type after ``--type``.
        order: Its place in lists, simplest first.
        summary: What it is, as the help says it.
        title: Its name where it opens a sentence.
        options: Options that mean something to it, by field of the settings (``rank``, ``skip``, ``hidden``, ...).
        closed: ``module:function`` with the signature of :func:`align.closed_form.procrustes.solve`; None without a
            closed form.
        module: ``module:function`` with the signature of :func:`align.training.modules.low_rank`; None for a type that
            is not trained by gradient from rows.
        windows: Whether it reads whole windows instead of rows (:mod:`align.compress`).
        formula: How a fitted map is applied.
        centred: Whether the train means are subtracted.
        isometric: Whether it leaves distances as they are but for one factor, so that no fit can change debiased CKA.
        sharing: How layers share a map: ``whole``, the same map for all but for a factor; ``base``, with a projection
            of each layer's own on top; None if they cannot.
        solved_as: The type that solves for the very maps which this one trains; None if there is none, or itself.
        judged_by: The closed form that its trained maps are compared with; None for ``solved_as``, or itself.
        label: What its closed form is called as somebody's optimum; may contain ``{rank}`` and ``{skip}``.
        defaults: Its own defaults of options, by field.
        refuses: Options that cannot be combined with it, and why.
    """

    name: str
    order: int
    summary: str
    title: str
    options: frozenset[str] = frozenset()
    closed: str | None = None
    module: str | None = None
    windows: bool = False
    formula: Formula = LINEAR
    centred: bool = True
    isometric: bool = False
    sharing: Literal["whole", "base"] | None = None
    solved_as: str | None = None
    judged_by: str | None = None
    label: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)

    def by_gradient(self, solver: str | None) -> bool:
        """Whether the map is trained rather than solved for.

        Args:
            solver: ``closed`` or ``adamw``; None for the type's own way.
        """
        return self.closed is None or solver == "adamw"

    @property
    def yardstick(self) -> MapType:
        """The type whose closed form a trained map is compared with."""
        return map_type(self.judged_by or self.solved_as or self.name)


def resolve(reference: str) -> Callable[..., Any]:
    """Import what a record refers to.

    Args:
        reference: ``module:function``.
    """
    function: Callable[..., Any] = pkgutil.resolve_name(reference)
    return function


#: Types that were registered from outside :mod:`align.maps.types`.
_registered: dict[str, MapType] = {}


def register(type_: MapType) -> None:
    """Add a type that is defined outside :mod:`align.maps.types`.

    Args:
        type_: The record.

    Raises:
        SpecError: There is another type of that name.
    """
    if type_.name in _own() or _registered.get(type_.name, type_) != type_:
        raise SpecError(f"there is a type {type_.name!r} already; choose another name")
    _registered[type_.name] = type_


def map_types() -> tuple[MapType, ...]:
    """All types, in order."""
    return tuple(sorted([*_own().values(), *_registered.values()], key=lambda type_: type_.order))


def map_type(name: str) -> MapType:
    """The record of a type.

    Args:
        name: Of the type.

    Raises:
        SpecError: There is none.
    """
    found = _own().get(name) or _registered.get(name)
    if found is None:
        raise SpecError(f"type {name!r}: choose one of {', '.join(type_.name for type_ in map_types())}")
    return found


def formula(kind: str) -> Formula:
    """A formula by its name in a card.

    Args:
        kind: Its name.

    Raises:
        KeyError: No type has it.
    """
    return formulas()[kind]


def formulas() -> dict[str, Formula]:
    """Every formula that a type has, by kind."""
    return {type_.formula.kind: type_.formula for type_ in map_types()}


def having(option: str) -> str:
    """The types that have an option, as words: ``reduced-rank and lora``.

    Args:
        option: Field of the settings.
    """
    return listed([type_.name for type_ in map_types() if option in type_.options], "and")


def listed(names: list[str], last: str) -> str:
    """Names as words: ``a, b and c``.

    Args:
        names: At least one.
        last: The word before the last name.
    """
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@cache
def _own() -> dict[str, MapType]:
    # By name: a record imports this module, and nothing here knows one type from another.
    package = import_module("align.maps.types")
    modules = [import_module(f"{package.__name__}.{entry.name}") for entry in pkgutil.iter_modules(package.__path__)]
    return {module.TYPE.name: module.TYPE for module in modules}
