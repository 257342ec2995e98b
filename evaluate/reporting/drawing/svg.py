"""Small inline SVG charts: dot plot and line chart. Every mark says its value on hover.

Text and line colours come from the page's CSS classes, so one drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from evaluate.reporting.reading.numbers import exact

_WIDTH = 400


@dataclass(frozen=True)
class Mark:
    """A point, its interval and what hovering over it says."""

    value: float | None
    low: float | None = None
    high: float | None = None
    name: str = ""
    kind: str = "control"

    @property
    def hover(self) -> str:
        """The mark's value in words."""
        if self.value is None:
            return self.name
        ends = ""
        if self.low is not None and self.high is not None:
            ends = f" [{exact(self.low)}, {exact(self.high)}]"
        return f"{self.name}: {exact(self.value)}{ends}"


@dataclass(frozen=True)
class Dots:
    """A line of a dot plot."""

    label: str
    marks: Sequence[Mark]
    text: str = ""
    note: str = ""


def dot_plot(
    lines: Sequence[Dots],
    *,
    label: str,
    axis: str,
    style: Callable[[float], str],
    anchors: Sequence[float] = (),
    stacked: bool = False,
    bounds: tuple[float, ...] = (),
) -> Markup:
    """Draw one horizontal line a row with points and their intervals.

    Args:
        lines: From top to bottom.
        label: What the drawing shows, for screen readers.
        axis: What the horizontal axis measures.
        style: How to write a tick.
        anchors: Values that the axis must show and that are marked by a line through all rows.
        stacked: Whether labels are long and stand above their line.
        bounds: Values that the axis must show, too, without a line.
    """
    ends = [e for line in lines for m in line.marks for e in (m.value, m.low, m.high) if e is not None]
    shown = [*ends, *anchors, *bounds]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    pad = 0.04 * (high - low) or 0.5
    left, right = (10.0, _WIDTH - 62.0) if stacked else (112.0, _WIDTH - 52.0)
    place = _linear(low - pad, high + pad, left, right)
    pitch = 44.0 if stacked else 25.0
    bottom = len(lines) * pitch + 6
    parts = []
    ticks, decimals = ticks_between(low - pad, high + pad, 4 if stacked else 5)
    for tick in ticks:
        parts.append(_line(place(tick), 4, place(tick), bottom, "tick"))
        parts.append(lettering(place(tick), bottom + 14, _tick(tick, decimals, style), "ax mid"))
    parts += [_line(place(a), 4, place(a), bottom, "anchor") for a in anchors]
    for i, line in enumerate(lines):
        y = i * pitch + (31.0 if stacked else 17.0)
        if stacked:
            parts.append(lettering(left, y - 13, _cut(line.label, 58), "lb"))
        else:
            parts.append(lettering(left - 10, y + 4, _cut(line.label, 17), "lb end"))
        for k, mark in enumerate(line.marks):
            parts.append(point(mark, place, y + (8.0 * k if stacked else 0.0)))
        if line.text:
            parts.append(lettering(_WIDTH - 2, y + 4, line.text, "val end"))
        if line.note:
            parts.append(lettering(left + 2, y + 4, line.note, "ax note-in"))
    parts.append(lettering((left + right) / 2, bottom + 31, axis, "ax mid"))
    return drawing(_WIDTH, bottom + 38, label, parts)


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


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    axes: tuple[str, str],
    references: Sequence[tuple[float, str]] = (),
    verticals: Sequence[tuple[float, str]] = (),
    log: bool = False,
) -> Markup:
    """Draw lines with points and, where given, interval whiskers.

    Args:
        series: The lines; a missing value breaks a line.
        label: What the drawing shows, for screen readers.
        axes: What the two axes measure.
        references: Horizontal lines with their names.
        verticals: Vertical lines with their names.
        log: Whether places lie on a logarithmic axis; all of them are then above zero.
    """
    marks = [mark for s in series for _, mark in s.points]
    ys = [e for m in marks for e in (m.value, m.low, m.high) if e is not None]
    ys += [value for value, _ in references]
    xs = sorted({x for s in series for x, mark in s.points if mark.value is not None})
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    pad = 0.06 * (high - low) or 0.1
    ticks, decimals = ticks_between(low - pad, high + pad, 5)
    # The name of the axis stands left of its longest number.
    left = max(48.0, 24.0 + 6.6 * max(len(_tick(tick, decimals)) for tick in ticks))
    right, top, bottom = _WIDTH - 12.0, 12.0, 190.0
    scaled: Callable[[float], float] = math.log10 if log else float
    ends = sorted(scaled(x) for x in (*xs, *(x for x, _ in verticals))) or [0.0]
    gap = 0.04 * (ends[-1] - ends[0]) or 0.5
    along = _linear(ends[0] - gap, ends[-1] + gap, left, right)

    def px(x: float) -> float:
        return along(scaled(x))

    py = _linear(low - pad, high + pad, bottom, top)
    parts = []
    for tick in ticks:
        parts.append(_line(left, py(tick), right, py(tick), "tick"))
        parts.append(lettering(left - 6, py(tick) + 4, _tick(tick, decimals), "ax end"))
    # A rate needs two digits here; all of them stand in the readout and the table.
    written = (lambda x: _typed(f"{x:,.0f}" if abs(x) >= 10 else f"{x:.2g}")) if log else exact
    parts += [lettering(px(x), bottom + 16, written(x), "ax mid") for x in _apart(xs, px)]
    parts += [_line(px(x), top, px(x), bottom, "ref") for x, _ in verticals]
    for value, _ in references:
        parts.append(_line(left, py(value), right, py(value), "ref"))
    for k, one in enumerate(series):
        parts.append(_polyline(one, px, py, _style(one, k)))
    # Names of reference lines come last: the page gives them a border of its own background.
    above = float("-inf")
    for v, name in sorted(references, reverse=True):
        # A name that would lie on the one above goes below its line.
        y = py(v) - 5 if py(v) - above >= 16 else py(v) + 12
        above = py(v)
        parts.append(lettering(right, y, name, "ax end note-in"))
    for k, (x, name) in enumerate(verticals):
        end = px(x) > (left + right) / 2
        parts.append(
            lettering(px(x) + (-4 if end else 4), top + 12 + 15 * k, name, "ax note-in end" if end else "ax note-in")
        )
    parts.append(lettering((left + right) / 2, bottom + 33, axes[0], "ax mid"))
    parts.append(
        Markup('<text class="ax mid" transform="translate(10 {}) rotate(-90)">{}</text>').format(
            coordinate((top + bottom) / 2), axes[1]
        )
    )
    return drawing(_WIDTH, bottom + 40, label, parts)


