"""What the instrument finds out about one causal type: a row of the table.

A row holds no figure that another processor could change. A difference that is rounding is 0; any other figure has one
digit, thousands of times coarser than what another order of the same sums does to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from featstore.errors import FeatstoreError, ProbeError, UnsupportedArchitectureError
from featstore.models.layout import Axes
from featstore.models.probe.prove import Proven, everything, prove
from featstore.models.probe.refusals import refuse_continuing, refuse_hiding, refuse_injecting, refuse_storing
from featstore.models.stack import residual_stream
from featstore.models.verdict import Verdict
from tests.support.architectures.building import NotBuiltError, build, causal_types
from tests.support.architectures.kinds import kind_of
from tests.support.table.agreeing import checked

Row = dict[str, Any]

#: A figure in the reason why hiding fails.
_FIGURE = re.compile(r"(?<=differ by )[\d.e+-]+")
#: Up to here a figure is rounding; what a model does that is none is a hundred times as large.
_ROUNDING = 1e-4


def measured(name: str) -> Row:
    """Build a type, prove the instrument on it and hold the verdict against the truth.

    Args:
        name: A causal type, or ``type@variant``.

    Returns:
        Plain JSON values. ``disagrees`` is there only where the truth is another than the verdict.

    Raises:
        NotBuiltError: The type cannot be built, and nobody looked at it.
    """
    row: Row = {"class": next(each.class_name for each in causal_types() if each.name == name.partition("@")[0])}
    try:
        model = build(name)
    except NotBuiltError as error:
        if not error.looked_at:
            raise
        return {**row, "not_built": str(error)}
    row["kind"] = str(kind_of(model))
    try:
        proven = proved(model)
    except FeatstoreError as error:
        refused = str(error) if isinstance(error, UnsupportedArchitectureError) else f"{type(error).__name__}: {error}"
        return {**row, "refused": refused, **_agreement(name, model, None, refused)}
    return {**row, **of(proven), **_agreement(name, model, proven, "")}


def proved(model: nn.Module) -> Proven:
    """A model with all that can be tested on it.

    Args:
        model: A causal language model.

    Raises:
        FeatstoreError: It is refused.
    """
    return prove(model, everything(residual_stream(model)))


def _agreement(name: str, model: nn.Module, proven: Proven | None, refused: str) -> Row:
    done, wrong = checked(name, model, proven, refused)
    return {"truth": done, **({"disagrees": wrong} if wrong else {})}


def of(proven: Proven) -> Row:
    """The members of a row that the verdict gives.

    Args:
        proven: With everything tested.
    """
    verdict, stream = proven.verdict, proven.stream
    return {
        "stack": verdict.stack,
        "blocks": verdict.blocks,
        "width": verdict.width,
        "streams": verdict.streams,
        "axes": _axes(stream.axes),
        "dtype": verdict.stream_dtype,
        "attention": verdict.attention,
        "reading": _reading(verdict),
        "continuing": _continuing(verdict),
        "layers": _layers(verdict),
        "commands": commands(verdict),
    }


def digit(value: float | None, *, rounding: float = 0.0) -> float | None:
    """A figure in one digit.

    Args:
        value: None where it is not finite or was not measured.
        rounding: Up to this it is 0.
    """
    if value is None:
        return None
    return 0 if value <= rounding else float(f"{value:.0e}")


def _axes(axes: Axes) -> list[str | int]:
    names: list[str | int] = list(axes.sizes)
    for place, word in sorted([(axes.batch, "batch"), (axes.tokens, "tokens")]):
        names.insert(place, word)
    return names


def _reading(verdict: Verdict) -> Row:
    reading = verdict.reading
    assert reading is not None
    figures = {name: digit(getattr(reading, name), rounding=_ROUNDING) for name in ("future", "padding", "neighbours")}
    return {
        **figures,
        "far": digit(reading.far, rounding=_ROUNDING),
        "layer_0": digit(reading.layer_0),
        "causal": reading.causal,
        "batching": reading.batching,
        "switch": reading.switch,
        "layer_0_is_table": reading.layer_0_is_table,
    }


def _continuing(verdict: Verdict) -> Row:
    way = verdict.continuing
    assert way is not None
    if way.kind == "none":
        return {"kind": "none"}
    return {
        "kind": way.kind,
        "positions": way.positions,
        "whole_logits": way.whole_logits,
        "padded": way.padded,
        "padding": digit(way.padding, rounding=_ROUNDING),
        "branching": way.branching,
    }


def _layers(verdict: Verdict) -> Row:
    layers = {int(name): entry for name, entry in verdict.layers.items()}
    found: Row = {
        "self_identical": [k for k, entry in layers.items() if entry.self_identical],
        # Exactly 0 or a leak: a small one is no rounding.
        "leak": [digit(layers[k].leak) for k in sorted(layers)],
        "skips": [k for k, entry in layers.items() if entry.skips],
    }
    if verdict.reading is not None and verdict.reading.causal:
        found["hide"] = [k for k, entry in layers.items() if entry.hide_refused is None]
        found["hide_refused"] = _reasons({k: entry.hide_refused for k, entry in layers.items()})
    return found


def _reasons(refused: dict[int, str | None]) -> list[Row]:
    """Reasons with their layers; figures become the largest one, in one digit."""
    found: dict[str, Row] = {}
    for layer, reason in refused.items():
        if reason is None:
            continue
        figure = _FIGURE.search(reason)
        entry = found.setdefault(_FIGURE.sub("{}", reason), {"layers": [], "largest": 0.0})
        entry["layers"].append(layer)
        entry["largest"] = max(entry["largest"], float(figure[0]) if figure else 0.0)
    return [
        {"layers": entry["layers"], "reason": reason.replace("{}", f"up to {digit(entry['largest']):g}")}
        for reason, entry in found.items()
    ]


def commands(verdict: Verdict) -> Row:
    """What the commands do with a model, by asking what they ask.

    Args:
        verdict: With everything tested.

    Returns:
        ``extract`` and ``table``: true or the refusal. Layers at which `stitch` takes it with ``--keep own`` and
        ``hide``, `generate` and `communicate` (``hidden``: with its conditions that hide the context).
    """
    name, layers = "it", [int(layer) for layer in verdict.layers]
    injects = _passing(layers, lambda k: refuse_injecting(name, verdict, [k]))
    hides = [k for k in injects if k in _passing(layers, lambda k: refuse_hiding(name, verdict, [k]))]
    goes_on = bool(_passing([0], lambda _: refuse_continuing(name, verdict)))
    return {
        "extract": bool(_passing([0], lambda _: refuse_storing(name, verdict, table=False))),
        "table": bool(_passing([0], lambda _: refuse_storing(name, verdict, table=True))),
        "stitch": injects,
        "stitch_hide": hides,
        "generate": injects if goes_on else [],
        "communicate": injects if goes_on else [],
        "communicate_hide": hides if goes_on else [],
    }


def _passing(layers: Iterable[int], refuse: Callable[[int], None]) -> list[int]:
    found = []
    for layer in layers:
        try:
            refuse(layer)
        except ProbeError:
            continue
        found.append(layer)
    return found
