"""Runs as if they had a few of their layer pairs alone: what the page shows in full of very many."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evaluate.reporting.reading.inputs import Node, Run
from featstore.runtime.records import Record


def narrowed(runs: Sequence[Run], kept: Mapping[str, Collection[str]]) -> list[Run]:
    """Runs whose files name only the given layer pairs.

    Values keep their places in the files; whatever is not of a layer pair stays as it is.

    Args:
        runs: What was read.
        kept: Keys of layer pairs by the run's label; a run that is not in it keeps none.
    """
    return [_narrowed(run, set(kept.get(run.label, ()))) for run in runs]


def _narrowed(run: Run, keys: Collection[str]) -> Run:
    names = {name: _pairs(node, keys) for name, node in run.files.items()}
    events = run.log.value if isinstance(run.log.value, list) else []
    log = [event for event in events if not isinstance(event, dict) or event.get("pair", "") in ("", None, *keys)]
    return replace(
        run,
        files=names,
        epochs=tuple(_pairs(epoch, keys) for epoch in run.epochs),
        log=Node(log, run.log.at, run.log.href) if events else run.log,
    )


def _pairs(node: Node, keys: Collection[str]) -> Node:
    """A file without the other layer pairs: of most files an object by key, of a card a list."""
    value: Any = node.value
    if isinstance(value, Record):
        if value.declares("pairs") and isinstance(value.member("pairs"), Mapping):
            few = {key: block for key, block in value.member("pairs").items() if key in keys}
            return Node(value.model_copy(update={"pairs": few}), node.at, node.href)
    elif isinstance(value, dict) and isinstance(value.get("pairs"), list):
        entries = [entry for entry in value["pairs"] if isinstance(entry, dict) and entry.get("key") in keys]
        return Node({**value, "pairs": entries}, node.at, node.href)
    return node
