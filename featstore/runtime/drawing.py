"""Figures that a notebook shows without pyplot and its global state, and the one chart that results share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from featstore.runtime.provenance import write_atomic

#: A label, its value and the 95 % interval of that, where there is one.
Point = tuple[str, float | None, Iterable[float | None] | None]


class Drawing(Figure):
    """A figure that displays itself, and is otherwise a plain one: ``savefig``, ``axes`` and so on."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as every other file of a result is written: whole, and never through a link.

    Args:
        figure: What to draw.
        path: The file; its suffix says the format.
        options: Of matplotlib's ``savefig``.

    Raises:
        WriteError: It cannot be written there.
        NoSpaceError: The disk is full.
    """
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), **options)
    write_atomic(path, buffer.getvalue())


def panels(titles: Sequence[str], *, height: float = 3.2) -> tuple[Drawing, list[Any]]:
    """A figure with a panel for each title, three in a row.

    Args:
        titles: One for each panel.
        height: Of a panel, in inches.
    """
    columns = max(1, min(3, len(titles)))
    rows = max(1, -(-len(titles) // columns))
    figure = Drawing(figsize=(5 * columns, height * rows), layout="constrained")
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in found[max(len(titles), 1) :]:
        axes.remove()
    for axes, title in zip(found, titles, strict=False):
        axes.set_title(title, fontsize="small", parse_math=False)
    return figure, found[: len(titles)]


def draw_points(axes: Any, points: Sequence[Point], *, controls: Collection[str] = ()) -> None:
    """Draw labelled values from top to bottom, each a point with its interval; controls have a colour of their own.

    Args:
        axes: Where.
        points: Label, value, interval. A value of None leaves its line empty.
        controls: Labels of controls.
    """
    for place, (name, value, ci95) in enumerate(points):
        if value is None:
            continue
        low, high = (value if end is None else end for end in ci95 or (None, None))
        # A percentile interval may leave its own estimate out by a hair; a bar cannot be negative.
        bars = [[max(0.0, value - low)], [max(0.0, high - value)]]
        colour = "C1" if name in controls else "C0"
        axes.errorbar([value], [place], xerr=bars, marker="o", markersize=5, capsize=3, linestyle="none", color=colour)
    axes.set_yticks(range(len(points)), labels=[name for name, _, _ in points], parse_math=False)
    axes.set_ylim(len(points) - 0.5, -0.5)
