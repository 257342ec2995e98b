// Every mark of a drawing says its numbers beside the pointer, under the finger and from the arrow keys.
const READOUT = $("readout");
const NEAR = 28;
let reading = null;

function hideReadout() {
  if (!reading) return;
  reading.node.classList.remove("on");
  reading.cursor?.remove();
  reading = null;
  READOUT.hidden = true;
}

function placeReadout() {
  if (!reading) return;
  READOUT.hidden = false; // it has a size only while it shows
  const [mark, own] = [reading.node.getBoundingClientRect(), READOUT.getBoundingClientRect()];
  // A mark that scrolled out of view keeps its place, and speaks again when it is back.
  READOUT.hidden = mark.bottom < 0 || mark.top > innerHeight;
  // Beside the mark, inside the window; narrow windows have it at the end away from the mark, by the style.
  READOUT.classList.toggle("up", mark.top > innerHeight / 2);
  const right = mark.right + 10 + own.width < innerWidth ? mark.right + 10 : Math.max(8, mark.left - own.width - 10);
  READOUT.style.left = `${right}px`;
  READOUT.style.top = `${Math.max(8, Math.min(mark.top, innerHeight - own.height - 8))}px`;
}

function showReadout(mark) {
  if (mark !== reading) {
    hideReadout();
    reading = mark;
    mark.node.classList.add("on");
    if (mark.cell) {
      // Above its neighbours, which would cover half of an outline.
      const box = Object.fromEntries(["x", "y", "width", "height"].map((name) => [name, mark.node.getAttribute(name)]));
      mark.cursor = svg("rect", { class: "cursor", ...box, transform: mark.node.parentNode.getAttribute("transform") });
      mark.node.ownerSVGElement.append(mark.cursor);
    }
    READOUT.replaceChildren(...mark.read());
  }
  placeReadout();
}

const middle = (mark) => {
  const box = mark.node.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
};

function nearest(marks, event) {
  const under = marks.find((mark) => mark.node === event.target);
  if (under || marks[0].cell) return under;
  let [found, least] = [null, NEAR];
  for (const mark of marks) {
    const [x, y] = middle(mark);
    const far = Math.hypot(x - event.clientX, y - event.clientY);
    if (far < least) [found, least] = [mark, far];
  }
  return found;
}

// The next mark in a direction: the closest along it, sideways steps counting more.
function next(marks, from, [dx, dy]) {
  const [x, y] = middle(from);
  let [found, least] = [from, Infinity];
  for (const mark of marks) {
    const [mx, my] = middle(mark);
    const along = (mx - x) * dx + (my - y) * dy;
    const across = Math.abs((mx - x) * dy) + Math.abs((my - y) * dx);
    if (along > 0.5 && along + 3 * across < least) [found, least] = [mark, along + 3 * across];
  }
  return found;
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
// Of cells the place decides: a row further up is a later one.
function beside(marks, from, key) {
  const width = marks[marks.length - 1].j + 1, height = marks.length / width;
  const to = { ArrowUp: [from.i + 1, from.j], ArrowDown: [from.i - 1, from.j], ArrowLeft: [from.i, from.j - 1], ArrowRight: [from.i, from.j + 1], Home: [from.i, 0], End: [from.i, width - 1], PageUp: [height - 1, from.j], PageDown: [0, from.j] }[key];
  if (!to) return null;
  const [i, j] = [Math.max(0, Math.min(height - 1, to[0])), Math.max(0, Math.min(width - 1, to[1]))];
  return marks[i * width + j];
}

// marks: [{node, says, read, cell, i, j}]; a drawing is one stop of the Tab key. Listeners sit on an element around it:
// a drawing that listens for focus would be a stop itself.
function listen(around, marks) {
  if (!marks.length) return;
  let current = marks[0];
  for (const mark of marks) fill(mark.node, { tabindex: mark === current ? 0 : -1, "aria-label": mark.says, role: mark.cell ? "gridcell" : "img" });
  const leave = () => {
    // What has the focus keeps its numbers when the pointer leaves.
    if (around.contains(document.activeElement) && document.activeElement !== document.body) showReadout(current);
    else if (marks.includes(reading)) hideReadout();
  };
  const follow = (event) => {
    const mark = nearest(marks, event);
    if (mark) showReadout(mark);
    else leave();
  };
  around.addEventListener("pointermove", follow);
  around.addEventListener("pointerdown", follow);
  around.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && leave());
  // Not every browser gives the focus to what is tapped.
  around.addEventListener("click", (event) => { if (event.target.tabIndex >= -1 && marks.some((mark) => mark.node === event.target)) event.target.focus({ preventScroll: true }); });
  around.addEventListener("focusin", (event) => {
    const mark = marks.find((one) => one.node === event.target);
    if (!mark) return;
    current.node.setAttribute("tabindex", -1);
    current = mark;
    mark.node.setAttribute("tabindex", 0);
    showReadout(mark);
  });
  around.addEventListener("focusout", hideReadout);
  around.addEventListener("keydown", (event) => {
    const to = current.cell ? beside(marks, current, event.key) : STEPS[event.key] && next(marks, current, STEPS[event.key]);
    if (!to) return;
    event.preventDefault();
    to.node.focus();
  });
}

addEventListener("keydown", (event) => event.key === "Escape" && hideReadout());
addEventListener("pointerdown", (event) => event.target.closest?.(".chart, .drawn") || hideReadout());
addEventListener("scroll", placeReadout, { capture: true, passive: true });
