"""What a page draws: points with intervals, lines and similarity matrices, as the data that its script draws from.

A drawing is an element of the class ``chart`` with its data inside; ``templates/charts.js`` and ``heat.js`` draw it.
Text and line colours come from the page's style, so one drawing serves light, dark and print.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from align.pages.document import embedded
from align.pages.palette import Scale


@dataclass(frozen=True)
class Mark:
    """A point and its interval.

    Attributes:
        value: None where there is nothing to draw.
        low: Lower end of the interval.
        high: Upper end of the interval.
        name: What it is, said beside its value.
        kind: Class of its style.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    name: str = ""
    kind: str = "control"

    def data(self) -> list[Any]:
        """As the script reads it."""
        return [self.value, self.low, self.high, self.name, self.kind]


@dataclass(frozen=True)
class Dots:
    """A line of a dot plot."""

    label: str
    marks: Sequence[Mark]
    text: str = ""
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A line of a line chart.

    Attributes:
        name: As the key says it.
        points: Place and mark; a mark without a value breaks the line.
        style: Which colour and marker, 0 to 8, 6 being muted and 7 the colour of text; None for those of its place.
    """

    name: str
    points: Sequence[tuple[float, Mark]] = field(default_factory=tuple)
    style: int | None = None


def dot_plot(
    lines: Sequence[Dots],
    *,
    label: str,
    axis: str,
    percent: bool = False,
    anchors: Sequence[float] = (),
    stacked: bool = False,
    bounds: tuple[float, ...] = (),
) -> Markup:
    """Draw one horizontal line a row with points and their intervals.

    Args:
        lines: From top to bottom.
        label: What the drawing shows, for screen readers.
        axis: What the horizontal axis measures.
        percent: Whether ticks are written in percent.
        anchors: Values that the axis must show and that are marked by a line through all rows.
        stacked: Whether labels are long and stand above their line.
        bounds: Values that the axis must show, too, without a line.
    """
    rows = [[line.label, [mark.data() for mark in line.marks], line.text, line.note] for line in lines]
    return _chart(
        "dots", label, lines=rows, axis=axis, percent=percent, anchors=anchors, stacked=stacked, bounds=bounds
    )


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    axes: tuple[str, str],
    references: Sequence[tuple[float, str]] = (),
    verticals: Sequence[tuple[float, str]] = (),
    log: bool = False,
) -> Markup:
    """Draw lines with points and, where given, interval whiskers; the key of the lines stands below.

    Args:
        series: The lines; a missing value breaks a line.
        label: What the drawing shows, for screen readers.
        axes: What the two axes measure.
        references: Horizontal lines with their names.
        verticals: Vertical lines with their names.
        log: Whether places lie on a logarithmic axis; all of them are then above zero.
    """
    lines = [
        [one.name, k % 6 if one.style is None else one.style, [[x, *mark.data()[:4]] for x, mark in one.points]]
        for k, one in enumerate(series)
    ]
    return _chart("lines", label, series=lines, axes=axes, references=references, verticals=verticals, log=log)


def heatmap(
    values: Sequence[Sequence[float | None]],
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    scale: Scale,
    *,
    label: str,
    reason: Callable[[int, int], str],
) -> Markup:
    """Draw a matrix with its first row at the bottom, as similarity matrices usually are, and its scale.

    Args:
        values: One row for each entry of ``rows``; None is hatched.
        rows: The model and the layers down the side.
        columns: The model and the layers along the bottom.
        scale: The colours.
        label: What the drawing shows, for screen readers.
        reason: Why the cell in a row and column is empty.
    """
    empty = {f"{i},{j}": reason(i, j) for i, row in enumerate(values) for j, v in enumerate(row) if v is None}
    sides = {
        name: {"model": model, "layers": list(layers)}
        for name, (model, layers) in (("rows", rows), ("columns", columns))
    }
    return _chart("heat", label, **sides, values=values, scale=scale.to_dict(), reasons=empty)


def spark(mark: Mark, bounds: tuple[float, float], label: str) -> Markup:
    """Draw a point with its interval about a line at zero, small enough for a cell of a table.

    Args:
        mark: The point.
        bounds: What the width of the drawing stands for.
        label: What the drawing shows, for screen readers.
    """
    return _chart("spark", label, mark=mark.data(), bounds=bounds)


def _chart(kind: str, label: str, **data: Any) -> Markup:
    # Six digits are said of a mark; rounded twice they would not be those of the file.
    block = embedded({"kind": kind, "label": label, **data}, digits=12)
    return Markup(
        '<span class="chart {}" role="group" aria-label="{}"><script type="application/json">{}</script></span>'
    ).format(kind, label, block)
