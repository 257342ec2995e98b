// Heatmaps: the first row at the bottom, as similarity matrices usually are; every cell can be pointed at and focused.
const READOUT = document.getElementById("readout");
const IN_CELL = 12;

function cellFacts(view, block, panel, i, j) {
  const facts = [[view.title, number(at(panel.values, i, j))]];
  const ends = panel.main ? at(block.ci, i, j) : null;
  if (ends) facts.push(["95 % interval", interval(ends)]);
  if (panel.main) {
    for (const floor of block.floors) {
      const beyond = floor.p ? `, 5 % beyond ${number(at(floor.edge, i, j))}, p = ${number(at(floor.p, i, j))}` : "";
      facts.push([`floor: ${floor.name}`, number(at(floor.values, i, j)) + beyond]);
      if (floor.excess) facts.push(["95 % interval above that floor", interval(at(floor.excess, i, j)) || "\u2013"]);
    }
    for (const ceiling of block.ceilings) {
      if (ceiling.reason) facts.push([ceiling.name, `\u2013 (${ceiling.reason})`]);
      else if (ceiling.values) facts.push([ceiling.name, number(at(ceiling.values, i, j))]);
      else {
        facts.push([`${block.rows.model} ${block.rows.layers[i]}, ${ceiling.name}`, number((ceiling.rows || [])[i], 4)]);
        if (!block.same || i !== j) facts.push([`${block.columns.model} ${block.columns.layers[j]}, ${ceiling.name}`, number((ceiling.columns || [])[j], 4)]);
      }
    }
    const written = (value) => (value === null ? "\u2013" : String(Number(value.toPrecision(4))).replace("-", "\u2212"));
    for (const [name, value] of Object.entries(block.facts.cells[`${i},${j}`] || {})) facts.push([name, written(value)]);
    for (const [side, k, axis] of [["rows", i, block.rows], ["columns", j, block.columns]]) {
      for (const [name, value] of Object.entries(block.facts[side][k] || {})) {
        facts.push([`${name} of ${axis.model} ${axis.layers[k]}`, written(value)]);
      }
    }
  }
  if (block.beside) {
    const other = panel.main ? block.beside : block;
    facts.push([other.state, number(at(other.values, i, j))]);
  }
  if (panel.n) facts.push(["rows", count(panel.n)]);
  return facts;
}
const cellName = (block, i, j) =>
  `${block.rows.model} ${block.rows.layers[i]} \u00d7 ${block.columns.model} ${block.columns.layers[j]}`;
const cellReason = (panel, i, j) =>
  at(panel.values, i, j) === null ? panel.reasons[`${i},${j}`] || "undefined; no reason is given" : null;

function showReadout(view, block, panel, i, j, rect) {
  READOUT.replaceChildren(html("b", {}, `${cellName(block, i, j)}, ${panel.state}`));
  const list = html("dl");
  cellFacts(view, block, panel, i, j).forEach(([name, value], k) =>
    list.append(html("dt", {}, name), html("dd", k ? {} : { class: "first" }, value)));
  READOUT.append(list);
  const why = cellReason(panel, i, j);
  if (why) READOUT.append(html("p", {}, `Undefined: ${why}`));
  READOUT.hidden = false;
  READOUT.classList.toggle("up", rect.getBoundingClientRect().top > innerHeight / 2);
  // Beside the cell, inside the window; narrow windows have it at the end away from the cell (by the style).
  const box = rect.getBoundingClientRect();
  const own = READOUT.getBoundingClientRect();
  const right = box.right + 10 + own.width < innerWidth ? box.right + 10 : Math.max(8, box.left - own.width - 10);
  READOUT.style.left = `${right}px`;
  READOUT.style.top = `${Math.max(8, Math.min(box.top, innerHeight - own.height - 8))}px`;
}
function hideReadout() {
  READOUT.hidden = true;
}

