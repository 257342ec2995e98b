"""One similarity matrix of a ``cka.json``: drawn, with its range in words, and as a table where cells are small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.similarity.page.palette import Scale
from evaluate.reporting.drawing.heatmap import Row, heatmap
from evaluate.reporting.reading.inputs import Node
from evaluate.reporting.reading.numbers import dash, exact, say, show

#: Up to this many columns the values stand in the cells; beyond, in a table below.
_READABLE_COLUMNS = 13


@dataclass(frozen=True)
class Panel:
    """One matrix: drawn, and as a table where its cells are too small to read."""

    title: str
    caption: Markup
    svg: Markup
    table: tuple[tuple[str, ...], tuple[tuple[str, tuple[Markup, ...]], ...]] | None


def panel(
    label: str,
    names: dict[str, list[str]],
    scale: Scale,
    title: str,
    owner: Node,
    node: Node,
    sides: tuple[str, str],
    caption: Markup,
    *,
    size: float = 340.0,
) -> Panel:
    """Draw a matrix.

    Args:
        label: The directory's name.
        names: Layers by model.
        scale: The colours; it holds every value.
        title: Of the matrix.
        owner: Where the reasons of missing cells stand.
        node: The matrix.
        sides: The model down the side and the one along the bottom.
        caption: What it shows; the range of its values is added.
        size: Of the drawing's longer side.
    """
    rows = rows_of(node)
    down, across = names[sides[0]], names[sides[1]]

    def reason(i: int, j: int) -> str:
        ends = (f"{sides[0]}:{layer_name(down, i)}", f"{sides[1]}:{layer_name(across, j)}")
        found = [owner.maybe("reasons").get(" ".join(order)).text for order in (ends, ends[::-1])]
        return found[0] or found[1] or "null in cka.json"

    known = [cell for _, _, cell in cells_of(node)]
    if known:
        low, high = (pick(known, key=lambda c: c.number or 0.0) for pick in (min, max))
        caption = say("{} From {} to {}.", caption, show(low), show(high))
    else:
        caption = say("{} No value: {}.", caption, reason(0, 0))
    svg = heatmap(
        rows, (sides[0], down), (sides[1], across), scale, label=f"{title}, {label}", reason=reason, size=size
    )
    table = None
    if max(len(row) for row in rows) > _READABLE_COLUMNS:
        body = tuple(
            (layer_name(down, i), tuple(_plain(value, reason(i, j)) for j, value in enumerate(row)))
            for i, row in enumerate(rows)
        )
        table = ((f"{sides[0]} \\ {sides[1]}", *across), body)
    return Panel(title, caption, svg, table)


def rows_of(node: Node) -> list[Row]:
    """The numbers of a matrix, None where there is none.

    Args:
        node: The matrix.
    """
    return [[cell.number for cell in row] for row in node]


def height(node: Node) -> int:
    """How many rows a matrix has.

    Args:
        node: The matrix.
    """
    return sum(1 for _ in node)


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


def _plain(value: float | None, reason: str) -> Markup:
    return dash(reason) if value is None else say("{}", exact(value))
