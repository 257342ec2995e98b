"""Similarity matrices as inline SVG, in the colours of the page that `align cka` writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from align.similarity.page.palette import RGB, Scale, is_dark
from evaluate.reporting.drawing.svg import coordinate, drawing, lettering, ticks_between
from evaluate.reporting.reading.numbers import exact, fixed

Row = Sequence[float | None]


def heatmap(
    matrix: Sequence[Row],
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    scale: Scale,
    *,
    label: str,
    reason: Callable[[int, int], str],
    size: float = 340.0,
) -> Markup:
    """Draw a matrix with its first row at the bottom, as similarity matrices usually are.

    Args:
        matrix: One row for each entry of ``rows``; None is hatched.
        rows: The model and the layers down the side.
        columns: The model and the layers along the bottom.
        scale: The colours.
        label: What the drawing shows, for screen readers.
        reason: Why the cell in a row and column is empty.
        size: Of the longer side.
    """
    height, width = len(matrix), max((len(row) for row in matrix), default=0)
    cell = min(52.0, size / max(width, height, 1))
    left, bottom, total = 46.0, 38.0, height * cell
    digits = 2 if cell >= 25 else None
    cells = []
    for i, row in enumerate(matrix):
        y = total - (i + 1) * cell + 2
        for j, value in enumerate(row):
            name = f"{rows[0]} {_at(rows[1], i)} × {columns[0]} {_at(columns[1], j)}"
            cells.append(
                _cell(left + j * cell, y, cell, value, scale, name, "" if value is not None else reason(i, j), digits)
            )
    parts = [_group(cells)]
    step_y, step_x = _every(height), _every(width)
    parts += [
        lettering(left - 6, total - (i + 0.5) * cell + 6, _at(rows[1], i), "ax end") for i in range(0, height, step_y)
    ]
    parts += [
        lettering(left + (j + 0.5) * cell, total + 16, _at(columns[1], j), "ax mid") for j in range(0, width, step_x)
    ]
    parts.append(lettering(left + width * cell / 2, total + 33, f"{columns[0]} layer", "ax mid"))
    parts.append(
        Markup('<text class="ax mid" transform="translate(11 {}) rotate(-90)">{}</text>').format(
            coordinate(total / 2), f"{rows[0]} layer"
        )
    )
    return drawing(left + width * cell + 4, total + bottom, label, parts)


def _group(cells: Sequence[Markup]) -> Markup:
    # One element, so that the dark page can turn light and dark round for all colours at once.
    return Markup('<g class="cells">{}</g>').format(Markup("").join(cells))


def legend(scale: Scale) -> Markup:
    """Draw the colour scale as a bar with ticks.

    Args:
        scale: The colours.
    """
    left, right, n = 14.0, 326.0, 52
    span = scale.high - scale.low
    width = (right - left) / n
    bar = [
        Markup('<rect x="{}" y="4" width="{}" height="12" fill="{}"/>').format(
            coordinate(left + k * width),
            coordinate(width + 0.5),
            _hex(scale.rgb(scale.low + (k + 0.5) / n * span)),
        )
        for k in range(n)
    ]
    parts = [_group(bar)]
    ticks, _ = ticks_between(scale.low, scale.high, 5)
    parts += [lettering(left + (t - scale.low) / span * (right - left), 30, fixed(t, 1), "ax mid") for t in ticks]
    return drawing(340, 34, f"colour scale from {exact(scale.low)} to {exact(scale.high)}", parts)


def _cell(
    x: float,
    y: float,
    size: float,
    value: float | None,
    scale: Scale,
    name: str,
    reason: str,
    digits: int | None,
) -> Markup:
    box = (coordinate(x), coordinate(y), coordinate(size))
    if value is None:
        return Markup(
            '<rect class="null" x="{0}" y="{1}" width="{2}" height="{2}" fill="url(#hatch)"><title>{3}</title></rect>'
        ).format(*box, f"{name}: – ({reason})")
    rgb = scale.rgb(value)
    drawn = Markup('<rect x="{0}" y="{1}" width="{2}" height="{2}" fill="{3}"><title>{4}</title></rect>').format(
        *box, _hex(rgb), f"{name}: {exact(value)}"
    )
    if digits is not None:
        drawn += Markup('<text class="in {}" x="{}" y="{}">{}</text>').format(
            "onk" if is_dark(rgb) else "onp",
            coordinate(x + size / 2),
            coordinate(y + size / 2 + 4),
            f"{value:z.{digits}f}".replace("-", "\u2212"),
        )
    return drawn


def _hex(rgb: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _at(names: Sequence[str], i: int) -> str:
    return names[i] if i < len(names) else f"#{i}"


def _every(n: int) -> int:
    return max(1, math.ceil(n / 12))
