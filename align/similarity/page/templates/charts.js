// Line charts. A line is told by its marker and its dashes as well as by its colour.
const STYLES = [
  { mark: "circle", dash: null }, { mark: "square", dash: "7 3" }, { mark: "triangle", dash: "2 3" },
  { mark: "diamond", dash: "9 3 2 3" }, { mark: "cross", dash: "1 4" },
];

function marker(kind, x, y) {
  const p = place;
  if (kind === "circle") return svg("circle", { class: "mark", cx: p(x), cy: p(y), r: 3.6 });
  if (kind === "square") return svg("rect", { class: "mark hollow", x: p(x - 3.2), y: p(y - 3.2), width: 6.4, height: 6.4 });
  if (kind === "triangle") return svg("path", { class: "mark", d: `M${p(x)} ${p(y - 4)}L${p(x + 4)} ${p(y + 3.4)}L${p(x - 4)} ${p(y + 3.4)}Z` });
  if (kind === "diamond") return svg("path", { class: "mark hollow", d: `M${p(x)} ${p(y - 4.4)}L${p(x + 4.4)} ${p(y)}L${p(x)} ${p(y + 4.4)}L${p(x - 4.4)} ${p(y)}Z` });
  return svg("path", { d: `M${p(x - 3)} ${p(y - 3)}L${p(x + 3)} ${p(y + 3)}M${p(x - 3)} ${p(y + 3)}L${p(x + 3)} ${p(y - 3)}` });
}

// series: [{name, points: [{x, y, ends, says}], bare}]; a missing y breaks the line.
function lineChart(series, title, axes) {
  const points = series.flatMap((s) => s.points).filter((p) => p.y !== null);
  if (!points.length) return html("p", { class: "gap" }, "Nothing to draw: every value is undefined.");
  const ys = points.flatMap((p) => [p.y, ...(p.ends || [])]);
  let low = Math.min(0, ...ys), high = Math.max(...ys);
  if (high === low) high = low + 1;
  const pad = 0.04 * (high - low);
  low -= low < 0 ? pad : 0;
  high += pad;
  // As wide as there is room, so that the lettering keeps its size on a phone.
  const W = Math.max(300, Math.min(680, document.getElementById("depth").clientWidth)), H = 300, left = 52, right = W - 12, top = 10, bottom = H - 44;
  const px = (x) => left + 8 + x * (right - left - 16);
  const py = (y) => bottom - ((y - low) / (high - low)) * (bottom - top);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}. The same numbers are in the tables of this page.` });
  const marks = ticks(low, high, 5);
  for (const v of marks.found) picture.append(svg("line", { class: "tick", x1: left, x2: right, y1: place(py(v)), y2: place(py(v)) }), label(left - 6, py(v) + 4, marks.text(v), "ax end"));
  for (let k = 0; k <= 5; k++) picture.append(label(px(k / 5), bottom + 17, (k / 5).toFixed(1), "ax mid"));
  picture.append(label((left + right) / 2, H - 8, axes[0], "ax mid"), svg("text", { class: "ax mid", transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)` }, axes[1]));
  series.forEach((one, k) => {
    const style = STYLES[k % STYLES.length];
    const group = svg("g", { class: `s s${k % STYLES.length}`, "data-series": one.name });
    let path = "", drawing = false;
    for (const p of one.points) {
      if (p.y !== null) path += `${drawing ? "L" : "M"}${place(px(p.x))} ${place(py(p.y))}`;
      drawing = p.y !== null;
    }
    group.append(svg("path", { d: path, "stroke-dasharray": style.dash }));
    for (const p of one.points) {
      if (p.y === null) continue;
      if (p.ends) group.append(svg("line", { class: "whisker", x1: place(px(p.x)), x2: place(px(p.x)), y1: place(py(p.ends[0])), y2: place(py(p.ends[1])) }));
      group.append(fill(marker(style.mark, px(p.x), py(p.y)), {}, [svg("title", {}, p.says)]));
    }
    picture.append(group);
  });
  const keys = html("ul", { class: "keys" });
  series.forEach((one, k) => {
    const style = STYLES[k % STYLES.length];
    const sample = svg("svg", { viewBox: "0 0 34 14", "aria-hidden": "true" }, svg("g", { class: `s s${k % STYLES.length}` },
      svg("line", { x1: 1, x2: 33, y1: 7, y2: 7, "stroke-dasharray": style.dash }), marker(style.mark, 17, 7)));
    keys.append(html("li", {}, sample, one.name));
  });
  return html("figure", { class: "chart" }, picture, keys);
}

const depth = (layers, k) => (Math.max(...layers) > 0 ? layers[k] / Math.max(...layers) : 0);

// The column at the nearest relative depth, the first of equals; within one model the next layer; -1 for none.
function sameDepth(block, i) {
  if (block.same) return i + 1 < block.columns.layers.length ? i + 1 : -1;
  const target = depth(block.rows.layers, i);
  let found = 0;
  block.columns.layers.forEach((_, j) => {
    const [now, then] = [j, found].map((k) => Math.abs(depth(block.columns.layers, k) - target));
    if (now < then - 1e-12) found = j;
  });
  return found;
}

function profile(view) {
  const block = view.blocks[0];
  const along = (choose, values, ci, name) => ({
    name,
    points: block.rows.layers.map((_, i) => {
      const j = choose(i);
      const y = j < 0 ? null : at(values, i, j);
      const ends = j < 0 || y === null ? null : at(ci, i, j);
      return { x: depth(block.rows.layers, i), y, ends, says: j < 0 ? "" : `${cellName(block, i, j)}: ${number(y)}${ends ? ` ${interval(ends)}` : ""}` };
    }),
  });
  const same = (i) => sameDepth(block, i);
  const closest = (i) => best(block.values[i], view.closer, block.same ? i : -1);
  const series = [
    along(same, block.values, block.ci, block.same ? "the next layer" : "at the nearest depth"),
    along(closest, block.values, block.ci, "best partner"),
  ];
  block.floors.forEach((floor) => series.push(along(same, floor.values, null, `floor: ${floor.name}`)));
  if (block.beside) series.push(along(same, block.beside.values, null, block.beside.state));
  const kept = series.filter((one) => one.points.some((p) => p.y !== null));
  return lineChart(kept, `${view.title} by relative depth of ${block.rows.model}`, [`relative depth in ${block.rows.model}`, view.title]);
}

function ranks() {
  const series = [];
  for (const model of DATA.models) {
    for (const [kind, name] of [["entropy", "entropy"], ["participation", "participation ratio"]]) {
      series.push({
        name: `${model}, ${name}`,
        points: DATA.layers[model].map((layer, k) => {
          const y = ((DATA.rank[model] || {})[layer] || {})[kind] ?? null;
          return { x: depth(DATA.layers[model], k), y, says: `${model} ${layer}: ${number(y, 1)}` };
        }),
      });
    }
  }
  return lineChart(series, "Effective rank by relative depth", ["relative depth", "effective rank"]);
}
