"""What all pages share: the library that draws them, data that stay data, and folds that lose nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from importlib.resources import files
from pathlib import Path

import pytest

from align.pages.charts import Dots, Mark, Series, dot_plot, heatmap, line_chart, spark
from align.pages.document import embedded, packed
from align.pages.palette import Scale
from tests.support import ROOT
from tests.support.drawings import drawings, marks, unpacked

VENDOR = files("align.pages").joinpath("vendor")
#: What `scripts/vendor` makes the bundle from.
MADE_FROM = ROOT / "scripts" / "vendored"
HOSTILE = "</script><script>window.ran=1</script>&\u2028"


def test_the_library_is_the_pinned_one() -> None:
    library = VENDOR.joinpath("plot.min.js").read_bytes()
    # `scripts/vendor` makes these bytes from the lock file.
    assert hashlib.sha256(library).hexdigest()[:16] == "bb4d108137cdd48b"
    text = library.decode()
    assert "</script" not in text
    assert not re.search(r"\beval\(|new Function|import\(|fetch\(|XMLHttpRequest", text)
    wanted = json.loads(MADE_FROM.joinpath("package.json").read_text())["dependencies"]
    licences = VENDOR.joinpath("LICENSES").read_text()
    assert f"@observablehq/plot {wanted['@observablehq/plot']} (ISC)" in licences
    assert all(name in licences for name in ("d3-array", "d3-scale", "d3-selection", "isoformat"))


def test_data_stay_data() -> None:
    text = str(embedded({"name": HOSTILE, "value": [1 / 3, None]}))
    assert not re.search(r"[<>&\u2028]", text)
    assert json.loads(text) == {"name": HOSTILE, "value": [0.3333333, None]}


def test_what_is_packed_comes_back_escaped_as_it_was() -> None:
    block = str(packed(f"<b>{HOSTILE}</b>"))
    [data] = re.findall(r'^<script type="application/zlib">([A-Za-z0-9+/=]+)</script>$', block)
    text = zlib.decompress(base64.b64decode(data)).decode()
    assert (
        text
        == unpacked(block)
        == f"&lt;b&gt;{HOSTILE.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}&lt;/b&gt;"
    )


def test_every_kind_of_drawing_holds_its_values() -> None:
    mark = Mark(0.25, -0.5, 1 / 3, HOSTILE, "mapped")
    drawn = [
        dot_plot([Dots("a", [mark], "0.25"), Dots("b", [], note="why")], label=HOSTILE, axis="x", anchors=(0.0,)),
        line_chart([Series("s", [(1.0, mark), (2.0, Mark(None))])], label="lines", axes=("x", "y"), log=True),
        spark(mark, (-1.0, 1.0), "spark"),
    ]
    found = drawings("".join(drawn))
    assert [spec["kind"] for spec in found] == ["dots", "lines", "spark"]
    for spec in found:
        [(says, _, value)] = marks(spec)
        assert value == 0.25
        assert says == f"{HOSTILE}: 0.25 [\u22120.5, 0.333333]"
    values = [[0.5, None], [-0.125, 1.5]]
    [spec] = drawings(
        heatmap(
            values, ("a", ["0", "1"]), ("b", ["2", "3"]), Scale.over(v for row in values for v in row), label="m",
            reason=lambda i, j: f"why {i} {j}",
        )
    )  # fmt: skip
    assert spec["values"] == values
    assert spec["reasons"] == {"0,1": "why 0 1"}
    assert spec["scale"] == {"low": -0.125, "high": 1.5, "closer": "higher"}


@pytest.mark.parametrize("room", ["align/pages", "align/similarity/page", "align/sweeps", "evaluate/reporting"])
def test_no_page_brings_markup_of_its_own_past_the_frame(room: str) -> None:
    for path in (Path(__file__).parents[3] / room / "templates").glob("*.j2"):
        text = path.read_text()
        assert " | safe" not in text.replace('"</div><div class=\\"texts\\">" | safe', "")
        assert not re.search(r"\son\w+=|\sstyle=|https?://|src=", text)
        assert path.name == "frame.html.j2" or text.startswith('{% extends "frame.html.j2" %}')
