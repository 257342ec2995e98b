"""The leaderboard, and what changed from one run to another, as one HTML page: maps first, controls on demand."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.pages.charts import Dots, Mark, dot_plot
from align.pages.document import Pages
from align.sweeps.changes import verdict_counts
from align.sweeps.entries import CLOSED
from align.sweeps.table import BASELINES, labels_of, with_interval
from featstore.runtime.console import human
from featstore.runtime.provenance import write_atomic

#: Maps that a drawing holds.
_DRAWN = 60
_KINDS = {"better": "above", "worse": "below"}


@dataclass(frozen=True)
class Line:
    """A row of a table: its class, by what it is filtered, and a text and a sort key for each column."""

    kind: str
    type: str
    direction: str
    layer: str
    cells: tuple[tuple[str, str], ...]


def render(board: Mapping[str, Any], changed: Mapping[str, Any] | None = None) -> str:
    """The page.

    Args:
        board: From :func:`align.sweeps.compare.compare_runs`.
        changed: From :func:`align.sweeps.changes.changes`; None for a page without that view.

    Returns:
        A complete HTML document; the same contents give the same bytes.
    """
    rows = board["rows"]
    labels = labels_of([row["run"] for row in rows])
    return _pages().render(
        runs=list(labels.values()),
        heads_of_board=_HEADS,
        lines=[line for row in rows for line in _lines(row, labels)],
        tests=board["tests"],
        drawing=_scores(rows, labels) if rows else None,
        drawn=min(_DRAWN, len(rows)),
        changed=None if changed is None else _changed(changed),
    )


def write(path: Path, board: Mapping[str, Any], changed: Mapping[str, Any] | None = None) -> None:
    """Write the page.

    Args:
        path: The file.
        board: From :func:`align.sweeps.compare.compare_runs`.
        changed: From :func:`align.sweeps.changes.changes`; None for a page without that view.

    Raises:
        WriteError: It cannot be written there.
    """
    write_atomic(path, render(board, changed))


#: Title, and whether its values are numbers.
_HEADS = (
    ("run", False), ("layers", False), ("what", False), ("R² [95 %]", True), ("beyond token [95 %]", True),
    ("val R²", True), ("minus reference", True), ("verdict", False), ("optimum", True), ("trained", True),
    ("warnings", False),
)  # fmt: skip


def _lines(row: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Line]:
    """The map, and beside it its closed form and its controls."""
    versus, closed = row["versus_reference"] or {}, row[CLOSED]
    place = (row["type"], *_place(row["pair"]))
    label = (labels[row["run"]],) * 2
    yield Line("map", *place, (
        label, (_arrow(row["pair"]),) * 2, (row["type"],) * 2,
        _number(row["r2"], row["r2_ci95"]), _number(row["partial_r2"], row["partial_r2_ci95"]), _number(row["val_r2"]),
        _number(versus.get("difference"), versus.get("ci95"), "+"), (versus.get("verdict", "–"),) * 2,
        _number(closed["r2"] if closed else None), _whole(row["trainable"]), (", ".join(row["warnings"]) or "–",) * 2,
    ))  # fmt: skip
    beside = [(f"closed form: {closed['name']}", closed["r2"], "closed")] if closed else []
    beside += [
        (f"control: {BASELINES.get(name, name)}", value, "control")
        for name, value in row["baselines"].items()
        if name != CLOSED and value is not None
    ]
    for what, value, kind in beside:
        none = ("–", "")
        yield Line(kind, *place, (label, (_arrow(row["pair"]),) * 2, (what,) * 2, _number(value), *(none,) * 7))


def _changed(result: Mapping[str, Any]) -> dict[str, Any]:
    labels = labels_of([result["first"], result["second"]])
    lines = []
    for block in result["both"]:
        warned = [*(f"− {code}" for code in block["warnings_gone"]), *(f"+ {code}" for code in block["warnings_new"])]
        kind = _KINDS.get(block["verdict"], "")
        types = " → ".join(dict.fromkeys(block["types"]))
        values = [_number(value, ends) for value, ends in zip(block["r2"], block["r2_ci95"], strict=True)]
        lines.append(Line(kind, types, *_place(block["pair"]), (
            (_arrow(block["pair"]),) * 2, (types,) * 2, *values, _number(block["difference"], block["ci95"], "+"),
            _p(block["p_adjusted"]), (block["verdict"],) * 2, (", ".join(warned) or "–",) * 2,
            (block["reason"] or "",) * 2,
        )))  # fmt: skip
    marks = [
        Dots(
            _arrow(block["pair"]),
            [_mark(block["difference"], block["ci95"], _arrow(block["pair"]), _KINDS.get(block["verdict"], "level"))],
            with_interval(block["difference"], None, "+"),
        )
        for block in result["both"]
        if block["difference"] is not None
    ]
    label = f"Difference of R², {labels[result['second']]} minus {labels[result['first']]}"
    return {
        "first": labels[result["first"]],
        "second": labels[result["second"]],
        "counts": verdict_counts(result["both"]),
        "lines": lines,
        "drawing": _half(marks, label, "difference of R²", (0.0,)) if marks else None,
        "drawn": min(_DRAWN, len(marks)),
        "of": len(marks),
        "only": [
            (labels[result[side]], [(_arrow(row["pair"]), row["type"], with_interval(row["r2"], row["r2_ci95"]))
                                    for row in result[f"only_{side}"]])
            for side in ("first", "second")
        ],
        "tests": result["tests"],
    }  # fmt: skip


def _half(marks: Sequence[Dots], label: str, axis: str, anchors: tuple[float, ...]) -> Markup:
    """As many as a reader takes in: the first and the last half of them."""
    few = marks if len(marks) <= _DRAWN else [*marks[: _DRAWN // 2], *marks[-_DRAWN // 2 :]]
    return dot_plot(few, label=label, axis=axis, anchors=anchors, stacked=True)


def _scores(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Markup:
    lines = []
    for row in rows:
        name = f"{labels[row['run']]} · {_arrow(row['pair'])}"
        mark = _mark(row["r2"], row["r2_ci95"], name, "mapped")
        lines.append(Dots(name, [mark], with_interval(row["r2"], None)))
    return _half(lines, "Held-out R² of every map", "R² on test rows", ())


def _mark(value: float | None, ends: Sequence[float] | None, name: str, kind: str) -> Mark:
    low, high = ends or (None, None)
    return Mark(value, low, high, name, kind)


def _place(pair: str) -> tuple[str, str]:
    """From which model to which, and the source's layer."""
    source, _, target = pair.partition("->")
    model, _, layer = source.rpartition(":")
    return f"{model} → {target.rpartition(':')[0]}", layer


def _arrow(pair: str) -> str:
    return pair.replace("->", " → ")


def _number(value: float | None, ends: Sequence[float] | None = None, sign: str = "") -> tuple[str, str]:
    if value is None:
        return "–", ""
    return with_interval(value, ends, sign).replace("-", "−"), repr(value)


def _p(value: float | None) -> tuple[str, str]:
    return ("–", "") if value is None else (f"{value:.2g}".replace("-", "−"), repr(value))


def _whole(value: int | None) -> tuple[str, str]:
    return ("–", "") if value is None else (human(value), repr(value))


@functools.cache
def _pages() -> Pages:
    return Pages("align.sweeps", "board.html.j2", "board.css", ("board.js",))
