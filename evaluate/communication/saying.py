"""What the reader has to say: its summaries of the contexts, and its states over them.

All of it is taken before anybody is asked, for every model that will be, so that the reader can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluate.communication.asking import ask, prompts_of
from evaluate.communication.messages import Reading, read
from evaluate.communication.tasks.base import Task
from evaluate.injection.loading import Loaded


@dataclass(frozen=True, eq=False)
class Said:
    """What a model has said of a task's contexts; it may be gone.

    Attributes:
        summaries: By example.
        readings: By example its states over the context.
    """

    summaries: Sequence[str]
    readings: Sequence[Reading]


def say(source: Loaded, task: Task, layers: Sequence[int], length: int) -> Said:
    """Let a model read the contexts of a task and sum them up.

    Args:
        source: The model.
        task: Its examples.
        layers: Whose states are kept.
        length: Tokens of a summary.

    Raises:
        SpecError: A context does not fit into the model.
    """
    examples = task.examples
    prompts = prompts_of(source, [task.summary_text(e) for e in examples], [()] * len(examples), length)
    found = ask(source, prompts, {"summary": None}, length=length, tick=lambda _: None)
    summaries = [" ".join(str(text).split()) for text in found["summary"]]
    contexts = [task.context_text(e) for e in examples]
    starts = [start_of(task.context_prompt)] * len(examples)
    return Said(summaries, read(source, contexts, starts, spans_of(task), layers))


def spans_of(task: Task) -> list[int]:
    """UTF-8 bytes of every context.

    Args:
        task: Its examples.
    """
    return [len(example.context.encode()) for example in task.examples]


def start_of(prompt: str) -> int:
    """First byte of the context in a prompt; nothing that varies comes before it.

    Args:
        prompt: With ``{context}`` where that goes.
    """
    return len(prompt.partition("{context}")[0].encode())
