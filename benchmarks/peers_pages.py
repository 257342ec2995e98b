"""Libraries that could draw our pages, on the same data and under the same policy: bytes, load time, complaints.

    mkdir /tmp/peers && cd /tmp/peers && npm install @observablehq/plot@0.6.17 d3@7.9.0 echarts@5.6.0 esbuild@0.25.10
    node node_modules/esbuild/install.js
    python benchmarks/peers_pages.py /tmp/peers

One page each: 200 dot plots of ten conditions with their intervals, and a heatmap of 10 by 20 layers. `first` is the
focus: how many elements of the first drawing can take it as the library leaves them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib as mpl
from matplotlib.figure import Figure

from align.pages.document import DRAWN
from tests.support.browser import Browser, find_chromium
from tests.support.report_fixtures import PAIR, stitch
from tests.support.similarity_fixture import similarity_result

DRAWINGS = 200
STYLE = ":root{--ink:#111}@media(prefers-color-scheme:dark){:root{--ink:#eee}} .c{width:440px}"
PLOT = 'export { plot, cell, dot, link } from "@observablehq/plot";'
DRAW_PLOT = """
const D = JSON.parse(document.getElementById("d").textContent);
for (let i = 0; i < 200; i++) {
  const rows = Object.entries(D.conditions).map(([k, [v, a, b]]) => ({ k, v, a, b }));
  document.getElementById("c" + i).append(Plot.plot({ className: "plot", marginLeft: 110, height: 280, width: 440,
    x: { label: "nats per token" }, marks: [
    Plot.link(rows, { x1: "a", x2: "b", y1: "k", y2: "k", stroke: "var(--ink)" }),
    Plot.dot(rows, { x: "v", y: "k", fill: "var(--ink)" })] }));
}
const cells = D.heat.flatMap((row, i) => row.map((v, j) => ({ i, j, v })));
document.getElementById("c200").append(
  Plot.plot({ className: "plot", marks: [Plot.cell(cells, { x: "j", y: "i", fill: "v" })] }));
"""
ECHARTS = """
import * as core from "echarts/core";
import { LineChart, HeatmapChart, ScatterChart, CustomChart } from "echarts/charts";
import { GridComponent, TooltipComponent, LegendComponent, VisualMapComponent, MarkLineComponent, AriaComponent }
  from "echarts/components";
import { SVGRenderer } from "echarts/renderers";
core.use([LineChart, HeatmapChart, ScatterChart, CustomChart, GridComponent, TooltipComponent, LegendComponent,
  VisualMapComponent, MarkLineComponent, AriaComponent, SVGRenderer]);
