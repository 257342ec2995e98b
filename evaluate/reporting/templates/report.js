"use strict";
// Every mark says its value beside the pointer, under the finger and from the keyboard; tables sort by their headings.
(() => {
  const readout = document.getElementById("readout");
  const NEAR = 28;
  let shown = null;

  // A point of a line is its marker, not the whisker through it.
  const box = (mark) => (mark.querySelector("circle, polygon") ?? mark).getBoundingClientRect();
  const centre = (mark) => {
    const b = box(mark);
    return [b.x + b.width / 2, b.y + b.height / 2];
  };

  function hide() {
    if (!shown) return;
    shown.classList.remove("on");
    shown.ownerSVGElement.querySelector(".cursor")?.remove();
    shown = null;
    readout.hidden = true;
  }

  function say(text) {
    const parts = /^(.*): (\u2013.*|[\u2212\d].*)$/s.exec(text);
    const value = document.createElement("b");
    value.textContent = parts ? parts[2] : text;
    readout.replaceChildren(value, ...(parts ? [parts[1]] : []));
  }

  function show(mark) {
    if (mark === shown) return;
    hide();
    shown = mark;
    mark.classList.add("on");
    if (mark.tagName === "rect") {
      const cursor = document.createElementNS(mark.namespaceURI, "rect");
      for (const name of ["x", "y", "width", "height"]) cursor.setAttribute(name, mark.getAttribute(name));
      cursor.setAttribute("class", "cursor");
      mark.ownerSVGElement.append(cursor);
    }
    say(mark.dataset.say);
    place();
  }

  function place() {
    if (!shown) return;
    readout.hidden = false; // it has a size only while it shows
    const [around, own] = [box(shown), readout.getBoundingClientRect()];
    // A mark that scrolled out of view keeps its place, and speaks again when it is back.
    readout.hidden = around.bottom < 0 || around.top > innerHeight;
    const wanted = around.x + around.width / 2 - own.width / 2;
    const left = Math.max(8, Math.min(wanted, document.documentElement.clientWidth - own.width - 8));
    const above = around.top - own.height - 10;
    readout.style.left = `${left}px`;
    readout.style.top = `${above >= 8 ? above : around.bottom + 10}px`;
  }

  function nearest(marks, event) {
    const under = event.target.closest(".m, .cells rect");
    if (under && marks.includes(under)) return under;
    let [best, least] = [null, NEAR];
    for (const mark of marks) {
      if (mark.tagName === "rect") continue;
      const [x, y] = centre(mark);
      const far = Math.hypot(x - event.clientX, y - event.clientY);
      if (far < least) [best, least] = [mark, far];
    }
    return best;
  }

  // The next mark in a direction: the closest along it, sideways steps counting more.
  function next(marks, from, [dx, dy]) {
    const [x, y] = centre(from);
    let [best, least] = [from, Infinity];
    for (const mark of marks) {
      const [mx, my] = centre(mark);
      const along = (mx - x) * dx + (my - y) * dy;
      const across = Math.abs((mx - x) * dy) + Math.abs((my - y) * dx);
      if (along > 0.5 && along + 3 * across < least) [best, least] = [mark, along + 3 * across];
    }
    return best;
  }

  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  for (const plot of document.querySelectorAll("svg[role=img]")) {
    const marks = [...plot.querySelectorAll(".m, .cells rect")].filter((mark) => mark.querySelector("title"));
    if (!marks.length) continue;
    for (const mark of marks) {
      // The browser's own hint would lie over the readout.
      const title = mark.querySelector("title");
      mark.dataset.say = title.textContent;
      title.remove();
    }
    plot.setAttribute("tabindex", "0");
    const follow = (event) => {
      const mark = nearest(marks, event);
      if (mark) show(mark);
      else hide();
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    plot.addEventListener("focus", () => shown?.ownerSVGElement === plot || show(marks[0]));
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      if (!STEPS[event.key]) return;
      event.preventDefault();
      const here = shown?.ownerSVGElement === plot ? shown : marks[0];
      show(next(marks, here, STEPS[event.key]));
    });
  }
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
  // Not every browser gives a tapped plot the focus, and so takes it away.
  addEventListener("pointerdown", (event) => event.target.closest("svg[role=img]") || hide());
  // Focus scrolls a plot into view after its first mark is shown: the readout goes with the mark.
  addEventListener("scroll", place, { capture: true, passive: true });
  addEventListener("resize", place);

  const value = (row, i) => row.cells[i].dataset.sort ?? "";
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("th[scope=col]").forEach((head, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const numeric = head.classList.contains("num");
        const sorted = head.getAttribute("aria-sort");
        const down = sorted ? sorted === "ascending" : numeric;
        table.querySelectorAll("th[scope=col]").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const compare = (a, b) => {
          const [x, y] = [value(a, i), value(b, i)];
          // What has no value stays below, whichever way the table is sorted.
          if (x === "" || y === "") return (x === "") - (y === "");
          const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
          return down ? -order : order;
        };
        body.append(...[...body.rows].sort(compare));
      });
    });
  }
  document.querySelectorAll(".scripted").forEach((hint) => { hint.hidden = false; });
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
