"""How much more often mapped states give the right answer than each control: ``gains`` of ``communicate.json``.

A gain is the difference of two accuracies on the same examples with its 95 % interval, its exact p value and the
questions that only one of the two gets right. It shows something where the interval leaves out zero and the exact test
agrees, and among many ways to send states only where Holm's adjustment for their number leaves it: ``above`` and
``beats`` of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.pages.charts import spark
from evaluate.reporting.reading.inputs import Node, Pair
from evaluate.reporting.reading.names import control_name, leak_of
from evaluate.reporting.reading.numbers import dash, exact, interval, percent, percent_number, say, show
from evaluate.reporting.sections.stitched import mark_of
from evaluate.reporting.sections.tables import Cell

Standing = Literal["above", "level", "unknown"]

#: Controls in the order of their columns; others that a file names follow.
_CONTROLS = ("silent", "random", "shuffled")
_MARKS: dict[Standing, tuple[str, str]] = {
    "above": ("▲", "above it: the interval leaves out zero, and the exact test agrees"),
    "level": ("○", "no difference shown"),
    "unknown": ("?", "not judged: the file does not say"),
}


@dataclass(frozen=True)
class Gains:
    """The gains of one task.

    Attributes:
        header: Column titles, each with its class.
        rows: A cell for each, with what it sorts by.
        key: What the marks of the cells mean, mark and words.
    """

    header: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    key: tuple[tuple[str, str], ...]


def standing(gain: Node) -> Standing:
    """What the file says of a gain.

    Args:
        gain: With ``above``; a file of an early version has none, and is not judged here.
    """
    above = gain.get("above").value
    return "above" if above is True else "level" if above is False else "unknown"


def beats_all(task: Node, name: str) -> bool:
    """Whether a way of sending states beats the question alone and both its controls.

    Args:
        task: One of the tasks of ``communicate.json``.
        name: The way, with its layer pair; without a random and a shuffled control nothing is shown.
    """
    return task.get("beats", name, "beats").value is True


def winning(task: Node) -> int:
    """How many ways of sending states beat everything.

    Args:
        task: One of the tasks of ``communicate.json``.
    """
    return sum(beats_all(task, name) for name, _ in task.get("gains").items())


def gains(task: Node, label: str) -> Gains | None:
    """Build the table of a task's gains, if it has any.

    Args:
        task: One of the tasks of ``communicate.json``.
        label: What the task is, for screen readers.
    """
    ways = [(name, against) for name, against in task.get("gains").items() if next(against.items(), None)]
    if not ways:
        return None
    controls = list(dict.fromkeys((*_CONTROLS, *(control for _, against in ways for control, _ in against.items()))))
    controls = [control for control in controls if any(against.get(control).value is not None for _, against in ways)]
    bounds, several = _bounds(ways), len({name.partition(" ")[2] for name, _ in ways}) > 1
    rows = tuple(_row(task, name, against, controls, bounds, label, several=several) for name, against in ways)
    found = {standing(against.get(control)) for _, against in ways for control in controls}
    key = tuple(words for place, words in _MARKS.items() if place in found)
    layers = (("layers", ""),) if several else ()
    columns = ("right", "above", *(f"over {control_name(control)}" for control in controls))
    return Gains((("sent", ""), *layers, *((column, "num") for column in columns)), rows, key)


def _row(
    task: Node,
    name: str,
    against: Node,
    controls: Sequence[str],
    bounds: tuple[float, float],
    label: str,
    *,
    several: bool,
) -> tuple[Cell, ...]:
    way, _, key = name.partition(" ")
    accuracy = task.get("conditions", name, "accuracy")
    cells = [Cell(say("{}", control_name(way)), way)]
    if several:
        cells.append(_layers(key))
    leak = leak_of(task.get("pairs", key)).tag
    cells.append(Cell(show(accuracy, percent) + leak, _sort(accuracy), "num"))
    above = [standing(against.get(control)) == "above" for control in controls]
    all_of = beats_all(task, name)
    count = f"{sum(above)} of {len(controls)}"
    cells.append(Cell(say("<b>{}</b>" if all_of else "{}", count), str(sum(above)), "num"))
    cells += [_gain(task, name, control, against.get(control), bounds, label) for control in controls]
    return tuple(cells)


def _layers(key: str) -> Cell:
    pair = Pair.parse(key)
    return Cell(say("{}", pair), str(pair))


def _gain(task: Node, name: str, control: str, gain: Node, bounds: tuple[float, float], label: str) -> Cell:
    if gain.get("value").number is None:
        why = task.get("reasons", f"{name.partition(' ')[0]}_{control} {name.partition(' ')[2]}").text
        why = why or task.get("reasons", f"{control} {name.partition(' ')[2]}").text
        return Cell(dash(why or f"not compared with {control_name(control)}"), "", "num")
    mark, words = _MARKS[standing(gain)]
    drawn = say('<span class="{}" title="{}">{}</span>', standing(gain), words, mark)
    value, ends = show(gain.get("value"), _points), interval(gain.get("ci95"), percent_number)
    words = f"{control_name(name)} over {control_name(control)}"
    point = mark_of(gain.get("value"), gain.get("ci95"), words, standing(gain))
    alone = [gain.get(f"{which}_alone") for which in ("first", "second")]
    # Questions that only one of the two gets right are all that tells.
    counts = say(" ({}:{})", *(show(node, exact) for node in alone)) if all(n.number is not None for n in alone) else ""
    return Cell(
        say("{}{} {} {}{}", spark(point, bounds, f"{words}, {label}"), drawn, value, ends, counts),
        _sort(gain.get("value")),
        "num",
    )


def _points(value: float) -> str:
    return f"{'+' if value > 0 else ''}{percent_number(value)}"


def _sort(node: Node) -> str:
    return "" if node.number is None else repr(node.number)


def _bounds(ways: Sequence[tuple[str, Node]]) -> tuple[float, float]:
    ends = [
        end.number
        for _, against in ways
        for _, gain in against.items()
        for end in (gain.get("value"), *gain.get("ci95"))
        if end.number is not None
    ]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return (low, high) if high > low else (-1.0, 1.0)
