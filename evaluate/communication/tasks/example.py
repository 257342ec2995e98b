"""One question about one context."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One question about one context.

    Attributes:
        context: What only A reads.
        question: What B is asked.
        answers: What counts as right; the first is the one shown.
        choices: What B chooses from, one of them right; empty for a free answer.
        cue: How the answer begins; may be empty.
        cluster: What it has in common with other examples, which then are no independent evidence; empty where that is
            no more than the context.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    cue: str = ""
    cluster: str = ""

    @property
    def right(self) -> int:
        """Which of the choices is right."""
        return self.choices.index(self.answers[0])

    @property
    def group(self) -> str:
        """Examples of one group are one piece of evidence: the same cluster, or else the same context."""
        return self.cluster or self.context
