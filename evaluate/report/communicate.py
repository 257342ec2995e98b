"""Can the target answer what only the source has read: accuracies of ``communicate.json``, drawn and in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evaluate.report.inputs import Node, Origin, Pair, Run
from evaluate.report.names import control_name
from evaluate.report.numbers import count, dash, exact, interval, percent, percent_number, say, show
from evaluate.report.stitched import mark_of
from evaluate.report.svg import Dots, dot_plot

#: What is known of a condition by its first word; any other counts as one of the map's.
_MEANING = {
    "silent": "the target sees the question alone",
    "text": "the target sees the text itself: the ceiling",
    "summary": "the target sees the source’s summary",
    "aligned": "mapped states at the text’s own positions, the text itself hidden",
    "replace": "the source’s last state takes the place of the target’s",
    "sum": "the source’s last state is added to the target’s",
    "mean": "the mean of the two last states",
    "random": "a random state of the same norm",
    "shuffled": "the states of another example",
}
_CONTROLS = ("random", "shuffled")
_WITHOUT_STATES = ("silent", "text", "summary")


@dataclass(frozen=True)
class Exchange:
    """One task of one run."""

    title: str
    run: str
    source: Origin
    words: Markup
    plots: tuple[tuple[str, Markup], ...]
    rows: tuple[tuple[str, str, str, Markup, Markup, Markup], ...]
    warnings: tuple[str, ...]


def exchanges(run: Run) -> list[Exchange]:
    """Build the tasks of a run.

    Args:
        run: The run.
    """
    found = []
    for name, task in run.file("communicate.json").get("tasks").items():
        conditions = dict(task.get("conditions").items())
        rows = tuple(
            (
                control_name(condition),
                _meaning(condition),
                _kind(condition),
                show(block.get("accuracy"), percent),
                interval(block.get("ci95"), percent_number) or dash("no interval is given"),
                show(block.get("bytes"), _size),
            )
            for condition, block in conditions.items()
        )
        source = run.origin("communicate.json")
        found.append(Exchange(name, run.label, source, _words(task), _plots(run, name, task), rows, _warnings(task)))
    return found


def findings(runs: Sequence[Run]) -> list[tuple[Markup, str]]:
    """What every task says in sentences, and the run it comes from.

    Args:
        runs: What was read.
    """
    return [
        (say("<b>{}</b> {}", name, _words(task)), run.label)
        for run in runs
        for name, task in run.file("communicate.json").get("tasks").items()
    ]


def warnings(run: Run) -> list[tuple[str, Markup]]:
    """What limits the answers, with its place.

    Args:
        run: The run.
    """
    return [
        (f"{run.label}, {name}", say("<b>communication</b> {}", text))
        for name, task in run.file("communicate.json").get("tasks").items()
        for text in _warnings(task)
    ]


def _plots(run: Run, name: str, task: Node) -> tuple[tuple[str, Markup], ...]:
    # What follows the first space is the layer pair: each has a drawing, with what needs no states on top of it.
    conditions = dict(task.get("conditions").items())
    pairs = dict.fromkeys(_pair(condition) for condition in conditions)
    chance = task.get("chance").number
    drawn = []
    for pair in [pair for pair in pairs if pair] or [""]:
        lines = []
        for condition, block in conditions.items():
            if _pair(condition) not in ("", pair):
                continue
            accuracy, short = block.get("accuracy"), control_name(condition.partition(" ")[0])
            if accuracy.number is None:
                lines.append(Dots(short, [], "–", "no accuracy is given"))
                continue
            mark = mark_of(accuracy, block.get("ci95"), control_name(condition), _kind(condition))
            lines.append(Dots(short, [mark], percent(accuracy.number)))
        title = str(Pair.parse(pair)) if pair else ""
        plot = dot_plot(
            lines,
            label=f"Share of right answers, {name}, {title or 'all conditions'}, {run.label}",
            axis="share of right answers" if chance is None else "share of right answers; dashed: guessing",
            style=percent,
            anchors=() if chance is None else (chance,),
            bounds=(0.0, 1.0),
        )
        drawn.append((title, plot))
    return tuple(drawn)


def _pair(condition: str) -> str:
    return condition.partition(" ")[2]


def _words(task: Node) -> Markup:
    of = dict(task.get("conditions").items())
    known = {name: block for name, block in of.items() if block.get("accuracy").number is not None}
    mapped = [name for name in known if _kind(name) == "mapped"]
    if not mapped:
        return say("No map answered any question.")
    best = max(mapped, key=lambda name: _accuracy(known[name]))
    controls = [name for name in known if _kind(name) == "control" or _word(name) == "silent"]
    rival = max(controls, key=lambda name: _accuracy(known[name]), default="")
    sentences = say(
        "Best of the maps is {}: {} of {} questions right", *_named(known, best), show(task.get("n"), exact)
    )
    ends = interval(known[best].get("ci95"), percent_number)
    sentences += say(" {}", ends) if ends else say("")
    beside = [
        say("{} {}", words, show(known[name].get("accuracy"), percent))
        for name, words in (("text", "the text itself gives"), ("silent", "the question alone"))
        if name in known
    ]
    if task.get("chance").number is not None:
        beside.append(say("guessing {}", show(task.get("chance"), percent)))
    if beside:
        sentences += say("; {}", Markup(", ").join(beside))
    sentences += say(".")
    if not rival:
        return sentences + say(" No control was run, so nothing shows that the states carried the answer.")
    low, high = known[best].get("ci95", 0).number, known[rival].get("ci95", 1).number
    if _accuracy(known[best]) <= _accuracy(known[rival]):
        text = " That is no better than the control {} ({})."
    elif low is not None and high is not None and low > high:
        text = " That is clearly above every control; the highest is {} ({})."
    else:
        text = " That is not clearly above the control {} ({})."
    return sentences + say(text, *_named(known, rival))


def _named(known: dict[str, Node], name: str) -> tuple[str, Markup]:
    return control_name(name), show(known[name].get("accuracy"), percent)


def _accuracy(block: Node) -> float:
    return block.get("accuracy").number or 0.0


def _warnings(task: Node) -> tuple[str, ...]:
    found = [warning.get("message").text or warning.text for warning in task.get("warnings")]
    return tuple(text for text in found if text)


def _word(condition: str) -> str:
    return re.split(r"[\W_]+", condition.lower(), maxsplit=1)[0]


def _meaning(condition: str) -> str:
    return _MEANING.get(_word(condition), "")


def _kind(condition: str) -> str:
    words = re.split(r"[\W_]+", condition.partition(" ")[0].lower())
    if any(word in _CONTROLS for word in words):
        return "control"
    return "own" if words[0] in _WITHOUT_STATES else "mapped"


def _size(value: float) -> str:
    return count(value) if value >= 1000 else exact(value)
