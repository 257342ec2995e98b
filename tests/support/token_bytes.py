"""The bytes that every token reads, found out without the code that is tested.

A tokenizer's vocabulary spells bytes in one of two ways. Stand-ins of the byte-level alphabet are read off the alphabet
at work: each character's bytes are asked for. Pieces are their own characters. What tokens spell, one after another,
must be what the tokenizer makes of the text, byte for byte, or there is no truth to compare with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import normalizers, pre_tokenizers

#: No token ends here.
NOWHERE = -1

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@cache
def alphabet() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for.

    The two hundred and forty-three bytes that UTF-8 uses; no text has the others.
    """
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result: dict[str, int] = {}
    # Every first byte and every continuation byte, in characters of one to four bytes.
    points = [*range(0x800), *range(0x800, 0x10000, 0x40), *range(0x10000, 0x110000, 0x1000)]
    for character in map(chr, (point for point in points if not 0xD800 <= point < 0xE000)):
        [(stand_ins, _)] = level.pre_tokenize_str(character)
        result |= dict(zip(stand_ins, character.encode(), strict=True))
    return result


def spelled_by_stand_ins(tokenizer: Any) -> dict[int, bytes]:
    """Bytes by id of a byte-level vocabulary; added tokens are text."""
    table, result = alphabet(), {}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for token, i in backend["model"]["vocab"].items():
        if set(token) <= table.keys():
            result[i] = bytes(table[character] for character in token)
    return result | {added["id"]: added["content"].encode() for added in backend["added_tokens"]}


def spelled_by_pieces(tokenizer: Any) -> dict[int, bytes]:
    """Bytes by id of a SentencePiece-like vocabulary, in which a space is "▁"; added tokens are text."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    pieces = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((entry[0], i) for i, entry in enumerate(vocabulary))
    )
    result = {}
    for piece, i in pieces:
        byte = _BYTE.fullmatch(piece)
        result[i] = bytes([int(byte[1], 16)]) if byte else piece.encode()
    return result | {added["id"]: added["content"].replace(" ", "▁").encode() for added in backend["added_tokens"]}


# Where a tokenizer's own text lies in the one that was given ----------------------------------------------------------


@lru_cache(maxsize=4096)
def places(text: str, form: str | None, space: str) -> tuple[bytes, NDArray[np.int64]]:
    """What a tokenizer makes of a text before it splits it, and where each byte of that ends in the text.

    A position in a normalised text has a place where the text up to it and the text after it, normalised apart, are
    what the whole is normalised to. Inside a character it has one where the character stays as it is.

    Args:
        text: What is tokenised.
        form: A Unicode form, or None.
        space: What stands for a space.

    Returns:
        The bytes, and int64 of one more: bytes of ``text`` read at each position, :data:`NOWHERE` where that has none.
    """
    normal, place, read = "", [np.zeros(1, dtype=np.int64)], 0
    for segment in _segments(text, form):
        changed = segment if form is None else _normalise(form, segment)
        normal += changed
        size = len(segment.encode())
        ends = np.arange(size + 1) if changed == segment else _places_in_changed(segment, changed, form)
        place.append(np.where(ends[1:] == NOWHERE, NOWHERE, ends[1:] + read))
        read += size
    # A space is one character of the text however many bytes its stand-in has.
    content = np.frombuffer(normal.encode(), dtype=np.uint8)
    position = np.r_[0, np.cumsum(np.where(content == 0x20, len(space.encode()), 1))]
    spelled = np.full(position[-1] + 1, NOWHERE, dtype=np.int64)
    spelled[position] = np.concatenate(place)
    return normal.replace(" ", space).encode(), spelled


def _places_in_changed(segment: str, changed: str, form: str | None) -> NDArray[np.int64]:
    assert form is not None
    content, bounds = changed.encode(), [0]
    for character in segment:
        bounds.append(bounds[-1] + len(character.encode()))
    ends = np.full(len(content) + 1, NOWHERE, dtype=np.int64)
    before = NOWHERE
    for count, bound in enumerate(bounds):
        head, tail = (_normalise(form, part) for part in (segment[:count], segment[count:]))
        at = len(head.encode()) if head + tail == changed else NOWHERE
        if at != NOWHERE:
            ends[at] = bound
            if before != NOWHERE and content[before:at] == segment[count - 1].encode():
                ends[before:at] = np.arange(bounds[count - 1], bound)
        before = at
    return ends


def _normalise(form: str, text: str) -> str:
    """As tokenizers do: their tables of Unicode are older than Python's."""
    result: str = getattr(normalizers, form)().normalize_str(text)
    return result


