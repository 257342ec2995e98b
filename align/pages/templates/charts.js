// Drawings of the class "chart", each from the data inside it, by the chart library: dots, lines and sparks.
// A line is told by its marker and its dashes as well as by its colour.
const SYMBOLS = ["circle", "square", "diamond2", "triangle", "times", "star", "circle", "diamond2", "square"];
const DASHES = [null, "7 3", "2 3", "9 3 2 3", "1 4", "12 4", "4 4", "5 4", "1.5 3.5"];

// A mark's numbers: its value and interval first, then what it is.
function said([value, low, high, name]) {
  const ends = low === null || high === null ? "" : ` ${interval([low, high], exact)}`;
  const text = `${exact(value)}${ends}`;
  return { says: `${name}: ${text}`, read: () => [html("b", {}, text), name] };
}

// The nodes that the library drew for a mark, each with the datum it stands for.
const drawnBy = (plot, kind, data) =>
  [...plot.querySelectorAll(`.${kind} > *`)].map((node) => ({ node, datum: data[node.__data__] }));

// Ends of an axis that holds all values, with some air.
function span(values, air) {
  const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  const pad = air * (high - low) || 0.5;
  return [low - pad, high + pad];
}
// The first and then every value that stands clear of the one before.
function apart(values, place, least) {
  const shown = [];
  for (const x of values) if (!shown.length || place(x) - place(shown[shown.length - 1]) >= least) shown.push(x);
  return shown;
}
const tickText = (v) => (Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-4) ? typeset(v.toExponential(1)) : exact(v));

const whisker = (rows, x1, x2, y1, y2, kind) => Plot.link(rows.filter((r) => r.mark[1] !== null && r.mark[2] !== null), { x1, x2, y1, y2, stroke: "currentColor", className: kind });

function dots(spec, width) {
  const pitch = spec.stacked ? 44 : 25, [left, right] = spec.stacked ? [10, 62] : [112, 62];
  const rows = spec.lines.flatMap(([, marks], i) => marks.map((mark, k) => ({ mark, y: i + (spec.stacked ? 0.7 + 0.18 * k : 0.5) }))).filter(({ mark }) => mark[0] !== null);
  const x = span([...rows.flatMap(({ mark }) => mark.slice(0, 3)).filter((v) => v !== null), ...spec.anchors, ...spec.bounds], 0.04);
  const lines = spec.lines.map(([label, , text, note], i) => ({ label, text, note, y: i + (spec.stacked ? 0.7 : 0.5), top: i + (spec.stacked ? 0.3 : 0.5) }));
  const letters = Math.max(12, Math.floor((spec.stacked ? width - 72 : 104) / 6.2));
  const height = spec.lines.length * pitch + 46;
  const kinds = [...new Set(rows.map(({ mark }) => mark[4]))];
  const plot = Plot.plot({
    className: "plot", width, height, marginLeft: left, marginRight: right, marginTop: 4, marginBottom: 42,
    x: { domain: x, label: spec.axis, labelAnchor: "center", labelArrow: "none", ticks: spec.stacked ? 4 : 5, tickFormat: spec.percent ? percent : tickText },
    y: { domain: [0, spec.lines.length || 1], range: [4, height - 42], axis: null },
    marks: [
      Plot.gridX({ className: "grid-lines", stroke: "currentColor", strokeOpacity: 1, ticks: spec.stacked ? 4 : 5 }),
      Plot.ruleX(spec.anchors, { className: "anchor", stroke: "currentColor" }),
      Plot.text(lines, { className: "lb", frameAnchor: "left", y: "top", text: (line) => cut(line.label, letters), title: (line) => (line.label.length > letters ? line.label : null), textAnchor: spec.stacked ? "start" : "end", dx: spec.stacked ? 0 : -10 }),
      Plot.text(lines, { className: "val", frameAnchor: "right", y: "y", text: "text", textAnchor: "end", dx: right - 2 }),
      Plot.text(lines, { className: "ax", frameAnchor: "left", y: "y", text: "note", textAnchor: "start", dx: 2 }),
      ...kinds.flatMap((kind) => {
        const of = rows.filter(({ mark }) => mark[4] === kind);
        return [
          whisker(of, (r) => r.mark[1], (r) => r.mark[2], "y", "y", `whisker m ${kind}`),
          Plot.dot(of, { className: `points m ${kind}`, x: (r) => r.mark[0], y: "y", r: 4.5, fill: kind === "hollow" ? "var(--paper)" : "currentColor", stroke: "currentColor" }),
        ];
      }),
    ],
  });
  const marks = kinds.flatMap((kind) => drawnBy(plot, `points.${kind || "m"}`, rows.filter(({ mark }) => mark[4] === kind)));
  marks.sort((a, b) => a.datum.y - b.datum.y);
  return { plot, marks: marks.map(({ node, datum }) => ({ node, ...said(datum.mark) })) };
}

