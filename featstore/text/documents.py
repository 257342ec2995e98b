"""Texts to documents: what is split, and later resampled, as a whole.

A *document* is an article, a file, a JSON line or a conversation; its id is the SHA-256 of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from featstore.errors import CorpusError, SpecError
from featstore.text.conversation import Conversation
from featstore.text.roles import Part
from featstore.text.windows import space_cut


@dataclass(frozen=True)
class Document:
    """One text that is split, and later resampled, as a whole.

    Attributes:
        text: What the models read (cut to ``--max-document-bytes`` where that is given).
        id: SHA-256 of the *whole* text, so that a byte budget does not move a document to another split.
        parts: Who wrote which bytes of it; nothing for ordinary text.
        conversation: The messages whose contents, one after another, are the text; None for ordinary text.
    """

    text: str
    id: bytes
    parts: tuple[Part, ...] = ()
    conversation: Conversation | None = None


def of_conversation(conversation: Conversation, identity: bytes | None = None) -> Document:
    """The document that a conversation is.

    Args:
        conversation: Its messages.
        identity: That of the whole conversation, where this is only its beginning.
    """
    return Document(conversation.text, identity or conversation.id, conversation.parts, conversation)


def documents(
    texts: Iterable[str | Conversation], *, max_documents: int | None = None, max_bytes: int | None = None
) -> Iterator[Document]:
    """Turn texts and conversations into documents, skipping those that are empty or only whitespace.

    Args:
        texts: Document texts or conversations in order.
        max_documents: Stop after so many.
        max_bytes: Keep the first so many UTF-8 bytes of each, cut back to whitespace; of a conversation the first
            messages that fit whole.

    Raises:
        CorpusError: A text is not Unicode.
        SpecError: Fewer bytes than a character may have.
    """
    if max_bytes is not None and max_bytes < 4:
        raise SpecError(f"{max_bytes} bytes of a document: at least 4 are needed to hold any character")
    count = 0
    for text in texts:
        if max_documents is not None and count >= max_documents:
            return
        if isinstance(text, Conversation):
            kept = text if max_bytes is None else text.cut(max_bytes)
            if kept is not None and kept.text.strip():
                yield of_conversation(kept, text.id)
                count += 1
            continue
        if not text.strip():
            continue
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"document {count} holds a lone surrogate at character {error.start}; it is not text"
            ) from error
        identity = hashlib.sha256(raw).digest()
        if max_bytes is not None and len(raw) > max_bytes:
            text = raw[: space_cut(raw, max_bytes)].decode()
            if not text.strip():
                continue
        yield Document(text, identity)
        count += 1
