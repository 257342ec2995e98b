"""Can the target answer what only the source has read: accuracies of ``communicate.json``, drawn and in words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.judging.sentences import placed
from align.pages.charts import Dots, dot_plot
from evaluate.reporting.reading.findings import findings_of
from evaluate.reporting.reading.inputs import Node, Origin, Pair, Run, clean_text
from evaluate.reporting.reading.names import NO_LEAK, Leak, control_name, leak_of
from evaluate.reporting.reading.numbers import count, dash, exact, fixed, interval, percent, percent_number, say, show
from evaluate.reporting.sections.gains import Gains, beats_all, gains, standing, winning
from evaluate.reporting.sections.stitched import mark_of
from featstore.runtime.records import EMPTY

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
_ORDER = ("silent", *_CONTROLS)
_WITHOUT_STATES = ("silent", "text", "summary")
#: Ways of sending states in the order in which they stand, each followed by its controls.
_WAYS = ("aligned", "replace", "sum", "mean")


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
    gains: Gains | None
    omitted: tuple[tuple[str, str], ...]
    meanings: tuple[tuple[str, str], ...]


def exchanges(run: Run) -> list[Exchange]:
    """Build the tasks of a run.

    Args:
        run: The run.
    """
    found, validated = [], _validated(run)
    for name, task in run.file("communicate.json").get("tasks").items():
        conditions = _ordered(task)
        several = len({_pair(condition) for condition in conditions} - {""}) > 1
        rows = tuple(
            (
                control_name(condition if several else condition.partition(" ")[0]),
                _meaning(condition),
                condition_kind(condition),
                show(block.get("accuracy"), percent) + _leak(task, condition).tag,
                interval(block.get("ci95"), percent_number) or dash("no interval is given"),
                show(block.get("bytes"), _size),
            )
            for condition, block in conditions.items()
        )
        source = run.origin("communicate.json")
        texts = tuple(clean_text(placed(found)) for found in findings_of(task))
        more = gains(task, f"{name}, {run.label}")
        plots = _plots(run, name, task)
        meanings = tuple(dict.fromkeys((_word(name), meaning) for name in conditions if (meaning := _meaning(name))))
        exchange = Exchange(
            name, run.label, source, _words(task, validated), plots, rows, texts, more, _omitted(task), meanings
        )
        found.append(exchange)
    return found


def _omitted(task: Node) -> tuple[tuple[str, str], ...]:
    # Why, and which conditions: one reason usually holds for several.
    found: dict[str, list[str]] = {}
    for name, why in task.get("reasons").items():
        # Several ways may share one entry: "replace, sum, mean a:1->b:2".
        way, _, key = name.rpartition(" ") if " " in name else (name, "", "")
        found.setdefault(why.text or "no reason is given", []).append(
            ", ".join(part for part in (control_name(way), key and str(Pair.parse(key))) if part)
        )
    return tuple((why, "; ".join(names)) for why, names in found.items())


def _plots(run: Run, name: str, task: Node) -> tuple[tuple[str, Markup], ...]:
    # What follows the first space is the layer pair: each has a drawing, with what needs no states on top of it.
    conditions = _ordered(task)
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
            mark = mark_of(accuracy, block.get("ci95"), control_name(condition), condition_kind(condition))
            leak = _leak(task, condition).text
            lines.append(Dots(short, [mark], ", ".join(part for part in (percent(accuracy.number), leak) if part)))
        title = str(Pair.parse(pair)) if pair else ""
        plot = dot_plot(
            lines,
            label=f"Share of right answers, {name}, {title or 'all conditions'}, {run.label}",
            axis="share of right answers" if chance is None else "share of right answers; dashed: guessing",
            percent=True,
            anchors=() if chance is None else (chance,),
            bounds=(0.0, 1.0),
        )
        drawn.append((title, plot))
    return tuple(drawn)


def _ordered(task: Node) -> dict[str, Node]:
    """The conditions in an order that puts a way of sending states beside its controls: files sort them by name."""

    def place(condition: str) -> tuple[int, str, int]:
        way, _, key = condition.partition(" ")
        if way in _WITHOUT_STATES:
            return _WITHOUT_STATES.index(way), "", 0
        method = re.sub(r"[_-]?(random|shuffled)$", "", way) or "replace"
        at = _WAYS.index(method) if method in _WAYS else len(_WAYS)
        return len(_WITHOUT_STATES) + at, key, condition_kind(way) == "control"

    # Layer pairs stay apart, each with all its ways.
    found = dict(task.get("conditions").items())
    keys = dict.fromkeys(("", *(_pair(name) for name in found)))
    return {name: found[name] for key in keys for name in sorted(found, key=place) if _pair(name) == key}


def _pair(condition: str) -> str:
    return condition.partition(" ")[2]


def _leak(task: Node, condition: str) -> Leak:
    return leak_of(task.get("pairs", pair)) if (pair := _pair(condition)) else NO_LEAK


@dataclass(frozen=True)
class Chosen:
    """The way of sending states that stands for one task of one run; its answers did not choose it.

    Attributes:
        condition: Its name in the file.
        val_r2: Validation R2 of its layer pair, by which it was chosen.
    """

    run: str
    task: Node
    condition: str
    val_r2: float | None

    @property
    def is_ceiling(self) -> bool:
        """Whether the model that answers is the one that read."""
        reader = self.task.get("source").text
        return bool(reader) and reader == self.task.get("target").text

    @property
    def block(self) -> Node:
        """The accuracy and what belongs to it."""
        return self.task.get("conditions", self.condition)

    @property
    def leak(self) -> Leak:
        """What leaks at its layer beside the states."""
        return _leak(self.task, self.condition)


def chosen_answers(runs: Sequence[Run]) -> list[Chosen]:
    """What stands for every task and run, the highest validation R2 first.

    Tasks in which a model reads for itself, the ceiling, count only where there are no others.

    Args:
        runs: What was read.
    """
    found = []
    for run in runs:
        validated = _validated(run)
        tasks = [task for _, task in run.file("communicate.json").get("tasks").items()]
        for task in tasks:
            condition = _chosen(task, validated)
            if condition:
                found.append(Chosen(run.label, task, condition, validated.get(_pair(condition))))
    found = [one for one in found if not one.is_ceiling] or found
    return sorted(found, key=lambda one: -_high(one.val_r2))


def _validated(run: Run) -> dict[str, float]:
    pairs = run.file("metrics.json").get("pairs").items()
    return {key: r2 for key, metrics in pairs if (r2 := metrics.get("val", "r2").number) is not None}


def _chosen(task: Node, validated: Mapping[str, float]) -> str:
    """The way that is quoted: that of the layer pair with the highest validation R2 which sends the most."""
    mapped = [
        name
        for name, block in _ordered(task).items()
        if condition_kind(name) == "mapped" and block.get("accuracy").number is not None
    ]

    def place(name: str) -> tuple[float, int]:
        way, _, key = name.partition(" ")
        return -_high(validated.get(key)), _WAYS.index(way) if way in _WAYS else len(_WAYS)

    # Without validation figures the first layer pair of the file.
    return min(mapped, key=place, default="")


def _high(r2: float | None) -> float:
    return -math.inf if r2 is None else r2


def _words(task: Node, validated: Mapping[str, float] = EMPTY) -> Markup:
    of = dict(task.get("conditions").items())
    known = {name: block for name, block in of.items() if block.get("accuracy").number is not None}
    best = _chosen(task, validated)
    if not best:
        return say("No map answered any question.")
    controls = [name for name in known if condition_kind(name) == "control" or _word(name) == "silent"]
    rival = max(controls, key=lambda name: _accuracy(known[name]), default="")
    several = len({_pair(name) for name in known if _pair(name) in validated}) > 1
    why = " (the layer pair of the highest validation R²)" if several else ""
    sentences = say("Sent as {}", control_name(best)) + say(
        "{}: {} of {} questions right", why, _named(task, known, best)[1], show(task.get("n"), exact)
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
    if against := dict(task.get("gains", best).items()):
        return sentences + _paired(best, against, task)
    text = " The highest control is {} ({}); the file compares none with it question by question."
    return sentences + say(text, *_named(task, known, rival))


def _paired(best: str, against: dict[str, Node], task: Node) -> Markup:
    # Differences on the same examples tell more than two intervals side by side.
    known = sorted(against, key=lambda control: (_ORDER.index(control) if control in _ORDER else len(_ORDER), control))
    level = [control_name(control) for control in known if standing(against[control]) != "above"]
    if level:
        words = say(" That is not above {} by more than the interval of the difference.", " or ".join(level))
    elif beats_all(task, best):
        words = say(
            " On the same questions that is above the question alone, random and shuffled states, each by more "
            "than the interval of the difference."
        )
    elif task.get("beats", best, "p_adjusted").number is not None:
        words = say(
            " That is above the question alone, random and shuffled states, each beyond its interval, but among so "
            "many ways to send states that may be chance (adjusted p {}).",
            show(task.get("beats", best, "p_adjusted"), exact),
        )
    else:
        words = say(" That is above {}; the other controls were not run.", " and ".join(map(control_name, known)))
    ways = [way for _, way in task.get("gains").items()]
    if len(ways) > 1:
        won = winning(task)
        words += say(
            " Of {} ways to send states, {} above all three.",
            len(ways),
            f"{won or 'none'} {'are' if won > 1 else 'is'}",
        )
    return words


def _named(task: Node, known: dict[str, Node], name: str) -> tuple[str, Markup]:
    return control_name(name), show(known[name].get("accuracy"), percent) + _leak(task, name).tag


def _accuracy(block: Node) -> float:
    return block.get("accuracy").number or 0.0


def _word(condition: str) -> str:
    """What decides a condition's meaning: the control that it is, or else its first word."""
    words = re.split(r"[\W_]+", condition.partition(" ")[0].lower())
    return next((word for word in words if word in _CONTROLS), words[0])


def _meaning(condition: str) -> str:
    return _MEANING.get(_word(condition), "")


def condition_kind(condition: str) -> str:
    """Whether a condition is a control, needs no states (``own``), or is one of the map's (``mapped``).

    Args:
        condition: With or without its layer pair.
    """
    words = re.split(r"[\W_]+", condition.partition(" ")[0].lower())
    if any(word in _CONTROLS for word in words):
        return "control"
    return "own" if words[0] in _WITHOUT_STATES else "mapped"


def _size(value: float) -> str:
    return count(value) if value >= 1000 or float(value).is_integer() else fixed(value, 1)