function lines(spec, width) {
  const height = spec.height ?? 240, left = 56, right = 14;
  const rows = spec.series.map(([, , points]) => points.map(([x, ...mark]) => ({ x, mark })));
  const known = rows.flat().filter(({ mark }) => mark[0] !== null);
  if (!known.length) return { plot: html("p", { class: "gap" }, "Nothing to draw: every value is undefined.") };
  const y = spec.from ?? span([...known.flatMap(({ mark }) => mark.slice(0, 3)).filter((v) => v !== null && v !== undefined), ...spec.references.map(([v]) => v)], 0.06);
  const xs = [...new Set([...known.map((p) => p.x), ...spec.verticals.map(([v]) => v)])].sort((a, b) => a - b);
  const scaled = spec.log ? Math.log10 : Number;
  const [low, high] = span(xs.map(scaled), 0.04);
  const place = (v) => ((scaled(v) - low) / (high - low)) * (width - left - right);
  const written = spec.log ? (v) => typeset(Math.abs(v) >= 10 ? count(Math.round(v)) : String(Number(v.toPrecision(2)))) : tickText;
  const own = [...new Set(known.map((p) => p.x))].sort((a, b) => a - b);
  const plot = Plot.plot({
    className: "plot", width, height, marginLeft: left, marginRight: right, marginTop: 14, marginBottom: 42,
    x: { type: spec.log ? "log" : "linear", domain: spec.log ? [10 ** low, 10 ** high] : [low, high], axis: null },
    y: { domain: y, axis: null },
    marks: [
      Plot.gridY({ className: "grid-lines", stroke: "currentColor", strokeOpacity: 1, ticks: 5 }),
      Plot.axisY({ label: spec.axes[1], labelAnchor: "center", labelArrow: "none", ticks: 5, tickSize: 0, tickFormat: tickText }),
      Plot.axisX(spec.ticks ?? apart(own, place, 34), { label: spec.axes[0], labelAnchor: "center", labelArrow: "none", tickSize: 0, tickFormat: written }),
      Plot.ruleX(spec.verticals, { className: "ref", x: "0", stroke: "currentColor" }),
      Plot.ruleY(spec.references, { className: "ref", y: "0", stroke: "currentColor" }),
      ...spec.series.flatMap(([name, style], k) => {
        const shown = rows[k].filter(({ mark }) => mark[0] !== null);
        return [
          Plot.line(rows[k], { className: `course s s${style}`, x: "x", y: (p) => p.mark[0] ?? NaN, stroke: "currentColor", strokeWidth: 1.8, strokeDasharray: DASHES[style] ?? undefined }),
          whisker(shown.map((p) => ({ ...p, mark: [p.mark[0], p.mark[1] ?? null, p.mark[2] ?? null] })), "x", "x", (p) => p.mark[1], (p) => p.mark[2], `whisker s s${style}`),
          Plot.dot(shown, { className: `points s s${style} series-${k}`, x: "x", y: (p) => p.mark[0], r: 3.6, symbol: SYMBOLS[style], fill: SYMBOLS[style] === "times" ? "none" : "currentColor", stroke: "currentColor" }),
        ];
      }),
      // Names of reference lines come last: the page gives them a border of its own background.
      Plot.text(spec.references, { className: "ax named", frameAnchor: "right", y: "0", text: "1", textAnchor: "end", dy: -6 }),
      Plot.text(spec.verticals, { className: "ax named", frameAnchor: "top", x: "0", text: "1", rotate: -90, textAnchor: "end", dx: -6 }),
    ],
  });
  const marks = spec.series.flatMap(([name], k) => {
    const shown = rows[k].filter(({ mark }) => mark[0] !== null);
    return drawnBy(plot, `points.series-${k}`, shown).map(({ node, datum }) => {
      node.dataset.series = name;
      return { node, ...(datum.mark[4] ?? said(datum.mark)) };
    });
  });
  const key = html("ul", { class: "keys" }, ...spec.series.map(([name, style]) => html("li", {}, swatch(style), name)));
  return { plot, marks, key };
}

