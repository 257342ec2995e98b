"""Training curves: losses and, where it was measured, similarity by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.pages.charts import Mark, Series, line_chart
from evaluate.reporting.reading.inputs import Node, Origin, Pair, Run
from evaluate.reporting.reading.names import control_name
from evaluate.reporting.reading.numbers import exact, fixed, say, show

#: Where an epoch's number stands, and where its figures stand.
_Epoch = tuple[Node, Node]
_LOSSES = (("train_loss", "training"), ("val_loss", "validation"))
_SCORES = (("cka", "CKA"), ("cosine_sim", "cosine"))


@dataclass(frozen=True)
class Training:
    """One layer pair's epochs."""

    run: str
    title: str
    sources: tuple[Origin, ...]
    charts: tuple[Markup, ...]
    notes: tuple[Markup, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[Markup, ...], ...]


def trainings(run: Run) -> list[Training]:
    """Draw every layer pair's losses by epoch.

    Args:
        run: The run.
    """
    if not run.trained:
        return []  # a closed form logs itself as epoch 0: one point is no curve
    keys = [pair.key for pair in run.pairs]
    keys += [event.get("pair").text for event in run.log]
    keys += [key for epoch in run.epochs for key, _ in epoch.get("pairs").items()]
    found = [_training(run, key, _epochs(run, key)) for key in dict.fromkeys(keys) if key]
    curves = [training for training in found if training is not None]
    if curves or not run.epochs:
        return curves
    mean = _training(run, "", [(epoch.get("epoch"), epoch) for epoch in run.epochs])
    return [mean] if mean else []


def _epochs(run: Run, key: str) -> list[_Epoch]:
    """The epochs from the log, or else the epoch files; a resumed run's last word counts."""
    logged = {
        event.get("epoch").number: (event.get("epoch"), event)
        for event in run.log
        if event.get("event").value == "epoch" and event.get("pair").text == key
    }
    if logged:
        return [entry for epoch, entry in sorted(logged.items(), key=lambda e: e[0] or 0.0)]
    blocks = [(epoch.get("epoch"), epoch.get("pairs", key)) for epoch in run.epochs]
    return [(epoch, block) for epoch, block in blocks if block.value is not None]


def _training(run: Run, key: str, epochs: Sequence[_Epoch]) -> Training | None:
    lines = _lines(_LOSSES, epochs)
    if not lines:
        return None
    closed = run.file("metrics.json").get("pairs", key, "baselines", "closed_form", "r2")
    references, notes = [], []
    if closed.number is not None:
        references = [(1 - closed.number, "closed form")]
        text = (
            "Dashed: the closed form’s error on the test split, 1 − R² = {} (R² {}). "
            "The validation loss is on the same scale."
        )
        notes.append(say(text, fixed(1 - closed.number, 3), show(closed)))
    notes += _stops(run, key)
    label = str(Pair.parse(key)) if key else "mean over layer pairs"
    losses = line_chart(
        lines,
        label=f"Loss by epoch, {label}, {run.label}",
        axes=("epoch", "loss"),
        references=references,
    )
    charts, nodes = [losses], [node for _, node in epochs]
    # A log has losses alone; the epoch files beside it have what was measured after every epoch.
    measured = _lines(
        _SCORES, [(epoch.get("epoch"), epoch.get("pairs", key) if key else epoch) for epoch in run.epochs]
    )
    if any(len(line.points) > 1 for line in measured):
        charts.append(
            line_chart(measured, label=f"Similarity by epoch, {label}, {run.label}", axes=("epoch", "validation"))
        )
        nodes += run.epochs
    columns = ("train_loss", "val_loss", "cka", "cosine_sim", "lr", "seconds")
    # The log tells more of an epoch than its file does.
    shown = [c for c in columns if any(node.maybe(c).number is not None for _, node in epochs)]
    rows = tuple((_figure(epoch), *(_figure(node.maybe(c)) for c in shown)) for epoch, node in epochs)
    return Training(
        run=run.label,
        title=label,
        sources=tuple(dict.fromkeys(Origin(node.at.split("#")[0], node.href) for node in nodes)),
        charts=tuple(charts),
        notes=tuple(notes),
        header=("epoch", *(control_name(c) for c in shown)),
        rows=rows,
    )


def _lines(figures: Sequence[tuple[str, str]], epochs: Sequence[_Epoch]) -> list[Series]:
    lines = []
    for style, (key, name) in enumerate(figures):
        points = [
            (epoch.number, Mark(node.get(key).number, name=f"{name}, epoch {epoch.text}")) for epoch, node in epochs
        ]
        known = [(x, mark) for x, mark in points if x is not None]
        if any(mark.value is not None for _, mark in known):
            lines.append(Series(name, known, style))
    return lines


def _figure(node: Node) -> Markup:
    return show(node, exact, "not given for this epoch")


def _stops(run: Run, key: str) -> list[Markup]:
    stops = [event for event in run.log if event.get("event").value == "stop" and event.get("pair").text == key]
    return [
        say(
            "{}. Kept is epoch {}.",
            (reason[:1].upper() + reason[1:]) or "No reason is given for the end",
            show(stop.get("best_epoch"), exact),
        )
        for stop in stops[-1:]
        for reason in [stop.get("reason").text.rstrip(".")]
    ]
