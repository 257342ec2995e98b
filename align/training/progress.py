"""Where a training is: counters, sums and records, all of them JSON values, so that a checkpoint can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Steps of the windowed train loss.
RECENT = 100


@dataclass
class Progress:
    """Where a training is, as JSON values.

    Attributes:
        epoch: In progress.
        step: Steps of it that were taken.
        taken: Steps taken in all.
        sums: Of every figure over the epoch's rows so far.
        rows: How many these are.
        norms: Sum of the gradients' norms.
        seconds: Spent on the epoch so far.
        recent: Loss and rows of the last steps.
        records: Of the epochs so far, from epoch 0.
        events: Step events so far.
        best_epoch: Number of the best epoch.
        best_loss: Its validation loss.
        reference: Validation loss since which patience counts.
        waited: Epochs without an improvement on it.
        reason: Why training is over; None while it is not.
    """

    epoch: int = 1
    step: int = 0
    taken: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    norms: float = 0.0
    seconds: float = 0.0
    recent: list[list[float]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_loss: float = math.inf
    reference: float = math.inf
    waited: int = 0
    reason: str | None = None

    def add(self, figures: Mapping[str, float], norm: float, rows: int) -> None:
        """Count a step of the epoch.

        Args:
            figures: Means over its rows, ``total`` among them.
            norm: Of its gradient.
            rows: How many rows it had.
        """
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * rows
        self.rows += rows
        self.norms += norm
        self.recent.append([figures["total"], rows])
        del self.recent[:-RECENT]

    @property
    def means(self) -> dict[str, float]:
        """Every figure over the epoch's rows so far."""
        return {name: total / self.rows for name, total in self.sums.items()}

    @property
    def recent_loss(self) -> float | None:
        """The loss over the epoch's last steps, :data:`RECENT` at most; None before its first."""
        rows = sum(rows for _, rows in self.recent)
        return sum(loss * n for loss, n in self.recent) / rows if rows else None

    def next_epoch(self) -> None:
        """Make ready for the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.sums, self.rows, self.norms, self.seconds, self.recent = {}, 0, 0.0, 0.0, []
