// The page's tables. A column: {title, numeric, fromTop, why, of: (row) => value, text: (row) => string}.
function sortable(columns, rows, caption, options = {}) {
  const line = (row) => html("tr", {}, ...columns.map((c, k) =>
    html(k ? "td" : "th", { class: c.numeric ? "num" : c.why ? "why" : null, scope: k ? null : "row" }, c.text ? c.text(row) : String(c.of(row) ?? "\u2013"))));
  const table = html("table", { "aria-label": caption });
  liveTable(table, columns, rows.map((row) => ({ row, keys: columns.map((c) => c.of(row)), line: () => line(row) })), options);
  return table;
}

const figure = (title, of, digits) => ({ title, of, numeric: true, fromTop: true, text: (row) => number(of(row), digits) });

function numbersTable(view, block, controls) {
  const rows = block.values.flatMap((line, i) => line.map((_, j) => ({ i, j })));
  const sides = [
    { title: `${block.rows.model} layer`, of: (r) => block.rows.layers[r.i] },
    { title: `${block.same ? "and layer" : `${block.columns.model} layer`}`, of: (r) => block.columns.layers[r.j] },
  ];
  const columns = [...sides, figure(block.beside ? block.state : "value", (r) => at(block.values, r.i, r.j))];
  if (block.ci) columns.push(figure("95 % from", (r) => (at(block.ci, r.i, r.j) || [null])[0]), figure("to", (r) => (at(block.ci, r.i, r.j) || [null, null])[1]));
  for (const floor of block.floors) {
    columns.push(figure(`floor: ${floor.name}`, (r) => at(floor.values, r.i, r.j)));
    if (floor.p) columns.push(figure("5 % beyond", (r) => at(floor.edge, r.i, r.j)), figure("p", (r) => at(floor.p, r.i, r.j)));
    if (floor.excess) columns.push(figure("above it, 95 % from", (r) => (at(floor.excess, r.i, r.j) || [null])[0]), figure("to", (r) => (at(floor.excess, r.i, r.j) || [null, null])[1]));
  }
  for (const ceiling of block.ceilings) if (ceiling.values) columns.push(figure(ceiling.name, (r) => at(ceiling.values, r.i, r.j)));
  if (block.beside) columns.push(figure(block.beside.state, (r) => at(block.beside.values, r.i, r.j)));
  const why = (r) => block.reasons[`${r.i},${r.j}`] ?? "";
  if (Object.keys(block.reasons).length) columns.push({ title: "why undefined", why: true, of: why, text: why });
  const filters = sides.map(({ title, of }) => ({ title, of: ({ row }) => of(row) }));
  return sortable(columns, rows, `${view.title}, ${block.title}`, { filters, controls });
}

// Both ways: the layers of the first model among those of the second, and the other way round.
function partnerTables(view) {
  const block = view.blocks[0];
  const reverse = view.blocks.find((b) => b.key === "reverse") || block;
  const sides = [{ block, own: block.rows, other: block.columns, get: (m, i, j) => at(m, i, j) }];
  if (!block.same) sides.push({ block: reverse, own: block.columns, other: block.rows, get: (m, i, j) => at(m, j, i) });
  return sides.map(({ block: from, own, other, get }) => {
    const rows = own.layers.map((layer, i) => {
      const values = other.layers.map((_, j) => get(from.values, i, j));
      const j = best(values, view.closer, block.same ? i : -1);
      const second = j < 0 ? -1 : best(values.map((v, k) => (k === j ? null : v)), view.closer, block.same ? i : -1);
      return {
        layer, partner: j < 0 ? null : other.layers[j], value: j < 0 ? null : values[j],
        ends: j < 0 ? null : get(from.ci, i, j), lead: second < 0 ? null : Math.abs(values[j] - values[second]),
        floor: j < 0 || !from.floors.length ? null : get(from.floors[0].values, i, j),
      };
    });
    const columns = [
      { title: `${own.model} layer`, of: (r) => r.layer },
      { title: block.same ? "closest other layer" : `closest ${other.model} layer`, of: (r) => r.partner },
      figure("value", (r) => r.value),
    ];
    if (from.ci) columns.push({ title: "95 % interval", of: (r) => (r.ends ? r.ends[0] : null), fromTop: true, text: (r) => interval(r.ends) || "\u2013" });
    if (from.floors.length) columns.push(figure(`floor`, (r) => r.floor));
    columns.push(figure("ahead of the next by", (r) => r.lead));
    const title = html("figcaption", {}, html("b", {}, own.model), block.same ? "" : ` among the layers of ${other.model}`);
    return html("figure", {}, title, html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Partners of ${own.model}` }, sortable(columns, rows, `Best partners of the layers of ${own.model}`)));
  });
}

function rankTable() {
  const rows = DATA.models.flatMap((model) => DATA.layers[model].map((layer) => ({ model, layer, ...((DATA.rank[model] || {})[layer] || {}) })));
  return sortable([
    { title: "model", of: (r) => r.model }, { title: "layer", of: (r) => r.layer },
    figure("entropy", (r) => r.entropy ?? null, 1), figure("participation ratio", (r) => r.participation ?? null, 1),
  ], rows, "Effective rank");
}