// A panel is a block's own values ("main") or those with the sinks treated the other way.
function heatmap(view, block, panel, mode) {
  const rows = panel.values.length;
  const columns = block.columns.layers.length;
  // As wide as there is room, at most 400, in whole pixels: lettering keeps its size and cells leave no seams.
  const room = Math.min(400, document.getElementById("maps").clientWidth - 52);
  const cell = Math.min(64, Math.max(6, Math.floor(room / Math.max(rows, columns, 1))));
  const left = 46, top = 4, height = rows * cell, width = columns * cell;
  const body = svg("g", { class: "cells", role: "presentation" });
  const frames = svg("g", { class: "cells", "aria-hidden": "true" });
  const cursor = svg("rect", { class: "cursor", width: place(cell), height: place(cell), visibility: "hidden" });
  const cells = [];
  // Within a model the neighbour is closest, which needs no mark.
  const marked = !block.key.startsWith("within");
  const rowBest = panel.values.map((row, i) => (marked ? best(row, view.closer, block.same ? i : -1) : -1));
  const columnBest = block.columns.layers.map((_, j) => (marked ? best(column(panel.values, j), view.closer, block.same ? j : -1) : -1));
  panel.values.forEach((row, i) => {
    const line = svg("g", { role: "row" });
    cells.push([]);
    row.forEach((value, j) => {
      const x = left + j * cell, y = top + height - (i + 1) * cell;
      const facts = cellFacts(view, block, panel, i, j).map(([name, text]) => `${name} ${text}`).join(", ");
      const why = cellReason(panel, i, j);
      const floor = mode === "floor" ? at(block.floors[0].values, i, j) : null;
      const t = value === null ? null : mode !== "floor" ? share(view.scale, value)
        : floor === null ? null : aboveFloor(view, value, floor);
      const rgb = t === null ? null : colour(t);
      const rect = svg("rect", {
        class: rgb ? "cell" : "cell null", x: place(x), y: place(y), width: place(cell + 0.3), height: place(cell + 0.3),
        fill: rgb && hex(rgb), role: "gridcell", tabindex: i || j ? -1 : 0, "data-i": i, "data-j": j,
        "aria-label": `${cellName(block, i, j)}: ${facts}${why ? `, undefined: ${why}` : ""}` +
          (rowBest[i] === j ? `, best partner of ${block.rows.model} ${block.rows.layers[i]}` : "") +
          (columnBest[j] === i ? `, best partner of ${block.columns.model} ${block.columns.layers[j]}` : ""),
      });
      line.append(rect);
      cells[i].push(rect);
      const ink = rgb && isDark(rgb) ? "onk" : "onp";
      if (Math.max(rows, columns) <= IN_CELL && value !== null) {
        frames.append(label(x + cell / 2, y + cell / 2 + 4, value.toFixed(2).replace(/^-(?=0\.00$)/, "").replace("-", "\u2212"), `in ${ink}`));
      }
      const inset = cell > 20 ? 2 : 1;
      if (rowBest[i] === j) frames.append(svg("rect", { class: `best ${ink}`, x: place(x + inset), y: place(y + inset), width: place(cell - 2 * inset), height: place(cell - 2 * inset) }));
      if (columnBest[j] === i) frames.append(svg("circle", { class: `dot ${ink}`, cx: place(x + cell - Math.min(7, cell / 2)), cy: place(y + Math.min(7, cell / 2)), r: place(Math.min(2.4, cell / 6)) }));
    });
    body.append(line);
  });
  const picture = svg("svg", {
    class: "heat", viewBox: `0 0 ${place(left + width + 4)} ${place(top + height + 40)}`, role: "grid",
    "aria-label": `${view.title}, ${block.title}, ${panel.state}: ${rows} by ${columns} layers`,
    "aria-rowcount": rows, "aria-colcount": columns, "data-block": block.key, "data-panel": panel.main ? "main" : "beside",
  });
  picture.style.maxWidth = `${Math.ceil(left + width + 4)}px`;
  picture.append(svg("rect", { class: "edge", x: left, y: top, width: place(width), height: place(height) }), body, frames, cursor);
  const every = (k) => Math.max(1, Math.ceil(k / 12));
  for (let i = 0; i < rows; i += every(rows)) picture.append(label(left - 6, top + height - (i + 0.5) * cell + 4, String(block.rows.layers[i]), "ax end"));
  for (let j = 0; j < columns; j += every(columns)) picture.append(label(left + (j + 0.5) * cell, top + height + 16, String(block.columns.layers[j]), "ax mid"));
  picture.append(label(left + width / 2, top + height + 34, `${block.columns.model} layer`, "ax mid"));
  picture.append(svg("text", { class: "ax mid", transform: `translate(12 ${place(top + height / 2)}) rotate(-90)` }, `${block.rows.model} layer`));
  // Listeners sit on an element around it: a drawing that listens for focus would be a stop of the Tab key itself.
  const around = html("div", {}, picture);
  listen(around, cells, cursor, (i, j) => showReadout(view, block, panel, i, j, cells[i][j]));
  return around;
}

