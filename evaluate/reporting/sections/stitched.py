"""The stitched losses of every map: under every condition, and what share of the loss was recovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.pages.charts import Dots, Mark, dot_plot
from evaluate.reporting.reading.inputs import Node, Origin, Pair, Run
from evaluate.reporting.reading.names import NO_LEAK, Leak, control_name, gain, leak_of, share, type_name
from evaluate.reporting.reading.numbers import Style, count, dash, interval, nats, percent, say, score, show
from featstore.text.roles import of_roles

#: Conditions of a stitched run and what each puts into the target, in the order they are drawn.
CONDITIONS = {
    "clean": "the target untouched",
    "self": "the target’s own states put back: must equal clean",
    "mapped": "the source’s states through the map: the result",
    "token": "the best prediction from the source’s current token alone: no context",
    "mean": "the target’s mean state at every replaced position: nothing of the source",
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
#: Heading of the differences from the mapped loss.
_MARGIN = "above mapped, 95 %"
#: The two recovered shares in stitch.json, and what they are.
SHARES = (
    ("recovered_token", "share of the loss between the source’s token alone and the clean run that the map recovers"),
    ("recovered", "the same, counted from the mean state instead of the token"),
)
#: What they are counted from, in words.
FROM = {"recovered_token": "from the token alone", "recovered": "from the mean state"}


@dataclass(frozen=True)
class Stitched:
    """One map's losses under every condition."""

    title: str
    run: str
    source: Origin
    beyond: Markup
    caption: Markup
    plot: Markup
    more: tuple[str, ...]
    rows: tuple[tuple[str, str, Markup, Markup, Markup, tuple[Markup, ...]], ...]


def forest(runs: Sequence[Run]) -> Markup | None:
    """Draw the recovered share of every map with its interval, from the token alone and from the mean state.

    Args:
        runs: What was read.
    """
    lines = []
    for run in runs:
        for key, stitched in run.file("stitch.json").get("pairs").items():
            blocks = [(stitched.get(name), name) for name, _ in SHARES]
            title = f"{run.label} · {Pair.parse(key)}"
            marks = [
                mark_of(block.get("value"), block.get("ci95"), f"recovered {FROM[name]}, {title}", kind)
                for (block, name), kind in zip(blocks, ("mapped", "hollow"), strict=True)
            ]
            value = marks[0].value
            leak = leak_of(stitched).text
            text = ", ".join(part for part in (percent(value), leak) if part) if value is not None else ""
            note = "" if text else _short(why_not(stitched, "recovered_token", "no figure in stitch.json"))
            lines.append(Dots(title, marks, text, note))
    if not lines:
        return None
    return dot_plot(
        lines,
        label="Recovered share of every map",
        axis="share of the loss recovered",
        percent=True,
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
            "Split {}: {} documents{}, {} tokens{}, {} of positions replaced. Beyond the source’s token alone {}. "
            "Counted from the mean state the map recovers {}.",
            stitch.get("split").text or "unnamed",
            show(pair.get("n_documents"), count),
            _effective(pair.get("effective_documents")),
            show(pair.get("n_tokens"), count),
            of_roles([node.text for node in stitch.get("roles")]),
            show(pair.get("replaced_share"), percent),
            _beyond(pair, leak),
            share(pair.get("recovered"), leak.tag, why_not(pair, "recovered", "no figure in stitch.json")),
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
                (_margin(pair, name), *(show(conditions[name].get(key), style, why[name]) for key, _, style in more)),
            )
            for name in names
        )
        title = f"{type_name(run)}, {Pair.parse(key)}"
        source = run.origin("stitch.json")
        headings = (_MARGIN, *(figure[1] for figure in more))
        blocks.append(Stitched(title, run.label, source, _beyond(pair, leak), caption, plot, headings, rows))
    return blocks


def _condition_line(name: str, block: Node, why: str, leak: Leak) -> Dots:
    loss = block.get("nats_per_token")
    mark = mark_of(loss, block.get("ci95"), control_name(name), kind_of(name))
    if loss.number is None:
        return Dots(control_name(name), [], "–", _short(why))
    return Dots(control_name(name), [mark], ", ".join(part for part in (nats(loss.number), leak.text) if part))


def _short(why: str) -> str:
    # Long reasons would run out of the drawing; the table has them whole.
    return why if len(why) <= 40 else why[:39] + "…"


def _effective(node: Node) -> Markup:
    return say("") if node.number is None else say(" (as many as {} equally long ones)", show(node, count))


def _beyond(pair: Node, leak: Leak) -> Markup:
    beyond = pair.get("beyond_token")
    if beyond.get("nats").number is None:
        return dash(why_not(pair, "beyond_token", "no figure in stitch.json"))
    why = why_not(pair, "recovered_token", "no figure in stitch.json")
    return say("{}, {} of what it leaves", gain(beyond, leak.tag), share(pair.get("recovered_token"), why=why))


def _margin(pair: Node, name: str) -> Markup:
    """How much lower the loss is with mapped states than under a control."""
    block = pair.get("controls", name)
    if block.get("nats").number is None:
        return dash("not a control of this map" if kind_of(name) != "control" else why_not(pair, name, "not compared"))
    beaten = {True: "▲", False: "○"}.get(block.get("beaten").value, "?")
    title = {"▲": "beaten: the interval is above zero", "○": "the interval is not above zero"}.get(
        beaten, "no interval"
    )
    mark = say('<span class="{}" title="{}">{}</span>', "above" if beaten == "▲" else "level", title, beaten)
    return say("{} {} {}", mark, show(block.get("nats"), nats), interval(block.get("ci95"), nats))


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
