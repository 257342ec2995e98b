"""The stitched losses of every map: under every condition, and what share of the loss was recovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluate.reporting.drawing.svg import Dots, Mark, dot_plot
from evaluate.reporting.reading.inputs import Node, Origin, Pair, Run
from evaluate.reporting.reading.names import NO_LEAK, Leak, control_name, leak_of, share, type_name
from evaluate.reporting.reading.numbers import Style, count, dash, interval, nats, percent, say, score, show
from featstore.text.roles import of_roles

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
#: What a condition may have beside its loss, its heading and how to write it.
_MORE: tuple[tuple[str, str, Style], ...] = (
    ("kl", "KL from clean", score),
    ("top1", "same top token", percent),
)
#: The two recovered shares in stitch.json, and what they are.
SHARES = (
    ("recovered", "share of the loss between mean state and clean run that the map recovers"),
    ("recovered_best_control", "the same, counted from the best control instead of the mean state"),
)


@dataclass(frozen=True)
class Stitched:
    """One map's losses under every condition."""

    title: str
    run: str
    source: Origin
    recovered: Markup
    caption: Markup
    plot: Markup
    more: tuple[str, ...]
    rows: tuple[tuple[str, str, Markup, Markup, Markup, tuple[Markup, ...]], ...]


def forest(runs: Sequence[Run]) -> Markup | None:
    """Draw the recovered share of every map with its interval, from the mean state and best control.

    Args:
        runs: What was read.
    """
    lines = []
    for run in runs:
        for key, stitched in run.file("stitch.json").get("pairs").items():
            blocks = [(stitched.get(name), name) for name, _ in SHARES]
            title = f"{run.label} · {Pair.parse(key)}"
            marks = [
                mark_of(block.get("value"), block.get("ci95"), f"{control_name(name)}, {title}", kind)
                for (block, name), kind in zip(blocks, ("mapped", "hollow"), strict=True)
            ]
            value = marks[0].value
            leak = leak_of(stitched).text
            text = ", ".join(part for part in (percent(value), leak) if part) if value is not None else ""
            note = "" if text else why_not(stitched, "recovered", "no figure in stitch.json")
            lines.append(Dots(title, marks, text, note))
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
        why = {name: why_not(pair, name, f"{name} is not in stitch.json") for name in names}
        leak = leak_of(pair)
        caption = say(
            "Split {}: {} documents, {} tokens{}, {} of positions replaced. Counted from the best "
            "control ({}) the map recovers {}.",
            stitch.get("split").text or "unnamed",
            show(pair.get("n_documents"), count),
            show(pair.get("n_tokens"), count),
            of_roles([node.text for node in stitch.get("roles")]),
            show(pair.get("replaced_share"), percent),
            control_name(pair.get("recovered_best_control", "control").text) or "not named",
            share(pair.get("recovered_best_control"), leak.tag),
        )
        if leak.words:
            caption += say(" <b>{}</b>.", leak.words.capitalize())
        # Where nothing is put in, nothing can leak.
        known = {name for name in names if conditions[name].get("nats_per_token").number is not None}
        beside = {name: leak if name in known - {"clean"} else NO_LEAK for name in names}
        lines = [_condition_line(name, conditions[name], why[name], beside[name]) for name in names]
        clean = conditions["clean"].get("nats_per_token").number
        plot = dot_plot(
            lines,
            label=f"Loss under every condition, {Pair.parse(key)}, {run.label}",
            axis="nats per token; lower is better",
            style=lambda value: f"{value:g}",
            anchors=() if clean is None else (clean,),
        )
        more = [
            figure for figure in _MORE if any(block.get(figure[0]).number is not None for block in conditions.values())
        ]
        rows = tuple(
            (
                control_name(name),
                kind_of(name),
                show(conditions[name].get("nats_per_token"), nats, why[name]) + beside[name].tag,
                interval(conditions[name].get("ci95")) or dash(why[name]),
                show(conditions[name].get("bits_per_byte"), score, why[name]),
                tuple(show(conditions[name].get(key), style, why[name]) for key, _, style in more),
            )
            for name in names
        )
        title = f"{type_name(run)}, {Pair.parse(key)}"
        source = run.origin("stitch.json")
        recovered = share(pair.get("recovered"), leak.tag)
        blocks.append(
            Stitched(title, run.label, source, recovered, caption, plot, tuple(figure[1] for figure in more), rows)
        )
    return blocks


def _condition_line(name: str, block: Node, why: str, leak: Leak) -> Dots:
    loss = block.get("nats_per_token")
    mark = mark_of(loss, block.get("ci95"), control_name(name), kind_of(name))
    if loss.number is None:
        # Long reasons would run out of the drawing; the table has them whole.
        return Dots(control_name(name), [], "–", why if len(why) <= 40 else why[:39] + "…")
    return Dots(control_name(name), [mark], ", ".join(part for part in (nats(loss.number), leak.text) if part))


def mark_of(value: Node, ci: Node, name: str, kind: str) -> Mark:
    """A figure and its interval as something to draw.

    Args:
        value: The figure.
        ci: Its interval, two numbers.
        name: What the figure is.
        kind: CSS class.
    """
    return Mark(value.number, ci.get(0).number, ci.get(1).number, name, kind)


def kind_of(name: str) -> str:
    """Whether a condition is the target's own, the result or a control.

    Args:
        name: Of the condition.
    """
    return {"clean": "own", "self": "own", "mapped": "mapped"}.get(name, "control")


def why_not(pair: Node, name: str, otherwise: str) -> str:
    """Why a layer pair lacks a figure.

    Args:
        pair: The pair's part of ``stitch.json``.
        name: Of the figure.
        otherwise: What to say where the file gives no reason.
    """
    return pair.get("reasons", name).text or otherwise
