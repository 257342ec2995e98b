"""Rate against distortion: what is sent for a byte of text, and how much of states, loss and answers it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.pages.charts import Mark, Series, line_chart
from evaluate.reporting.reading.inputs import Node, Origin, Pair, Run
from evaluate.reporting.reading.names import control_name, leak_of, share
from evaluate.reporting.reading.numbers import count, dash, interval, nats, percent, percent_number, say, score, show
from evaluate.reporting.sections.sent import Sent, accuracy_charts, rate_style, reference_rate, sent
from evaluate.reporting.sections.stitched import FROM, SHARES, mark_of, why_not
from evaluate.reporting.sections.tables import Cell

#: Codecs of one rate, and how they are drawn; others that a file names follow.
_STYLES = {"compress": 0, "pca": 1, "strided": 2}
_TITLES = {"compress": "R²", "pca": "R² of PCA"}
_CONDITIONS = {"mapped": 0, "token": 8, "mean": 1, "shuffled": 2, "clean": 7}
#: Style of maps that do not compress.
_WHOLE = 5
#: Rates closer than this share of them are one.
_SAME_RATE = 0.01
_AXIS = "bytes sent per byte of text"


@dataclass(frozen=True)
class Rates:
    """All compressed maps of one layer pair, and beside them what the other maps send."""

    title: str
    charts: tuple[tuple[str, Markup], ...]
    notes: tuple[Markup, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sources: tuple[Origin, ...]


@dataclass(frozen=True)
class _Point:
    run: Run
    rate: Node
    kept: Node
    stitched: Node
    test: Node

    @property
    def x(self) -> float:
        return self.rate.number or 0.0

    @property
    def compressed(self) -> bool:
        return self.kept.value is not None or self.rate.number is not None


def rates(runs: Sequence[Run]) -> list[Rates]:
    """Draw R2, stitched loss and answers against bytes for a byte of text, for every layer pair with compressed maps.

    Maps of the same layer pair that do not compress stand beside them where their ``communicate.json`` says what
    they sent.

    Args:
        runs: What was read.
    """
    found: dict[str, list[_Point]] = {}
    for run in runs:
        for pair in run.pairs:
            metrics = run.file("metrics.json").get("pairs", pair.key)
            stitched = run.file("stitch.json").get("pairs", pair.key)
            kept = metrics.get("rate_distortion")
            rate = _rate(kept, stitched.get("rate", "latent_bytes_per_text_byte"))
            found.setdefault(pair.key, []).append(_Point(run, rate, kept, stitched, metrics.get("test")))
    return [
        _rates(key, sorted(points, key=lambda point: point.x))
        for key, points in found.items()
        if any(point.compressed for point in points)
    ]


def _rate(kept: Node, stitched: Node) -> Node:
    """Bytes for a byte of text: of the stitched text, or else of the test windows."""
    own = kept.get("bytes_per_text_byte")
    known = [node for node in (stitched, own) if node.number is not None and node.number > 0]
    return known[0] if known else own


def _rates(key: str, points: Sequence[_Point]) -> Rates:
    title = str(Pair.parse(key))
    compressed = [point for point in points if point.compressed]
    answers = [entry for point in points for entry in sent(point.run, key, compressed=point.compressed)]
    beside = reference_rate(answers)
    whole = [point for point in points if not point.compressed and point.run.label in beside]
    codecs = dict.fromkeys((*_STYLES, *(name for point in compressed for name, _ in point.kept.get("r2").items())))
    charts = _charts(title, compressed, [(beside[point.run.label], point) for point in whole], list(codecs))
    tasks = list(dict.fromkeys(entry.task for entry in answers))
    header = (
        "run",
        "latents",
        "bytes per window",
        "bytes per text byte",
        *(_TITLES.get(n) or f"R² {control_name(n)}" for n in codecs),
    )
    header += ("mapped nats", "beyond token", "recovered", *(f"right, {task}" for task in tasks))
    rows = [_row(point, list(codecs), answers, tasks) for point in compressed]
    rows += [_whole_row(point, list(codecs), answers, tasks) for point in whole]
    rows += _text_rows(answers, tasks, len(codecs))
    shown = [*compressed, *whole]
    names = ("metrics.json", "stitch.json", "communicate.json")
    sources = dict.fromkeys(p.run.origin(name) for p in shown for name in names if name in p.run.files)
    drawn = (*charts, *accuracy_charts(answers, key))
    notes = (_note(compressed), _short_texts(compressed, answers))
    return Rates(title, drawn, notes, header, tuple(rows), tuple(sources))


def _charts(
    title: str, points: Sequence[_Point], whole: Sequence[tuple[float, _Point]], codecs: Sequence[str]
) -> list[tuple[str, Markup]]:
    drawn = [point for point in points if point.x > 0]

    def line(
        words: str, style: int | None, find: Callable[[_Point], tuple[Node, Node]], *, injected: bool = True
    ) -> Series | None:
        marks = [(p.x, mark_of(*find(p), _named(p, words, injected=injected), "")) for p in drawn]
        return Series(words, marks, style) if any(mark.value is not None for _, mark in marks) else None

    def apart(words: str, find: Callable[[_Point], tuple[Node, Node]]) -> Series | None:
        found: list[tuple[float, Mark]] = []
        for x, point in whole:
            mark = mark_of(*find(point), f"{point.run.label}, {words}, at the rate of its answers", "")
            # A gap after each: these are no course over rates.
            found += [(x, mark), (x, Mark(None))] if mark.value is not None else []
        return Series(words, found, _WHOLE) if found else None

    as_they_are = "states as they are"
    held = [line(control_name(name), _STYLES.get(name), _held(name), injected=False) for name in codecs]
    held.append(apart(as_they_are, lambda p: (p.test.get("r2"), p.test.get("r2_ci95"))))
    recovered = [line(FROM[name], style, _shared(name)) for style, (name, _) in enumerate(SHARES)]
    recovered.append(apart(as_they_are, _shared(SHARES[0][0])))
    losses = [line(control_name(name), style, _lost(name)) for name, style in _CONDITIONS.items()]
    losses.append(apart(as_they_are, _lost("mapped")))
    charts = []
    for name, axis, found, levels in (
        ("Held-out R²", "R²", held, ()),
        ("Recovered share", "share of the loss", recovered, ((0.0, "as the control"), (1.0, "as clean"))),
        ("Stitched loss", "nats per token", losses, ()),
    ):
        lines = [series for series in found if series is not None]
        if lines and any(series.style != _WHOLE for series in lines):
            drawing = line_chart(
                lines,
                label=f"{name} against rate, {title}",
                axes=(_AXIS, axis),
                references=levels,
                verticals=[(1.0, "the text itself"), *_token_ids(drawn)],
                log=True,
            )
            charts.append((f"{name} against rate", drawing))
    return charts


def _held(name: str) -> Callable[[_Point], tuple[Node, Node]]:
    return lambda point: (point.kept.get("r2", name), Node())


def _shared(name: str) -> Callable[[_Point], tuple[Node, Node]]:
    return lambda point: (point.stitched.get(name, "value"), point.stitched.get(name, "ci95"))


def _lost(name: str) -> Callable[[_Point], tuple[Node, Node]]:
    return lambda point: _loss(point, name)


def _note(points: Sequence[_Point]) -> Markup:
    raw = next((p.kept for p in points if p.kept.get("raw_bytes").number is not None), Node())
    if raw.value is None:
        return say("")
    return say(
        "A window of {} bytes of text has {} bytes of states and {} bytes of token ids. PCA and strided are linear "
        "codecs of the same number of bytes.",
        show(raw.get("text_bytes"), count),
        show(raw.get("raw_bytes"), count),
        show(raw.get("token_id_bytes"), count),
    )


def _short_texts(points: Sequence[_Point], answers: Sequence[Sent]) -> Markup:
    asked = [
        (p.rate.number, entry.rate)
        for p in points
        for entry in answers
        if entry.run is p.run and entry.kind == "compressed"
    ]
    asked = [(own, task) for own, task in asked if own is not None and task > own * (1 + _SAME_RATE)]
    if not asked:
        return say("")
    return say(
        "The latents of a window are as many however short its text. The texts of a task fill less of a window than "
        "the test documents, so that answers stand at a higher rate than R² and losses of the same run."
    )


def _token_ids(points: Sequence[_Point]) -> list[tuple[float, str]]:
    for point in points:
        ids, text = (point.kept.get(name).number for name in ("token_id_bytes", "text_bytes"))
        if ids is not None and text is not None and text > 0 and ids / text > 0:
            return [(ids / text, "its token ids")]
    return []


def _named(point: _Point, name: str, *, injected: bool) -> str:
    leak = leak_of(point.stitched).text if injected else ""
    return ", ".join(part for part in (point.run.label, name, _shape(point), leak) if part)


def _shape(point: _Point) -> str:
    sides = [point.kept.get(name).text for name in ("latents", "latent_dim")]
    return "×".join(sides) if all(sides) else "latents not given"


def _loss(point: _Point, name: str) -> tuple[Node, Node]:
    condition = point.stitched.get("conditions", name)
    return condition.get("nats_per_token"), condition.get("ci95")


def _number(node: Node, html: Markup) -> Cell:
    return Cell(html, "" if node.number is None else repr(node.number), "num")


def _row(point: _Point, codecs: Sequence[str], answers: Sequence[Sent], tasks: Sequence[str]) -> tuple[Cell, ...]:
    size = point.kept.get("bytes_per_window")
    return (
        Cell(say("{}", point.run.label), point.run.label),
        Cell(say("{}", _shape(point)), _shape(point)),
        _number(size, show(size, count)),
        _number(point.rate, show(point.rate, rate_style)),
        *(_number(point.kept.get("r2", name), show(point.kept.get("r2", name), score)) for name in codecs),
        *_stitched_cells(point),
        *(_right(point.run, "compressed", answers, task, point.rate.number) for task in tasks),
    )


def _whole_row(point: _Point, codecs: Sequence[str], answers: Sequence[Sent], tasks: Sequence[str]) -> tuple[Cell, ...]:
    aligned = next(entry for entry in answers if entry.run is point.run and entry.way == "aligned")
    why = "this map sends every state as it is"
    r2 = point.test.get("r2")
    # Its one R2 stands where that of the compressed maps does.
    figures = [_number(r2, show(r2, score)) if place == 0 else _none(why) for place in range(len(codecs))]
    return (
        Cell(say("{}", point.run.label), point.run.label),
        Cell(say("states as they are"), "states as they are"),
        _none(why),
        Cell(aligned.shown, repr(aligned.rate), "num"),
        *figures,
        *_stitched_cells(point),
        *(_right(point.run, "states", answers, task) for task in tasks),
    )


def _text_rows(answers: Sequence[Sent], tasks: Sequence[str], codecs: int) -> list[tuple[Cell, ...]]:
    """The text itself, and its summary, from the first run that was asked with them."""
    rows = []
    for kind, words in (("text", "the text itself"), ("summary", "a summary in words")):
        found = {entry.task: entry for entry in reversed(answers) if entry.kind == kind}
        if not found:
            continue
        first = next(entry for entry in answers if entry.kind == kind)
        why = "text is no state"
        cells = [Cell(say("{}", first.run.label), first.run.label), Cell(say("{}", words), words), _none(why)]
        cells.append(Cell(first.shown, repr(first.rate), "num"))
        cells += [_none(why)] * (codecs + 3)
        cells += [_accuracy(found.get(task)) for task in tasks]
        rows.append(tuple(cells))
    return rows


def _stitched_cells(point: _Point) -> tuple[Cell, ...]:
    there = point.stitched.value is not None
    leak = leak_of(point.stitched).tag

    def why(name: str) -> str:
        return why_not(point.stitched, name, "not given") if there else "there is no stitch.json"

    loss = _loss(point, "mapped")[0]
    cells = [_number(loss, show(loss, nats, why("mapped")) + (leak if loss.number is not None else Markup("")))]
    for name, _ in SHARES:
        block = point.stitched.get(name)
        known = block.get("value").number is not None
        cells.append(_number(block.get("value"), share(block, leak) if known else dash(why(name))))
    return tuple(cells)


def _right(run: Run, kind: str, answers: Sequence[Sent], task: str, rate: float | None = None) -> Cell:
    found = [entry for entry in answers if entry.run is run and entry.kind == kind and entry.task == task]
    # Of several ways to send states the one that sends all of them compares with a window.
    return _accuracy(next((e for e in found if e.way == "aligned"), found[0] if found else None), rate)


def _accuracy(entry: Sent | None, rate: float | None = None) -> Cell:
    if entry is None:
        return _none("not asked with this; evaluate communicate asks")
    accuracy = entry.block.get("accuracy")
    html = say("{} {}{}", show(accuracy, percent), interval(entry.block.get("ci95"), percent_number), entry.leak.tag)
    if rate is not None and abs(entry.rate - rate) > _SAME_RATE * rate:
        html += say(' <span class="ci">at {}</span>', entry.shown)
    return _number(accuracy, html)


def _none(why: str) -> Cell:
    return Cell(dash(why), "", "num")
