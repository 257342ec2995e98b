"""What an answer is, and what a measurement says of a claim.

A claim names a range, or a side of a value. It is supported where the whole interval of the measured figure lies inside
the range, contradicted where it lies wholly outside, and undecided elsewhere (:func:`align.statistics.judge`): an
interval that overlaps the range shows no more than that nobody measured enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from align.statistics import CONTRADICTED, SUPPORTED, UNDECIDED, Estimate, Verdict, judge
from evaluate.reproduce.evidence import Value

#: Of a question that claims nothing; and of one whose steps are not done, or whose figure does not exist.
ANSWERED, OPEN = "answered", "cannot be said"


@dataclass(frozen=True)
class Table:
    """Figures behind an answer.

    Attributes:
        title: What they are.
        header: Of the columns.
        rows: Texts.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass
class Answer:
    """A question of the programme, answered.

    Attributes:
        question: What was asked.
        expected: What the original expected.
        verdict: ``supported``, ``contradicted`` or ``undecided``; ``answered`` where nothing is claimed, or ``cannot be
            said``.
        decided_by: How many test documents, or questions, would decide what is undecided, if the figure stayed as it
            is; None where nobody knows.
        unit: What is counted.
        found: The measurement in one sentence.
        words: Further sentences.
        tables: Figures.
        plots: PNG files beside the analysis.
        sources: Files that the figures come from, below the programme's directory.
    """

    question: str
    expected: str
    verdict: str = OPEN
    decided_by: int | None = None
    unit: str = "test documents"
    found: str = "its steps are not done"
    words: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def block(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)

    def judge(self, *verdicts: Verdict) -> None:
        """Take the verdict of claims that have to hold together.

        Args:
            verdicts: Of each.
        """
        together = all_of(verdicts)
        self.verdict, self.decided_by = together.state, together.documents

    def claim(self, estimate: Estimate, low: float = -math.inf, high: float = math.inf) -> None:
        """Judge the claim that a figure lies within a range, and say why where it cannot be judged.

        Args:
            estimate: The figure.
            low: The range's lower end.
            high: Its upper end.
        """
        self.judge(judge(estimate, low, high))
        if estimate.reason is not None:
            self.words.append(f"There is no interval: {estimate.reason}.")


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on several claims together: all have to be supported, and one that is contradicted is enough.

    Args:
        verdicts: Of each, at least one.
    """
    states = [verdict.state for verdict in verdicts]
    if CONTRADICTED in states:
        return Verdict(CONTRADICTED, None)
    if UNDECIDED not in states:
        return Verdict(SUPPORTED, None)
    needed = [verdict.documents for verdict in verdicts if verdict.state == UNDECIDED]
    known = [count for count in needed if count is not None]
    return Verdict(UNDECIDED, max(known) if len(known) == len(needed) else None)


def share(value: Value | None, form: str = ".1%") -> str:
    """A share in percent with its interval, a dash where there is none."""
    return "-" if value is None else value.show(form)


def figure(value: Value | None, form: str = ".3f") -> str:
    """A figure with its interval, a dash where there is none."""
    return "-" if value is None else value.show(form)


def arrow(key: str) -> str:
    """A layer pair for reading."""
    return key.replace("->", " → ")