export const init = core.init;
"""
DRAW_ECHARTS = """
const D = JSON.parse(document.getElementById("d").textContent), names = Object.keys(D.conditions);
const open = (id, width, height) => echarts.init(document.getElementById(id), null, { renderer: "svg", width, height });
for (let i = 0; i < 200; i++) {
  const chart = open("c" + i, 440, 280);
  chart.setOption({ animation: false, aria: { enabled: true }, tooltip: {}, xAxis: { type: "value" },
    yAxis: { type: "category", data: names }, series: [
    { type: "scatter", color: "var(--ink)", data: names.map((k, j) => [D.conditions[k][0], j]) },
    { type: "custom", data: names.map((k, j) => [...D.conditions[k], j]), renderItem: (_, api) => {
      const a = api.coord([api.value(1), api.value(3)]), b = api.coord([api.value(2), api.value(3)]);
      return { type: "line", shape: { x1: a[0], y1: a[1], x2: b[0], y2: b[1] }, style: { stroke: "#555" } }; } }] });
  if (!i) window.tip = () => chart.dispatchAction({ type: "showTip", seriesIndex: 0, dataIndex: 1 });
}
open("c200", 640, 400).setOption({ animation: false, xAxis: { type: "category" }, yAxis: { type: "category" },
  visualMap: { min: 0, max: 1 }, series: [{ type: "heatmap",
  data: D.heat.flatMap((row, i) => row.map((v, j) => [j, i, v])) }] });
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="where npm installed them")
    parser.add_argument("--runs", type=int, default=5, help="rounds that count")
    arguments = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        parser.error("no Chromium here: apt install chromium, or set CHROMIUM to one")
    losses = stitch()["pairs"][PAIR]["conditions"]
    conditions = {name: [of["nats_per_token"], *of["ci95"]] for name, of in losses.items() if of}
    data = json.dumps({"conditions": conditions, "heat": similarity_result(10, 20)["cross"]})
    places = "".join(f'<div class="c" id="c{i}"></div>' for i in range(DRAWINGS + 1))
    body = f'{places}<script type="application/json" id="d">{data}</script>'
    start = time.perf_counter()
    figures = [figure(conditions) for _ in range(20)]
    print(f"matplotlib: {(time.perf_counter() - start) / 20:.3f} s a figure, {len(figures[0])} bytes")
    published = (arguments.packages / "node_modules/echarts/dist/echarts.min.js").read_text()
    pages = {
        "Observable Plot, bundled": (body, bundled(arguments.packages, "Plot", PLOT), DRAW_PLOT),
        "ECharts, bundled": (body, bundled(arguments.packages, "echarts", ECHARTS), DRAW_ECHARTS),
        "ECharts, as published": (body, published, DRAW_ECHARTS),
        "matplotlib": ("".join(f"<div class=c>{each}</div>" for each in figures * (DRAWINGS // 20)), "", ""),
    }
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "profile").mkdir()
        browser = Browser(executable, Path(name) / "profile")
        for title, parts in pages.items():
            path = Path(name) / "page.html"
            path.write_text(page(*parts))
            print(f"{title}: {path.stat().st_size / 1e6:.2f} MB, {shown(browser, path, arguments.runs)}")
        browser.close()


def shown(browser: Browser, path: Path, runs: int) -> str:
    """How long a page takes, and what it complains of, a tooltip included where there is one."""
    taken = []
    for _ in range(runs + 1):
        with browser.tab() as tab:
            tab.size(1200, 900)
            start = time.perf_counter()
            tab.open(path)
            taken.append(time.perf_counter() - start)
            tab.run("window.tip?.()")
            tab.settle()
            complaints = len(tab.complaints)
            focus = tab.run("document.querySelectorAll('#c0 [tabindex]').length")
    return f"{statistics.median(taken[1:]):.2f} s until drawn, {complaints} complaints, first: {focus}"


def page(body: str, library: str, script: str) -> str:
    """A page under the policy of ours."""
    whole = f"{library}\n{script}"
    hashes = {name: hashed(text) for name, text in (("script", whole), ("style", STYLE))}
    policy = (
        f"default-src 'none'; img-src data:; script-src '{hashes['script']}'; style-src '{hashes['style']}' '{DRAWN}'"
    )
    head = f'<meta charset=utf-8><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += '<link rel="icon" href="data:,">'
    return f"<!doctype html>{head}<style>{STYLE}</style>{body}<script>{whole}</script>"


def hashed(text: str) -> str:
    """As a policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def bundled(packages: Path, name: str, source: str) -> str:
    """What esbuild makes of a module, as one script."""
    (packages / f"{name}.mjs").write_text(source)
    command = ["npx", "esbuild", f"{name}.mjs", "--bundle", "--minify", "--format=iife", f"--global-name={name}"]
    return subprocess.run(command, cwd=packages, check=True, capture_output=True, text=True).stdout


def figure(conditions: dict[str, list[float]]) -> str:
    """The dot plot as matplotlib's SVG, text as text."""
    drawn = Figure(figsize=(4.4, 2.8), layout="constrained")
    axes = drawn.add_subplot()
    values = list(conditions.values())
    ends = [[max(0.0, v - a) for v, a, _ in values], [max(0.0, b - v) for v, _, b in values]]
    axes.errorbar([v for v, *_ in values], range(len(values)), xerr=ends, fmt="o")
    axes.set_yticks(range(len(values)), list(conditions))
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "peers"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


if __name__ == "__main__":
    main()
