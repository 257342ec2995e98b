"""Documents to a plan: windows are cut and tokenised until the budget is spent, or read again as they were cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from featstore.errors import CorpusError, SpecError
from featstore.text import tokens
from featstore.text.chat import DATE
from featstore.text.chat_tokens import tokenize_conversations
from featstore.text.documents import Document
from featstore.text.message_arrays import holds_conversations, pack, tokenize_windows
from featstore.text.plan import (
    DEFAULT_BATCH_TOKENS,
    DEFAULT_SHARD_ROWS,
    DEFAULT_WINDOW_BYTES,
    Plan,
    PlannedCorpus,
    PlannedModel,
)
from featstore.text.splits import split_of
from featstore.text.windows import windows

_TOKENIZE_BATCH = 256
#: A window before it is tokenised: number of its document, the document, its bytes, and where the window lies in them.
_Cut = tuple[int, Document, bytes, int, int]


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
        for i, (_, document, raw, start, end) in enumerate(chunk):
            parts = {name: tokenized[name][i] for name in tokenizers}
            for name, limit in (contexts or {}).items():
                if len(parts[name].ids) > limit:
                    raise _too_long(document, end - start, len(parts[name].ids), name, limit)
            if not builder.add(document, raw, start, end, parts, max_tokens):
                break
            tick(max(len(p.ids) for p in parts.values()))
    planned = builder.finish()
    return Plan(planned, builder.models(planned), window_bytes, batch_tokens, shard_rows, settings or {})


def _tokenize(chunk: Sequence[_Cut], tokenizer: Any, name: str, date: str) -> list[tokens.TokenizedWindow]:
    conversations = [document.conversation for _, document, *_ in chunk if document.conversation is not None]
    if conversations:
        return tokenize_conversations(tokenizer, name, conversations, date=date)
    texts = [raw[start:end].decode() for _, _, raw, start, end in chunk]
    return tokens.tokenize_documents(tokenizer, name, texts, [number for number, *_ in chunk])


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


def _window_stream(documents: Iterable[Document], window_bytes: int) -> Iterator[_Cut]:
    for number, document in enumerate(documents):
        raw = document.text.encode()
        if document.conversation is not None:
            yield number, document, raw, 0, len(raw)  # never cut: a template is given all of it
            continue
        for start, end in windows(raw, window_bytes):
            yield number, document, raw, start, end


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
