"""What was verified on each model before anything was read from it or put into it, as the files record it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from evaluate.reporting.reading.inputs import Node, Origin, Run
from featstore.errors import CorruptDataError
from featstore.models.probe.words import batching, by_number, continuing, figure, hide, numbers, padding
from featstore.models.verdict import LayerVerdict, Verdict
from featstore.runtime.records import Record

#: Files that have it; a card has what its store was made with.
_FILES = ("stitch.json", "generations.json", "communicate.json")

COLUMNS = ("model", "blocks", "streams", "windows", "goes on", "prompts", "leak by layer", "hide by layer", "attention")


@dataclass(frozen=True)
class Verified:
    """What was verified on the models of all runs.

    Attributes:
        rows: A model each, with a cell for each of :data:`COLUMNS`.
        sources: The files that say so.
    """

    rows: tuple[tuple[str, ...], ...]
    sources: tuple[Origin, ...]


def verified(runs: Sequence[Run]) -> Verified | None:
    """Tabulate what was verified, a row a model; two where runs say different things of one.

    Args:
        runs: What was read.

    Returns:
        None where no file says anything, as those of earlier versions.
    """
    rows: dict[tuple[str, ...], None] = {}
    sources: dict[Origin, None] = {}
    for run in runs:
        found: dict[str, dict[str, Any]] = {}
        for name, content, file in _said(run):
            found[name] = _with(found.get(name, {}), content)
            sources[run.origin(file)] = None
        for name, content in found.items():
            with suppress(CorruptDataError):
                rows[_row(name, Verdict.parse(content))] = None
    return Verified(tuple(rows), tuple(sources)) if rows else None


def _said(run: Run) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Model, verdict and file; a file that is damaged here says nothing."""
    for name, model in run.file("adapter.json").get("models").items():
        if isinstance(content := model.get("verified").value, Mapping):
            yield name, content, "adapter.json"
    for file in _FILES:
        for name, verdict in run.file(file).get("verified").items():
            yield name, _content(verdict), file


def _content(verdict: Node) -> Mapping[str, Any]:
    return verdict.value.content() if isinstance(verdict.value, Record) else {}


def _with(known: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """What two files say together; of a layer the one that says more."""
    layers = dict(_layers(known))
    for name, entry in _layers(more).items():
        held = layers.get(name)
        layers[name] = {**held, **entry} if isinstance(held, Mapping) and isinstance(entry, Mapping) else entry
    said = {name: value for name, value in more.items() if value is not None}
    return {**known, **said, **({"layers": layers} if layers else {})}


def _layers(content: Mapping[str, Any]) -> Mapping[str, Any]:
    found = content.get("layers")
    return found if isinstance(found, Mapping) else {}


def _row(name: str, verdict: Verdict) -> tuple[str, ...]:
    return (
        name,
        str(verdict.blocks),
        str(verdict.streams),
        "not tested" if verdict.reading is None else batching(verdict.reading),
        continuing(verdict.continuing),
        padding(verdict.continuing),
        _leaks(verdict.layers),
        hide(verdict.layers),
        verdict.attention or "–",
    )


def _leaks(layers: Mapping[str, LayerVerdict]) -> str:
    """Layers of one leak together, the clean ones first."""
    found: dict[str, list[int]] = {}
    for layer, entry in by_number(layers).items():
        found.setdefault(figure(entry.leak), []).append(layer)
    order = sorted(found, key=lambda leak: (leak != "0", found[leak]))
    return "; ".join(f"{leak} at {numbers(found[leak])}" for leak in order) or "not tested"
