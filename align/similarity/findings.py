"""What a careful reader would object to in similarities: pure functions over the contents of ``cka.json``.

All that decides is in the file, so that one which was not judged when it was made is judged when it is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from align.judging.findings import Finding, finding
from align.judging.table import JUDGED, limit
from align.results import Similarity


def judged(result: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``cka.json`` with their findings, and the version of the table that they are of.

    Args:
        result: All else that the file holds; matrices may be arrays with NaN.
    """
    return {**result, "warnings": list(findings(result)), "judged": JUDGED}


def rejudged(similarity: Similarity) -> Similarity:
    """What was read, judged now if its file was not when it was made.

    Args:
        similarity: From any version's file.
    """
    if similarity.judged is not None:
        return similarity
    return Similarity.parse(judged(similarity.content()))


def findings(result: Mapping[str, Any]) -> Iterator[Finding]:
    """Find what limits the similarities.

    Args:
        result: Contents of ``cka.json``; what it lacks is no finding.
    """
    yield from _few_rows(result)
    if result.get("estimator") == "biased":
        yield finding("biased-estimator")
    # Where no row is a sink, keeping them changes nothing.
    if result.get("keep_sinks") and result.get("masked_rows") != 0:
        yield finding("sinks-kept")
    yield from _sinks_dominate(result)
    null = max((value for _, _, value in _cells(result, "null", "cross")), default=None)
    if null is not None and null > limit("high-null", "null"):
        yield finding("high-null", reached=null)
    yield from _few_documents(result)
    for floor, block in (result.get("permutations") or {}).items():
        yield from _few_exchanges(floor, block)
    for name, block in {"": result, **(result.get("measures") or {})}.items():
        yield from _undefined(name, block)
        if block is result or block.get("closer", "higher") == "higher":
            yield from _above_one(name, block)


def _few_exchanges(floor: str, block: Mapping[str, Any]) -> Iterator[Finding]:
    draws = block.get("draws")
    if draws is not None and not block.get("reason") and draws < limit("few-exchanges", "exchanges"):
        yield finding("few-exchanges", {"floor": floor}, draws=draws, smallest=1 / (1 + draws))


def _few_rows(result: Mapping[str, Any]) -> Iterator[Finding]:
    width, rows = max((result.get("widths") or {}).values(), default=0), result.get("n")
    wanted = limit("few-rows", "per_dimension") * width
    if rows and rows < wanted:
        yield finding("few-rows", rows=rows, width=width, wanted=wanted)


def _sinks_dominate(result: Mapping[str, Any]) -> Iterator[Finding]:
    """A pair of layers whose similarity a few huge rows decide: the one that they change most."""
    kept = bool(result.get("keep_sinks"))
    other = {(i, j): value for i, j, value in _cells(result, "masked" if kept else "unmasked", "cross")}
    both = [(value, other[i, j], i, j) for i, j, value in _cells(result, "cross") if (i, j) in other]
    value, beside, i, j = max(both, key=lambda cell: abs(cell[0] - cell[1]), default=(0.0, 0.0, 0, 0))
    if abs(value - beside) > limit("sink-dominated", "shift"):
        masked, unmasked = (beside, value) if kept else (value, beside)
        yield finding("sink-dominated", {"layers": _layers(result, i, j)}, masked=masked, kept=unmasked)


def _few_documents(result: Mapping[str, Any]) -> Iterator[Finding]:
    counts = [(result.get(name) or {}).get("documents") for name in ("ci95", "sample")]
    documents = min((count for count in counts if count is not None), default=None)
    if documents is not None and documents < limit("few-documents", "wanted"):
        yield finding("few-documents", documents=documents)


def _undefined(name: str, block: Mapping[str, Any]) -> Iterator[Finding]:
    matrices = [block.get("cross"), block.get("reverse"), *(block.get("within") or {}).values()]
    values = [value for matrix in matrices for value in chain.from_iterable(() if matrix is None else matrix)]
    undefined = sum(not _is_defined(value) for value in values)
    if not undefined:
        return
    reasons = Counter((block.get("reasons") or {}).values()).most_common()
    reason = reasons[0][0] if reasons else "no reason is given"
    others = len(reasons) - 1 if len(reasons) > 1 else None
    yield finding("undefined", _measure(name), undefined=undefined, cells=len(values), reason=reason, others=others)


def _above_one(name: str, block: Mapping[str, Any]) -> Iterator[Finding]:
    places = [("cross",), ("reverse",), *(("within", model) for model in block.get("within") or {})]
    values = [value for place in places for _, _, value in _cells(block, *place)]
    above = sum(value > 1 + limit("above-one", "rounding") for value in values)
    if above:
        yield finding("above-one", _measure(name), above=above, cells=len(values))


def _measure(name: str) -> dict[str, str]:
    return {"measure": name} if name else {}


def _cells(block: Mapping[str, Any], *keys: str) -> Iterator[tuple[int, int, float]]:
    """Places and values of a matrix that are defined; none of one that is not there."""
    matrix: Any = block
    for key in keys:
        matrix = matrix.get(key) if isinstance(matrix, Mapping) else None
    for i, row in enumerate(() if matrix is None else matrix):
        for j, value in enumerate(() if row is None else row):
            if _is_defined(value):
                yield i, j, float(value)


def _is_defined(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _layers(result: Mapping[str, Any], i: int, j: int) -> str:
    """Two layers by name; by place where a damaged file has no names for them."""
    models, layers = result.get("models") or ("", ""), result.get("layers") or {}
    ends = []
    for model, at in ((models[0], i), (models[-1], j)):
        known = layers.get(model) or ()
        ends.append(f"{model}:{known[at] if at < len(known) else f'#{at}'}")
    return " ".join(ends)