def ticks_between(low: float, high: float, about: int) -> tuple[list[float], int]:
    """Round values inside an interval, and how many decimals they need.

    Args:
        low: Lower end.
        high: Upper end, above the lower.
        about: Roughly how many.
    """
    rough = (high - low) / about
    if not rough > 0 or not math.isfinite(rough):
        return [low], 2
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [k * step for k in range(first, last + 1)], decimals


def _tick(value: float, decimals: int, style: Callable[[float], str] | None = None) -> str:
    if style is not None:
        return style(value)
    return exact(value) if abs(value) >= 1e5 else f"{value:.{decimals}f}".replace("-", "\u2212")


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def point(mark: Mark, place: Callable[[float], float], y: float) -> Markup:
    """Draw a mark as a dot on its horizontal whisker.

    Args:
        mark: One without a value is not drawn.
        place: From values to horizontal places.
        y: Its height.
    """
    if mark.value is None:
        return Markup("")
    whisker = Markup("")
    if mark.low is not None and mark.high is not None:
        whisker = _line(place(mark.low), y, place(mark.high), y, "whisker")
    return Markup('<g class="m {}"><title>{}</title>{}<circle cx="{}" cy="{}" r="4.5" data-v="{}"/></g>').format(
        mark.kind,
        mark.hover,
        whisker,
        coordinate(place(mark.value)),
        coordinate(y),
        repr(mark.value),
    )


