"use strict";
// What the other parts share: the data, elements, numbers, colours.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

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
const place = (x) => String(Math.round(x * 100) / 100);
const label = (x, y, text, kind) => svg("text", { x: place(x), y: place(y), class: kind }, text);

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
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "\u2212");
}
const interval = (ends) => (ends ? `[${number(ends[0])}, ${number(ends[1])}]` : "");
const count = (n) => n.toLocaleString("en-US");
const at = (matrix, i, j) => (matrix && matrix[i] ? matrix[i][j] : null);

// Colours: the share of the way from unlike (0) to alike (1); negative below 0 or below a floor.
function share(scale, value) {
  if (scale.closer === "lower") return (scale.high - value) / (scale.high - scale.low);
  return value >= 0 ? value / scale.high : value / Math.max(scale.high, -scale.low);
}
function aboveFloor(view, value, floor) {
  const best = view.closer === "lower" ? Math.min(0, view.scale.low) : view.scale.high;
  return best === floor ? null : (value - floor) / (best - floor);
}
function colour(t) {
  const stops = t >= 0 ? DATA.colours.alike : DATA.colours.below;
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
const column = (matrix, j) => matrix.map((row) => row[j]);

// Round ticks between two values, at most about n of them.
function ticks(low, high, n) {
  const raw = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return { found, text: (v) => v.toFixed(decimals).replace(/^-(?=0(\.0*)?$)/, "").replace("-", "\u2212") };
}
