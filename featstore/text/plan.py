"""The plan: everything about an extraction that is fixed before a model runs.

One tokenising pass decides windows, row ranges, shards and batches. Work is then divided by the plan alone, so the same
bytes come out however often a run is interrupted and whoever does the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorpusError, SpecError
from featstore.runtime.provenance import digest
from featstore.text import tokens
from featstore.text.chat import DATE
from featstore.text.chat_tokens import tokenize_conversations
from featstore.text.documents import Document
from featstore.text.message_arrays import NO_BYTES, NO_OFFSETS, holds_conversations, pack, tokenize_windows
from featstore.text.roles import TEXT, roles_at
from featstore.text.splits import split_of
from featstore.text.windows import windows

DEFAULT_WINDOW_BYTES = 2048
DEFAULT_BATCH_TOKENS = 8192
DEFAULT_SHARD_ROWS = 16_384
_TOKENIZE_BATCH = 256


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


def make_plan(
    documents: Iterable[Document],
    tokenizers: dict[str, Any],
    *,
    max_tokens: int | None,
    window_bytes: int = DEFAULT_WINDOW_BYTES,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    shard_rows: int = DEFAULT_SHARD_ROWS,
    contexts: dict[str, int] | None = None,
    settings: dict[str, Any] | None = None,
    date: str = DATE,
    tick: Callable[[float], None] = lambda _: None,
) -> Plan:
    """Tokenise documents with every tokenizer until the budget is spent, and fix windows, rows and splits.

    Args:
        documents: In corpus order.
        tokenizers: Fast tokenizers by model name, in store order.
        max_tokens: Stop before the first window at which any model would exceed so many rows; None for all.
        window_bytes: Longest window.
        batch_tokens: Padded tokens of a forward pass at most.
        shard_rows: Rows of a shard.
        contexts: Longest sequence of each model; a longer window is refused.
        settings: Recorded in the store.
        date: The day that chat templates are told.
        tick: Called with the number of tokens (of the model with the most) planned since the last call.

    Raises:
        CorpusError: No text, less than two tokens, fewer than three different documents, or a conversation that a
            chat template does not write as it is.
        OffsetError: A tokenizer's offsets do not rebuild the text.
        SpecError: A window is longer than a model's context.
    """
    if batch_tokens < 1 or shard_rows < 1:
        raise SpecError(f"batch of {batch_tokens} tokens and shards of {shard_rows} rows: both must be positive")
    builder = _Builder(tuple(tokenizers))
    stream = _window_stream(documents, window_bytes)
    while not builder.full and (chunk := list(islice(stream, _TOKENIZE_BATCH))):
        tokenized = {name: _tokenize(chunk, tokenizer, name, date) for name, tokenizer in tokenizers.items()}
        for i, (document, raw, start, end) in enumerate(chunk):
            parts = {name: tokenized[name][i] for name in tokenizers}
            for name, limit in (contexts or {}).items():
                if len(parts[name].ids) > limit:
                    raise _too_long(document, end - start, len(parts[name].ids), name, limit)
            if not builder.add(document, raw, start, end, parts, max_tokens):
                break
            tick(max(len(p.ids) for p in parts.values()))
    planned = builder.finish()
    return Plan(planned, builder.models(planned), window_bytes, batch_tokens, shard_rows, settings or {})


def _tokenize(
    chunk: Sequence[tuple[Document, bytes, int, int]], tokenizer: Any, name: str, date: str
) -> list[tokens.TokenizedWindow]:
    conversations = [document.conversation for document, _, _, _ in chunk if document.conversation is not None]
    if conversations:
        return tokenize_conversations(tokenizer, name, conversations, date=date)
    return tokens.tokenize(tokenizer, [raw[start:end].decode() for _, raw, start, end in chunk])


def _too_long(document: Document, size: int, count: int, name: str, limit: int) -> SpecError:
    what, remedy = f"a window of {size} bytes", "use a smaller --window-bytes"
    if document.conversation is not None:
        what = f"{document.conversation.where}: a conversation of {size} bytes"
        remedy = "leave the row out, or keep its first messages with --max-document-bytes"
    return SpecError(f"{what} has {count} tokens, more than the context of model {name!r} ({limit}); {remedy}")


def plan_model(
    planned: PlannedCorpus,
    tokenizer: Any,
    name: str,
    context: int,
    tick: Callable[[float], None] = lambda _: None,
    *,
    date: str = DATE,
) -> PlannedModel:
    """Tokenise windows that are fixed already, for a model that joins a store, or is in it.

    Args:
        planned: The text and its windows.
        tokenizer: The model's fast tokenizer.
        name: Named in errors.
        context: The model's longest sequence.
        tick: Called with the number of windows tokenised since the last call.
        date: The day that chat templates are told.

    Raises:
        CorpusError: The model's chat template does not write a conversation as it is.
        OffsetError: The tokenizer's offsets do not rebuild the text.
        SpecError: A window is longer than the model's context.
    """
    count = len(planned.window_document)
    parts: list[tokens.TokenizedWindow] = []
    for at in range(0, count, _TOKENIZE_BATCH):
        numbers = range(at, min(at + _TOKENIZE_BATCH, count))
        parts += tokenize_windows(planned, numbers, tokenizer, name, date=date)
        tick(len(numbers))
    lengths = [len(part.ids) for part in parts]
    longest = max(lengths)
    if longest > context:
        chats = holds_conversations(planned)
        what = f"document {planned.window_document[lengths.index(longest)]}" if chats else "a window"
        raise SpecError(
            f"{what} of this store has {longest} tokens, more than the context of model {name!r} ({context}); "
            f"extract it into a store of its own with a smaller {'--max-document-bytes' if chats else '--window-bytes'}"
        )
    return _planned_model(planned, parts)


def _planned_model(planned: PlannedCorpus, parts: Sequence[tokens.TokenizedWindow]) -> PlannedModel:
    byte_end = np.concatenate([part.byte_end for part in parts])
    special = np.concatenate([part.special for part in parts])
    counts = [len(part.ids) for part in parts]
    return PlannedModel(
        row_start=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        ids=np.concatenate([part.ids for part in parts]),
        byte_end=byte_end,
        special=special,
        exact=np.concatenate([part.exact for part in parts]),
        role=planned.roles(np.repeat(np.arange(len(parts)), counts), byte_end, special),
    )


def _window_stream(documents: Iterable[Document], window_bytes: int) -> Iterator[tuple[Document, bytes, int, int]]:
    for document in documents:
        raw = document.text.encode()
        if document.conversation is not None:
            yield document, raw, 0, len(raw)  # never cut: a template is given all of it
            continue
        for start, end in windows(raw, window_bytes):
            yield document, raw, start, end


class _Builder:
    """Collects windows until the budget is spent."""

    def __init__(self, names: Sequence[str]) -> None:
        self.full = False
        self._names = names
        self._documents: list[Document] = []
        self._raw: list[bytes] = []
        self._windows: list[tuple[int, int, int]] = []
        self._parts: dict[str, list[tokens.TokenizedWindow]] = {name: [] for name in names}
        self._rows = dict.fromkeys(names, 0)

    def add(
        self,
        document: Document,
        raw: bytes,
        start: int,
        end: int,
        parts: dict[str, tokens.TokenizedWindow],
        max_tokens: int | None,
    ) -> bool:
        counts = {name: self._rows[name] + len(parts[name].ids) for name in self._names}
        if max_tokens is not None and max(counts.values()) > max_tokens:
            self.full = True
            return False
        if start == 0:
            self._documents.append(document)
            self._raw.append(b"")
        self._raw[-1] = raw[:end]
        self._windows.append((len(self._documents) - 1, start, end))
        for name in self._names:
            self._parts[name].append(parts[name])
        self._rows = counts
        return True

    def finish(self) -> PlannedCorpus:
        if not self._windows:
            reason = "the first window exceeds --max-tokens" if self.full else "the corpus holds no text"
            raise CorpusError(f"nothing to read: {reason}")
        if min(self._rows.values()) < 2:
            raise CorpusError("the corpus is shorter than two tokens; add text")
        table = np.array(self._windows, dtype=np.int64)
        messages = [
            (number, part.role, part.start, min(part.end, len(raw)))
            for number, (document, raw) in enumerate(zip(self._documents, self._raw, strict=True))
            for part in document.parts
            if part.start < len(raw) or document.conversation is not None
        ]
        who = np.array(messages, dtype=np.int64).reshape(-1, 4)
        ids = [document.id for document in self._documents]
        lengths = [len(raw) for raw in self._raw]
        return PlannedCorpus(
            text=np.frombuffer(b"".join(self._raw), dtype=np.uint8),
            document_start=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            document_id=np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 32),
            document_split=split_of(ids),
            window_document=table[:, 0].astype(np.int32),
            window_start=table[:, 1],
            window_end=table[:, 2],
            message_document=who[:, 0].astype(np.int32),
            message_role=who[:, 1].astype(np.uint8),
            message_start=who[:, 2],
            message_end=who[:, 3],
            **pack([document.conversation for document in self._documents if document.conversation is not None]),
        )

    def models(self, planned: PlannedCorpus) -> dict[str, PlannedModel]:
        return {name: _planned_model(planned, parts) for name, parts in self._parts.items()}
