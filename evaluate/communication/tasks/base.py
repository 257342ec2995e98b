"""What a task is, how its prompts are written, and when an answer counts.

The reader (A) sees the context; the answerer (B) sees the question and, in some conditions, the context or a summary of
it. An answer is free text, where it counts if an accepted answer stands in its first line, or a choice, where the one
of the highest likelihood counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from featstore.errors import SpecError

_ARTICLES = {"a", "an", "the"}
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Example:
    """One question about one context.

    Attributes:
        context: What only A reads.
        question: What B is asked.
        answers: What counts as right; the first is the one shown.
        choices: What B chooses from, one of them right; empty for a free answer.
        cue: How the answer begins; may be empty.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    cue: str = ""

    @property
    def right(self) -> int:
        """Which of the choices is right."""
        return self.choices.index(self.answers[0])


@dataclass(frozen=True)
class Task:
    """Examples and how they are put to models.

    Attributes:
        name: Shown and used as the key of the results.
        examples: At least one.
        chance: Accuracy of the best answer that looks at neither context nor states.
        chance_is: What that answer is, in words.
        context_prompt: What A reads, with ``{context}``.
        question_prompt: What B reads alone, with ``{question}`` and ``{cue}``.
        text_prompt: What B reads with the context, with all three.
        summary_prompt: What A continues to sum the context up, with ``{context}``.
    """

    name: str
    examples: tuple[Example, ...]
    chance: float
    chance_is: str
    context_prompt: str = "{context}"
    question_prompt: str = "Question: {question}\nAnswer:{cue}"
    text_prompt: str = "{context}\nQuestion: {question}\nAnswer:{cue}"
    summary_prompt: str = "{context}\nIn short,"

    def __post_init__(self) -> None:
        if not self.examples:
            raise SpecError(f"task {self.name!r} has no examples; ask for at least one")
        kinds = {bool(example.choices) for example in self.examples}
        if len(kinds) > 1:
            raise SpecError(
                f"task {self.name!r} mixes examples with and without choices, which are scored differently; "
                "give all of them choices, or none"
            )

    @property
    def has_choices(self) -> bool:
        """Whether B chooses instead of writing."""
        return bool(self.examples[0].choices)

    def context_text(self, example: Example) -> str:
        """A's prompt."""
        return self.context_prompt.format(context=example.context)

    def summary_text(self, example: Example) -> str:
        """What A continues to sum up."""
        return self.summary_prompt.format(context=example.context)

    def question_text(self, example: Example) -> str:
        """B's prompt without the context."""
        return self.question_prompt.format(question=example.question, cue=_spaced(example.cue))

    def text(self, example: Example, context: str | None = None) -> str:
        """B's prompt with the context, or with other words in its place.

        Args:
            example: Which.
            context: A summary, say; None for the context itself.
        """
        told = example.context if context is None else context
        return self.text_prompt.format(context=told, question=example.question, cue=_spaced(example.cue))


def _spaced(cue: str) -> str:
    # A cue ends without a space: tokenizers of this family put the space before a word into its token.
    return f" {cue}" if cue else ""


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and accents.

    Args:
        text: Any.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return _WORD.findall(plain)


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether a free answer holds an accepted one: its words, in a row, in the first line that is not empty.

    Case, accents, punctuation and an article before the accepted answer do not matter.

    Args:
        text: What B wrote.
        answers: What is accepted.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    said = words(lines[0]) if lines else []
    for answer in answers:
        wanted = words(answer)
        if len(wanted) > 1 and wanted[0] in _ARTICLES:
            del wanted[0]
        if wanted and any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1)):
            return True
    return False