def _polyline(one: Series, px: Callable[[float], float], py: Callable[[float], float], k: int) -> Markup:
    parts: list[Markup] = []
    stretch: list[str] = []
    paths = [stretch]
    for x, mark in one.points:
        if mark.value is None:
            stretch = []
            paths.append(stretch)
            continue
        stretch.append(f"{coordinate(px(x))},{coordinate(py(mark.value))}")
        if mark.low is not None and mark.high is not None:
            parts.append(_line(px(x), py(mark.low), px(x), py(mark.high), "whisker"))
        parts.append(
            Markup('<g class="m"><title>{}</title>{}</g>').format(mark.hover, marker(k, px(x), py(mark.value)))
        )
    lines = [Markup('<polyline points="{}"/>').format(" ".join(p)) for p in paths if len(p) > 1]
    return Markup('<g class="s s{}">{}</g>').format(k, Markup("").join([*lines, *parts]))


def chart_key(series: Sequence[Series]) -> Markup:
    """Draw the key of a line chart: a list of markers with the names of their lines.

    Args:
        series: The lines, in their order.
    """
    swatch = Markup(
        '<li><svg class="key" viewBox="0 0 22 12" aria-hidden="true"><g class="s s{0}">'
        '<polyline points="0,6 22,6"/>{1}</g></svg>{2}</li>'
    )
    items = [swatch.format(_style(one, k), marker(_style(one, k), 11, 6), one.name) for k, one in enumerate(series)]
    return Markup('<ul class="keys">{}</ul>').format(Markup("").join(items))


def _style(one: Series, k: int) -> int:
    return k % 6 if one.style is None else one.style


def _apart(xs: Sequence[float], px: Callable[[float], float]) -> list[float]:
    # Labels that would touch the one before are left out.
    shown: list[float] = []
    for x in xs:
        if not shown or px(x) - px(shown[-1]) >= 30:
            shown.append(x)
    return shown


def _typed(text: str) -> str:
    return text.replace("-", "\u2212")


def marker(k: int, x: float, y: float) -> Markup:
    """The point of the k-th line: shape tells lines apart where colour cannot.

    Args:
        k: Which line.
        x: Horizontal centre.
        y: Vertical centre.
    """
    if k % 3 == 0:
        return Markup('<circle cx="{}" cy="{}" r="3.6"/>').format(coordinate(x), coordinate(y))
    corners = ((-3.3, -3.3), (3.3, -3.3), (3.3, 3.3), (-3.3, 3.3))
    if k % 3 == 2:
        corners = ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0))
    points = " ".join(f"{coordinate(x + dx)},{coordinate(y + dy)}" for dx, dy in corners)
    return Markup('<polygon points="{}"/>').format(points)


def drawing(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    """Wrap shapes in an ``<svg>`` that shrinks with the page but does not grow far beyond its size.

    Args:
        width: In the units of the shapes.
        height: Likewise.
        label: What the drawing shows, for screen readers.
        parts: The shapes.
    """
    return Markup('<svg viewBox="0 0 {0} {1}" width="{2}" role="img" aria-label="{3}">{4}</svg>').format(
        coordinate(width),
        coordinate(height),
        round(width * 1.15),
        label,
        Markup("").join(parts),
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        kind, coordinate(x1), coordinate(y1), coordinate(x2), coordinate(y2)
    )


def lettering(x: float, y: float, words: str, kind: str) -> Markup:
    """Put text at a point.

    Args:
        x: Where it starts, ends or is centred, as the classes say.
        y: The baseline.
        words: The text.
        kind: CSS classes: ``mid`` or ``end`` and a role such as ``ax``.
    """
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, coordinate(x), coordinate(y), words)


def coordinate(value: float) -> str:
    """Write a coordinate in as few characters as a screen can tell apart.

    Args:
        value: In the units of the drawing.
    """
    return f"{value:.2f}".rstrip("0").rstrip(".")
