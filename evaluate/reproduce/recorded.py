"""What ``steps.json`` holds: every command of the programme, how it ended and how long it took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from featstore.runtime.records import EMPTY, Amount, Fault, Record, Table, read, write
from featstore.runtime.schema import shown

DONE, FAILED, RUNNING, WAITING = "done", "failed", "running", "waiting"


class StepEntry(Record):
    """One step.

    Attributes:
        command: Tool and arguments; the programme's own directory is written ``OUT``.
        status: ``done``, ``failed``, ``running`` or ``waiting``.
        seconds: That it took; null where it is not done.
        error: Why it is not done.
    """

    always: ClassVar[tuple[str, ...]] = ("command", "status", "seconds", "error")

    command: tuple[str, ...] = ()
    status: str = WAITING
    seconds: Amount | None = None
    error: str | None = None

    def faults(self) -> Iterator[Fault]:
        """A status that is none."""
        if self.status not in (DONE, FAILED, RUNNING, WAITING):
            yield ("status",), f"is {shown(self.status)}, expected one of {DONE}, {FAILED}, {RUNNING}, {WAITING}"


class Steps(Record):
    """Contents of ``steps.json``, in the directory of the programme.

    Attributes:
        steps: By name.
    """

    file: ClassVar[str] = "steps.json"
    made_by: ClassVar[str] = "evaluate reproduce"
    always: ClassVar[tuple[str, ...]] = ("steps",)

    steps: Table[StepEntry] = EMPTY


def read_steps(where: Path | str) -> Steps:
    """Read ``steps.json``.

    Args:
        where: Its directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(Steps, where, remedy="remove it to begin again")


def write_steps(directory: Path, steps: Steps) -> Path:
    """Write ``steps.json`` into a directory and return its path."""
    return write(steps, directory)