def _segments(text: str, form: str | None) -> Iterator[str]:
    """Stretches that normalise without regard to each other: they begin at ASCII characters."""
    if form is None or _normalise(form, text) == text:
        yield text
    else:
        yield from re.findall(r"[\x00-\x7f][^\x00-\x7f]*|[^\x00-\x7f]+", text)


def true_ends(
    text: str, tokens: list[bytes], special: NDArray[np.bool_], *, form: str | None = None, space: str = " "
) -> NDArray[np.int64]:
    """Bytes of a text that have been read once each token is.

    Args:
        text: What was tokenised.
        tokens: What each token spells, ``(n,)``.
        special: bool ``(n,)``.
        form: Unicode form that the tokenizer brings a text to, or None.
        space: What stands for a space.

    Returns:
        int64 ``(n,)``: 0 for a special token and before anything was read, :data:`NOWHERE` where the end has no place
        in the text.

    Raises:
        AssertionError: What the tokens spell is not the text.
    """
    expected, place = places(text, form, space)
    ordinary = [b"" if apart else token for token, apart in zip(tokens, special, strict=True)]
    spelled = b"".join(ordinary)
    if spelled[max(len(spelled) - len(expected), 0) :] != expected:
        ordinary = _quoting(ordinary, expected, space.encode())
        spelled = b"".join(ordinary)
    prefix = max(len(spelled) - len(expected), 0)
    if spelled[prefix:] != expected or spelled[:prefix] not in (b"", space.encode()):
        at = next((i for i, (a, b) in enumerate(zip(spelled, expected, strict=False)) if a != b), len(expected))
        raise AssertionError(f"tokens spell {spelled[at : at + 40]!r} and the text is {expected[at : at + 40]!r}")
    read = np.cumsum([len(token) for token in ordinary], dtype=np.int64) - prefix
    ends: NDArray[np.int64] = place[np.maximum(read, 0)]
    return np.where(special, 0, ends)


def _quoting(tokens: list[bytes], expected: bytes, space: bytes) -> list[bytes]:
    """Tokens of one byte that stand for a quotation of themselves: Unigram models read "<0x41>" in a text as one."""
    result, read = list(tokens), 0
    for i, token in enumerate(tokens):
        quoted = f"<0x{token[0]:02X}>".encode() if len(token) == 1 else token
        if not expected.startswith(token, read):
            if expected.startswith(quoted, read):
                result[i] = quoted
            elif not read and token.startswith(space):
                read -= len(space)
        read += len(result[i])
    return result


def character_ends(text: str) -> NDArray[np.bool_]:
    """Whether a character begins at each byte of a text, and True at its end: bool ``(bytes + 1,)``."""
    content = np.frombuffer(text.encode(), dtype=np.uint8)
    return np.r_[(content & 0xC0) != 0x80, True]


def true_keys(text: str, ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ends at which a text's tokens may pair, and the token of each: the last that ends there.

    Args:
        text: What was tokenised.
        ends: From :func:`true_ends`.
    """
    rows = np.flatnonzero((ends > 0) & character_ends(text)[np.maximum(ends, 0)])
    last = np.r_[np.diff(ends[rows]) > 0, True][: len(rows)]
    return ends[rows][last], rows[last]
