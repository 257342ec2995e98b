"""Similarity matrices as inline SVG, and the colour scale they share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluate.report.numbers import exact, fixed
from evaluate.report.svg import coordinate, drawing, lettering, ticks_between

Row = Sequence[float | None]

#: Similarity 0 to 1: pale to navy, with more change of hue towards 1, where trained models differ.
_RAMP = (
    (0.0, (244, 243, 236)),
    (0.25, (222, 229, 204)),
    (0.5, (158, 205, 182)),
    (0.75, (62, 151, 166)),
    (0.9, (38, 92, 148)),
    (1.0, (32, 28, 92)),
)
_NEGATIVE = ((0.0, (244, 243, 236)), (1.0, (168, 66, 24)))


@dataclass(frozen=True)
class Scale:
    """Maps values to colours: 0 is pale, positive blue, negative rust; nothing is clamped."""

    low: float = 0.0
    high: float = 1.0

    @classmethod
    def over(cls, matrices: Sequence[Sequence[Row]]) -> Scale:
        """The scale from 0 to 1, widened to hold every value.

        Args:
            matrices: All matrices that share the scale.
        """
        values = [v for matrix in matrices for row in matrix for v in row if v is not None]
        return cls(min([0.0, *values]), max([1.0, *values]))

    def rgb(self, value: float) -> tuple[int, int, int]:
        """The colour of a value.

        Args:
            value: A number within the scale.
        """
        share = value / max(self.high, -self.low)
        stops = _RAMP if share >= 0 else _NEGATIVE
        share = abs(share)
        for (x0, c0), (x1, c1) in itertools.pairwise(stops):
            if share <= x1:
                t = (share - x0) / (x1 - x0)
                red, green, blue = (round(a + t * (b - a)) for a, b in zip(c0, c1, strict=True))
                return red, green, blue
        raise ValueError(f"{value} lies outside the scale {self.low}..{self.high}")


def heatmap(
    matrix: Sequence[Row],
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    scale: Scale,
    *,
    label: str,
    reason: Callable[[int, int], str],
) -> Markup:
    """Draw a matrix with its first row at the bottom, as similarity matrices usually are.

    Args:
        matrix: One row for each entry of ``rows``; None is hatched.
        rows: The model and the layers down the side.
        columns: The model and the layers along the bottom.
        scale: The colours.
        label: What the drawing shows, for screen readers.
        reason: Why the cell in a row and column is empty.
    """
    height, width = len(matrix), max((len(row) for row in matrix), default=0)
    cell = min(52.0, 340.0 / max(width, height, 1))
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
        dark = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 140
        drawn += Markup('<text class="in {}" x="{}" y="{}">{}</text>').format(
            "onk" if dark else "onp",
            coordinate(x + size / 2),
            coordinate(y + size / 2 + 4),
            f"{value:z.{digits}f}".replace("-", "\u2212"),
        )
    return drawn


def _hex(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _at(names: Sequence[str], i: int) -> str:
    return names[i] if i < len(names) else f"#{i}"


def _every(n: int) -> int:
    return max(1, math.ceil(n / 12))
