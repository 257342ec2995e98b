"""What a task is, how its prompts are written, and when an answer counts.

The reader (A) sees the context; the answerer (B) sees the question and, in some conditions, the context or a summary of
it. An answer is free text, where the first of the task's answers that its first line names counts, or a choice, where
the one of the highest likelihood counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from evaluate.communication.tasks.chance import chance_of
from evaluate.communication.tasks.example import Example
from evaluate.communication.tasks.scoring import Names, is_right
from featstore.errors import SpecError

__all__ = ["Example", "Task"]


@dataclass(frozen=True)
class Task:
    """Examples and how they are put to models.

    Attributes:
        name: Shown and used as the key of the results.
        examples: At least one.
        others: What could be taken for an answer beside the examples' own: to name it first is to be wrong.
        context_prompt: What A reads, with ``{context}``.
        question_prompt: What B reads alone, with ``{question}`` and ``{cue}``.
        text_prompt: What B reads with the context, with all three.
        summary_prompt: What A continues to sum the context up, with ``{context}``.
    """

    name: str
    examples: tuple[Example, ...]
    others: tuple[str, ...] = ()
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

    @cached_property
    def names(self) -> Names:
        """All that counts as an answer."""
        return Names([*(answer for example in self.examples for answer in example.answers), *self.others])

    @cached_property
    def _chance(self) -> tuple[float, str]:
        return chance_of(self.examples, self.names)

    @property
    def chance(self) -> float:
        """Accuracy on these examples of the best answer that does not read (:mod:`.chance`)."""
        return self._chance[0]

    @property
    def chance_is(self) -> str:
        """What that answer is, in words."""
        return self._chance[1]

    def is_right(self, example: Example, answer: str) -> bool:
        """Whether an answer counts.

        Args:
            example: The question.
            answer: What B wrote, or the choice it took.
        """
        if self.has_choices:
            return answer == example.answers[0]
        return is_right(answer, example.answers, self.names)

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
