"""Whether the target answers what only the source has read, from ``communicate.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.stats import binomtest

from align.judging.record import Finding
from align.statistics import CONTRADICTED, SIGNIFICANT, SUPPORTED, UNDECIDED, Verdict, holm
from evaluate.reproduce.answers.base import Answer, Table, arrow, share
from evaluate.reproduce.evidence import Evidence, Value
from evaluate.results import Answers, Gain, TaskAnswers
from featstore.runtime.console import human_bytes
from featstore.runtime.records import EMPTY

#: Conditions of a task in the order of the question: nothing, states, text.
_ORDER = ("silent", "replace", "sum", "mean", "aligned", "random", "shuffled", "aligned_random", "aligned_shuffled")
_AGAINST = ("silent", "random", "shuffled")
#: More right answers than a control by less than this count as none.
_MARGIN = 0.05


def communication(evidence: Evidence) -> Answer:
    """Accuracy of every condition, and what it sends."""
    answer = Answer(
        "Can the target answer what only the source has read?",
        "States were injected at layer 0, without the prompt and without controls; texts were called a validation. "
        "Here, that some way to put states in beats the question alone, random and shuffled states; and that none does "
        f"where all are within {_MARGIN:.0%} of one of these.",
        unit="questions",
    )
    ways: dict[str, Mapping[str, Gain]] = {}
    p: dict[str, float | None] = {}
    for task, entry in evidence.tasks("affine").items():
        answer.tables.append(_table(task, entry))
        if entry.source == entry.target:
            answer.words += [f"The ceiling, {entry.source} with itself: {_quoted(entry, evidence)}."] * bool(
                entry.gains
            )
        else:
            ways |= {f"{task}: {name}": gains for name, gains in entry.gains.items()}
            p |= {f"{task}: {name}": beats.p for name, beats in entry.beats.items()}
            if entry.gains:
                answer.words.append(f"{task}: {_quoted(entry, evidence)}.")
        answer.words += [f"{task}: {warning.sentence}." for warning in _general(entry.warnings)]
    if ways:
        adjusted = dict(zip(p, holm(list(p.values())), strict=True))
        won = [name for name, gains in ways.items() if _wins(gains, adjusted.get(name))]
        answer.judge(_verdict(ways, won))
        answer.found = (
            f"{len(won)} of {len(ways)} ways to put the other model's states into a question beat the question alone, "
            f"random and shuffled states (p adjusted for all of them, Holm){': ' if won else ''}"
            f"{'; '.join(map(arrow, won))}."
        )
        answer.sources.append("runs/affine/communicate.json")
    return answer


def _wins(gains: Mapping[str, Gain], adjusted: float | None) -> bool:
    above = all(name in gains and bool(gains[name].above) for name in _AGAINST)
    return above and adjusted is not None and adjusted <= SIGNIFICANT


def _verdict(ways: Mapping[str, Mapping[str, Gain]], won: Sequence[str]) -> Verdict:
    """That some way beats everything is supported by one, and contradicted where each is level with something."""
    if won:
        return Verdict(SUPPORTED, None)
    if all(any(map(_small, gains.values())) for gains in ways.values()):
        return Verdict(CONTRADICTED, None)
    # The way that would first beat everything, if it went on like this, says how many questions that takes.
    needed = [[_questions(gain, SIGNIFICANT / len(ways)) for gain in gains.values()] for gains in ways.values()]
    known = [max(filter(None, counts)) for counts in needed if counts and None not in counts]
    return Verdict(UNDECIDED, min(known, default=None))


def _questions(gain: Gain, level: float) -> int | None:
    """Questions after which the exact test would find a gain that goes on as it is; None for no gain."""
    first, second = gain.first_alone or 0, gain.second_alone or 0
    if gain.value is None or gain.value <= 0 or first <= second:
        return None
    n = (first - second) / gain.value
    for times in map(float, np.geomspace(1, 1000, 200)):
        one, other = round(first * times), round(second * times)
        if binomtest(one, one + other).pvalue <= level:
            return math.ceil(n * times)
    return None


def _small(gain: Gain) -> bool:
    """Whether the whole interval of a gain is below what counts."""
    high = None if gain.ci95 is None else gain.ci95[1]
    return high is not None and high <= _MARGIN


def _quoted(entry: TaskAnswers, evidence: Evidence) -> str:
    """A way named beforehand: the states of all positions at the middle layers, or the first there is."""
    middle = (evidence.places.middle, evidence.places.middle.reversed)
    names = [f"aligned {pair.key}" for pair in middle]
    name = next((name for name in names if name in entry.gains), next(iter(entry.gains)))
    words = [f"{arrow(name)}, {_right(entry, name)} right"]
    words += [f"{said} {_right(entry, other)}" for other, said in _BESIDE if other in entry.conditions]
    return "; ".join(words)


_BESIDE = (("silent", "told nothing"), ("text", "with the text"))


def _right(entry: TaskAnswers, name: str) -> str:
    answers = entry.conditions.get(name)
    return "-" if answers is None else share(Value.between(answers.accuracy, answers.ci95), ".0%")


def _table(task: str, entry: TaskAnswers) -> Table:
    rows = []
    for name, answers in _ordered(entry.conditions):
        told = entry.gains.get(name, EMPTY)
        rows.append(
            (
                answers.condition or name,
                "" if answers.pair is None else arrow(answers.pair),
                share(Value.between(answers.accuracy, answers.ci95)),
                "-" if answers.bytes is None else human_bytes(answers.bytes),
                *(_gain(told.get(control)) for control in _AGAINST),
            )
        )
    who = f"{entry.source} reads, {entry.target} answers"
    chance = "unknown" if entry.chance is None else f"{entry.chance:.1%} ({entry.chance_is})"
    title = f"{task}: {entry.n} questions, chance {chance}; {who}; in brackets the questions that one alone gets right"
    return Table(title, ("condition", "layers", "right", "sent", *(f"more than {c}" for c in _AGAINST)), rows)


def _ordered(conditions: Mapping[str, Answers]) -> list[tuple[str, Answers]]:
    place = {name: i for i, name in enumerate((*_ORDER, "summary", "text"))}
    return sorted(conditions.items(), key=lambda item: (item[1].pair or "", place.get(item[1].condition or "", 99)))


def _gain(gain: Gain | None) -> str:
    value = None if gain is None else Value.of(gain)
    if gain is None or value is None:
        return ""
    counts = "" if gain.first_alone is None else f" ({gain.first_alone}:{gain.second_alone})"
    return f"{value.show('+.0%')}{counts}"


def _general(warnings: Iterable[Finding]) -> list[Finding]:
    """Those of the task as a whole: what holds of single conditions stands in their row."""
    return [warning for warning in warnings if warning.code != "no-better-than-control"]
