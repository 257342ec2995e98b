// What the selectors change.
let view = DATA.views[0];

function drawn(spec) {
  const node = html("span", { class: `chart ${spec.kind}` });
  SPECS.set(node, spec);
  return node;
}

function panels(block) {
  const own = { main: true, values: block.values, reasons: block.reasons, state: block.state, n: view.n };
  return block.beside ? [own, { main: false, ...block.beside }] : [own];
}

function drawMaps() {
  const mode = $("colours").value;
  hideReadout();
  $("legend").replaceChildren(scaleOf(view, mode));
  $("heats").className = view.blocks.some((block) => block.beside) ? "" : "grid";
  $("heats").replaceChildren(...view.blocks.map((block) => {
    const grid = html("div", { class: "grid" });
    const whole = html("div", { class: "block" }, html("h3", {}, block.title), grid);
    if (mode === "floor" && !block.floors.length) {
      grid.append(html("p", { class: "gap" }, "No floor was computed here; colours by value show this block."));
      return whole;
    }
    for (const panel of panels(block)) {
      const rows = panel.n ? `, ${count(panel.n)} rows` : "";
      grid.append(html("figure", {}, html("figcaption", {}, html("b", {}, panel.state), rows), drawn(mapOf(view, block, panel, mode))));
    }
    return whole;
  }));
  drawCharts($("heats"));
}

function drawTable() {
  const block = view.blocks.find((b) => b.key === $("block").value);
  $("table-filters").replaceChildren();
  $("table").replaceChildren(numbersTable(view, block, $("table-filters")));
}

function draw() {
  view = DATA.views.find((v) => v.id === $("measure").value);
  const rows = view.n ? `${view.title}: ${view.rows_text}, ${count(view.n)}. ` : `${view.title}. `;
  const side = view.closer === "lower" ? "It is a distance: 0 is most alike. " : "";
  const ways = view.symmetric ? "" : "It differs with the direction: an arrow leads from the first layer to the second. ";
  $("about").textContent = rows + side + ways;
  const floors = view.blocks.some((block) => block.floors.length);
  $("colours").options[1].disabled = !floors;
  if (!floors) $("colours").value = "value";
  $("block").replaceChildren(...view.blocks.map((block) => html("option", { value: block.key }, block.title)));
  drawMaps();
  drawTable();
  $("profile").replaceChildren(drawn(profile(view)));
  drawCharts($("profile"));
  $("partner-tables").replaceChildren(...partnerTables(view));
}

$("measure").addEventListener("change", draw);
$("colours").addEventListener("change", drawMaps);
$("block").addEventListener("change", drawTable);
draw();
if (DATA.rank) {
  $("ranks").append(drawn(ranks()));
  $("rank-table").replaceChildren(rankTable());
}
liven(document);
