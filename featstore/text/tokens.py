"""Windows to token ids, with the byte at which every token ends.

A token's end is the number of bytes of the text that the model has read once it has read this token. It comes from the
tokens' own bytes (:mod:`featstore.text.alignment`); a window that its tokens do not spell is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import OffsetError
from featstore.text.alignment import byte_ends
from featstore.text.bytes import TokenBytes, token_bytes

#: Whitespace, one- to four-byte characters, combining marks, spellings that are not normalised: what goes wrong.
PROBE = "The naïve café costs 5 € in 東京 — नमस्ते ကမ္ဘာ 🙂, e\u0301 and ▁\n\tend  of\u00a0line."


@dataclass(frozen=True)
class TokenizedWindow:
    """The tokens of one window, special tokens included as the tokenizer adds them.

    Attributes:
        ids: int32 ``(tokens,)``.
        byte_end: int32 ``(tokens,)``, UTF-8 bytes of the window read once this token is; 0 for a special token, and for
            one that reads nothing of the text, such as a space put before it.
        special: bool ``(tokens,)``.
        exact: bool ``(tokens,)``, whether the token has read these bytes and no others. Where it is false it ends
            inside a character that the tokenizer rewrote, or whose bytes it does not tell: it has read ``byte_end``
            bytes and something of what follows.
    """

    ids: NDArray[np.int32]
    byte_end: NDArray[np.int32]
    special: NDArray[np.bool_]
    exact: NDArray[np.bool_]


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[TokenizedWindow]:
    """Tokenise windows and tell where every token ends.

    Control tokens that are quoted in a text are read as text or kept, as ``tokenizer.split_special_tokens`` says; those
    that are kept are special.

    Args:
        tokenizer: A fast transformers tokenizer.
        texts: Window texts.

    Raises:
        OffsetError: The tokens do not rebuild a window; the message shows where.
    """
    vocabulary = token_bytes(tokenizer)
    batch = tokenizer(
        list(texts),
        add_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        verbose=False,
    )
    normalizer = tokenizer.backend_tokenizer.normalizer
    normalise = str if normalizer is None else normalizer.normalize_str
    return [
        _window(vocabulary, normalise, text, encoding)
        for text, encoding in zip(texts, batch.encodings or (), strict=True)
    ]


def tokenize_documents(
    tokenizer: Any, name: str, texts: Sequence[str], documents: Sequence[int]
) -> list[TokenizedWindow]:
    """:func:`tokenize`, which says of which document a window is that cannot be read.

    Args:
        tokenizer: A fast transformers tokenizer.
        name: The model's name, for the message.
        texts: Window texts.
        documents: Number of each window's document, from 0; people count from 1.

    Raises:
        OffsetError: The tokens do not rebuild a window.
    """
    try:
        return tokenize(tokenizer, texts)
    except OffsetError:
        for text, number in zip(texts, documents, strict=True):
            try:
                tokenize(tokenizer, [text])
            except OffsetError as error:
                raise OffsetError(f"document {number + 1}, as model {name!r} reads it: {error}") from error
        raise


def _window(vocabulary: TokenBytes, normalise: Callable[[str], str], text: str, encoding: Any) -> TokenizedWindow:
    ids, added = np.array(encoding.ids, dtype=np.int32), np.array(encoding.special_tokens_mask, dtype=bool)
    # A text that quotes its own start token begins with two of them: the quoted one is enough.
    first = int(len(ids) > 1 and added[0] and not added[1] and ids[0] == ids[1] and vocabulary.control[ids[1]])
    ids, added = ids[first:], added[first:]
    special = added | vocabulary.control[ids]
    byte_end, exact = np.zeros(len(ids), dtype=np.int32), np.ones(len(ids), dtype=bool)
    read = np.flatnonzero(~added)
    if len(read):
        byte_end[read], exact[read] = byte_ends(
            vocabulary, normalise, text, ids[read], lambda: _spans(encoding)[first:][read]
        )
    byte_end[special], exact[special] = 0, True
    return TokenizedWindow(ids, byte_end, special, exact)


def _spans(encoding: Any) -> NDArray[np.int64]:
    """Offsets in characters, ``(tokens, 2)``: made only where they are needed, as it takes longer than tokenising."""
    return np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def prove(tokenizer: Any, name: str) -> TokenBytes:
    """Read a tokenizer's vocabulary as bytes, and tokenise a text chosen to trip it, before any work is done.

    Args:
        tokenizer: A fast transformers tokenizer.
        name: The model's name, for the message.

    Returns:
        Its vocabulary.

    Raises:
        OffsetError: Its tokens do not rebuild that text.
    """
    try:
        tokenize(tokenizer, [PROBE])
    except OffsetError as error:
        raise OffsetError(f"model {name!r}: {error}") from error
    return token_bytes(tokenizer)


def ends_in_words(vocabulary: TokenBytes) -> str:
    """What the byte ends of a tokenizer's tokens come from, as a phrase for people.

    Args:
        vocabulary: From :func:`prove`.
    """
    if not vocabulary.told:
        return "byte ends from offsets, as its tokens' bytes cannot be told"
    if vocabulary.unknown:
        return f"byte ends from its tokens' bytes, but for {vocabulary.unknown} that cannot be told"
    return "byte ends from its tokens' bytes"


def ends_from(tokenizer: Any) -> str:
    """What the byte ends of a tokenizer's tokens come from, as stores record it: ``bytes`` or ``offsets``.

    Args:
        tokenizer: A fast transformers tokenizer.
    """
    return "bytes" if token_bytes(tokenizer).told else "offsets"
