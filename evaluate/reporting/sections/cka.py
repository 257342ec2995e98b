"""The similarity section: what a ``cka.json`` says in words, and its first map; the similarity page has all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.pages.charts import heatmap
from align.pages.palette import Scale
from align.similarity.floors.reading import NAMES, readings
from align.statistics import SIGNIFICANT
from evaluate.reporting.reading.inputs import Node, Origin, Run
from evaluate.reporting.reading.numbers import count, fixed, say, show
from featstore.text.roles import of_roles

#: What is exchanged for a floor.
_WHAT = {
    "documents": "documents in each other's place at equal positions",
    "token": "partners of the same token in another document",
}


@dataclass(frozen=True)
class Similarity:
    """The section of one directory."""

    label: str
    source: Origin
    page: Origin | None
    facts: Markup
    findings: tuple[Markup, ...]
    title: str
    drawing: Markup | None
    caption: Markup


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
    kernel, estimator = cka.get("kernel").text or "linear", cka.get("estimator").text
    facts = say(
        "{} CKA, {} kernel, n = {} pairs{}, {} rows masked{}.",
        estimator.capitalize() or "Unnamed",
        kernel,
        _count(cka),
        of_roles([node.text for node in cka.get("roles")]),
        show(cka.get("masked_rows"), count),
        ", sinks kept" if cka.get("keep_sinks").value is True else "",
    )
    return Similarity(
        label=run.label,
        source=run.origin("cka.json"),
        page=run.cka_page,
        facts=facts,
        findings=tuple(findings(run)),
        title=f"{a} × {b}",
        drawing=_drawing(run.label, cka, (a, b), names) if rows_of(cka.get("cross")) else None,
        caption=_range(cka),
    )


def _drawing(label: str, cka: Node, models: tuple[str, str], names: dict[str, list[str]]) -> Markup:
    """The similarity of every layer of one model with every layer of the other."""
    rows = rows_of(cka.get("cross"))
    sides = [
        (model, [layer_name(names[model], k) for k in range(n)]) for model, n in zip(models, _size(rows), strict=True)
    ]

    def reason(i: int, j: int) -> str:
        ends = [f"{model}:{layers[k]}" for (model, layers), k in zip(sides, (i, j), strict=True)]
        found = [cka.get("reasons").get(" ".join(order)).text for order in (ends, ends[::-1])]
        return found[0] or found[1] or "null in cka.json"

    scale = Scale.over(value for row in rows for value in row)
    return heatmap(rows, sides[0], sides[1], scale, label=f"{models[0]} × {models[1]}, {label}", reason=reason)


def _size(rows: Sequence[Sequence[float | None]]) -> tuple[int, int]:
    return len(rows), max((len(row) for row in rows), default=0)


def _range(cka: Node) -> Markup:
    """The ends of the values, with their places in the file."""
    known = [cell for _, _, cell in cells_of(cka.get("cross"))]
    if not known:
        return say("No value is defined.")
    low, high = (pick(known, key=lambda cell: cell.number or 0.0) for pick in (min, max))
    return say("Every layer of one with every layer of the other, from {} to {}.", show(low), show(high))


def rows_of(node: Node) -> list[list[float | None]]:
    """The numbers of a matrix, all rows as long as the longest; None where there is none.

    Args:
        node: The matrix.
    """
    rows = [[cell.number for cell in row] for row in node]
    width = max(map(len, rows), default=0)
    return [row + [None] * (width - len(row)) for row in rows] if width else []


def cells_of(node: Node) -> Iterator[tuple[int, int, Node]]:
    """Row, column and value of every cell that has one.

    Args:
        node: The matrix.
    """
    for i, row in enumerate(node):
        for j, cell in enumerate(row):
            if cell.number is not None:
                yield i, j, cell


def layer_name(names: Sequence[str], i: int) -> str:
    """A layer as the file names it, or its place.

    Args:
        names: The layers.
        i: Which.
    """
    return names[i] if i < len(names) else f"#{i}"


def findings(run: Run) -> list[Markup]:
    """What the matrices say, in sentences.

    Args:
        run: The directory.
    """
    cka = run.file("cka.json")
    best = max(cells_of(cka.get("cross")), key=lambda cell: cell[2].number or 0.0, default=None)
    if best is None:
        return []
    sentences = [say("Most alike are {}: CKA {}.", _name(cka, best[0], best[1]), show(best[2]))]
    sentences += _above(cka)
    sentences.append(
        say(
            "CKA ignores rotation, scale and offset: it says which layers are alike, not whether a "
            "map between them is right."
        )
    )
    return sentences


def _above(cka: Node) -> list[Markup]:
    """What each floor says, in a sentence."""
    a, b = _models(cka)
    sentences = []
    for kind in NAMES:
        floor = cka.get("permutations", kind)
        if floor.value is None:
            continue
        [found] = readings({kind: dict(floor.value)}, alone=a == b)
        if found.reason is not None:
            sentences.append(say("There is no floor with {}: {}.", _WHAT[kind], found.reason))
            continue
        if not found.is_decided:
            text = "With {}, CKA is {} to {} on average; {} exchanges are too few to decide anything."
            ends = fixed(found.low, 3), fixed(found.high, 3)
            sentences.append(say(text, _WHAT[kind], *ends, found.draws))
            continue
        sentences.append(
            say(
                "With {}, CKA is {} to {} on average: {} of {} pairs of layers are above that floor (p at most {} over "
                "all of them).",
                _WHAT[kind],
                fixed(found.low, 3),
                fixed(found.high, 3),
                found.above,
                found.pairs,
                SIGNIFICANT,
            )
        )
    return sentences


def _beside(cka: Node) -> Node:
    # With --keep-sinks the main figures are the unmasked ones, and the masked stand beside them.
    return cka.get("masked" if cka.get("masked").value is not None else "unmasked")


def _models(cka: Node) -> tuple[str, str]:
    named = [model.text for model in cka.get("models")] or [name for name, _ in cka.get("layers").items()]
    return (named[0] if named else "a", named[-1] if named else "b")


def _name(cka: Node, i: int, j: int) -> str:
    a, b = _models(cka)
    names = [[layer.text for layer in cka.get("layers", model)] for model in (a, b)]
    return f"{a} layer {layer_name(names[0], i)} and {b} layer {layer_name(names[1], j)}"


def _count(node: Node) -> Markup:
    return show(node.get("n"), count)
