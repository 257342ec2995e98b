"""What a page draws, from the data it draws from: every mark with its place and what it says."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import zlib
from typing import Any

_PACKED = re.compile(r'<script type="application/zlib">(.*?)</script>')
_BOARD = re.compile(
    r"<tbody>\n(?:(?!</tbody>).)*?</tbody>\n</table>\n(<script type=\"application/zlib\">[^<]*</script>)", re.DOTALL
)
_DRAWING = re.compile(
    r'<span class="chart (\w+)" role="group" aria-label="([^"]*)">'
    r'<script type="application/json">(.*?)</script></span>',
    re.DOTALL,
)


def unpacked(text: str) -> str:
    """The page with everything unfolded: what travels packed in its place, a board with all of its rows."""
    text = _BOARD.sub(r"<tbody>\n\1</tbody>\n</table>\n", text)
    while _PACKED.search(text):
        text = _PACKED.sub(lambda found: zlib.decompress(base64.b64decode(found[1])).decode(), text)
    return text


def drawings(text: str) -> list[dict[str, Any]]:
    """The data of every drawing, in the order of the page."""
    found = []
    for kind, label, data in _DRAWING.findall(text):
        spec = json.loads(data)
        assert (spec["kind"], spec["label"]) == (kind, html.unescape(label))
        found.append(spec)
    return found


def drawing(text: str, label: str) -> dict[str, Any]:
    """The only drawing of a label."""
    [found] = [spec for spec in drawings(text) if spec["label"] == label]
    return found


def marks(spec: dict[str, Any]) -> list[tuple[str, float | None, float]]:
    """What every mark of a drawing says, its place along the axis and its value; without a value there is no mark."""
    if spec["kind"] == "lines":
        along = math.log10 if spec["log"] else float
        points = [(along(x), mark) for _, _, line in spec["series"] for x, *mark in line]
    elif spec["kind"] == "dots":
        points = [(None, mark[:4]) for _, line, *_ in spec["lines"] for mark in line]
    elif spec["kind"] == "spark":
        points = [(None, spec["mark"][:4])]
    else:
        return [(says, None, value) for says, value in cells(spec)]
    return [(_says(*mark), x, mark[0]) for x, mark in points if mark[0] is not None]


def cells(spec: dict[str, Any]) -> list[tuple[str, float]]:
    """What every cell of a matrix says, and its value; NaN for one without."""
    (rows, columns) = ((spec[side]["model"], spec[side]["layers"]) for side in ("rows", "columns"))
    found = []
    for i, row in enumerate(spec["values"]):
        for j, value in enumerate(row):
            name = f"{rows[0]} {rows[1][i]} × {columns[0]} {columns[1][j]}"
            shown = f"– ({spec['reasons'][f'{i},{j}']})" if value is None else _exact(value)
            found.append((f"{name}: {shown}", math.nan if value is None else value))
    return found


def titles(text: str) -> list[str]:
    """What every mark of every drawing says."""
    return [says for spec in drawings(text) for says, _, _ in marks(spec)]


def _says(value: float, low: float | None, high: float | None, name: str) -> str:
    ends = "" if low is None or high is None else f" [{_exact(low)}, {_exact(high)}]"
    return f"{name}: {_exact(value)}{ends}"


def _exact(value: float) -> str:
    return f"{value:.6g}".replace("-", "\u2212")
