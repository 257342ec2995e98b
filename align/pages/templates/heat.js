// Similarity matrices: the first row at the bottom, as usual; every cell can be pointed at and focused.
const IN_CELL = 12;
const cellName = (block, i, j) =>
  `${block.rows.model} ${block.rows.layers[i]} \u00d7 ${block.columns.model} ${block.columns.layers[j]}`;

// spec: {label, rows, columns, values, scale, reasons}; and where a page has more to say of a cell: shade(value, i, j),
// the share of the way to alike or null; facts(i, j), elements for the readout; aside(i, j), words for its label;
// marked: whether the best partners are marked; same: whether both sides are one model; data: attributes of the drawing.
function heat(spec, width) {
  const rows = spec.rows.layers.length, columns = spec.columns.layers.length;
  const left = 46, bottom = 40, size = Math.min(46, (width - left - 6) / columns);
  const shade = spec.shade ?? ((value) => share(spec.scale, value));
  const cells = spec.values.flatMap((line, i) => line.map((value, j) => {
    const t = value === null ? null : shade(value, i, j);
    const rgb = t === null ? null : colour(t);
    return { i, j, value, rgb, ink: rgb && isDark(rgb) ? "onk" : "onp" };
  }));
  const best_ = spec.marked ? [spec.values.map((line, i) => best(line, spec.scale.closer, spec.same ? i : -1)), spec.columns.layers.map((_, j) => best(spec.values.map((line) => line[j]), spec.scale.closer, spec.same ? j : -1))] : [[], []];
  const frames = cells.filter((c) => best_[0][c.i] === c.j), points = cells.filter((c) => best_[1][c.j] === c.i);
  const inset = size > 20 ? 2 : 1;
  const step = (n) => Math.max(1, Math.ceil(n / 12));
  const ticks = (n) => Array.from({ length: Math.ceil(n / step(n)) }, (_, k) => k * step(n));
  const small = Math.max(rows, columns) <= IN_CELL && size >= 25;
  const plot = Plot.plot({
    className: "plot", width: Math.ceil(left + columns * size + 6), height: Math.ceil(rows * size + bottom + 4),
    marginLeft: left, marginRight: 6, marginTop: 4, marginBottom: bottom,
    x: { type: "band", domain: [...Array(columns).keys()], padding: 0, round: false, axis: null },
    y: { type: "band", domain: [...Array(rows).keys()].reverse(), padding: 0, round: false, axis: null },
    marks: [
      Plot.cell(cells, { className: "cells", x: "j", y: "i", fill: (c) => (c.rgb ? hex(c.rgb) : "url(#hatch)") }),
      ...["onk", "onp"].flatMap((ink) => [
        Plot.cell(frames.filter((c) => c.ink === ink), { className: `best ${ink}`, x: "j", y: "i", inset, fill: "none", stroke: "currentColor", strokeWidth: 1.6 }),
        Plot.dot(points.filter((c) => c.ink === ink), { className: `partner ${ink}`, x: "j", y: "i", dx: size / 2 - Math.min(7, size / 2), dy: Math.min(7, size / 2) - size / 2, r: Math.min(2.4, size / 6), fill: "currentColor" }),
        Plot.text(small ? cells.filter((c) => c.ink === ink && c.value !== null) : [], { className: `in ${ink}`, x: "j", y: "i", fill: "currentColor", text: (c) => typeset(c.value.toFixed(2).replace(/^-(?=0\.00$)/, "")) }),
      ]),
      Plot.axisX(ticks(columns), { tickSize: 0, tickFormat: (j) => String(spec.columns.layers[j]), label: `${cut(spec.columns.model, columns * size / 7 - 6)} layer`, labelAnchor: "center", labelArrow: "none" }),
      Plot.axisY(ticks(rows), { tickSize: 0, tickFormat: (i) => String(spec.rows.layers[i]), label: `${cut(spec.rows.model, rows * size / 7 - 6)} layer`, labelAnchor: "center", labelArrow: "none" }),
    ],
  });
  fill(plot, { "aria-rowcount": rows, "aria-colcount": columns, ...spec.data });
  plot.classList.add("heat");
  const marks = drawnBy(plot, "cells", cells).map(({ node, datum: { i, j, value, rgb } }) => {
    node.setAttribute("class", rgb ? "cell" : "cell null");
    fill(node, { "data-i": i, "data-j": j });
    const name = cellName(spec, i, j), why = value === null ? spec.reasons[`${i},${j}`] || "undefined; no reason is given" : "";
    const text = value === null ? `\u2013 (${why})` : exact(value);
    const read = () => (spec.facts ? spec.facts(i, j) : [html("b", {}, text), name]);
    const says = `${name}: ${spec.aside ? spec.aside(i, j, why) : text}` +
      (best_[0][i] === j ? `, best partner of ${spec.rows.model} ${spec.rows.layers[i]}` : "") +
      (best_[1][j] === i ? `, best partner of ${spec.columns.model} ${spec.columns.layers[j]}` : "");
    return { node, says, read, cell: true, i, j };
  });
  marks.sort((a, b) => a.i - b.i || a.j - b.j);
  return { plot, marks, legend: spec.data ? null : legend(spec.scale, width) };
}

function legend(scale, width, says) {
  const steps = 64, step = (scale.high - scale.low) / steps;
  const bar = Array.from({ length: steps }, (_, k) => ({ a: scale.low + k * step, b: scale.low + (k + 1.02) * step, rgb: colour(share(scale, scale.low + (k + 0.5) * step)) }));
  const plot = Plot.plot({
    className: "plot", width: Math.min(380, width), height: 34, marginLeft: 14, marginRight: 14, marginTop: 2, marginBottom: 20,
    x: { domain: [scale.low, scale.high], axis: null, clamp: true }, y: { domain: [0, 1], axis: null },
    marks: [Plot.rect(bar, { className: "cells", x1: "a", x2: "b", y1: () => 0, y2: () => 1, fill: (d) => hex(d.rgb) }), Plot.axisX({ ticks: 5, tickSize: 0, label: null, tickFormat: tickText })],
  });
  const words = says ?? `darker is more alike${scale.closer === "lower" ? " (lower values)" : ""}${scale.low < 0 ? ", rust below 0" : ""}; hatched: undefined`;
  fill(plot, { role: "img", "aria-label": `${words}; from ${number(scale.low)} to ${number(scale.high)}` });
  return html("span", { class: "scale" }, plot, html("small", {}, words));
}
