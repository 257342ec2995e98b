"""The result in sentences: what is most alike, how far above the floor, what the sinks do, what to be careful about."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.judging.sentences import placed
from align.similarity.floors.reading import NAMES, readings
from align.similarity.page.definitions import title_of
from align.similarity.page.views import Matrix, View, beside, best, values_of
from align.statistics import SIGNIFICANT

#: What a floor exchanges, in a sentence.
_WHAT = {
    NAMES["documents"]: "documents in each other's place at equal positions",
    NAMES["token"]: "partners of the same token in another document",
}
_NARROW = "\u202f"


@dataclass(frozen=True)
class Glance:
    """A measure in one line.

    Attributes:
        title: The measure.
        pair: The most alike layers, such as ``a 8 × b 4``; None where nothing is defined.
        value: Their value.
        interval: Their 95 % interval.
        floor: The median over all cells of its first floor, and that floor's name.
        agrees: For how many layers of the first model the best partner is the one by linear CKA, of how many.
    """

    title: str
    pair: str | None
    value: str
    interval: str
    floor: str
    agrees: str


def number(value: float | None, digits: int = 3) -> str:
    """A figure as the page writes it: more digits where rounding would claim exactly 0, 1 or -1, a true minus.

    Args:
        value: The figure; None is a dash.
        digits: After the point.
    """
    if value is None:
        return "\u2013"
    text = f"{value:.{digits}f}"
    for more in range(digits, digits + 4):
        tried = f"{value:.{more}f}"
        if float(tried) not in (0.0, 1.0, -1.0) or float(tried) == value:
            text = tried
            break
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "\u2212")


def percent(share: float) -> str:
    """A share in whole percent, with a narrow space before the sign.

    Args:
        share: 1 for all.
    """
    return f"{100 * share:.0f}\u202f%"


def count(value: int) -> str:
    """A number of things with separators for thousands.

    Args:
        value: How many.
    """
    return f"{value:,}"


def most_alike(view: View) -> tuple[int, int] | None:
    """Where in the cross block the two most alike layers are.

    Args:
        view: From :func:`align.similarity.page.views.views`.
    """
    block = view["blocks"][0]
    found = []
    for i, row in enumerate(block["values"]):
        j = best(row, view["closer"], i if block["same"] else None)
        if j is not None:
            found.append((row[j] if view["closer"] == "higher" else -row[j], -i, -j))
    if not found:
        return None
    _, i, j = max(found)
    return -i, -j


def pair_name(block: dict[str, Any], i: int, j: int) -> str:
    """Two layers as the page names them.

    Args:
        block: Of a view.
        i: The row's position.
        j: The column's position.
    """
    rows, columns = block["rows"], block["columns"]
    return f"{rows['model']} {rows['layers'][i]} \u00d7 {columns['model']} {columns['layers'][j]}"


def summary(result: dict[str, Any], shown: Sequence[View]) -> list[str]:
    """What the result says, in sentences.

    Args:
        result: Contents of ``cka.json``.
        shown: Its views.
    """
    main = shown[0]
    sentences = [_first(result, main), _intervals(result), _floor(result, main), _sinks(result, main)]
    if len(shown) > 1 and (others := _agreement(shown)):
        sentences.append(others)
    sentences.append(_sample(result, shown))
    return [s for s in sentences if s]


def warnings(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The findings of a result in sentences; those that differ in their measure alone share one.

    Args:
        findings: As ``cka.json`` has them.
    """
    groups: dict[str, list[str]] = {}
    for found in findings:
        groups.setdefault(placed(found, "measure"), []).append(_measure(found))
    return [f"{'; '.join(names)}: {said}" if any(names) else said for said, names in groups.items()]


def _measure(finding: Mapping[str, Any]) -> str:
    name = (finding.get("where") or {}).get("measure")
    return title_of(name) if name else ""


def glances(shown: Sequence[View]) -> list[Glance]:
    """Every measure in one line.

    Args:
        shown: Views, linear CKA first.
    """
    reference = _partners(shown[0])
    lines = []
    for view in shown:
        block, place = view["blocks"][0], most_alike(view)
        floor = block["floors"][0] if block["floors"] else None
        own = _partners(view)
        both = [i for i in own if i in reference]
        lines.append(
            Glance(
                view["title"],
                pair_name(block, *place) if place else None,
                number(block["values"][place[0]][place[1]]) if place else "\u2013",
                _interval(block["ci"], place) if place else "",
                f"{number(_median(floor['values']))} ({floor['name']})" if floor else "\u2013",
                f"{sum(own[i] == reference[i] for i in both)} of {len(both)}" if both else "\u2013",
            )
        )
    return lines


def _first(result: dict[str, Any], main: View) -> str:
    place = most_alike(main)
    if place is None:
        return f"No two layers could be compared: {_first_reason(main)}."
    block = main["blocks"][0]
    value = number(block["values"][place[0]][place[1]])
    rows = f" over {count(result['n'])} paired rows" if result.get("n") else ""
    values = _compared(block)
    if len(values) == 1:
        return f"{pair_name(block, *place)}: {result.get('estimator', 'debiased')} linear CKA {value}{rows}."
    typical = number(statistics.median(values))
    return (
        f"{pair_name(block, *place)} are the most alike, with {result.get('estimator', 'debiased')} linear CKA "
        f"{value}{rows}; the median over all pairs of layers is {typical}."
    )


