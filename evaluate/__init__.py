"""Evaluate maps in the full models: inject mapped states at the true layer, beside controls that say what it means.

``evaluate.stitch``, ``generate`` and ``communicate`` measure a run of `align`, ``report`` makes a page of what was
measured, and ``inject`` puts states into a loop of one's own. Names are imported when they are first used, so that
``import evaluate`` needs no torch.

The import name is shared with a Hugging Face package; both cannot live in one environment (`featstore doctor` looks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluate.api import communicate, generate, inject, load_models, report, stitch
    from evaluate.notebook.answers import CommunicateResult
    from evaluate.notebook.page import ReportResult
    from evaluate.notebook.stitched import StitchResult
    from evaluate.notebook.texts import GenerateResult

__all__ = [
    "CommunicateResult",
    "GenerateResult",
    "ReportResult",
    "StitchResult",
    "communicate",
    "generate",
    "inject",
    "load_models",
    "report",
    "stitch",
]


#: Where a name is, if not among the functions.
_RESULTS = {
    "CommunicateResult": "evaluate.notebook.answers",
    "GenerateResult": "evaluate.notebook.texts",
    "ReportResult": "evaluate.notebook.page",
    "StitchResult": "evaluate.notebook.stitched",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from featstore.runtime.extras import extras_named

    with extras_named("evaluate"):
        value = getattr(import_module(_RESULTS.get(name, "evaluate.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # What people complete: no helpers of this module, and no rooms, which are imported by their own names.
    return sorted(__all__)
