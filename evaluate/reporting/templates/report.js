// What the report adds: where every figure comes from, and the table of all maps of a large one.
function origin(figure) {
  const [file, path] = figure.dataset.from.split("#");
  const keys = path.split("/").slice(1).map((key) => key.replaceAll("~1", "/").replaceAll("~0", "~"));
  return `${figure.value} in ${file} \u203a ${keys.join(" \u203a ")}`;
}
for (const event of ["pointerover", "focusin"]) {
  addEventListener(event, ({ target }) => {
    const figure = target.closest?.("data") ?? target.querySelector?.(":scope > data");
    if (figure && !figure.title) figure.title = origin(figure);
  });
}

function everyMap({ columns, words, rows }) {
  const heads = columns.map(([title, numeric]) => ({ title, numeric, fromTop: numeric }));
  const place = (name) => columns.findIndex(([title]) => title === name);
  const of = (row, i) => (columns[i][1] ? row[i] : words[row[i]]);
  const cell = (row, [, numeric], i) => html("td", numeric ? { class: "num" } : {}, numeric ? number(of(row, i)) : of(row, i));
  const filters = BY.map((name) => ({ title: name, of: ({ row }) => of(row, place(name)) }));
  const lines = rows.map((row) => ({ row, keys: columns.map((_, i) => of(row, i)), line: () => html("tr", {}, ...columns.map((column, i) => cell(row, column, i))) }));
  liveTable($("every-table"), heads, lines, { filters, step: 100, search: true, controls: $("every-controls") });
}
if ($("every-map")) {
  $("every-maps").addEventListener("toggle", () => everyMap(JSON.parse($("every-map").textContent)), { once: true });
}
$("unfold").addEventListener("click", unfoldAll);
document.querySelectorAll(".scripted").forEach((part) => { part.hidden = false; });
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
liven(document);
