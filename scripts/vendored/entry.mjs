// What the pages draw with; everything else of the library is left out of the bundle.
export { axisX, axisY, cell, dot, gridX, gridY, line, link, plot, rect, ruleX, ruleY, text } from "@observablehq/plot";