function listen(picture, cells, cursor, show) {
  let current = [0, 0];
  const find = (event) => {
    const data = event.target.dataset;
    return data && data.i !== undefined ? [Number(data.i), Number(data.j)] : null;
  };
  const mark = ([i, j]) => {
    cursor.setAttribute("x", cells[i][j].getAttribute("x"));
    cursor.setAttribute("y", cells[i][j].getAttribute("y"));
    cursor.setAttribute("visibility", "visible");
    show(i, j);
  };
  const leave = () => {
    // What has the focus keeps its numbers when the pointer leaves.
    if (picture.contains(document.activeElement)) mark(current);
    else {
      cursor.setAttribute("visibility", "hidden");
      hideReadout();
    }
  };
  picture.addEventListener("pointerover", (event) => { const to = find(event); if (to) mark(to); });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("click", (event) => { const to = find(event); if (to) cells[to[0]][to[1]].focus({ preventScroll: true }); });
  picture.addEventListener("focusin", (event) => {
    const to = find(event);
    if (!to) return;
    cells[current[0]][current[1]].setAttribute("tabindex", -1);
    current = to;
    cells[to[0]][to[1]].setAttribute("tabindex", 0);
    mark(to);
  });
  picture.addEventListener("focusout", () => { cursor.setAttribute("visibility", "hidden"); hideReadout(); });
  picture.addEventListener("keydown", (event) => {
    let [i, j] = current;
    const last = [cells.length - 1, cells[0].length - 1];
    const moves = { ArrowUp: [i + 1, j], ArrowDown: [i - 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1], Home: [i, 0], End: [i, last[1]], PageUp: [last[0], j], PageDown: [0, j] };
    if (event.key === "Escape") {
      hideReadout();
    } else if (moves[event.key]) {
      event.preventDefault();
      [i, j] = moves[event.key].map((k, side) => Math.max(0, Math.min(last[side], k)));
      cells[i][j].focus();
    }
  });
}

function legend(view, mode) {
  const low = mode === "floor" ? -1 : view.scale.low, high = mode === "floor" ? 1 : view.scale.high;
  const left = 14, right = 366, steps = 64, width = (right - left) / steps;
  const x = (v) => left + ((v - low) / (high - low)) * (right - left);
  const bar = svg("g", { class: "cells" });
  for (let k = 0; k < steps; k++) {
    const v = low + ((k + 0.5) / steps) * (high - low);
    bar.append(svg("rect", { x: place(left + k * width), y: 2, width: place(width + 0.5), height: 12, fill: hex(colour(mode === "floor" ? v : share(view.scale, v))) }));
  }
  const picture = svg("svg", { viewBox: "0 0 380 32", role: "img" }, bar);
  const marks = ticks(low, high, 5);
  for (const v of marks.found) picture.append(label(x(v), 28, marks.text(v), "ax mid"));
  const side = view.closer === "lower" ? "lower is more alike" : "higher is more alike";
  const says = mode === "floor" ? "share of the way from the floor (0) to the best possible value (1); below 0, rust: under the floor" : `colour by value, ${side}; hatched: undefined`;
  picture.setAttribute("aria-label", `${says}; from ${number(low)} to ${number(high)}`);
  return html("figure", {}, picture, html("figcaption", {}, says));
}
