"""The leaderboard and the stitched losses: tables and plots of what was scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluate.report.inputs import Node, Pair, Run
from evaluate.report.numbers import (
    Style,
    count,
    dash,
    interval,
    nats,
    percent,
    say,
    score,
    show,
)
from evaluate.report.svg import Dots, Mark, Series, chart_key, dot_plot, line_chart
from evaluate.report.words import control_name, share, type_name

#: Conditions of a stitched run and what each puts into the target, in the order they are drawn.
CONDITIONS = {
    "clean": "the target untouched: the floor",
    "self": "the target’s own states put back: must equal clean",
    "mapped": "the source’s states through the map: the result",
    "mean": "the target’s mean state everywhere: no information",
    "zero": "zeros",
    "random_norm": "random directions of the mapped states’ norms",
    "random_rotation": "the source’s states through a random rotation",
    "shuffled": "mapped states of other text: plausible, but about something else",
    "raw": "the source’s states without a map",
}


@dataclass(frozen=True)
class Cell:
    """A table cell: what it shows and what it sorts by."""

    html: Markup
    sort: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the leaderboard."""

    title: str
    hint: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its caption and, for lines, the key."""

    title: str
    svg: Markup
    key: Markup


@dataclass(frozen=True)
class Stitched:
    """One map's losses under every condition."""

    title: str
    run: str
    source: str
    recovered: Markup
    caption: Markup
    plot: Markup
    rows: tuple[tuple[str, str, Markup, Markup, Markup], ...]


#: Title, hint, where in metrics.json below the layer pair, how to write it.
_FIGURES: tuple[tuple[str, str, tuple[str, ...], Style], ...] = (
    ("R²", "held-out R², test split", ("test", "r2"), score),
    ("median dim", "median of R² over dimensions", ("test", "r2_median_dim"), score),
    ("cosine", "mean cosine, mean state subtracted", ("test", "cosine_centered"), score),
    (
        "top-1",
        "share of mapped states whose nearest target state is the true partner",
        ("test", "retrieval_top1"),
        percent,
    ),
    ("chance", "top-1 by guessing", ("test", "retrieval_chance"), percent),
    ("with sinks", "held-out R² with the attention sinks left in", ("by_mask", "kept", "r2"), score),
    ("identity", "R² of the source’s states as they are", ("baselines", "identity", "r2"), score),
    ("rotation", "R² of a random rotation", ("baselines", "random_rotation", "r2"), score),
    ("shuffled", "R² of a map fitted to shuffled pairs", ("baselines", "shuffled", "r2"), score),
    ("closed form", "R² of the closed form on the same split", ("baselines", "closed_form", "r2"), score),
)
_SHARES = (
    ("recovered", "share of the loss between mean state and clean run that the map recovers"),
    ("recovered_best_control", "the same, counted from the best control instead of the mean state"),
)

COLUMNS = (
    Column("run", "directory"),
    Column("layers", "source layer → target layer"),
    Column("type", "type of the map"),
    Column("trainable", "trainable parameters"),
    *(Column(title, hint) for title, hint, _, _ in _FIGURES),
    Column("recovered", _SHARES[0][1]),
    Column("past best control", _SHARES[1][1]),
    Column("warnings", "warnings in metrics.json; their texts stand in the summary"),
)


def leaderboard(runs: Sequence[Run]) -> list[list[Cell]]:
    """Build the rows: every layer pair of every run, best held-out R2 first within a layer pair.

    Args:
        runs: What was read.
    """
    entries = [(run, pair) for run in runs for pair in run.pairs]
    order = list(dict.fromkeys(pair.key for _, pair in entries))

    def place(entry: tuple[Run, Pair]) -> tuple[int, float]:
        r2 = _r2(*entry).number
        return order.index(entry[1].key), float("inf") if r2 is None else -r2

    return [_row(run, pair) for run, pair in sorted(entries, key=place)]


def r2_by_layer(runs: Sequence[Run]) -> Chart | None:
    """Draw held-out R2 over source layers, where a run has at least three.

    Args:
        runs: What was read.
    """
    return _by_layer(runs, "Held-out R² by source layer", "R²", lambda r, p: (_r2(r, p), Node()))


def recovered_by_layer(runs: Sequence[Run]) -> Chart | None:
    """Draw the recovered share over source layers, where a run has at least three.

    Args:
        runs: What was read.
    """

    def find(run: Run, pair: Pair) -> tuple[Node, Node]:
        block = run.file("stitch.json").get("pairs", pair.key, "recovered")
        return block.get("value"), block.get("ci95")

    return _by_layer(runs, "Recovered share by source layer", "recovered share", find)


def forest(runs: Sequence[Run]) -> Markup | None:
    """Draw the recovered share of every map with its interval, from the mean state and best control.

    Args:
        runs: What was read.
    """
    lines = []
    for run in runs:
        for key, stitched in run.file("stitch.json").get("pairs").items():
            blocks = [(stitched.get(name), name) for name, _ in _SHARES]
            marks = [
                _mark(block.get("value"), block.get("ci95"), name.replace("_", " "), kind)
                for (block, name), kind in zip(blocks, ("mapped", "hollow"), strict=True)
            ]
            value = marks[0].value
            text = percent(value) if value is not None else ""
            note = "" if text else _why(stitched, "recovered", "no figure in stitch.json")
            lines.append(Dots(f"{run.label} · {Pair.parse(key)}", marks, text, note))
    if not lines:
        return None
    return dot_plot(
        lines,
        label="Recovered share of every map",
        axis="share of the loss recovered",
        style=percent,
        anchors=(0.0, 1.0),
        stacked=True,
    )