function swatch(style) {
  const sample = Plot.plot({
    className: "plot", width: 30, height: 12, margin: 0, axis: null, x: { domain: [0, 2] }, y: { domain: [-1, 1] },
    marks: [
      Plot.line([[0, 0], [2, 0]], { className: `course s s${style}`, stroke: "currentColor", strokeWidth: 1.8, strokeDasharray: DASHES[style] ?? undefined }),
      Plot.dot([[1, 0]], { className: `points s s${style}`, symbol: SYMBOLS[style], r: 3.4, fill: SYMBOLS[style] === "times" ? "none" : "currentColor", stroke: "currentColor" }),
    ],
  });
  return fill(sample, { "aria-hidden": "true" });
}

function spark(spec) {
  const row = [{ mark: spec.mark }];
  const plot = Plot.plot({
    className: "plot", width: 96, height: 16, marginTop: 1, marginBottom: 1, marginLeft: 6, marginRight: 6, axis: null,
    x: { domain: spec.bounds }, y: { domain: [0, 2] },
    marks: [
      Plot.ruleX([0], { className: "anchor", stroke: "currentColor" }),
      whisker(row, (r) => r.mark[1], (r) => r.mark[2], () => 1, () => 1, `whisker m ${spec.mark[4]}`),
      Plot.dot(row, { className: `points m ${spec.mark[4]}`, x: (r) => r.mark[0], y: () => 1, r: 4.5, fill: "currentColor" }),
    ],
  });
  return { plot, marks: drawnBy(plot, "points", row).map(({ node, datum }) => ({ node, ...said(datum.mark) })) };
}

const KINDS = { dots, lines, spark, heat: (spec, width) => heat(spec, width) };

// Draw into an element what its data say; drawn again where its width has changed.
function drawChart(node, spec, width) {
  const { plot, marks, key, legend } = KINDS[spec.kind](spec, width);
  fill(plot, { "aria-label": spec.label, role: spec.kind === "heat" ? "grid" : "group" });
  const around = html("span", { class: "drawn" }, plot);
  listen(around, marks || []);
  node.replaceChildren(...[legend, around, key].filter(Boolean));
}

const SPECS = new WeakMap();
function drawCharts(root) {
  for (const node of root.querySelectorAll(".chart")) {
    if (!SPECS.has(node)) SPECS.set(node, JSON.parse(node.querySelector("script").textContent));
    const width = Math.max(270, Math.min(node.classList.contains("heat") ? 460 : 640, node.clientWidth || 420));
    // What is folded away has no width; it is drawn when it is opened.
    if (!node.getClientRects().length || Number(node.dataset.width) === width) continue;
    node.dataset.width = width;
    drawChart(node, SPECS.get(node), width);
  }
}
