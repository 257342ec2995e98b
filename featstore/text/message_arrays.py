"""Conversations as a store holds them: contents in the text, and beside it, as JSON, what is not text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError
from featstore.text.chat import DATE
from featstore.text.chat_tokens import tokenize_conversations
from featstore.text.conversation import Conversation, Message, to_json
from featstore.text.roles import ROLES
from featstore.text.tokens import TokenizedWindow, tokenize_documents

#: Of a corpus without conversations.
NO_BYTES, NO_OFFSETS = np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.int64)


class _Corpus(Protocol):
    """Text in documents and windows, planned or stored."""

    @property
    def text(self) -> NDArray[np.uint8]: ...
    @property
    def document_start(self) -> NDArray[np.int64]: ...
    @property
    def window_document(self) -> NDArray[np.int32]: ...
    @property
    def window_offset(self) -> NDArray[np.int64]: ...
    @property
    def window_stop(self) -> NDArray[np.int64]: ...
    @property
    def message_document(self) -> NDArray[np.int32]: ...
    @property
    def message_role(self) -> NDArray[np.uint8]: ...
    @property
    def message_start(self) -> NDArray[np.int64]: ...
    @property
    def message_end(self) -> NDArray[np.int64]: ...
    @property
    def message_rest(self) -> NDArray[np.uint8]: ...
    @property
    def message_rest_start(self) -> NDArray[np.int64]: ...
    @property
    def document_tools(self) -> NDArray[np.uint8]: ...
    @property
    def document_tools_start(self) -> NDArray[np.int64]: ...


def holds_conversations(corpus: _Corpus) -> bool:
    """Whether the documents are conversations; either all of them are, or none.

    Args:
        corpus: Planned or stored.
    """
    return len(corpus.message_rest_start) > 0


def pack(conversations: Sequence[Conversation]) -> dict[str, NDArray[Any]]:
    """What is not text of conversations, as arrays.

    Args:
        conversations: All documents of a corpus, or none.

    Returns:
        ``message_rest`` and ``document_tools``, uint8 of JSON texts one after another (of nothing where there is
        nothing to say), and int64 ``message_rest_start`` and ``document_tools_start``, where each begins and the last
        ends; all empty for no conversations.
    """
    if not conversations:
        rest = tools = (NO_BYTES, NO_OFFSETS)
    else:
        rest = _joined(to_json(m.rest) if m.rest else b"" for one in conversations for m in one.messages)
        tools = _joined(to_json(one.tools) if one.tools else b"" for one in conversations)
    return {
        "message_rest": rest[0],
        "message_rest_start": rest[1],
        "document_tools": tools[0],
        "document_tools_start": tools[1],
    }


def conversation_of(corpus: _Corpus, document: int) -> Conversation:
    """A document as the conversation that it is.

    Args:
        corpus: One that :func:`holds_conversations`.
        document: Its number.

    Raises:
        CorruptDataError: What lies beside the text is damaged.
    """
    where = f"document {document}"
    first, last = np.searchsorted(corpus.message_document, [document, document + 1]).tolist()
    begin = int(corpus.document_start[document])
    try:
        messages = [
            Message(
                ROLES[corpus.message_role[at]],
                corpus.text[begin + corpus.message_start[at] : begin + corpus.message_end[at]].tobytes().decode(),
                _value(corpus.message_rest, corpus.message_rest_start, at) or {},
            )
            for at in range(first, last)
        ]
        tools = _value(corpus.document_tools, corpus.document_tools_start, document)
    except (ValueError, IndexError) as error:
        raise CorruptDataError(f"{where}: its messages are damaged ({error}); restore the store") from error
    return Conversation(tuple(messages), tuple(tools) if tools else None, where)


def tokenize_windows(
    corpus: _Corpus, windows: Iterable[int], tokenizer: Any, name: str, *, date: str = DATE
) -> list[TokenizedWindow]:
    """Tokenise windows of a corpus, conversations through the tokenizer's chat template.

    Args:
        corpus: Planned or stored.
        windows: Their numbers.
        tokenizer: A fast transformers tokenizer.
        name: The model's name, for messages.
        date: The day that templates are told.

    Raises:
        CorpusError: A template that fails, or that drops, repeats, reorders or changes a message.
        OffsetError: The tokens do not rebuild a window.
    """
    numbers = list(windows)
    if holds_conversations(corpus):
        read = [conversation_of(corpus, int(corpus.window_document[number])) for number in numbers]
        return tokenize_conversations(tokenizer, name, read, date=date)
    cuts = [(corpus.window_offset[number], corpus.window_stop[number]) for number in numbers]
    texts = [corpus.text[start:end].tobytes().decode() for start, end in cuts]
    return tokenize_documents(tokenizer, name, texts, corpus.window_document[numbers].tolist())


def _joined(parts: Iterable[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    held = list(parts)
    starts = np.concatenate(([0], np.cumsum([len(part) for part in held], dtype=np.int64))).astype(np.int64)
    return np.frombuffer(b"".join(held), dtype=np.uint8), starts


def _value(data: NDArray[np.uint8], starts: NDArray[np.int64], at: int) -> Any:
    raw = data[starts[at] : starts[at + 1]].tobytes()
    return json.loads(raw) if raw else None
