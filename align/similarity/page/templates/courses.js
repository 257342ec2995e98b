// Courses over relative depth: the measure of a view, and the effective ranks.
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

const told = (name, text) => ({ says: `${name}: ${text}`, read: () => [html("b", {}, text), name] });
const course = (series, label, axes) => {
  const kept = series.filter(([, points]) => points.some(([, y]) => y !== null));
  const ys = kept.flatMap(([, points]) => points.flatMap((p) => p.slice(1, 4))).filter((v) => v !== null);
  const low = Math.min(0, ...ys), high = Math.max(low + 1e-9, ...ys), pad = 0.04 * (high - low);
  return {
    kind: "lines", label: `${label}. The same numbers are in the tables of this page.`, axes, references: [], verticals: [], log: false,
    height: 300, ticks: [0, 0.2, 0.4, 0.6, 0.8, 1], from: [low - (low < 0 ? pad : 0), high + pad],
    series: kept.map(([name, points], k) => [name, k % 5, points]),
  };
};

function profile(view) {
  const block = view.blocks[0];
  const along = (choose, values, ci, name) => [name, block.rows.layers.map((_, i) => {
    const j = choose(i);
    const y = j < 0 ? null : at(values, i, j);
    const ends = j < 0 || y === null ? null : at(ci, i, j);
    const text = `${number(y)}${ends ? ` ${interval(ends)}` : ""}`;
    return [depth(block.rows.layers, i), y, ends ? ends[0] : null, ends ? ends[1] : null, "", j < 0 ? null : told(cellName(block, i, j), text)];
  })];
  const same = (i) => sameDepth(block, i);
  const closest = (i) => best(block.values[i], view.closer, block.same ? i : -1);
  const series = [
    along(same, block.values, block.ci, block.same ? "the next layer" : "at the nearest depth"),
    along(closest, block.values, block.ci, "best partner"),
  ];
  block.floors.forEach((floor) => series.push(along(same, floor.values, null, `floor: ${floor.name}`)));
  if (block.beside) series.push(along(same, block.beside.values, null, block.beside.state));
  return course(series, `${view.title} by relative depth of ${block.rows.model}`, [`relative depth in ${block.rows.model}`, view.title]);
}

function ranks() {
  const series = DATA.models.flatMap((model) => [["entropy", "entropy"], ["participation", "participation ratio"]].map(([kind, name]) => [
    `${model}, ${name}`,
    DATA.layers[model].map((layer, k) => {
      const y = ((DATA.rank[model] || {})[layer] || {})[kind] ?? null;
      return [depth(DATA.layers[model], k), y, null, null, "", told(`${model} ${layer}`, number(y, 1))];
    }),
  ]));
  return course(series, "Effective rank by relative depth", ["relative depth", "effective rank"]);
}
