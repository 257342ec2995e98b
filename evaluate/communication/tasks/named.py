"""Tasks by the name that ``--task`` takes."""

from __future__ import annotations

from pathlib import Path

from evaluate.communication.tasks.base import Task
from evaluate.communication.tasks.countries import countries
from evaluate.communication.tasks.jsonl import from_jsonl
from evaluate.communication.tasks.lookup import lookup
from evaluate.communication.tasks.tipsheets import tipsheets
from featstore.errors import SpecError

#: What ``--task`` may be.
NAMES = ("countries", "tipsheets", "lookup", "lookup:PAIRS", "jsonl:PATH")


def make(text: str, count: int, seed: int = 0) -> Task:
    """Make the task that ``--task`` names.

    Args:
        text: One of :data:`NAMES`.
        count: Examples; of a file at most.
        seed: Of the tasks made by code; a file is read from its beginning.

    Raises:
        SpecError: No such task, no examples, or a line of a file is not an example.
    """
    if count < 1:
        raise SpecError(f"--examples {count}: a task needs at least one")
    name, colon, value = text.partition(":")
    if text == "countries":
        return countries(count, seed)
    if text == "tipsheets":
        return tipsheets(count, seed)
    if name == "lookup" and (not colon or (value.isdecimal() and len(value) < 10)):
        return lookup(count, seed, int(value)) if colon else lookup(count, seed)
    if name == "jsonl" and value:
        return from_jsonl(Path(value), count)
    raise SpecError(f"--task {text!r}: choose one of {', '.join(NAMES)}")
