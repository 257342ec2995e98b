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

#: Tokens that may share one rewritten stretch of text before the search for its end is given up.
_LONGEST_STRETCH = 64


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
        found = _ends_in_rewritten(vocabulary, normalise, text, [pieces[i] or b"" for i in ids.tolist()])
        if found is not None:
            return found
    if not vocabulary.told:
        return ends_by_offsets(text, spans())
    return _Alignment(vocabulary, normalise, text, ids, spans()).ends()


def _ends_in_rewritten(
    vocabulary: TokenBytes, normalise: Callable[[str], str], text: str, pieces: list[bytes]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]] | None:
    """Ends where the tokens spell what the tokenizer makes of a text; None where they spell something else."""
    # A normaliser that puts something before a text would put it before every stretch of it.
    before = normalise("x").removesuffix("x")

    def rewrite(stretch: str) -> str:
        result = normalise(stretch).removeprefix(before)
        return result.replace(SPACE, " ") if vocabulary.spaced else result

    rewritten, place = places(rewrite, text)
    joined = b"".join(pieces)
    if vocabulary.spaced and not joined.endswith(rewritten):
        pieces = _quoting(pieces, rewritten)
        joined = b"".join(pieces)
    added = len(joined) - len(rewritten)
    if joined != b" " * added + rewritten or added > 1:
        return None
    ends = place[np.maximum(np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - added, 0)]
    return np.maximum.accumulate(np.maximum(ends, 0)), ends != NOWHERE


def _quoting(pieces: list[bytes], rewritten: bytes) -> list[bytes]:
    """Bytes that stand for their names: Unigram models read a quoted "<0x41>" as the token of a byte."""
    result, read = list(pieces), 0
    for at, piece in enumerate(pieces):
        name = b"<0x%02X>" % piece[0] if len(piece) == 1 else piece
        if at == 0 and piece[:1] == b" " and not rewritten.startswith(piece):
            read = -1
        elif not rewritten.startswith(piece, read) and rewritten.startswith(name, read):
            result[at] = name
        read += len(result[at])
    return result


class _Alignment:
    """The tokens of a text that is not what they spell, laid along it piece by piece.

    Where a piece is what stands in the text, it ends where it ends. Where it is not, the tokens from there on are taken
    together until what they spell is what the normaliser makes of a stretch of the text; the last of them has read that
    stretch, and where the others end inside it nobody can tell.
    """

    def __init__(
        self,
        vocabulary: TokenBytes,
        normalise: Callable[[str], str],
        text: str,
        ids: NDArray[np.int32],
        spans: NDArray[np.int64],
    ) -> None:
        self._text, self._raw, self._normalise = text, text.encode(), normalise
        self._pieces = [vocabulary.pieces[i] for i in ids.tolist()]
        self._spaced = vocabulary.spaced
        self._boundaries = byte_offsets(text)
        self._starts, self._stops = (self._boundaries[spans[:, side]].tolist() for side in (0, 1))

    def ends(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        count, position, at = len(self._pieces), 0, 0
        ends, exact = [0] * count, [True] * count
        while at < count:
            piece = self._pieces[at]
            if piece is not None and self._raw.startswith(piece, position):
                position += len(piece)
            elif at == 0 and piece is not None and piece[:1] == b" " and self._raw.startswith(piece[1:]):
                position = len(piece) - 1
            else:
                while position < len(self._raw) and self._raw[position] & 0xC0 == 0x80:
                    # Bytes that agree so far with those of a character that was rewritten.
                    at -= 1
                    position = ends[at - 1] if at else 0
                last, stop = self._stretch(at, position)
                ends[at:last], exact[at:last] = [position] * (last - at), [False] * (last - at)
                at, position = last, stop
            ends[at] = position
            exact[at] = True
            at += 1
        if self._left(position, len(self._raw)):
            raise self._uncovered(position)
        return np.array(ends, dtype=np.int64), np.array(exact)

    def _stretch(self, first: int, position: int) -> tuple[int, int]:
        """The last of the tokens from ``first`` that together spell a stretch of the text, and where that ends."""
        spelt: bytes | None = b""
        for last in range(first, min(first + _LONGEST_STRETCH, len(self._pieces))):
            piece = self._pieces[last]
            spelt = None if spelt is None or piece is None else spelt + piece
            after = self._starts[last + 1] if last + 1 < len(self._pieces) else len(self._raw)
            stops = sorted({stop for stop in (self._stops[last], after) if stop >= position})
            if spelt is None:
                # Nobody knows what an unknown token spells: its offsets are believed where they stand alone.
                clean = [stop for stop in stops[:1] if stop == self._stops[last] <= after]
                if clean and not self._left(position, self._starts[first]):
                    return last, clean[0]
                continue
            for alike in (self._same, self._same_but_for_spaces):
                for stop in stops:
                    if alike(self._raw[position:stop].decode(), spelt, start=first == 0):
                        return last, stop
        raise self._uncovered(position)

    def _same(self, stretch: str, spelt: bytes, *, start: bool) -> bool:
        """Whether tokens spell what the normaliser makes of a stretch, at the start perhaps after one more space."""
        wanted = self._normalise(stretch)
        if self._spaced:
            wanted = wanted.replace(SPACE, " ")
        return spelt == wanted.encode() or (start and spelt == b" " + wanted.encode())

    def _same_but_for_spaces(self, stretch: str, spelt: bytes, *, start: bool) -> bool:
        del start
        try:
            found = spelt.decode()
        except UnicodeDecodeError:
            return False
        wanted = self._normalise(stretch).replace(SPACE, " " if self._spaced else SPACE)
        return bool(found.split()) and found.split() == wanted.split()

    def _left(self, start: int, stop: int) -> bool:
        """Whether something other than whitespace lies between, which the tokenizer does not itself take away."""
        return start < stop and bool(self._normalise(self._raw[start:stop].decode()).replace(SPACE, " ").strip())

    def _uncovered(self, position: int) -> OffsetError:
        character = int(np.searchsorted(self._boundaries, position, side="right")) - 1
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
