// What the page has to say of a cell: its data, its floors and ceilings, the figures beside it.
const DATA = JSON.parse($("data").textContent);

function aboveFloor(view, value, floor) {
  const top = view.closer === "lower" ? Math.min(0, view.scale.low) : view.scale.high;
  return top === floor ? null : (value - floor) / (top - floor);
}

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
    const written = (value) => (value === null ? "\u2013" : typeset(String(Number(value.toPrecision(4)))));
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

// A block of a view as a drawing; mode: colours by value, or above the floor.
function mapOf(view, block, panel, mode) {
  const says = (i, j) => `${view.title} ${number(at(panel.values, i, j))}`;
  const floorAt = (i, j) => (panel.main && block.floors.length ? at(block.floors[0].values, i, j) : null);
  const above = (value, i, j) => (floorAt(i, j) === null ? null : aboveFloor(view, value, floorAt(i, j)));
  return {
    kind: "heat", label: `${view.title}, ${block.title}, ${panel.state}: ${block.rows.layers.length} by ${block.columns.layers.length} layers`,
    rows: block.rows, columns: block.columns, same: block.same, values: panel.values, scale: view.scale, reasons: panel.reasons,
    // Within a model the neighbour is closest, which needs no mark.
    marked: !block.key.startsWith("within"),
    shade: mode === "floor" ? above : null,
    aside: (i, j, why) => says(i, j) + (why ? `, undefined: ${why}` : ""),
    facts: (i, j) => {
      const why = at(panel.values, i, j) === null ? panel.reasons[`${i},${j}`] || "undefined; no reason is given" : null;
      const list = cellFacts(view, block, panel, i, j).flatMap(([name, value], k) => [html("dt", {}, name), html("dd", k ? {} : { class: "first" }, value)]);
      return [html("b", {}, `${cellName(block, i, j)}, ${panel.state}`), html("dl", {}, ...list), ...(why ? [html("p", {}, `Undefined: ${why}`)] : [])];
    },
    data: { "data-block": block.key, "data-panel": panel.main ? "main" : "beside" },
  };
}

function scaleOf(view, mode) {
  const side = view.closer === "lower" ? "lower is more alike" : "higher is more alike";
  if (mode !== "floor") return legend(view.scale, 380, `colour by value, ${side}; hatched: undefined`);
  return legend({ low: -1, high: 1, closer: "higher" }, 380, "share of the way from the floor (0) to the best possible value (1); below 0, rust: under the floor");
}
