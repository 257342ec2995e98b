"""The plan: everything about an extraction that is fixed before a model runs.

One tokenising pass decides windows, row ranges, shards and batches. Work is then divided by the plan alone, so the same
bytes come out however often a run is interrupted and whoever does the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.runtime.provenance import digest
from featstore.text.message_arrays import NO_BYTES, NO_OFFSETS
from featstore.text.roles import TEXT, roles_at

DEFAULT_WINDOW_BYTES = 2048
DEFAULT_BATCH_TOKENS = 8192
DEFAULT_SHARD_ROWS = 16_384


@dataclass(frozen=True)
class PlannedCorpus:
    """The documents and windows that will be read.

    Attributes:
        text: uint8 ``(bytes,)``, the documents' UTF-8 one after another, cut where the budget ended.
        document_start: int64 ``(documents + 1,)`` offsets into ``text``.
        document_id: uint8 ``(documents, 32)``.
        document_split: uint8 ``(documents,)``, 0 train, 1 validation, 2 test.
        window_document: int32 ``(windows,)``.
        window_start: int64 ``(windows,)`` first byte within the document.
        window_end: int64 ``(windows,)`` byte after the last.
        message_document: int32 ``(messages,)``; empty for ordinary text.
        message_role: uint8 ``(messages,)``, numbers in :data:`featstore.text.roles.ROLES`.
        message_start: int64 ``(messages,)`` first byte within the document.
        message_end: int64 ``(messages,)`` byte after the last.
        message_rest: uint8, what messages have besides, as :func:`featstore.text.message_arrays.pack` makes it; empty,
            as the next three, where the documents are no conversations.
        message_rest_start: int64 ``(messages + 1,)``.
        document_tools: uint8, the tools that were offered.
        document_tools_start: int64 ``(documents + 1,)``.
    """

    text: NDArray[np.uint8]
    document_start: NDArray[np.int64]
    document_id: NDArray[np.uint8]
    document_split: NDArray[np.uint8]
    window_document: NDArray[np.int32]
    window_start: NDArray[np.int64]
    window_end: NDArray[np.int64]
    message_document: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    message_role: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    message_start: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    message_end: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    message_rest: NDArray[np.uint8] = field(default_factory=lambda: NO_BYTES)
    message_rest_start: NDArray[np.int64] = field(default_factory=lambda: NO_OFFSETS)
    document_tools: NDArray[np.uint8] = field(default_factory=lambda: NO_BYTES)
    document_tools_start: NDArray[np.int64] = field(default_factory=lambda: NO_OFFSETS)

    @property
    def window_offset(self) -> NDArray[np.int64]:
        """Where each window begins in ``text``."""
        return self.document_start[self.window_document] + self.window_start

    @property
    def window_stop(self) -> NDArray[np.int64]:
        """Where each window ends in ``text``."""
        return self.document_start[self.window_document] + self.window_end

    def roles(
        self, window: NDArray[np.int64], byte_end: NDArray[np.int32], special: NDArray[np.bool_]
    ) -> NDArray[np.uint8]:
        """Who wrote the last byte that each token has read; ``text`` for special tokens.

        Args:
            window: ``(n,)``, the tokens' windows.
            byte_end: int32 ``(n,)``, within the window.
            special: bool ``(n,)``.
        """
        found = roles_at(
            self.window_document[window],
            self.window_start[window] + byte_end,
            self.message_document,
            self.message_role,
            self.message_start,
            self.message_end,
        )
        return np.where(special, TEXT, found).astype(np.uint8)

    @property
    def hash(self) -> str:
        """SHA-256 over text, document boundaries and windows."""
        total = hashlib.sha256()
        for array in (
            self.text,
            self.document_start,
            self.document_id,
            self.window_document,
            self.window_end,
            self.message_document,
            self.message_role,
            self.message_end,
            self.message_rest,
            self.message_rest_start,
            self.document_tools,
            self.document_tools_start,
        ):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def begins_with(self, other: PlannedCorpus) -> bool:
        """Whether this is the other one with more text after it.

        Args:
            other: Of a shorter plan.
        """
        windows, documents = len(other.window_document), len(other.document_id)
        return (
            np.array_equal(self.document_id[:documents], other.document_id)
            and np.array_equal(self.text[: len(other.text)], other.text)
            and all(
                np.array_equal(getattr(self, name)[:windows], getattr(other, name))
                for name in ("window_document", "window_start", "window_end")
            )
        )


@dataclass(frozen=True)
class PlannedModel:
    """One model's tokens of the planned windows.

    Attributes:
        row_start: int64 ``(windows + 1,)``; window w owns rows ``row_start[w]:row_start[w + 1]``.
        ids: int32 ``(n,)``.
        byte_end: int32 ``(n,)``, within the window.
        special: bool ``(n,)``.
        exact: bool ``(n,)``, whether the token has read these bytes and no others.
        role: uint8 ``(n,)``, who wrote the last byte that it has read.
    """

    row_start: NDArray[np.int64]
    ids: NDArray[np.int32]
    byte_end: NDArray[np.int32]
    special: NDArray[np.bool_]
    exact: NDArray[np.bool_]
    role: NDArray[np.uint8]

    @property
    def rows(self) -> int:
        """Number of token states of this model."""
        return int(self.row_start[-1])

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns of a store's token table, each ``(n,)``."""
        return {
            "id": self.ids,
            "byte_end": self.byte_end,
            "window": np.repeat(np.arange(len(self.row_start) - 1, dtype=np.int32), np.diff(self.row_start)),
            "special": self.special,
            "exact": self.exact,
            "role": self.role,
        }

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides which row is which token."""
        total = hashlib.sha256()
        for array in (self.row_start, self.ids, self.byte_end, self.special, self.exact, self.role):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def begins_with(self, other: PlannedModel) -> bool:
        """Whether this is the other one with more windows after it.

        Args:
            other: Of a shorter plan.
        """
        windows, rows = len(other.row_start), other.rows
        return (
            len(self.row_start) >= windows
            and np.array_equal(self.row_start[:windows], other.row_start)
            and np.array_equal(self.ids[:rows], other.ids)
            and np.array_equal(self.byte_end[:rows], other.byte_end)
        )


@dataclass(frozen=True)
class Plan:
    """What to compute, in units that do not depend on who computes it.

    Attributes:
        corpus: Documents and windows.
        models: Tokens by model name, in store order.
        window_bytes: Window length.
        batch_tokens: Padded tokens of a forward pass at most.
        shard_rows: Rows of a shard.
        settings: Source and budgets as recorded in the store.
        segments: Window counts at which earlier, shorter plans of the same store ended. Batches never cross them, so
            that rows which are there already would come out the same.
    """

    corpus: PlannedCorpus
    models: dict[str, PlannedModel]
    window_bytes: int
    batch_tokens: int
    shard_rows: int
    settings: dict[str, Any]
    segments: tuple[int, ...] = ()

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides which text is read in which windows and splits."""
        return digest(
            {
                "corpus": self.corpus.hash,
                "split": digest(self.corpus.document_split.tolist()),
                "window_bytes": self.window_bytes,
                "segments": list(self.segments),
            }
        )

    def groups(self, name: str) -> Iterator[tuple[int, int]]:
        """Neighbouring windows that are batched together, as (first, end) window numbers.

        A group holds about as many rows as fit a shard, so writing back in document order needs bounded memory.

        Args:
            name: Model.
        """
        starts = self.models[name].row_start
        first = 0
        for segment in (*self.segments, len(starts) - 1):
            while first < segment:
                end = int(np.searchsorted(starts, starts[first] + self.shard_rows, side="right")) - 1
                end = min(max(end, first + 1), segment)
                yield first, end
                first = end

    def batches(self, name: str, first: int, end: int) -> list[NDArray[np.int64]]:
        """Batches of windows of similar length within a group, longest first.

        Args:
            name: Model.
            first: First window of the group.
            end: Window after the last.

        Returns:
            Window numbers; a batch's padded size stays within ``batch_tokens`` unless it is a single window.
        """
        lengths = np.diff(self.models[name].row_start[first : end + 1])
        order = np.argsort(-lengths, kind="stable")
        result = []
        at = 0
        while at < len(order):
            longest = max(int(lengths[order[at]]), 1)
            count = max(self.batch_tokens // longest, 1)
            result.append(first + order[at : at + count])
            at += count
        return result
