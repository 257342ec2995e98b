"""What an answer is, and when an expectation counts as held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evaluate.reproduce.evidence import Value

HELD, PARTLY, LESS, MORE, NOT, ANSWERED, OPEN = (
    "held",
    "held in part",
    "less than expected",
    "more than expected",
    "did not hold",
    "answered",
    "cannot be said",
)


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
        verdict: One of this module's.
        found: The measurement in one sentence.
        words: Further sentences.
        tables: Figures.
        plots: PNG files beside the analysis.
        sources: Files that the figures come from, below the programme's directory.
    """

    question: str
    expected: str
    verdict: str = OPEN
    found: str = "its steps are not done"
    words: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def block(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)


@dataclass(frozen=True)
class Judged:
    """How many measurements fall within an expected range, below it and above."""

    within: int
    below: int
    above: int

    @property
    def verdict(self) -> str:
        """What most of them say; ``held in part`` where none of the three has more than half."""
        total = self.within + self.below + self.above
        if not total:
            return OPEN
        for count, verdict in ((self.within, HELD), (self.below, LESS), (self.above, MORE)):
            if 2 * count > total:
                return verdict
        return PARTLY

    def words(self, what: str) -> str:
        """The counts as a sentence.

        Args:
            what: Is counted, such as ``layer pairs``.
        """
        total = self.within + self.below + self.above
        return f"Of {total} {what}, {self.within} lie in the expected range, {self.below} below and {self.above} above."


def judge(values: Sequence[Value], low: float, high: float) -> Judged:
    """Compare measurements with an expected range: inside is what has an interval that overlaps it.

    Args:
        values: Measurements; one without an interval is its own.
        low: Least expected.
        high: Most expected.
    """
    below = above = 0
    for value in values:
        least = value.value if value.low is None else value.low
        most = value.value if value.high is None else value.high
        below += most < low
        above += least > high
    return Judged(len(values) - below - above, below, above)


def share(value: Value | None) -> str:
    """A share in percent with its interval, a dash where there is none."""
    return "-" if value is None else value.show(".1%")


def figure(value: Value | None, form: str = ".3f") -> str:
    """A figure with its interval, a dash where there is none."""
    return "-" if value is None else value.show(form)


def arrow(key: str) -> str:
    """A layer pair for reading."""
    return key.replace("->", " → ")
