"""Figures over layers: what each layer pair of a run reached, as lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup

from align.pages.charts import Mark, Series, line_chart
from evaluate.reporting.reading.inputs import Node, Origin, Pair, Run
from evaluate.reporting.reading.names import control_name, leak_of, type_name
from evaluate.reporting.sections.stitched import FROM, SHARES, mark_of

#: A line through fewer layers shows no course.
_LAYERS = 2
#: Colours of the conditions: the result stands out, its bounds are in the colour of text, what carries nothing is pale.
_STYLES = {
    "mapped": 0,
    "clean": 7,
    "token": 8,
    "mean": 1,
    "zero": 4,
    "random_norm": 5,
    "random_rotation": 3,
    "shuffled": 2,
    "raw": 6,
}


@dataclass(frozen=True)
class Chart:
    """A drawing with its caption and the files it is drawn from."""

    title: str
    drawing: Markup
    sources: tuple[Origin, ...]
    run: str = ""


def r2_by_layer(runs: Sequence[Run]) -> Chart | None:
    """Draw held-out R2 over source layers, a line for every run with at least two.

    Args:
        runs: What was read.
    """

    def find(run: Run, pair: Pair) -> tuple[Node, Node]:
        test = run.file("metrics.json").get("pairs", pair.key, "test")
        return test.get("r2"), test.get("r2_ci95")

    return _of_runs(runs, "Held-out R² by source layer", "R²", "metrics.json", find)


def recovered_by_layer(runs: Sequence[Run]) -> Chart | None:
    """Draw the share recovered of what the token alone leaves over source layers, a line for every run with two.

    Args:
        runs: What was read.
    """

    def find(run: Run, pair: Pair) -> tuple[Node, Node]:
        block = run.file("stitch.json").get("pairs", pair.key, "recovered_token")
        return block.get("value"), block.get("ci95")

    title = "Recovered of what the token alone leaves, by source layer"
    return _of_runs(runs, title, "recovered share", "stitch.json", find)


def stitched_curves(run: Run) -> list[Chart]:
    """Draw a run's stitched losses over source layers, and the recovered shares, for each direction.

    Args:
        run: The run.
    """
    charts = []
    for way, pairs in _ways(run).items():
        blocks = {pair: run.file("stitch.json").get("pairs", pair.key) for pair in pairs}
        named = f"{type_name(run)}, {way[0]} → {way[1]}"
        losses = [
            Series(control_name(name), points, style)
            for name, style in _STYLES.items()
            if (points := _points(blocks, name, partial(_loss, name)))
        ]
        shares = [
            Series(FROM[name], points, style)
            for style, (name, _) in enumerate(SHARES)
            if (points := _points(blocks, FROM[name], partial(_share, name)))
        ]
        for title, axis, lines, lines_at in (
            ("loss by layer", "nats per token", losses, ()),
            ("recovered by layer", "share of the loss", shares, ((0.0, "as the control"), (1.0, "as clean"))),
        ):
            if not lines:
                continue
            label = f"{named}: {title}"
            drawing = line_chart(lines, label=f"{label}, {run.label}", axes=("source layer", axis), references=lines_at)
            charts.append(Chart(label, drawing, (run.origin("stitch.json"),), run.label))
    return charts


def _loss(name: str, block: Node) -> tuple[Node, Node]:
    condition = block.get("conditions", name)
    return condition.get("nats_per_token"), condition.get("ci95")


def _share(name: str, block: Node) -> tuple[Node, Node]:
    return block.get(name, "value"), block.get(name, "ci95")


def _points(blocks: dict[Pair, Node], name: str, find: Callable[[Node], tuple[Node, Node]]) -> list[tuple[float, Mark]]:
    points = [
        (float(pair.source_layer), mark_of(*find(block), _named(f"{control_name(name)}, {pair}", block), ""))
        for pair, block in blocks.items()
    ]
    known = [point for point in points if point[1].value is not None]
    return sorted(known, key=lambda point: point[0]) if len(known) >= _LAYERS else []


def _named(words: str, stitched: Node) -> str:
    leak = leak_of(stitched).text
    return f"{words}, {leak}" if leak else words


def _ways(run: Run) -> dict[tuple[str, str], list[Pair]]:
    # A line needs one value a layer: a run that sends a layer to several places stays in the tables.
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in run.pairs:
        if pair.source:
            found.setdefault((pair.source, pair.target), []).append(pair)
    return {way: pairs for way, pairs in found.items() if len({pair.source_layer for pair in pairs}) == len(pairs)}


def _title(run: Run, pair: Pair, file: str) -> str:
    words = f"{run.label}, {pair}"
    return _named(words, run.file(file).get("pairs", pair.key)) if file == "stitch.json" else words


def _of_runs(
    runs: Sequence[Run], title: str, axis: str, file: str, find: Callable[[Run, Pair], tuple[Node, Node]]
) -> Chart | None:
    series: list[Series] = []
    sources: dict[Origin, None] = {}
    for run in runs:
        for way, pairs in _ways(run).items():
            points = [
                (float(pair.source_layer), mark_of(*find(run, pair), _title(run, pair, file), "")) for pair in pairs
            ]
            known = sorted((p for p in points if p[1].value is not None), key=lambda point: point[0])
            if len(known) >= _LAYERS:
                series.append(Series(f"{run.label}, {way[0]} → {way[1]}", known))
                sources[run.origin(file)] = None
    if not series:
        return None
    return Chart(title, line_chart(series, label=title, axes=("source layer", axis)), tuple(sources))
