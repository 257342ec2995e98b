"""Rate against distortion: what compressed windows cost, and how much of the states they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluate.report.inputs import Node, Origin, Pair, Run
from evaluate.report.names import control_name, share
from evaluate.report.numbers import count, dash, nats, say, score, show
from evaluate.report.stitched import mark_of, why_not
from evaluate.report.svg import Series, chart_key, line_chart

#: Codecs of one rate, and how they are drawn; others that a file names follow.
_STYLES = {"compress": 0, "pca": 1, "strided": 2}
_CONDITIONS = {"mapped": 0, "mean": 1, "shuffled": 2, "clean": 7}
#: Names of a rate in bytes for a byte of text, in ``rate_distortion`` and in ``rate``.
_RATES = ("bytes_per_text_byte", "latent_bytes_per_text_byte", "per_text_byte")


@dataclass(frozen=True)
class Rates:
    """All compressed maps of one layer pair."""

    title: str
    charts: tuple[tuple[str, Markup, Markup], ...]
    notes: tuple[Markup, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[Markup, ...], ...]
    sources: tuple[Origin, ...]


@dataclass(frozen=True)
class _Point:
    run: Run
    rate: Node
    kept: Node
    stitched: Node

    @property
    def x(self) -> float:
        return self.rate.number or 0.0


def rates(runs: Sequence[Run]) -> list[Rates]:
    """Draw R2 and stitched loss against bytes for a byte of text, for every layer pair with compressed maps.

    Args:
        runs: What was read.
    """
    found: dict[str, list[_Point]] = {}
    for run in runs:
        for pair in run.pairs:
            kept = run.file("metrics.json").get("pairs", pair.key, "rate_distortion")
            stitched = run.file("stitch.json").get("pairs", pair.key)
            rate = _rate(kept, stitched.get("rate"))
            if kept.value is not None or rate.number is not None:
                found.setdefault(pair.key, []).append(_Point(run, rate, kept, stitched))
    return [_rates(key, sorted(points, key=lambda point: point.x)) for key, points in found.items()]


def _rate(kept: Node, stitched: Node) -> Node:
    candidates = [node.get(name) for node in (stitched, kept) for name in _RATES]
    known = [node for node in (stitched, *candidates) if node.number is not None and node.number > 0]
    return known[0] if known else kept.get(_RATES[0])


def _rates(key: str, points: Sequence[_Point]) -> Rates:
    title = str(Pair.parse(key))
    codecs = dict.fromkeys((*_STYLES, *(name for point in points for name, _ in point.kept.get("r2").items())))
    drawn = [point for point in points if point.x > 0]
    held = [
        Series(control_name(name), marks, _STYLES.get(name))
        for name in codecs
        if (marks := [(p.x, mark_of(p.kept.get("r2", name), Node(), _named(p, name), "")) for p in drawn])
        and any(mark.value is not None for _, mark in marks)
    ]
    losses = [
        Series(control_name(name), marks, style)
        for name, style in _CONDITIONS.items()
        if (marks := [(p.x, mark_of(*_loss(p, name), _named(p, name), "")) for p in drawn])
        and any(mark.value is not None for _, mark in marks)
    ]
    charts = []
    for name, axis, lines in (
        ("Held-out R²", "R²", held),
        ("Stitched loss", "nats per token", losses),
    ):
        if lines:
            svg = line_chart(
                lines,
                label=f"{name} against rate, {title}",
                axes=("bytes of latents per byte of text", axis),
                verticals=[(1.0, "the text itself"), *_token_ids(drawn)],
                log=True,
            )
            charts.append((f"{name} against rate", svg, chart_key(lines)))
    header = ("run", "latents", "bytes per window", "per text byte", *(f"R² {control_name(n)}" for n in codecs))
    rows = tuple(_row(point, list(codecs)) for point in points)
    sources = dict.fromkeys(
        point.run.origin(name)
        for point in points
        for name in ("metrics.json", "stitch.json")
        if name in point.run.files
    )
    return Rates(title, tuple(charts), (_note(points),), (*header, "mapped nats", "recovered"), rows, tuple(sources))


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


def _token_ids(points: Sequence[_Point]) -> list[tuple[float, str]]:
    for point in points:
        ids, text = (point.kept.get(name).number for name in ("token_id_bytes", "text_bytes"))
        if ids is not None and text is not None and text > 0 and ids / text > 0:
            return [(ids / text, "its token ids")]
    return []


def _named(point: _Point, name: str) -> str:
    return f"{point.run.label}, {control_name(name)}, {_shape(point)}"


def _shape(point: _Point) -> str:
    sides = [point.kept.get(name).text for name in ("latents", "latent_dim")]
    return "×".join(sides) if all(sides) else "latents not given"


def _loss(point: _Point, name: str) -> tuple[Node, Node]:
    condition = point.stitched.get("conditions", name)
    return condition.get("nats_per_token"), condition.get("ci95")


def _row(point: _Point, codecs: Sequence[str]) -> tuple[Markup, ...]:
    why = "there is no stitch.json" if point.stitched.value is None else why_not(point.stitched, "mapped", "not given")
    recovered = point.stitched.get("recovered")
    return (
        say("{}", point.run.label),
        say("{}", _shape(point)),
        show(point.kept.get("bytes_per_window"), count),
        show(point.rate, score),
        *(show(point.kept.get("r2", name), score) for name in codecs),
        show(_loss(point, "mapped")[0], nats, why),
        share(recovered) if recovered.get("value").number is not None else dash(why),
    )
