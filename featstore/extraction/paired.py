"""The pairs of a plan: which rows of two models belong together, told before a state is computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featstore.extraction.job import Job
from featstore.store.read.first import first_rows
from featstore.store.read.pairs import last_at_each_end, match_ends
from featstore.text.plan import PlannedModel


@dataclass(frozen=True)
class PlannedPairs:
    """All pairs of two models, in document order; sinks are not known yet.

    Attributes:
        rows: int64 ``(m,)`` row numbers by model, the second model's ascending.
        split: uint8 ``(m,)``.
    """

    rows: dict[str, NDArray[np.int64]]
    split: NDArray[np.uint8]

    @classmethod
    def of(cls, job: Job, first: str, second: str) -> PlannedPairs:
        """Match two models' tokens.

        Args:
            job: From :func:`featstore.extraction.job.prepare`.
            first: Model earlier in store order.
            second: The other.
        """
        sides = []
        for name in (first, second):
            planned = job.plan.models[name]
            sides.append(last_at_each_end(windows_of(planned), planned.byte_end, planned.special, planned.exact))
        text = job.plan.corpus
        keys, row_a, row_b = match_ends(sides[0], sides[1], "end", text.window_offset, text.window_stop, text.text)
        split = text.document_split[text.window_document[keys >> 32]]
        return cls({first: row_a, second: row_b}, split)

    def between(self, second: str, start: int, end: int) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.uint8]]:
        """Row numbers by model, and splits, of the pairs whose row of the second model lies in start..end.

        Args:
            second: That model.
            start: First row.
            end: Row after the last.
        """
        part = slice(*np.searchsorted(self.rows[second], [start, end]))
        return {name: rows[part] for name, rows in self.rows.items()}, self.split[part]


def windows_of(planned: PlannedModel) -> NDArray[np.int32]:
    """The window of every row: int32 ``(n,)``.

    Args:
        planned: A model's plan.
    """
    return np.repeat(np.arange(len(planned.row_start) - 1, dtype=np.int32), np.diff(planned.row_start))


def first_rows_of(planned: PlannedModel) -> NDArray[np.bool_]:
    """Which rows are sinks for being the first of a window, bool ``(n,)``.

    Args:
        planned: A model's plan.
    """
    return first_rows(windows_of(planned), planned.byte_end, planned.special)
