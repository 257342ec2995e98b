"""Windows to token ids, with the byte at which every token ends.

Tokenizers report offsets in characters; two tokenizers meet in UTF-8 bytes. Offsets are known to lie (empty spans,
byte-fallback tokens that share a character), so every window is checked: the spans must run forward and cover the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import OffsetError

#: Whitespace, one- to four-byte characters, combining marks: what offsets tend to get wrong.
PROBE = "The naïve café costs 5 € in 東京 — नमस्ते 🙂\n\tend  of\u00a0line."


@dataclass(frozen=True)
class TokenizedWindow:
    """The tokens of one window, special tokens included as the tokenizer adds them.

    Attributes:
        ids: int32 ``(tokens,)``.
        byte_end: int32 ``(tokens,)``, UTF-8 bytes of the window read once this token is; 0 for a special token.
        special: bool ``(tokens,)``.
    """

    ids: NDArray[np.int32]
    byte_end: NDArray[np.int32]
    special: NDArray[np.bool_]


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[TokenizedWindow]:
    """Tokenise windows and convert character offsets to byte ends.

    Args:
        tokenizer: A fast transformers tokenizer.
        texts: Window texts.

    Raises:
        OffsetError: The offsets do not rebuild a window; the message shows where.
    """
    batch = tokenizer(
        list(texts),
        add_special_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    result = []
    for text, ids, spans, mask in zip(
        texts,
        batch["input_ids"],
        batch["offset_mapping"],
        batch["special_tokens_mask"],
        strict=True,
    ):
        span = np.array(spans, dtype=np.int64).reshape(-1, 2)
        special = np.array(mask, dtype=bool)
        check_offsets(text, span[~special])
        ends = np.where(special, 0, byte_offsets(text)[span[:, 1]])
        result.append(TokenizedWindow(np.array(ids, dtype=np.int32), ends.astype(np.int32), special))
    return result


def byte_offsets(text: str) -> NDArray[np.int64]:
    """UTF-8 byte offset of every character boundary.

    Args:
        text: Any text without lone surrogates.

    Returns:
        int64 ``(len(text) + 1,)``; entry i is the number of bytes of ``text[:i]``.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate(([0], np.cumsum(lengths)))


def check_offsets(text: str, spans: NDArray[np.int64]) -> None:
    """Prove that token spans rebuild a text: in range, running forward, and together covering all but whitespace.

    Args:
        text: What was tokenised.
        spans: int64 ``(tokens, 2)``, character start and end of each token that is not special.

    Raises:
        OffsetError: They do not.
    """
    start, end = spans[:, 0], spans[:, 1]
    if spans.size and (start.min() < 0 or end.max() > len(text) or (end < start).any() or (np.diff(end) < 0).any()):
        at = int(np.flatnonzero(np.r_[False, np.diff(end) < 0] | (end < start) | (start < 0) | (end > len(text)))[0])
        raise OffsetError(
            f"token {at} spans characters {start[at]}..{end[at]} of a text of {len(text)}, before its neighbour: "
            "this tokenizer's offsets cannot be used for pairing; update `tokenizers` or use another tokenizer"
        )
    depth = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(depth, start, 1)
    np.add.at(depth, end, -1)
    for position in map(int, np.flatnonzero(np.cumsum(depth[:-1]) == 0)):
        if not text[position].isspace():
            around = text[max(position - 10, 0) : position + 10]
            raise OffsetError(
                f"no token covers character {position} ({text[position]!r}, in {around!r}): this tokenizer's offsets "
                "cannot be used for pairing; clean the text, update `tokenizers` or use another tokenizer"
            )


def probe(tokenizer: Any, name: str) -> None:
    """Check a tokenizer's offsets on a text chosen to trip it, before any work is done.

    Args:
        tokenizer: A fast transformers tokenizer.
        name: The model's name, for the message.

    Raises:
        OffsetError: As :func:`check_offsets`.
    """
    try:
        tokenize(tokenizer, [PROBE])
    except OffsetError as error:
        raise OffsetError(f"model {name!r}: {error}") from error