def stitched_losses(run: Run) -> list[Stitched]:
    """Build a run's stitched losses, one block a layer pair.

    Args:
        run: The run.
    """
    stitch = run.file("stitch.json")
    blocks = []
    for key, pair in stitch.get("pairs").items():
        names = [*CONDITIONS, *(n for n, _ in pair.get("conditions").items() if n not in CONDITIONS)]
        conditions = {name: pair.get("conditions", name) for name in names}
        why = {name: _why(pair, name, f"{name} is not in stitch.json") for name in names}
        caption = say(
            "Split {}: {} documents, {} tokens, {} of positions replaced. Counted from the best "
            "control ({}) the map recovers {}.",
            stitch.get("split").text or "unnamed",
            show(pair.get("n_documents"), count),
            show(pair.get("n_tokens"), count),
            show(pair.get("replaced_share"), percent),
            control_name(pair.get("recovered_best_control", "control").text) or "not named",
            share(pair.get("recovered_best_control")),
        )
        lines = [_condition_line(name, conditions[name], why[name]) for name in names]
        clean = conditions["clean"].get("nats_per_token").number
        plot = dot_plot(
            lines,
            label=f"Loss under every condition, {Pair.parse(key)}, {run.label}",
            axis="nats per token; lower is better",
            style=lambda value: f"{value:g}",
            anchors=() if clean is None else (clean,),
        )
        rows = tuple(
            (
                control_name(name),
                _kind(name),
                show(conditions[name].get("nats_per_token"), nats, why[name]),
                interval(conditions[name].get("ci95")) or dash(why[name]),
                show(conditions[name].get("bits_per_byte"), score, why[name]),
            )
            for name in names
        )
        title = f"{type_name(run)}, {Pair.parse(key)}"
        source = f"{run.label}/stitch.json"
        recovered = share(pair.get("recovered"))
        blocks.append(Stitched(title, run.label, source, recovered, caption, plot, rows))
    return blocks


def _row(run: Run, pair: Pair) -> list[Cell]:
    metrics = run.file("metrics.json").get("pairs", pair.key)
    stitched = run.file("stitch.json").get("pairs", pair.key)
    trainable = run.card_pair(pair.key).get("parameters", "trainable")
    cells = [
        Cell(say("{}", run.label), run.label, "name"),
        Cell(say("{}", pair), str(pair)),
        Cell(say("{}", type_name(run)), type_name(run)),
        Cell(show(trainable, count, _missing(run, "adapter.json")), _sort(trainable), "num"),
    ]
    for title, _, path, style in _FIGURES:
        node = metrics.get(*path)
        html = show(node, style, _reason(run, metrics, path))
        cells.append(Cell(html, _sort(node), "num main" if title == "R²" else "num"))
    for name, _ in _SHARES:
        block = stitched.get(name)
        why = _why(stitched, name, _missing(run, "stitch.json"))
        known = block.get("value").number is not None
        cells.append(Cell(share(block) if known else dash(why), _sort(block.get("value")), "num"))
    warned = sum(1 for _ in metrics.get("warnings"))
    if metrics.value is None:
        return [*cells, Cell(dash(_missing(run, "metrics.json")), "", "num")]
    return [*cells, Cell(say("{}", warned), str(warned), "num")]


def _by_layer(
    runs: Sequence[Run], title: str, axis: str, find: Callable[[Run, Pair], tuple[Node, Node]]
) -> Chart | None:
    series = []
    for run in runs:
        for way in dict.fromkeys((pair.source, pair.target) for pair in run.pairs if pair.source):
            pairs = [pair for pair in run.pairs if (pair.source, pair.target) == way]
            points = {
                float(pair.source_layer): _mark(*find(run, pair), f"{run.label}, {pair}", "")
                for pair in pairs
                if find(run, pair)[0].number is not None
            }
            # A line needs one value a layer: a run that sends a layer to several places stays in the table.
            if len(points) >= 3 and len({pair.source_layer for pair in pairs}) == len(pairs):
                name = f"{run.label}, {way[0]} → {way[1]}"
                series.append(Series(name, sorted(points.items(), key=lambda point: point[0])))
    if not series:
        return None
    svg = line_chart(series, label=title, axes=("source layer", axis))
    return Chart(title, svg, chart_key([one.name for one in series]))


def _condition_line(name: str, block: Node, why: str) -> Dots:
    loss = block.get("nats_per_token")
    mark = _mark(loss, block.get("ci95"), control_name(name), _kind(name))
    if loss.number is None:
        # Long reasons would run out of the drawing; the table has them whole.
        return Dots(control_name(name), [], "–", why if len(why) <= 40 else why[:39] + "…")
    return Dots(control_name(name), [mark], nats(loss.number))


def _mark(value: Node, ci: Node, name: str, kind: str) -> Mark:
    return Mark(value.number, ci.get(0).number, ci.get(1).number, name, kind)


def _kind(name: str) -> str:
    return {"clean": "own", "self": "own", "mapped": "mapped"}.get(name, "control")


def _r2(run: Run, pair: Pair) -> Node:
    return run.file("metrics.json").get("pairs", pair.key, "test", "r2")


def _sort(node: Node) -> str:
    return "" if node.number is None else repr(node.number)


def _why(pair: Node, name: str, otherwise: str) -> str:
    return pair.get("reasons", name).text or otherwise


def _reason(run: Run, metrics: Node, path: Sequence[str]) -> str:
    # A whole block may be null for one reason, given under any of these names.
    for key in (".".join(path), ".".join(path[:-1]), ".".join(path[1:]), path[-2]):
        if reason := metrics.get("reasons", key).text:
            return reason
    return _missing(run, "metrics.json")


def _missing(run: Run, file: str) -> str:
    return f"not given in {file}" if file in run.files else f"there is no {file}"
