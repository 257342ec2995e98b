"""The leaderboard: every map, and beside it the closed forms and controls on the same test rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from evaluate.reporting.reading.inputs import Node, Pair, Run
from evaluate.reporting.reading.names import control_name, leak_of, share, type_name
from evaluate.reporting.reading.numbers import Style, count, dash, interval, percent, say, score, show
from evaluate.reporting.sections.stitched import SHARES, why_not


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
class Row:
    """A line of the leaderboard.

    Attributes:
        kind: ``map``, ``closed`` for a closed form beside it, or ``control``.
        cells: One for each column.
        type: Of the run's map, by which rows are filtered.
        direction: From which model to which.
        layer: Of the source.
    """

    kind: str
    cells: tuple[Cell, ...]
    type: str
    direction: str
    layer: str


@dataclass(frozen=True)
class _Entry:
    kind: str
    run: Run
    pair: Pair
    what: str
    block: Node
    place: tuple[str, ...]
    shared: int = 1

    @property
    def validated(self) -> float:
        """R2 on validation rows, of maps alone: ordered by test figures, the first would be too large."""
        value = self.run.file("metrics.json").get("pairs", self.pair.key, "val", "r2").number
        return float("-inf") if value is None or self.kind != "map" else value


#: Title, hint, key of the block, how to write it.
_FIGURES: tuple[tuple[str, str, str, Style], ...] = (
    ("R²", "held-out R², test split, with its 95 % interval over documents", "r2", score),
    (
        "partial R²",
        "share explained of the error that the source’s token alone leaves, test split",
        "partial_r2",
        score,
    ),
    ("top-1", "share of mapped states whose nearest target state is the true partner", "retrieval_top1", percent),
    ("chance", "top-1 by guessing", "retrieval_chance", percent),
    ("cosine", "mean cosine, mean state subtracted", "cosine_centered", score),
    ("median dim", "median of R² over dimensions", "r2_median_dim", score),
)
#: Those before the stitched shares, each with its interval.
_FIRST = 2
#: Baselines of every map, in the order of their rows.
_CONTROLS = ("token", "mean", "identity", "random_rotation", "shuffled")
_BOUNDED = {key for _, _, key, _ in _FIGURES[:_FIRST]}
#: Baselines of compressed maps that send as much as they do.
_CODECS = {"pca": "same rate: PCA", "strided": "same rate: every n\u2011th state"}

COLUMNS = (
    Column("run", "directory"),
    Column("layers", "source layer → target layer"),
    Column("what", "type of the map, or what stands in for it"),
    *(Column(title, hint) for title, hint, _, _ in _FIGURES[:_FIRST]),
    Column("beyond token", SHARES[0][1]),
    Column("recovered", SHARES[1][1]),
    *(Column(title, hint) for title, hint, _, _ in _FIGURES[_FIRST:]),
    Column("with sinks", "held-out R² with the attention sinks left in"),
    Column("trainable", "trainable parameters"),
    Column("warnings", "warnings in metrics.json; their texts stand in the summary"),
)


def leaderboard(runs: Sequence[Run]) -> list[Row]:
    """Build the rows: by layer pair, the maps in the order of their validation R2, then closed forms, then controls.

    A closed form or control that several runs share to the last digit is one row, which says so.

    Args:
        runs: What was read.
    """
    entries = list(_merged([entry for run in runs for pair in run.pairs for entry in _entries(run, pair)]))
    order = {key: place for place, key in enumerate(dict.fromkeys(entry.pair.key for entry in entries))}
    kinds = ("map", "closed", "control")
    entries.sort(key=lambda entry: (order[entry.pair.key], kinds.index(entry.kind), -entry.validated, _place(entry)))
    return [
        Row(entry.kind, tuple(_cells(entry)), type_name(entry.run), entry.pair.direction, entry.pair.source_layer)
        for entry in entries
    ]


def _place(entry: _Entry) -> int:
    name = entry.place[-1]
    return _CONTROLS.index(name) if name in _CONTROLS else len(_CONTROLS)


def _entries(run: Run, pair: Pair) -> Iterator[_Entry]:
    metrics = run.file("metrics.json").get("pairs", pair.key)
    yield _Entry("map", run, pair, type_name(run), metrics.get("test"), ("test",))
    baselines = metrics.get("baselines")
    for name, block in baselines.items():
        if name == "closed_form":
            if block.value is None:
                continue  # the map is that closed form itself
            what = block.get("name").text
            yield _Entry("closed", run, pair, f"closed form{what and f': {what}'}", block, ("baselines", name))
        else:
            what = f"control: {control_name(name)}" if name in _CONTROLS else _CODECS.get(name, control_name(name))
            yield _Entry("control", run, pair, what, block, ("baselines", name))


def _merged(entries: Sequence[_Entry]) -> Iterator[_Entry]:
    groups: dict[tuple[object, ...], _Entry] = {}
    for entry in entries:
        if entry.kind == "map":
            yield entry
            continue
        figures = tuple(entry.block.get(key).number for _, _, key, _ in _FIGURES)
        store = entry.run.file("adapter.json").get("store", "fingerprint").text
        key = (store, entry.pair.key, entry.what, *figures)
        first = groups.get(key)
        groups[key] = replace(first, shared=first.shared + 1) if first else entry
    yield from groups.values()


def _cells(entry: _Entry) -> Iterator[Cell]:
    run, pair = entry.run, entry.pair
    is_map = entry.kind == "map"
    metrics = run.file("metrics.json").get("pairs", pair.key)
    stitched = run.file("stitch.json").get("pairs", pair.key)
    others = say(' <span class="ci">and {} more</span>', entry.shared - 1) if entry.shared > 1 else say("")
    yield Cell(say("{}{}", run.label, others), run.label, "name")
    yield Cell(say("{}", pair), str(pair))
    yield Cell(say("{}", entry.what), entry.what)
    for _, _, key, style in _FIGURES[:_FIRST]:
        yield _figure(entry, metrics, key, style)
    for name, _ in SHARES:
        block = stitched.get(name) if is_map else Node()
        why = why_not(stitched, name, _missing(run, "stitch.json")) if is_map else "only maps are injected"
        html = share(block, leak_of(stitched).tag) if block.get("value").number is not None else dash(why)
        yield Cell(html, _sort(block.get("value")), "num")
    for _, _, key, style in _FIGURES[_FIRST:]:
        yield _figure(entry, metrics, key, style)
    if not is_map:
        yield from (
            Cell(dash(why), "", "num") for why in ("only measured for maps", "nothing is trained", "a baseline")
        )
        return
    sinks = metrics.get("by_mask", "kept", "r2")
    yield Cell(show(sinks, score, _reason(run, metrics, ("by_mask", "kept", "r2"))), _sort(sinks), "num")
    trainable = run.card_pair(pair.key).get("parameters", "trainable")
    yield Cell(show(trainable, count, _missing(run, "adapter.json")), _sort(trainable), "num")
    if metrics.value is None:
        yield Cell(dash(_missing(run, "metrics.json")), "", "num")
        return
    warned = sum(warning.get("level").text != "note" for warning in metrics.get("warnings"))
    yield Cell(say("{}", warned), str(warned), "num")


def _figure(entry: _Entry, metrics: Node, key: str, style: Style) -> Cell:
    node = entry.block.get(key)
    html = show(node, style, _reason(entry.run, metrics, (*entry.place, key)))
    if key not in _BOUNDED:
        return Cell(html, _sort(node), "num")
    ends = interval(entry.block.get(f"{key}_ci95"), score)
    return Cell(say("{} {}", html, ends) if ends else html, _sort(node), "num main")


def _sort(node: Node) -> str:
    return "" if node.number is None else repr(node.number)


def _reason(run: Run, metrics: Node, path: Sequence[str]) -> str:
    # A whole block may be null for one reason, given under any of these names.
    for key in (".".join(path), ".".join(path[:-1]), ".".join(path[1:]), path[-2]):
        if reason := metrics.get("reasons", key).text:
            return reason
    return _missing(run, "metrics.json")


def _missing(run: Run, file: str) -> str:
    return f"not given in {file}" if file in run.files else f"there is no {file}"
