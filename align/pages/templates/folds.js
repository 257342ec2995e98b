// What is folded away travels packed, and is unpacked and drawn where it is opened.
async function unpacked(block) {
  const bytes = Uint8Array.from(atob(block.textContent), (sign) => sign.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
}

async function unfold(details) {
  for (const block of details.querySelectorAll("script[type='application/zlib']")) {
    // Folds inside folds wait for their own turn.
    if (block.closest("details") !== details || block.dataset.taken) continue;
    block.dataset.taken = "yes";
    const text = await unpacked(block);
    block.insertAdjacentHTML("afterend", text);
    block.remove();
  }
  liven(details);
}

function liven(root) {
  for (const details of root.querySelectorAll("details:not(.live)")) {
    details.classList.add("live");
    details.addEventListener("toggle", () => details.open && unfold(details));
    if (details.open) unfold(details);
  }
  root.querySelectorAll("table.sortable:not(.live)").forEach(sortRows);
  drawCharts(root);
}

let lastWidth = innerWidth;
addEventListener("resize", () => {
  hideReadout();
  // A phone's address bar changes the height all the time; drawings follow the width alone.
  if (innerWidth !== lastWidth) drawCharts(document);
  lastWidth = innerWidth;
});

// For paper, and for the browser's own search: everything unpacked, unfolded and drawn.
async function unfoldAll() {
  for (let closed; (closed = document.querySelector("details:not([open])")); ) {
    closed.open = true;
    await unfold(closed);
  }
}