def _compared(block: dict[str, Any]) -> list[float]:
    """The values of all pairs of layers; within one model each pair once, and none of a layer with itself."""
    rows = block["values"]
    return [
        v for i, row in enumerate(rows) for j, v in enumerate(row) if v is not None and not (block["same"] and j <= i)
    ]


def _first_reason(view: View) -> str:
    return next(iter(view["blocks"][0]["reasons"].values()), "every value is undefined")


def _floor(result: dict[str, Any], main: View) -> str:
    alone = main["blocks"][0]["same"]
    found = readings(result.get("permutations") or {}, alone=alone)
    if not found:
        return "There is no floor beside these figures: none was asked for."
    sentences = []
    for floor in found:
        if floor.reason is not None:
            sentences.append(f"There is no floor with {_WHAT.get(floor.name, floor.name)}: {floor.reason}.")
            continue
        rows = f"{count(floor.rows)} rows of {count(floor.documents)} documents"
        decided = (
            f"{floor.above} of {floor.pairs} pairs of layers are above that floor (p \u2264 {SIGNIFICANT}, "
            "corrected for all of them)"
            if floor.is_decided
            else f"{count(floor.draws)} exchanges are too few to decide anything"
        )
        sentences.append(
            f"With {_WHAT.get(floor.name, floor.name)}, {rows} give {number(floor.low)} to {number(floor.high)} on "
            f"average (95{_NARROW}% below {number(floor.edge)}): {decided}."
        )
    return " ".join(sentences)


def _sinks(result: dict[str, Any], main: View) -> str:
    rows = result.get("masked_rows")
    if rows is None:
        return ""
    if not rows:
        return "No row is marked as an attention sink, so nothing was masked."
    noun = f"{count(rows)} row{' is an attention sink' if rows == 1 else 's are attention sinks'}"
    left = "left in" if result.get("keep_sinks") else "left out"
    other = beside(result)
    block = main["blocks"][0]
    if not other or not block["beside"]:
        return f"{noun} and {left}; what they change was not computed."
    changes = [
        (abs(w - v), i, j, v, w)
        for i, (one, two) in enumerate(zip(block["values"], other["cross"], strict=True))
        for j, (v, w) in enumerate(zip(one, two, strict=True))
        if v is not None and w is not None
    ]
    if not changes:
        return f"{noun} and {left}; no pair of layers is defined both with and without them."
    change, i, j, value, changed = max(changes, key=lambda c: c[0])
    verb = "Without them" if result.get("keep_sinks") else "With them in"
    return (
        f"{noun} and {left}. {verb}, linear CKA changes by up to {number(change)} "
        f"({pair_name(block, i, j)}: from {number(value)} to {number(changed)})."
    )


def _partners(view: View) -> dict[int, int]:
    block = view["blocks"][0]
    found = {i: best(row, view["closer"], i if block["same"] else None) for i, row in enumerate(block["values"])}
    return {i: j for i, j in found.items() if j is not None}


def _agreement(shown: Sequence[View]) -> str:
    reference = _partners(shown[0])
    shares = []
    for view in shown[1:]:
        own = _partners(view)
        both = [i for i in own if i in reference]
        if both:
            shares.append((sum(own[i] == reference[i] for i in both) / len(both), view["title"]))
    if len(reference) < 2 or not shares:
        return ""
    low, high = min(shares), max(shares)
    model = shown[0]["blocks"][0]["rows"]["model"]
    measures = f"{len(shares)} other measure{'s' if len(shares) > 1 else ''}"
    if low[0] == high[0]:
        verb = "choose" if len(shares) > 1 else "chooses"
        return f"{measures} {verb} the partner that linear CKA chooses for {percent(low[0])} of the layers of {model}."
    return (
        f"Of {measures}, {high[1]} chooses the partner that linear CKA chooses most often "
        f"({percent(high[0])} of the layers of {model}), {low[1]} least often ({percent(low[0])})."
    )


def _sample(result: dict[str, Any], shown: Sequence[View]) -> str:
    sample = result.get("sample") or {}
    rows, total, documents = sample.get("rows"), sample.get("of"), sample.get("documents")
    if len(shown) < 2 or not rows:
        return ""
    of = f"a sample of {count(rows)} of {count(total)} rows" if total and rows < total else f"all {count(rows)} rows"
    intervals = f"; their intervals are over {count(documents)} documents" if documents else ""
    return f"The other measures see {of}{intervals}."


def _intervals(result: dict[str, Any]) -> str:
    """What the intervals of the main figure stand on."""
    given = result.get("ci95") or {}
    if given.get("reason"):
        return f"Linear CKA has no intervals: {given['reason']}."
    if not given.get("documents"):
        return ""
    rows = f"{count(given['rows'])} of {count(given['of'])} rows"
    return f"Its intervals leave out each of {count(given['documents'])} documents in turn, over {rows}."


def _interval(matrix: Any, place: tuple[int, int]) -> str:
    ends = matrix[place[0]][place[1]] if matrix else None
    return f"[{number(ends[0])}, {number(ends[1])}]" if ends else ""


def _median(matrix: Matrix) -> float | None:
    found = list(values_of(matrix))
    middle = statistics.median(found) if found else math.nan
    return None if math.isnan(middle) else middle
