// All maps from the page's data block: a screenful of rows is laid out at a time, sorted and filtered as asked.
(() => {
  const STEP = 100;
  const { columns, words, rows } = JSON.parse(document.getElementById("every-map").textContent);
  const part = (name) => document.getElementById(`every-${name}`);
  const [table, search, count, back, on] = ["table", "search", "count", "back", "on"].map(part);
  const cell = (row, i) => (columns[i][1] ? row[i] : words[row[i]]);
  let [found, first, by, down] = [rows, 0, -1, false];

  function lay() {
    const lines = found.slice(first, first + STEP).map((row) => {
      const line = document.createElement("tr");
      columns.forEach(([, number], i) => {
        const value = cell(row, i);
        const place = line.insertCell();
        if (number) place.className = "num";
        place.textContent = value === null ? "\u2013" : number ? value.toFixed(3).replace("-", "\u2212") : value;
      });
      return line;
    });
    table.tBodies[0].replaceChildren(...lines);
    const last = Math.min(first + STEP, found.length);
    count.textContent = found.length ? `${first + 1} to ${last} of ${found.length}` : "no map has these words";
    back.disabled = first === 0;
    on.disabled = last >= found.length;
  }

  function pick() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const said = (row) => columns.map(([, number], i) => (number ? "" : words[row[i]])).join(" ").toLowerCase();
    found = wanted.length ? rows.filter((row) => { const text = said(row); return wanted.every((w) => text.includes(w)); }) : [...rows];
    if (by >= 0) {
      const order = (x, y) => (columns[by][1] ? x - y : x.localeCompare(y, undefined, { numeric: true }));
      found.sort((a, b) => {
        const [x, y] = [cell(a, by), cell(b, by)];
        // What has no value stays below, whichever way the table is sorted.
        if (x === null || y === null) return (x === null) - (y === null);
        return down ? -order(x, y) : order(x, y);
      });
    }
    first = 0;
    lay();
  }

  columns.forEach(([title, number], i) => {
    const head = document.createElement("th");
    head.scope = "col";
    if (number) head.className = "num";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    button.addEventListener("click", () => {
      down = by === i ? !down : number;
      by = i;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      pick();
    });
    head.append(button);
    table.tHead.rows[0].append(head);
  });
  search.addEventListener("input", pick);
  back.addEventListener("click", () => { first = Math.max(0, first - STEP); lay(); });
  on.addEventListener("click", () => { first += STEP; lay(); });
  part("maps").addEventListener("toggle", () => table.tBodies[0].rows.length || lay());
})();
