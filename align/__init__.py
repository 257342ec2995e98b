"""Maps between two models' hidden states, fitted from a feature store alone, and similarity between all layers.

``align.train`` fits a run, ``align.load`` gives its maps as functions of arrays, ``align.compare`` ranks runs, and
``align.cka`` compares layers. The closed-form maps are scikit-learn estimators as well. Names are imported when they
are first used, so that ``import align`` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.api import Changes, Leaderboard, Map, Maps, Run, Similarity, changes, cka, compare, load, train
    from align.closed_form.estimators import AffineAligner, LinearAligner, ProcrustesAligner, ReducedRankAligner

__all__ = [
    "AffineAligner",
    "Changes",
    "Leaderboard",
    "LinearAligner",
    "Map",
    "Maps",
    "ProcrustesAligner",
    "ReducedRankAligner",
    "Run",
    "Similarity",
    "changes",
    "cka",
    "compare",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from featstore.runtime.extras import extras_named

    with extras_named("align"):
        module = import_module("align.closed_form.estimators" if name.endswith("Aligner") else "align.api")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # What people complete: no helpers of this module, and no rooms, which are imported by their own names.
    return sorted(__all__)
