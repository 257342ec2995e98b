"""Pictures of the similarity of all layers: linear CKA with and without attention sinks, and every other measure.

The colours and marks are those of the page: darker is more alike, rust below 0, hatched where undefined; a frame is the
best partner of the row's layer, a dot that of the column's. The same result gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Circle, Rectangle
from matplotlib.ticker import MaxNLocator

from align.pages.palette import Scale, is_dark
from align.similarity.page.views import Matrix, View, best, values_of, views
from align.similarity.page.words import number
from featstore.runtime.console import jsonable
from featstore.runtime.drawing import Drawing, save_figure

#: Numbers are printed in the cells of maps with at most so many layers a side.
IN_CELL = 12
_COLUMNS = 4
_DPI = 120


def plot(result: Mapping[str, Any], out: Path) -> list[str]:
    """Draw ``cka.png`` and ``.svg``, and ``measures.png`` and ``.svg`` where other measures were computed.

    Args:
        result: Contents of ``cka.json``; NaN is read as null.
        out: Directory; it exists.

    Returns:
        Names of the files written.
    """
    main, *others = views(jsonable(dict(result)))
    names = _save(_cka(main), out, "cka")
    if others:
        names += _save(_measures(others), out, "measures")
    return names


def draw(result: Mapping[str, Any], *, measures: bool = False) -> Figure:
    """Draw what :func:`plot` writes into files.

    Args:
        result: Contents of ``cka.json``; NaN is read as null.
        measures: The other measures, of which there is at least one, instead of CKA.
    """
    main, *others = views(jsonable(dict(result)))
    return _settled(_measures(others) if measures else _cka(main))


def _cka(view: View) -> Figure:
    """Cross and within, one scale for all; a second row of maps for the sinks treated the other way."""
    blocks = view["blocks"]
    panels = [blocks]
    if any(block["beside"] for block in blocks):
        panels.append([block["beside"] for block in blocks])
    figure = Drawing(figsize=(4.4 * len(blocks) + 0.8, 4.3 * len(panels) + 0.5), dpi=_DPI, layout="constrained")
    scale = Scale(**view["scale"])
    marks = "frame: best partner of the row's layer, dot: of the column's"
    heading = f"{view['title']}\none scale for all maps: {scale.words()}\n{marks}"
    figure.suptitle(heading, fontsize="medium", parse_math=False)
    axes = figure.subplots(len(panels), len(blocks), squeeze=False)
    image = None
    for line, shown in zip(axes, panels, strict=True):
        for one, block, panel in zip(line, blocks, shown, strict=True):
            if panel is None:
                one.axis("off")
                continue
            image = _map(one, view, block, panel["values"], scale) or image
            n = panel["n"] if "n" in panel else view["n"]
            rows = f", {n:,} rows" if n else ""
            one.set_title(f"{block['title']}\n{panel['state']}{rows}", fontsize="small", parse_math=False)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.7)
    return figure


def _measures(shown: list[View]) -> Figure:
    """The cross block of every measure, both ways where it has two; each on its own scale."""
    maps = [(view, block) for view in shown for block in view["blocks"] if block["key"] in ("cross", "reverse")]
    columns = min(_COLUMNS, len(maps))
    lines = math.ceil(len(maps) / columns)
    figure = Drawing(figsize=(4.6 * columns, 4.5 * lines), dpi=_DPI, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for one, (view, block) in zip(axes, maps, strict=False):
        scale = Scale(**view["scale"])
        image = _map(one, view, block, block["values"], scale)
        if image is not None:
            figure.colorbar(image, ax=one, shrink=0.8)
        heading = [f"{view['title']}, {block['title']}", scale.words(), *_floors(block)]
        one.set_title("\n".join(heading), fontsize="small", parse_math=False)
    for one in axes[len(maps) :]:
        one.axis("off")
    return figure


def _floors(block: dict[str, Any]) -> list[str]:
    lines = []
    for floor in block["floors"]:
        found = list(values_of(floor["values"]))
        if found:
            lines.append(f"floor, {floor['name']}: {number(min(found))} to {number(max(found))}")
    return lines or ["no floor"]


def _map(axes: Axes, view: View, block: dict[str, Any], values: Matrix, scale: Scale) -> AxesImage | None:
    table = np.array([[math.nan if v is None else v for v in row] for row in values], dtype=np.float64)
    colours = _colours(scale)
    norm = mpl.colors.Normalize(scale.low, scale.high)
    behind = Rectangle((0, 0), 1, 1, transform=axes.transAxes, facecolor="white", edgecolor="0.7", zorder=-1)
    behind.set_hatch("////")
    axes.add_patch(behind)
    image = axes.imshow(np.ma.masked_invalid(table), norm=norm, cmap=colours, origin="lower", interpolation="nearest")
    for axis, side in ((axes.xaxis, block["columns"]), (axes.yaxis, block["rows"])):
        layers = side["layers"]
        step = max(1, math.ceil(len(layers) / IN_CELL))
        axis.set_ticks(range(0, len(layers), step), [str(k) for k in layers[::step]])
        axis.set_label_text(f"layer of {side['model']}", parse_math=False)
    _marks(axes, view, block, values, scale)
    if max(table.shape) <= IN_CELL:
        for (i, j), value in np.ndenumerate(table):
            if math.isfinite(value):
                text = f"{value:z.2f}".replace("-", "\u2212")
                colour = _ink(scale, value)
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize="x-small")
    return image if np.isfinite(table).any() else None


def _marks(axes: Axes, view: View, block: dict[str, Any], values: Matrix, scale: Scale) -> None:
    # Within a model the neighbour is closest, which needs no mark.
    if block["key"].startswith("within"):
        return
    for i, row in enumerate(values):
        j = best(row, view["closer"], i if block["same"] else None)
        if j is not None:
            edge = _ink(scale, row[j])
            axes.add_patch(Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, edgecolor=edge, linewidth=1.2))
    # In the corner where a number is printed, in the middle of small cells.
    dot = (0.3, 0.07) if max(len(values), len(block["columns"]["layers"])) <= IN_CELL else (0.0, 0.15)
    for j in range(len(block["columns"]["layers"])):
        column = [row[j] for row in values]
        at = best(column, view["closer"], j if block["same"] else None)
        if at is not None:
            axes.add_patch(Circle((j + dot[0], at + dot[0]), dot[1], color=_ink(scale, column[at])))


def _ink(scale: Scale, value: float | None) -> str:
    return "white" if value is not None and is_dark(scale.rgb(value)) else "black"


def _colours(scale: Scale, steps: int = 512) -> mpl.colors.ListedColormap:
    span = scale.high - scale.low
    found = [scale.rgb(scale.low + (k + 0.5) / steps * span) for k in range(steps)]
    return mpl.colors.ListedColormap(np.array(found) / 255)


def _settled(figure: Figure) -> Figure:
    """The figure in its final arrangement."""
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            axes.yaxis.set_major_locator(MaxNLocator(6))
    # Maps are square, which the first arrangement does not know yet; after the second, both files show the same.
    engine = figure.get_layout_engine()
    if engine is not None:
        for _ in range(2):
            engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def _save(figure: Figure, out: Path, name: str) -> list[str]:
    figure = _settled(figure)
    # A fixed salt keeps identifiers in the SVG the same from run to run.
    with mpl.rc_context({"svg.hashsalt": "featstore"}):
        save_figure(figure, out / f"{name}.svg", metadata={"Date": None})
    save_figure(figure, out / f"{name}.png")
    return [f"{name}.png", f"{name}.svg"]
