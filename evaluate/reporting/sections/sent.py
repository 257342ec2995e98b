"""Right answers against rate: what each way of sending states costs for a byte of text, and how often it answers right.

A rate is bytes sent for each byte of the text that only the source has read. The text itself has rate 1, its
summary less or more, and states as they are some hundreds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.pages.charts import Mark, Series, line_chart
from evaluate.reporting.reading.inputs import Node, Pair, Run
from evaluate.reporting.reading.names import NO_LEAK, Leak, control_name, leak_of
from evaluate.reporting.reading.numbers import exact, fixed, say, show
from evaluate.reporting.sections.communicate import condition_kind
from evaluate.reporting.sections.stitched import mark_of

#: What travels, the name of its line and its style; controls are those of the compressed states.
_KINDS = {
    "compressed": ("compressed states", 0),
    "states": ("states as they are", 5),
    "shuffled": ("control: states of another example", 2),
    "random": ("control: random states", 3),
    "text": ("the text itself", 7),
    "summary": ("a summary in words", 4),
}


@dataclass(frozen=True)
class Sent:
    """One condition of one task: what was sent, at which rate, and how often the answer was right.

    Attributes:
        kind: One of the keys of ``_KINDS``.
        way: The condition without its layer pair.
        rate: Bytes sent for a byte of text, above zero.
        shown: The rate with its origin.
        leak: What leaks beside the states; nothing beside a text.
    """

    run: Run
    task: str
    kind: str
    way: str
    block: Node
    rate: float
    shown: Markup
    leak: Leak = NO_LEAK

    @property
    def mark(self) -> Mark:
        """The accuracy and its interval."""
        words = f"{self.run.label}, {control_name(self.way)} at {exact(self.rate)} bytes per byte of text, {self.task}"
        words += f", {self.leak.text}" if self.leak.text else ""
        return mark_of(self.block.get("accuracy"), self.block.get("ci95"), words, "")


def sent(run: Run, key: str, *, compressed: bool) -> list[Sent]:
    """Everything a run's tasks sent for one layer pair, the text and its summary among them.

    Args:
        run: The run.
        key: The layer pair's key.
        compressed: Whether the run's maps compress.
    """
    found = []
    for name, task in run.file("communicate.json").get("tasks").items():
        if not any(condition.partition(" ")[2] == key for condition, _ in task.get("conditions").items()):
            continue
        rate = task.get("pairs", key, "rate", "latent_bytes_per_text_byte")
        length = task.get("conditions", "text", "bytes")
        for condition, block in task.get("conditions").items():
            way, _, pair = condition.partition(" ")
            kind = _kind(way, compressed=compressed) if pair in ("", key) else ""
            if not kind or block.get("accuracy").number is None:
                continue
            own = rate if pair and compressed and rate.number is not None else None
            value, shown = _rate(block, length, own)
            if value is not None:
                leak = leak_of(task.get("pairs", key)) if pair else NO_LEAK
                found.append(Sent(run, name.partition(" (")[0], kind, way, block, value, shown, leak))
    return found


def _kind(way: str, *, compressed: bool) -> str:
    if way in ("text", "summary"):
        return way
    if condition_kind(way) == "mapped":
        return "compressed" if compressed else "states"
    # Controls of states as they are stand in the gains; here they would hide what they control.
    last = way.rpartition("_")[2]
    return last if compressed and last in ("random", "shuffled") else ""


def _rate(block: Node, text: Node, given: Node | None) -> tuple[float | None, Markup]:
    if given is not None and (given.number or 0.0) > 0:
        return given.number, show(given, rate_style)
    size, length = block.get("bytes").number, text.number
    if size is None or length is None or length <= 0 or not 0 < size / length < float("inf"):
        return None, say("")
    rate = size / length
    return rate, say(
        '<span title="{} bytes for {} bytes of text">{}</span>', exact(size), exact(length), rate_style(rate)
    )


def rate_style(value: float) -> str:
    """Write a rate: three decimals where it is near that of text, one where it is far above.

    Args:
        value: Bytes for a byte of text.
    """
    return fixed(value, 3 if value < 10 else 1)


def reference_rate(points: Sequence[Sent]) -> dict[str, float]:
    """The rate at which each uncompressed run sends all its states, by label of the run.

    Args:
        points: What was sent.
    """
    return {p.run.label: p.rate for p in points if p.kind == "states" and p.way == "aligned"}


def accuracy_charts(points: Sequence[Sent], key: str) -> list[tuple[str, Markup]]:
    """Draw right answers against rate, a chart for every task: title and drawing.

    Args:
        points: What was sent for one layer pair.
        key: The layer pair's key.
    """
    charts = []
    for task in dict.fromkeys(point.task for point in points):
        of = [point for point in points if point.task == task]
        if not any(point.kind in ("compressed", "states") for point in of):
            continue
        lines = [
            Series(words, _line(found, joined=kind in ("compressed", "shuffled", "random")), style)
            for kind, (words, style) in _KINDS.items()
            if (found := sorted((p for p in of if p.kind == kind), key=lambda point: point.rate))
        ]
        drawing = line_chart(
            lines,
            label=f"Right answers against rate, {task}, {Pair.parse(key)}",
            axes=("bytes sent per byte of text", "share of right answers"),
            references=_references(of[0].run, task, key),
            log=True,
        )
        charts.append((f"Right answers against rate, {task}", drawing))
    return charts


def _line(points: Sequence[Sent], *, joined: bool) -> list[tuple[float, Mark]]:
    # Only compressed maps of growing rate are a course; a gap after every other point keeps them apart.
    found: list[tuple[float, Mark]] = []
    seen = set()
    for point in points:
        same = (point.rate, point.block.get("accuracy").number, point.block.get("n").number)
        if point.kind in ("text", "summary") and same in seen:
            continue  # every run asks with the text itself
        seen.add(same)
        found.append((point.rate, point.mark))
        if not joined:
            found.append((point.rate, Mark(None)))
    return found


def _references(run: Run, task: str, key: str) -> list[tuple[float, str]]:
    for name, block in run.file("communicate.json").get("tasks").items():
        fits = any(condition.partition(" ")[2] == key for condition, _ in block.get("conditions").items())
        if fits and name.partition(" (")[0] == task:
            levels = (
                (block.get("conditions", "silent", "accuracy"), "the question alone"),
                (block.get("chance"), "guessing"),
            )
            return [(node.number, words) for node, words in levels if node.number is not None]
    return []
