"""Where the tokens of a text end, in bytes.

Where the tokens' own bytes, one after another, are the text, their lengths add up, also inside a character. Where a
tokenizer rewrites the text (a normaliser, an unknown token, a space it adds), the two are laid along each other piece
by piece. Where its bytes cannot be told at all, the ends are those of the offsets, and a token counts only if the next
one does not begin before it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from featstore.errors import OffsetError
from featstore.text.bytes import SPACE, TokenBytes
from featstore.text.rewriting import NOWHERE, places


def byte_ends(
    vocabulary: TokenBytes,
    normalise: Callable[[str], str],
    text: str,
    ids: NDArray[np.int32],
    spans: Callable[[], NDArray[np.int64]],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Byte ends of the tokens of a text, and which of them are exact.

    Args:
        vocabulary: The tokenizer's.
        normalise: What the tokenizer does to a text before it splits it.
        text: What was tokenised.
        ids: int32 ``(tokens,)``, those that come from the text.
        spans: Gives int64 ``(tokens, 2)``, their offsets in characters; called only where they are needed.

    Returns:
        int64 ``(tokens,)`` ends and bool ``(tokens,)`` whether they are exact.

    Raises:
        OffsetError: The tokens do not rebuild the text; the message shows where.
    """
    lengths = vocabulary.length[ids]
    if lengths.min() >= 0:
        raw, pieces = text.encode(), vocabulary.pieces
        joined = b"".join([pieces[i] or b"" for i in ids.tolist()])
        # The proof: what the tokens spell is the text, or the text after the space that SentencePiece puts before it.
        before = int(joined != raw)
        if joined == raw or (joined[:1] == b" " and joined[1:] == raw):
            return np.maximum(np.cumsum(lengths, dtype=np.int64) - before, 0), np.ones(len(ids), dtype=bool)
    if not vocabulary.told:
        return ends_by_offsets(text, spans())
    return _Rewritten(vocabulary, normalise, text).ends([vocabulary.pieces[i] for i in ids.tolist()], spans)


class _Rewritten:
    """A text as its tokenizer rewrites it, along which the tokens' bytes are laid one after another."""

    def __init__(self, vocabulary: TokenBytes, normalise: Callable[[str], str], text: str) -> None:
        # A normaliser that puts something before a text would put it before every stretch of it.
        before = normalise("x").removesuffix("x")

        def rewrite(stretch: str) -> str:
            result = normalise(stretch).removeprefix(before)
            return result.replace(SPACE, " ") if vocabulary.spaced else result

        self._text = text
        self._bytes, self._place = places(rewrite, text)

    def ends(
        self, pieces: list[bytes | None], spans: Callable[[], NDArray[np.int64]]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Byte ends in the text, and which of them are exact.

        Args:
            pieces: The tokens' bytes; None where they cannot be told.
            spans: Their offsets in characters.
        """
        joined = b"".join([piece or b"" for piece in pieces])
        if None not in pieces and joined.removeprefix(b" ") == self._bytes.removeprefix(b" "):
            lengths = np.array([len(piece or b"") for piece in pieces], dtype=np.int64)
            ends = self._place[np.maximum(np.cumsum(lengths) - (len(joined) - len(self._bytes)), 0)]
            return np.maximum.accumulate(np.maximum(ends, 0)), ends != NOWHERE
        position, positions = 0, []
        starts, stops = self._offsets(spans()) if None in pieces else ([], [])
        lost = np.zeros(len(pieces), dtype=bool)
        for at, piece in enumerate(pieces):
            if piece is not None:
                position = self._after(position, piece)
            elif at + 1 < len(pieces) and starts[at + 1] < stops[at]:
                # It shares a stretch with the next token: where it ends nobody knows, and the next is looked for.
                lost[at] = True
                position = max(self._bytes.find(pieces[at + 1] or b"", position + 1, stops[at]), position)
            else:
                position = max(self._over(position, starts[at]), stops[at])
            positions.append(position)
        self._over(position, len(self._bytes))
        ends = self._place[positions]
        return np.maximum.accumulate(np.maximum(ends, 0)), (ends != NOWHERE) & ~lost

    def _after(self, position: int, piece: bytes) -> int:
        """Where a token ends that is read from ``position`` on."""
        start = position
        while True:
            if self._bytes.startswith(piece, position):
                return position + len(piece)
            # A space that the tokenizer puts before a text.
            if piece[:1] == b" " and self._bytes.startswith(piece[1:], position):
                return position + len(piece) - 1
            # Unigram models read a quoted "<0x41>" as the token of a byte.
            if len(piece) == 1 and self._bytes.startswith(b"<0x%02X>" % piece[0], position):
                return position + len("<0x00>")
            # Whitespace that it takes away.
            position += 1
            self._over(start, position)

    def _over(self, position: int, stop: int) -> int:
        """``stop``, if nothing but whitespace lies before it that no token has read."""
        left = self._bytes[position:stop]
        if left.strip() and left.decode(errors="replace").strip():
            raise self._uncovered(position)
        if stop > len(self._bytes):
            raise self._uncovered(position)
        return stop

    def _offsets(self, spans: NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Offsets in the rewritten text; inside a stretch that is rewritten as a whole they mean all of it."""
        known = np.flatnonzero(self._place != NOWHERE)
        boundaries, places_known = byte_offsets(self._text), self._place[known]
        starts = np.searchsorted(places_known, boundaries[spans[:, 0]], side="right") - 1
        stops = np.searchsorted(places_known, boundaries[spans[:, 1]])
        return known[starts].tolist(), known[np.minimum(stops, len(known) - 1)].tolist()

    def _uncovered(self, position: int) -> OffsetError:
        boundaries = byte_offsets(self._text)
        read = int(self._place[: position + 1].max())
        character = int(np.searchsorted(boundaries, read, side="right")) - 1
        around = self._text[max(character - 10, 0) : character + 10]
        return OffsetError(
            f"no token covers character {character} ({self._text[character : character + 1]!r}, in {around!r}) as it "
            "stands: this tokenizer cannot spell the text, so what its tokens have read cannot be told; clean the "
            "text, update `tokenizers` or use another tokenizer"
        )


def ends_by_offsets(text: str, spans: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Byte ends from offsets alone: a token counts as having read its last character if the next begins after it.

    Args:
        text: What was tokenised.
        spans: int64 ``(tokens, 2)``, character start and end of each token that is not special.

    Returns:
        int64 ``(tokens,)`` ends and bool ``(tokens,)`` whether they are exact; a token that shares a character with the
        next one is not, and ends where that one begins.

    Raises:
        OffsetError: As :func:`check_offsets`.
    """
    check_offsets(text, spans)
    following = np.append(spans[1:, 0], len(text))
    stops = np.minimum(spans[:, 1], following)
    ends = np.maximum.accumulate(byte_offsets(text)[stops]) if len(stops) else np.zeros(0, dtype=np.int64)
    return ends, spans[:, 1] <= following


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
