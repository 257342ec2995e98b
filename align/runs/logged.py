"""What a line of ``log.jsonl`` holds: an epoch, a step or the end of a training."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from align.results import Scores
from featstore.errors import CorruptDataError
from featstore.runtime.records import EMPTY, Number, Record, Table, Whole, salvaged


class LogEvent(Record):
    """One line of ``log.jsonl``: which members there are depends on the event.

    Attributes:
        event: ``epoch``, ``step`` or ``stop``.
        pair: Layer pair.
        epoch: Its number; 0 is the map before training.
        step: Steps taken.
        lr: Learning rate.
        seconds: Of the epoch.
        loss: Mean over the last 100 steps at most.
        train_loss: Weighted loss, mean over the epoch's steps.
        val_loss: Validation MSE over that of predicting the train mean.
        train_parts: Mean of each loss component over the steps.
        val_parts: Mean of each over the validation rows.
        recent_loss: Train loss over the epoch's last steps.
        grad_norm: Mean norm of the gradient before clipping.
        cka: Debiased CKA on validation rows.
        cka_seconds: That it took.
        cosine_sim: Mean cosine on validation rows.
        val: Figures on the validation rows.
        best_epoch: The epoch that is kept.
        reason: Why training ended.
    """

    file: ClassVar[str] = "log.jsonl"
    made_by: ClassVar[str] = "align train"
    always: ClassVar[tuple[str, ...]] = ("event", "pair")

    event: str = ""
    pair: str = ""
    epoch: Whole | None = None
    step: Whole | None = None
    lr: Number | None = None
    seconds: Number | None = None
    loss: Number | None = None
    train_loss: Number | None = None
    val_loss: Number | None = None
    train_parts: Table[Number | None] = EMPTY
    val_parts: Table[Number | None] = EMPTY
    recent_loss: Number | None = None
    grad_norm: Number | None = None
    cka: Number | None = None
    cka_seconds: Number | None = None
    cosine_sim: Number | None = None
    val: Scores | None = None
    best_epoch: Whole | None = None
    reason: str | None = None


def read_log(path: Path) -> tuple[list[LogEvent], bool, str | None]:
    """Read a log as far as it can be read; members that are not of their types are left out.

    Args:
        path: The file.

    Returns:
        The events; whether the last line is torn, as one is that a process was killed over; and one line on what was
        left out, None where nothing was.

    Raises:
        CorruptDataError: It cannot be read, or a line before the last is no JSON object.
    """
    if path.exists() and not path.is_file():
        # A pipe would keep its reader waiting.
        raise CorruptDataError(f"{path} cannot be read (it is not a file); restore it or train again")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CorruptDataError(f"{path} cannot be read ({error.strerror}); restore it or train again") from error
    events: list[LogEvent] = []
    left_out: str | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event, lost = salvaged(LogEvent, line, f"{path}, line {number},")
        except CorruptDataError:
            if number == len(lines):
                return events, True, left_out
            raise
        events.append(event)
        if lost is not None and left_out is None:
            left_out = f"{path.name}, line {number}: {lost}"
    return events, False, left_out
