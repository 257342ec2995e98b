// Tables that sort by their headings, filter by what stands above them, and show a screenful of many rows at a time.
// heads: [{title, hint, numeric, fromTop, why}]; rows: [{keys: sort key of each column, line: () => its <tr>}];
// filters: [{title, of: (row) => value}]; search: whether words can be looked for.
function liveTable(table, heads, rows, { filters = [], step = Infinity, search = false, controls = null } = {}) {
  const body = table.tBodies[0] ?? table.appendChild(html("tbody"));
  const line = table.tHead?.rows[0] ?? table.createTHead().insertRow();
  const wanted = new Map();
  let [all, found, first, by, down, words] = [rows, rows, 0, -1, false, []];
  const bar = html("span", { class: "filters" });
  const says = html("span", { role: "status" });
  const [back, on] = ["back", "on"].map((text) => html("button", { type: "button" }, text));

  const missing = (v) => v === null || v === undefined || v === "";
  function order(p, q) {
    const [a, b] = [p.keys[by], q.keys[by]];
    // What is missing stays at the end whichever way it is sorted.
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const [x, y] = [Number(a), Number(b)];
    const way = heads[by].numeric || typeof a === "number" ? x - y : String(a).localeCompare(String(b), undefined, { numeric: true });
    return down ? -way : way;
  }
  function lay() {
    body.replaceChildren(...found.slice(first, first + step).map((row) => (row.made ??= row.line())));
    const last = Math.min(first + step, found.length);
    says.textContent = !found.length ? "no row is like that" : found.length > step ? `${first + 1} to ${last} of ${count(found.length)}` : found.length < all.length ? `${count(found.length)} of ${count(all.length)}` : "";
    back.hidden = on.hidden = found.length <= step;
    [back.disabled, on.disabled] = [first === 0, last >= found.length];
    drawCharts(body);
  }
  function pick() {
    const like = ([filter, value]) => value === "" || ((row) => String(filter.of(row)) === value);
    const tests = [...wanted].map(like).filter((test) => test !== true);
    found = all.filter((row) => tests.every((test) => test(row)) && words.every((word) => row.keys.join(" ").toLowerCase().includes(word)));
    if (by >= 0) found.sort(order);
    first = 0;
    lay();
  }
  function choices() {
    bar.replaceChildren();
    for (const filter of filters) {
      const values = [...new Set(all.map(filter.of))].filter((v) => !missing(v));
      if (values.length < 2) continue;
      values.sort((a, b) => String(a).localeCompare(String(b), undefined, { numeric: true }));
      const select = html("select", {}, html("option", { value: "" }, "all"), ...values.map((v) => html("option", { value: v }, v)));
      select.value = values.map(String).includes(wanted.get(filter)) ? wanted.get(filter) : "";
      wanted.set(filter, select.value);
      select.addEventListener("change", () => { wanted.set(filter, select.value); pick(); });
      bar.append(html("label", {}, filter.title, select));
    }
    if (search) {
      const input = html("input", { type: "search", value: words.join(" ") });
      input.addEventListener("input", () => { words = input.value.toLowerCase().split(/\s+/).filter(Boolean); pick(); });
      bar.append(html("label", {}, "only rows with", input));
    }
    bar.append(says, back, on);
  }

  heads.forEach((head, i) => {
    const cell = line.cells[i] ?? line.appendChild(html("th", { scope: "col", class: head.numeric ? "num" : null, title: head.hint }, head.title));
    const button = html("button", { type: "button" });
    button.append(...cell.childNodes);
    cell.append(button);
    cell.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      // Numbers first from the highest, words and layers from the lowest.
      down = by === i ? !down : Boolean(head.fromTop ?? head.numeric);
      by = i;
      for (const other of line.cells) other.setAttribute("aria-sort", "none");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      pick();
    });
  });
  back.addEventListener("click", () => { first = Math.max(0, first - step); lay(); });
  on.addEventListener("click", () => { first += step; lay(); });
  choices();
  if (controls) controls.append(bar);
  lay();
  return { table, replace: (more) => { all = more; choices(); pick(); } };
}

// Rows that stand in the page already, with what they sort by and are filtered by.
const standing = (rows) => [...rows].map((row) => ({ keys: [...row.cells].map((cell) => cell.dataset.sort ?? ""), line: () => row, of: row.dataset }));
const BY = ["type", "direction", "layer"];

async function sortRows(table) {
  table.classList.add("live");
  const heads = [...table.tHead.rows[0].cells].map((cell) => ({ numeric: cell.classList.contains("num") }));
  const filters = table.dataset.controls ? BY.map((name) => ({ title: name, of: (row) => row.of[name] })) : [];
  const controls = table.dataset.controls ? $(table.dataset.controls) : null;
  const block = table.parentNode.querySelector("script[type='application/zlib']");
  let every = standing(table.tBodies[0].rows), rows = every;
  if (block) {
    // A board shows its maps; all rows, those that stand beside them too, travel packed.
    const holder = html("template");
    holder.innerHTML = await unpacked(block);
    block.remove();
    every = standing(holder.content.querySelectorAll("tr"));
    rows = every.filter((row) => row.line().className === "map");
  }
  const live = liveTable(table, heads, rows, { filters, controls, step: Number(table.dataset.step) || Infinity });
  const beside = table.dataset.beside ? $(table.dataset.beside) : null;
  beside?.addEventListener("change", () => live.replace(beside.checked ? every : rows));
}
