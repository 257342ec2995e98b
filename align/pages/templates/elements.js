// What the other parts share: elements, numbers, colours.
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const child of children || []) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}
const html = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const typeset = (text) => text.replace("-", "\u2212");
// As words.number: more digits where rounding would claim exactly 0, 1 or -1; a true minus.
function number(value, digits = 3) {
  if (value === null || value === undefined) return "\u2013";
  let text = value.toFixed(digits);
  for (let more = digits; more < digits + 4; more++) {
    const tried = value.toFixed(more);
    if (![0, 1, -1].includes(Number(tried)) || Number(tried) === value) {
      text = tried;
      break;
    }
  }
  return Number(text) === 0 ? text.replace("-", "") : typeset(text);
}
// All digits that matter, for what is pointed at.
const exact = (value) => typeset(String(Number(value.toPrecision(6))));
const percent = (value) => `${typeset(String(Number((100 * value).toPrecision(4))))}\u202f%`;
const cut = (text, letters) => (text.length <= letters ? text : `${text.slice(0, Math.max(1, letters - 1))}\u2026`);
const interval = (ends, write = number) => (ends ? `[${write(ends[0])}, ${write(ends[1])}]` : "");
const count = (n) => n.toLocaleString("en-US");
const at = (matrix, i, j) => (matrix && matrix[i] ? matrix[i][j] : null);

// Colours: the share of the way from unlike (0) to alike (1); negative below 0 or below a floor.
function share(scale, value) {
  if (scale.closer === "lower") return (scale.high - value) / (scale.high - scale.low);
  return value >= 0 ? value / scale.high : value / Math.max(scale.high, -scale.low);
}
function colour(t) {
  const stops = t >= 0 ? COLOURS.alike : COLOURS.below;
  const x = Math.min(Math.abs(t), 1);
  for (let k = 1; k < stops.length; k++) {
    const [x0, c0] = stops[k - 1];
    const [x1, c1] = stops[k];
    if (x <= x1) return c0.map((a, m) => Math.round(a + ((x - x0) / (x1 - x0)) * (c1[m] - a)));
  }
  return stops[stops.length - 1][1];
}
const hex = (rgb) => "#" + rgb.map((c) => c.toString(16).padStart(2, "0")).join("");
function isDark(rgb) {
  const [r, g, b] = rgb.map((c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.179;
}

// The closest of some values, the first of equals; -1 where nothing is defined.
function best(values, closer, skip) {
  const sign = closer === "higher" ? 1 : -1;
  let found = -1;
  values.forEach((v, j) => {
    if (v !== null && j !== skip && (found < 0 || sign * v > sign * values[found])) found = j;
  });
  return found;
}
