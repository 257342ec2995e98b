"""The contents of ``cka.json`` as one kind of thing per measure: what the page draws and what its summary reads.

Linear CKA over all rows and the measures over a sample are written differently; here they have the same keys, so that
one drawing serves all of them. A view is what JSON can hold::

    {"id", "title", "closer", "symmetric", "n", "rows_text", "scale": {"low", "high", "closer"},
     "blocks": [{"key", "title", "state", "rows": {"model", "layers"}, "columns": {...}, "values", "ci", "reasons",
                 "floors": [{"name", "values", "n"} | {"edge", "p", "excess"}],
                 "ceilings": [{"name", "values" | "rows" and "columns"}],
                 "facts": {"rows", "columns", "cells"}, "beside": {"state", "values", "n", "reasons"} | None}]}

A floor with exchanged partners has its ``edge``, which 5 % of the exchanges pass, the corrected p of every cell
and, of a biased measure, the interval of the value less the floor, its ``excess``.
Every matrix is indexed ``[row's layer][column's layer]``; ``reasons`` has keys ``"i,j"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from align.pages.palette import Scale
from align.similarity.page.definitions import CEILINGS, FLOORS, title_of

Matrix = Sequence[Sequence[float | None]]
View = dict[str, Any]

MASKED, KEPT = "attention sinks masked", "attention sinks left in"


def views(result: dict[str, Any]) -> list[View]:
    """All measures of a result, linear CKA over all rows first.

    Args:
        result: Contents of ``cka.json``.
    """
    return [_main(result), *(_sampled(result, name, content) for name, content in result.get("measures", {}).items())]


def values_of(matrix: Matrix | None) -> Iterable[float]:
    """The values of a matrix that are defined.

    Args:
        matrix: Rows of numbers and None; None for no matrix at all.
    """
    return (v for row in matrix or () for v in row if v is not None)


def beside(result: dict[str, Any]) -> dict[str, Any] | None:
    """The same figures with the attention sinks treated the other way, where they were computed.

    Args:
        result: Contents of ``cka.json``.
    """
    found: dict[str, Any] | None = result.get("masked" if result.get("keep_sinks") else "unmasked")
    return found


def states(result: dict[str, Any]) -> tuple[str, str]:
    """What the main figures and those beside them do with attention sinks.

    Args:
        result: Contents of ``cka.json``.
    """
    return (KEPT, MASKED) if result.get("keep_sinks") else (MASKED, KEPT)


def best(values: Sequence[float | None], closer: str, skip: int | None = None) -> int | None:
    """Where the closest value is, the first of equals; None where nothing is defined.

    Args:
        values: Of one layer with all others.
        closer: ``higher`` or ``lower``.
        skip: A position to leave out: the layer itself.
    """
    sign = 1 if closer == "higher" else -1
    found = [(sign * v, -j) for j, v in enumerate(values) if v is not None and j != skip]
    return -max(found)[1] if found else None


def _main(result: dict[str, Any]) -> View:
    floor = result.get("null") or {}
    other = beside(result)
    blocks = []
    for key, title, rows, columns in _places(result):
        block = _block(result, key, title, rows, columns, _matrix(result, key), result.get("reasons") or {})
        block["ci"] = _matrix(result.get("ci95") or {}, key) or None
        block["floors"] = list(_exchanged(result.get("permutations") or {}, key))
        # Shuffled rows are no floor beside ones that keep what documents share.
        if key == "cross" and not block["floors"] and any(True for _ in values_of(floor.get("cross"))):
            name = (floor.get("method") or "shuffled pairs").replace("shuffled pairs", FLOORS["shuffled"])
            block["floors"].append({"name": name, "values": floor["cross"], "n": floor.get("n")})
        # Stores without rows have the main figures only: there is nothing to lay beside them.
        if other and _matrix(other, key) and any(True for _ in values_of(_matrix(other, key))):
            block["beside"] = {
                "state": states(result)[1],
                "values": _matrix(other, key),
                "n": other.get("n"),
                "reasons": _by_place(other.get("reasons") or {}, rows, columns, result["layers"]),
            }
        blocks.append(block)
    return _view(
        ("all-rows", f"Linear CKA, {result.get('estimator', 'debiased')}, all rows"),
        {"closer": "higher", "symmetric": True, "bounds": (None, 1.0)},
        result.get("n"),
        "all paired rows",
        blocks,
    )


def _sampled(result: dict[str, Any], name: str, content: dict[str, Any]) -> View:
    sample = result.get("sample") or {}
    reasons = content.get("reasons") or {}
    symmetric = content.get("symmetric", True)
    blocks = []
    for key, title, rows, columns in _places(result, both_ways=bool(content.get("reverse")), arrows=not symmetric):
        values = _matrix(content, key)
        if not values:
            continue
        block = _block(result, key, title, rows, columns, values, reasons)
        block["ci"] = _matrix(content.get("ci95") or {}, key)
        block["floors"] = list(_exchanged(content.get("permutations") or {}, key))
        exchanged = bool(block["floors"])
        for floor, matrices in (content.get("floors") or {}).items():
            if exchanged and floor == "shuffled":
                continue
            if any(True for _ in values_of(_matrix(matrices or {}, key))):
                entry = {"name": FLOORS.get(floor, floor), "values": _matrix(matrices, key), "n": matrices.get("n")}
                block["floors"].append(entry)
        block["ceilings"] = list(_ceilings(content, key, rows, columns, reasons))
        facts = content.get("facts") or {}
        block["facts"]["cells"] = _by_place(facts, rows, columns, result["layers"])
        for side, model in (("rows", rows), ("columns", columns)):
            block["facts"][side] = [facts.get(f"{model}:{layer}") for layer in result["layers"][model]]
        blocks.append(block)
    title = content.get("title") or title_of(name)
    return _view(
        (name, f"{title}, sampled rows" if name == "cka" else title),
        {
            "closer": content.get("closer", "higher"),
            "symmetric": symmetric,
            "bounds": tuple(content.get("bounds") or (None, None)),
        },
        sample.get("rows"),
        "a sample of the paired rows",
        blocks,
    )


def _exchanged(permutations: dict[str, Any], key: str) -> Iterable[dict[str, Any]]:
    """The floors with exchanged partners, where a block has them."""
    for name, floor in permutations.items():
        tables = {"cross": floor, "reverse": floor.get("opposite") or {}}.get(key, {})
        if any(True for _ in values_of(tables.get("mean"))):
            yield {
                "name": FLOORS.get(name, name),
                "values": tables["mean"],
                "edge": tables["p95"],
                "p": tables["p_max"],
                "excess": tables.get("excess_ci95") or None,
                "n": floor.get("rows"),
            }


def _view(
    name: tuple[str, str], kind: dict[str, Any], n: int | None, rows_text: str, blocks: list[dict[str, Any]]
) -> View:
    shown = [v for b in blocks for m in (b["values"], (b["beside"] or {}).get("values")) for v in values_of(m)]
    scale = Scale.over(shown, closer=kind["closer"], bounds=kind["bounds"])
    return {
        "id": name[0],
        "title": name[1],
        "closer": kind["closer"],
        "symmetric": kind["symmetric"],
        "n": n,
        "rows_text": rows_text,
        "scale": scale.to_dict(),
        "blocks": blocks,
    }


def _places(
    result: dict[str, Any], *, both_ways: bool = False, arrows: bool = False
) -> Iterable[tuple[str, str, str, str]]:
    """Key, title, the model down the side and the model along the bottom of every matrix."""
    first, second = result["models"]
    yield "cross", f"{first} \u2192 {second}" if arrows else f"{first} \u00d7 {second}", first, second
    if both_ways:
        yield "reverse", f"{second} \u2192 {first}", first, second
    # One model alone: what lies within it is what lies across.
    if first != second:
        for name in (first, second):
            yield f"within:{name}", f"within {name}", name, name


def _block(
    result: dict[str, Any],
    key: str,
    title: str,
    rows: str,
    columns: str,
    values: Matrix | None,
    reasons: dict[str, str],
) -> dict[str, Any]:
    layers = result["layers"]
    return {
        "key": key,
        "title": title,
        "state": states(result)[0],
        "rows": {"model": rows, "layers": layers[rows]},
        "columns": {"model": columns, "layers": layers[columns]},
        "same": rows == columns,
        "values": values or [[None] * len(layers[columns]) for _ in layers[rows]],
        "ci": None,
        "reasons": _by_place(reasons, rows, columns, layers),
        "floors": [],
        "ceilings": [],
        "facts": {"rows": [], "columns": [], "cells": {}},
        "beside": None,
    }


def _matrix(content: dict[str, Any], key: str) -> Any:
    part, _, model = key.partition(":")
    return ((content.get(part) or {}).get(model)) if model else content.get(part)


def _by_place(given: dict[str, Any], rows: str, columns: str, layers: dict[str, list[int]]) -> dict[str, Any]:
    """What is written by two layers, named in either order, by their place in a matrix."""
    found = {}
    for i, r in enumerate(layers[rows]):
        for j, c in enumerate(layers[columns]):
            one, two = f"{rows}:{r}", f"{columns}:{c}"
            here = given.get(f"{one} {two}") or given.get(f"{two} {one}")
            if here:
                found[f"{i},{j}"] = here
    return found


def _ceilings(
    content: dict[str, Any], key: str, rows: str, columns: str, reasons: dict[str, str]
) -> Iterable[dict[str, Any]]:
    for name, given in (content.get("ceilings") or {}).items():
        if name == "reasons":
            continue
        title = CEILINGS.get(name, name)
        if not given:
            why = reasons.get(name) or ((content["ceilings"].get("reasons") or {}).get(name)) or "not computed"
            yield {"name": title, "reason": why}
        elif "cross" in given or "within" in given:
            if matrix := _matrix(given, key):
                yield {"name": title, "values": matrix}
        else:
            # One value a layer: a layer against itself, stored or computed another way.
            yield {"name": title, "rows": given.get(rows), "columns": given.get(columns)}
