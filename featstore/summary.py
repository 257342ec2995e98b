"""What a store holds, in numbers and in words."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.markup import escape

from featstore.console import human, human_bytes, human_seconds
from featstore.errors import SpecError
from featstore.store import Store


def summary(store: Store) -> dict[str, Any]:
    """What a store holds, for people and scripts.

    Args:
        store: Any complete store.
    """
    result: dict[str, Any] = {
        "store": str(store.path),
        "fingerprint": store.fingerprint,
        "documents": store.attributes["split"]["documents"],
        "corpus_bytes": store.attributes["corpus"]["bytes"],
        "bytes": sum(record["bytes"] for record in store.manifest.values()),
        "models": {},
        "pairs": {},
    }
    for name in store.models:
        model, table = store.model(name), store.tokens(name)
        result["models"][name] = {
            "reference": model.attributes.get("reference"),
            "rows": model.rows,
            "layers": list(model.layers),
            "width": model.width,
            "depth": model.depth,
            "sinks": int(table.sink.sum()),
            "special": int(table.special.sum()),
        }
    for i, first in enumerate(store.models):
        for second in store.models[i + 1 :]:
            pairs = store.pairs(first, second)
            result["pairs"][f"{first}__{second}"] = {
                "pairs": len(pairs),
                "masked": int(pairs.sink.sum()),
                "coverage": {first: pairs.coverage[0], second: pairs.coverage[1]},
            }
    return result


def describe(result: dict[str, Any]) -> str:
    """The summary as lines for people.

    Args:
        result: From :func:`summary` or :func:`extract`.
    """
    lines = [
        f"[bold]{result['store']}[/bold]: {human_bytes(result['bytes'])}, fingerprint {result['fingerprint'][:12]}"
    ]
    documents = ", ".join(f"{count} {split}" for split, count in result["documents"].items())
    lines.append(f"  text     {human_bytes(result['corpus_bytes'])}, documents: {documents}")
    for name, model in result["models"].items():
        layers = ",".join(map(str, model["layers"]))
        lines.append(
            f"  {name:8} {human(model['rows'])} states of width {model['width']} at layers {layers} "
            f"of {model['depth']}; {model['sinks']} sinks"
        )
    for key, pair in result["pairs"].items():
        coverage = ", ".join(f"{share:.1%} of {name}" for name, share in pair["coverage"].items())
        lines.append(f"  {key}: {human(pair['pairs'])} pairs cover {coverage}; {pair['masked']} masked as sinks")
    if "seconds" in result:
        lines.append(f"  took {human_seconds(result['seconds'])}")
    return "\n".join(lines)


def window_table(store: Store, window: int, rows: int) -> dict[str, Any]:
    """A window token by token: text, norm at each layer, sink, partner in the other models.

    Args:
        store: Any complete store.
        window: Window number.
        rows: Tokens of each model at most.

    Raises:
        SpecError: No such window.
    """
    corpus = store.corpus
    count = len(corpus.window_document)
    if window >= count:
        raise SpecError(f"window {window} is outside 0..{count - 1} of {store.path}")
    raw = corpus.window_text(window).encode()
    result: dict[str, Any] = {"window": window, "document": int(corpus.window_document[window]), "models": {}}
    for name in store.models:
        table, model = store.tokens(name), store.model(name)
        first, end = (int(v) for v in np.searchsorted(table.window, [window, window + 1]))
        end = min(end, first + rows)
        norms = {layer: store.norms(name, layer)[first:end] for layer in model.layers}
        partners = {
            other: dict(zip(pairs.row_source.tolist(), pairs.row_target.tolist(), strict=True))
            for other in store.models
            if other != name
            for pairs in [store.pairs(name, other)]
        }
        entries, start = [], 0
        for row in range(first, end):
            stop = int(table.byte_end[row])
            entries.append(
                {
                    "row": row,
                    "id": int(table.id[row]),
                    "text": "" if table.special[row] else raw[start:stop].decode(errors="replace"),
                    "special": bool(table.special[row]),
                    "sink": bool(table.sink[row]),
                    "norms": {str(layer): float(values[row - first]) for layer, values in norms.items()},
                    "partner": {other: rows_of.get(row) for other, rows_of in partners.items()},
                }
            )
            start = max(start, stop)
        result["models"][name] = entries
    return result


def describe_window(result: dict[str, Any]) -> str:
    """A window's table as lines for people.

    Args:
        result: From :func:`window_table`.
    """
    lines = [f"window {result['window']} of document {result['document']}"]
    for name, entries in result["models"].items():
        layers = list(entries[0]["norms"]) if entries else []
        lines.append(f"[bold]{name}[/bold]  row, norm at layer {', '.join(layers)}, partner, text")
        for entry in entries:
            norms = " ".join(f"{value:9.1f}" for value in entry["norms"].values())
            partner = " ".join("-" if row is None else str(row) for row in entry["partner"].values())
            marks = ("S" if entry["sink"] else " ") + ("*" if entry["special"] else " ")
            lines.append(f"  {entry['row']:7} {norms} {marks} {partner:>7}  {escape(repr(entry['text']))}")
    lines.append("S: attention sink (masked), *: special token (never pairs), -: no partner")
    return "\n".join(lines)
