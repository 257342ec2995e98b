"""The similarity section: what a ``cka.json`` says, drawn and in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluate.report.heatmap import Row, Scale, heatmap, legend
from evaluate.report.inputs import Node, Run
from evaluate.report.numbers import count, dash, exact, say, show

#: Similarity of shuffled pairs above this means that the estimate itself is biased upwards.
_HIGH_NULL = 0.05
#: A cell that moves further than this when masked rows return is made by those rows.
_SINK_SHIFT = 0.05
#: Up to this many columns the values stand in the cells; beyond, in a table below.
_READABLE_COLUMNS = 13


@dataclass(frozen=True)
class Panel:
    """One matrix: drawn, and as a table where its cells are too small to read."""

    title: str
    caption: Markup
    svg: Markup
    table: tuple[tuple[str, ...], tuple[tuple[str, tuple[Markup, ...]], ...]] | None


@dataclass(frozen=True)
class Similarity:
    """The section of one directory."""

    label: str
    source: str
    facts: Markup
    findings: tuple[Markup, ...]
    panels: tuple[Panel, ...]
    legend: Markup


def similarity(run: Run) -> Similarity | None:
    """Build the section of one directory, if it has a ``cka.json``.

    Args:
        run: The directory.
    """
    cka = run.file("cka.json")
    if cka.value is None:
        return None
    a, b = _models(cka)
    names = {model: [layer.text for layer in cka.get("layers", model)] for model in (a, b)}
    null, beside = cka.get("null"), _beside(cka)
    note = (
        "The same with the masked rows put back in, n = {}."
        if "unmasked" in beside.at
        else "The same without sinks and other masked rows, n = {}."
    )
    chance = say("What chance gives: {}, n = {}.", null.get("method").text or "shuffled pairs", _count(null))
    wanted = [
        (f"{a} × {b}", cka, cka.get("cross"), (a, b), say("Every layer of one with every of the other.")),
        (f"{a} × {a}", cka, cka.get("within", a), (a, a), say("Within {}.", a)),
        (f"{b} × {b}", cka, cka.get("within", b), (b, b), say("Within {}.", b)),
        (beside.at.rsplit("/", 1)[-1], beside, beside.get("cross"), (a, b), say(note, _count(beside))),
        ("null", null, null.get("cross"), (a, b), chance),
    ]
    if a == b:
        del wanted[1:3]  # the cross matrix of a model with itself is what "within" would repeat
    wanted = [entry for entry in wanted if _height(entry[2])]
    scale = Scale.over([_rows(node) for _, _, node, _, _ in wanted])
    panels = tuple(_panel(run.label, names, scale, *entry) for entry in wanted)
    kernel, estimator = cka.get("kernel").text or "linear", cka.get("estimator").text
    facts = say(
        "{} CKA, {} kernel, n = {} pairs, {} rows masked{}.",
        estimator.capitalize() or "Unnamed",
        kernel,
        _count(cka),
        show(cka.get("masked_rows"), count),
        ", sinks kept" if cka.get("keep_sinks").value is True else "",
    )
    return Similarity(run.label, f"{run.label}/cka.json", facts, tuple(findings(run)), panels, legend(scale))


def findings(run: Run) -> list[Markup]:
    """What the matrices say, in sentences.

    Args:
        run: The directory.
    """
    cka = run.file("cka.json")
    best = max(_cells(cka.get("cross")), key=lambda cell: cell[2].number or 0.0, default=None)
    if best is None:
        return []
    sentences = [say("Most alike are {}: CKA {}.", _name(cka, best[0], best[1]), show(best[2]))]
    null = _largest(cka.get("null", "cross"))
    if null is not None:
        sentences.append(say("Shuffled pairs reach {} at most.", show(null)))
    sentences.append(
        say(
            "CKA ignores rotation, scale and offset: it says which layers are alike, not whether a "
            "map between them is right."
        )
    )
    return sentences


def warnings(run: Run) -> list[Markup]:
    """What makes the similarities less than they seem.

    Args:
        run: The directory.
    """
    cka = run.file("cka.json")
    notes = []
    if cka.get("keep_sinks").value is True:
        text = "<b>sinks kept</b> A few rows of huge norm decide these similarities."
        notes.append(say(text))
    null = _largest(cka.get("null", "cross"))
    if null is not None and (null.number or 0.0) > _HIGH_NULL:
        text = "<b>high null</b> CKA of shuffled pairs reaches {}: read the map against that, not 0."
        notes.append(say(text, show(null)))
    beside = _beside(cka)
    shifts = [
        (abs((other.number or 0.0) - (cell.number or 0.0)), i, j, cell, other)
        for i, j, cell in _cells(cka.get("cross"))
        if (other := beside.get("cross", i, j)).number is not None
    ]
    size, i, j, cell, other = max(shifts, key=lambda s: s[0], default=(0.0, 0, 0, Node(), Node()))
    if size > _SINK_SHIFT:
        masked, unmasked = (cell, other) if "unmasked" in beside.at else (other, cell)
        text = (
            "<b>sinks dominate</b> With the masked rows included, {} reads {} instead of {}: only "
            "masked figures say how alike layers are."
        )
        notes.append(say(text, _name(cka, i, j), show(unmasked), show(masked)))
    return notes


def _panel(
    label: str,
    names: dict[str, list[str]],
    scale: Scale,
    title: str,
    owner: Node,
    node: Node,
    sides: tuple[str, str],
    caption: Markup,
) -> Panel:
    rows = _rows(node)
    down, across = names[sides[0]], names[sides[1]]

    def reason(i: int, j: int) -> str:
        ends = (f"{sides[0]}:{_layer(down, i)}", f"{sides[1]}:{_layer(across, j)}")
        found = [owner.get("reasons", " ".join(order)).text for order in (ends, ends[::-1])]
        return found[0] or found[1] or "null in cka.json"

    known = [cell for _, _, cell in _cells(node)]
    if known:
        low, high = (pick(known, key=lambda c: c.number or 0.0) for pick in (min, max))
        caption = say("{} From {} to {}.", caption, show(low), show(high))
    svg = heatmap(rows, (sides[0], down), (sides[1], across), scale, label=f"CKA {title}, {label}", reason=reason)
    table = None
    if max(len(row) for row in rows) > _READABLE_COLUMNS:
        body = tuple(
            (_layer(down, i), tuple(_plain(value, reason(i, j)) for j, value in enumerate(row)))
            for i, row in enumerate(rows)
        )
        table = ((f"{sides[0]} \\ {sides[1]}", *across), body)
    return Panel(title, caption, svg, table)


def _beside(cka: Node) -> Node:
    # With --keep-sinks the main figures are the unmasked ones, and the masked stand beside them.
    return cka.get("masked" if cka.get("masked").value is not None else "unmasked")


def _models(cka: Node) -> tuple[str, str]:
    named = [model.text for model in cka.get("models")] or [name for name, _ in cka.get("layers").items()]
    return (named[0] if named else "a", named[-1] if named else "b")


def _rows(node: Node) -> list[Row]:
    return [[cell.number for cell in row] for row in node]


def _height(node: Node) -> int:
    return sum(1 for _ in node)


def _cells(node: Node) -> Iterator[tuple[int, int, Node]]:
    for i, row in enumerate(node):
        for j, cell in enumerate(row):
            if cell.number is not None:
                yield i, j, cell


def _largest(node: Node) -> Node | None:
    cells: Sequence[Node] = [cell for _, _, cell in _cells(node)]
    return max(cells, key=lambda cell: cell.number or 0.0, default=None)


def _name(cka: Node, i: int, j: int) -> str:
    a, b = _models(cka)
    names = [[layer.text for layer in cka.get("layers", model)] for model in (a, b)]
    return f"{a} layer {_layer(names[0], i)} and {b} layer {_layer(names[1], j)}"


def _layer(names: Sequence[str], i: int) -> str:
    return names[i] if i < len(names) else f"#{i}"


def _count(node: Node) -> Markup:
    return show(node.get("n"), count)


def _plain(value: float | None, reason: str) -> Markup:
    return dash(reason) if value is None else say("{}", exact(value))
