"""Measures other than linear CKA over all rows: the cross block of each, small, and the layers' effective ranks."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from markupsafe import Markup

from align.similarity.floors.reading import NAMES, readings
from align.similarity.page.palette import Scale
from evaluate.reporting.drawing.matrices import Panel, cells_of, height, panel, rows_of
from evaluate.reporting.drawing.svg import Mark, Series, chart_key, line_chart
from evaluate.reporting.reading.inputs import Node
from evaluate.reporting.reading.numbers import count, fixed, say, show

#: Of a small matrix's longer side.
_SIZE = 190.0
#: What the two kinds of effective rank are, by their key.
_RANKS = {
    "entropy": "exp of the entropy of the spectrum (Roy and Vetterli 2007)",
    "participation": "participation ratio of the spectrum",
}


@dataclass(frozen=True)
class Measures:
    """What stands beside linear CKA in one ``cka.json``."""

    facts: Markup
    panels: tuple[Panel, ...]
    ranks: tuple[Markup, Markup] | None


def measures(label: str, cka: Node, models: tuple[str, str], names: dict[str, list[str]]) -> Measures | None:
    """Draw the measures of a comparison, each on a colour scale of its own.

    Args:
        label: The directory's name.
        cka: Contents of ``cka.json``.
        models: The two compared.
        names: Their layers.

    Returns:
        None where there is neither a measure nor an effective rank, as in files of earlier versions.
    """
    panels = []
    for name, content in cka.get("measures").items():
        cross = content.get("cross")
        if not height(cross):
            continue
        lower = content.get("closer").text == "lower"
        scale = Scale.over(
            (value for row in rows_of(cross) for value in row),
            closer="lower" if lower else "higher",
            bounds=(content.get("bounds", 0).number, content.get("bounds", 1).number),
        )
        title = content.get("title").text or name
        caption = say("{}{}", "Lower is more alike. " if lower else "", _floor(content))
        panels.append(panel(label, names, scale, title, content, cross, models, caption, size=_SIZE))
    ranks = _ranks(label, cka, names)
    if not panels and ranks is None:
        return None
    sample = cka.get("sample")
    facts = say("")
    if panels and sample.get("rows").number is not None:
        facts = say("Measured on a sample of {} of {} pairs", show(sample.get("rows"), count), _of(sample))
        if sample.get("documents").number is not None:
            facts += say(" from {} documents", show(sample.get("documents"), count))
        facts += say(". Darker is more alike; every measure has a colour scale of its own.")
    return Measures(facts, tuple(panels), ranks)


def _of(sample: Node) -> Markup:
    return show(sample.get("of"), count)


def _floor(content: Node) -> Markup:
    """Both floors of a measure: their middle, since cells lie close together, and the pairs of layers above them."""
    words = say("")
    for kind, name in NAMES.items():
        floor = content.get("permutations", kind)
        found = [cell.number for _, _, cell in cells_of(floor.get("mean")) if cell.number is not None]
        if not found:
            continue
        [read] = readings({kind: dict(floor.value)}, content.get("closer").text)
        middle = fixed(statistics.median(found), 3)
        if not read.is_decided:
            words += say("{}: {} (median), too few exchanges to decide. ", name.capitalize(), middle)
            continue
        text = "{}: {} (median), {} of {} pairs of layers closer. "
        words += say(text, name.capitalize(), middle, read.above, read.pairs)
    return words


def _ranks(label: str, cka: Node, names: dict[str, list[str]]) -> tuple[Markup, Markup] | None:
    lines = []
    for model in names:
        for kind, words in _RANKS.items():
            points = []
            for layer, block in cka.get("effective_rank", model).items():
                at, value = _integer(layer), block.get(kind)
                if at is not None and value.number is not None:
                    points.append((at, Mark(value.number, name=f"{model} layer {layer}, {words}")))
            if points:
                lines.append(Series(f"{model}, {kind}", sorted(points, key=lambda point: point[0])))
    if not lines:
        return None
    svg = line_chart(lines, label=f"Effective rank by layer, {label}", axes=("layer", "dimensions"))
    return svg, chart_key(lines)


def _integer(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 7 else None
