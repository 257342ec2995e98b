"""The similarity section: what a ``cka.json`` says, drawn and in words."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from align.similarity.floors.reading import NAMES, readings
from align.similarity.page.palette import Scale
from align.statistics import SIGNIFICANT
from evaluate.reporting.drawing.heatmap import legend
from evaluate.reporting.drawing.matrices import Panel, cells_of, height, layer_name, panel, rows_of
from evaluate.reporting.reading.inputs import Node, Origin, Run
from evaluate.reporting.reading.numbers import count, fixed, say, show
from evaluate.reporting.sections.measures import Measures, measures
from featstore.text.roles import of_roles

#: What is exchanged for a floor.
_WHAT = {
    "documents": "documents in each other's place at equal positions",
    "token": "partners of the same token in another document",
}
_FLOOR_NOTES = {
    "documents": "Documents in each other's place at equal positions, mean over exchanges, {} rows.",
    "token": "Partners of the same token in another document, mean over exchanges, {} rows.",
}


@dataclass(frozen=True)
class Similarity:
    """The section of one directory."""

    label: str
    source: Origin
    page: Origin | None
    facts: Markup
    findings: tuple[Markup, ...]
    panels: tuple[Panel, ...]
    legend: Markup
    measures: Measures | None


def similarity(run: Run) -> Similarity | None:
    """Build the section of one directory, if it has a ``cka.json``.

    Args:
        run: The directory.
    """
    cka = run.file("cka.json")
    if cka.value is None:
        return None
    a, b = _models(cka)
    names = {model: [layer.text for layer in cka.get("layers", model)] for model in (a, b)}
    null, beside = cka.get("null"), _beside(cka)
    note = (
        "The same with the masked rows put back in, n = {}."
        if "unmasked" in beside.at
        else "The same without sinks and other masked rows, n = {}."
    )
    shuffled = say("Rows shuffled, n = {}: what the estimator says of no relation at all.", _count(null))
    floors = [
        (title, floor, floor.get("mean"), (a, b), say(_FLOOR_NOTES[kind], show(floor.get("rows"), count)))
        for kind, title in NAMES.items()
        if (floor := cka.get("permutations", kind)).value is not None
    ]
    wanted = [
        (f"{a} × {b}", cka, cka.get("cross"), (a, b), say("Every layer of one with every of the other.")),
        (f"{a} × {a}", cka, cka.get("within", a), (a, a), say("Within {}.", a)),
        (f"{b} × {b}", cka, cka.get("within", b), (b, b), say("Within {}.", b)),
        (beside.at.rsplit("/", 1)[-1], beside, beside.get("cross"), (a, b), say(note, _count(beside))),
        *floors,
        ("rows shuffled", null, null.get("cross"), (a, b), shuffled),
    ]
    if a == b:
        del wanted[1:3]  # the cross matrix of a model with itself is what "within" would repeat
    wanted = [entry for entry in wanted if height(entry[2])]
    scale = Scale.over(value for _, _, node, _, _ in wanted for row in rows_of(node) for value in row)
    panels = tuple(panel(run.label, names, scale, *entry) for entry in wanted)
    kernel, estimator = cka.get("kernel").text or "linear", cka.get("estimator").text
    facts = say(
        "{} CKA, {} kernel, n = {} pairs{}, {} rows masked{}.",
        estimator.capitalize() or "Unnamed",
        kernel,
        _count(cka),
        of_roles([node.text for node in cka.get("roles")]),
        show(cka.get("masked_rows"), count),
        ", sinks kept" if cka.get("keep_sinks").value is True else "",
    )
    return Similarity(
        label=run.label,
        source=run.origin("cka.json"),
        page=run.cka_page,
        facts=facts,
        findings=tuple(findings(run)),
        panels=panels,
        legend=legend(scale),
        measures=measures(run.label, cka, (a, b), names),
    )


def findings(run: Run) -> list[Markup]:
    """What the matrices say, in sentences.

    Args:
        run: The directory.
    """
    cka = run.file("cka.json")
    best = max(cells_of(cka.get("cross")), key=lambda cell: cell[2].number or 0.0, default=None)
    if best is None:
        return []
    sentences = [say("Most alike are {}: CKA {}.", _name(cka, best[0], best[1]), show(best[2]))]
    sentences += _above(cka)
    sentences.append(
        say(
            "CKA ignores rotation, scale and offset: it says which layers are alike, not whether a "
            "map between them is right."
        )
    )
    return sentences


def _above(cka: Node) -> list[Markup]:
    """What each floor says, in a sentence."""
    a, b = _models(cka)
    sentences = []
    for kind in NAMES:
        floor = cka.get("permutations", kind)
        if floor.value is None:
            continue
        [found] = readings({kind: dict(floor.value)}, alone=a == b)
        if found.reason is not None:
            sentences.append(say("There is no floor with {}: {}.", _WHAT[kind], found.reason))
            continue
        if not found.is_decided:
            text = "With {}, CKA is {} to {} on average; {} exchanges are too few to decide anything."
            ends = fixed(found.low, 3), fixed(found.high, 3)
            sentences.append(say(text, _WHAT[kind], *ends, found.draws))
            continue
        sentences.append(
            say(
                "With {}, CKA is {} to {} on average: {} of {} pairs of layers are above that floor (p at most {} over "
                "all of them).",
                _WHAT[kind],
                fixed(found.low, 3),
                fixed(found.high, 3),
                found.above,
                found.pairs,
                SIGNIFICANT,
            )
        )
    return sentences


def _beside(cka: Node) -> Node:
    # With --keep-sinks the main figures are the unmasked ones, and the masked stand beside them.
    return cka.get("masked" if cka.get("masked").value is not None else "unmasked")


def _models(cka: Node) -> tuple[str, str]:
    named = [model.text for model in cka.get("models")] or [name for name, _ in cka.get("layers").items()]
    return (named[0] if named else "a", named[-1] if named else "b")


def _name(cka: Node, i: int, j: int) -> str:
    a, b = _models(cka)
    names = [[layer.text for layer in cka.get("layers", model)] for model in (a, b)]
    return f"{a} layer {layer_name(names[0], i)} and {b} layer {layer_name(names[1], j)}"


def _count(node: Node) -> Markup:
    return show(node.get("n"), count)
