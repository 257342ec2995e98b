"""Whether text, token tables and pairs agree with each other: what makes figures wrong and no reader notices.

Pure functions of arrays, one pass each. What reads these arrays refuses the first contradiction; `verify` looks
beyond, at what takes long: every state, every window's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from featstore.store.read.columns import pieces
from featstore.store.read.records import StoredCorpus, Tokens
from featstore.text.roles import ROLES


def corpus_problems(corpus: StoredCorpus, split: Sequence[int] | None = None) -> Iterator[str]:
    """Windows follow each other through every document, splits are known, and messages lie within their documents.

    Args:
        corpus: As stored; its arrays have the lengths that its documents say.
        split: Documents of each split, as the root's attributes count them; None for unknown.
    """
    count, edges = len(corpus.document_split), corpus.document_start
    if not count or not len(corpus.window_document):
        yield "corpus: there are no documents, or no windows"
        return
    length = np.diff(edges)
    if edges[0] != 0 or (length < 0).any() or edges[-1] != len(corpus.text):
        yield "corpus: the documents do not fit the text"
        return
    document, start, end = corpus.window_document, corpus.window_start, corpus.window_end
    if (document < 0).any() or (document >= count).any() or (np.diff(document) < 0).any() or (end < start).any():
        yield "corpus: the windows are not in order, or of documents that are not there"
        return
    same = np.r_[False, document[1:] == document[:-1]]
    begins = np.where(same, np.r_[0, end[:-1]], 0)
    last = np.r_[~same[1:], True]
    unread = np.setdiff1d(np.flatnonzero(length), document)
    if (start != begins).any() or (end[last] != length[document[last]]).any() or len(unread):
        yield "corpus: the windows do not cover the documents"
        return
    if (corpus.document_split > 2).any():
        number = int(np.flatnonzero(corpus.document_split > 2)[0])
        yield f"corpus: document {number} has split {corpus.document_split[number]}, not 0 to 2: a split is unknown"
        return
    counts = np.bincount(corpus.document_split, minlength=3).tolist()
    if split is not None and counts != list(split):
        yield f"corpus: {counts} documents are in the splits, the attributes say {list(split)}"
    yield from _message_problems(corpus, length)


def _message_problems(corpus: StoredCorpus, length: NDArray[np.int64]) -> Iterator[str]:
    document, start, end = corpus.message_document, corpus.message_start, corpus.message_end
    if not len(document) == len(start) == len(end) == len(corpus.message_role):
        yield "corpus: messages have documents, roles and ends of different numbers"
        return
    if not len(document):
        return
    outside = (document < 0).any() or (document >= len(length)).any() or (np.diff(document) < 0).any()
    before = np.where(np.r_[False, document[1:] == document[:-1]], np.r_[0, end[:-1]], 0)
    if outside or (start < before).any() or (end < start).any() or (end > length[document]).any():
        yield "corpus: the messages do not lie within their documents, in order"
    elif (corpus.message_role >= len(ROLES)).any():
        yield "corpus: a message has an unknown role"


def token_problems(name: str, rows: int, table: Tokens, corpus: StoredCorpus, vocabulary: int | None) -> Iterator[str]:
    """The token table fits the text: every column has its rows, in order, within their windows.

    Args:
        name: Of the model.
        rows: Of its token table.
        table: As stored.
        corpus: Sound by :func:`corpus_problems`.
        vocabulary: Ids are below it; None for unknown.
    """
    wrong = [(field, len(column)) for field, column in vars(table).items() if len(column) != rows]
    for field, found in wrong:
        yield f"{name}: tokens/{field} has {found} rows, expected {rows}"
    if wrong:
        return
    lengths = corpus.window_end - corpus.window_start
    if not rows:
        yield f"{name}: the tokens' windows are not those of the corpus, in order"
        return
    before = _Before(-1, -1, 0)
    for at in pieces(rows):
        piece = _Piece(at.start, *(np.asarray(getattr(table, column)[at]) for column in _Piece.columns()))
        wrong_here = list(_piece_problems(name, piece, before, lengths, vocabulary))
        yield from wrong_here
        if wrong_here:
            return
        before = piece.last(before)
    if before.window != len(lengths) - 1:
        yield f"{name}: a window has no tokens"


@dataclass(frozen=True)
class _Before:
    """What precedes a piece of a token table: its last window, that of the last ordinary token, and where it ends."""

    window: int
    ordinary: int
    end: int


@dataclass(frozen=True)
class _Piece:
    """A stretch of a token table."""

    start: int
    id: NDArray[np.int32]
    byte_end: NDArray[np.int32]
    window: NDArray[np.int32]
    special: NDArray[np.bool_]
    role: NDArray[np.uint8]

    @classmethod
    def columns(cls) -> list[str]:
        return [member.name for member in fields(cls)][1:]

    def last(self, before: _Before) -> _Before:
        """What precedes the piece that follows."""
        ordinary = np.flatnonzero(~self.special)[-1:]
        if not len(ordinary):
            return _Before(int(self.window[-1]), before.ordinary, before.end)
        at = int(ordinary[0])
        return _Before(int(self.window[-1]), int(self.window[at]), int(self.byte_end[at]))


def _piece_problems(
    name: str, piece: _Piece, before: _Before, lengths: NDArray[np.int64], vocabulary: int | None
) -> Iterator[str]:
    window = piece.window
    step = np.diff(window, prepend=max(before.window, 0))
    if window[0] < 0 or window[-1] >= len(lengths) or (step < 0).any():
        yield f"{name}: the tokens' windows are not those of the corpus, in order"
        return
    if (step > 1).any() or (before.window < 0 and window[0] > 0):
        yield f"{name}: a window has no tokens"
    if (piece.byte_end < 0).any() or (piece.byte_end > lengths[window]).any():
        yield f"{name}: a token ends beyond its window"
        return
    if piece.byte_end[piece.special].any():
        yield f"{name}: a special token claims to have read text"
        return
    ordinary = np.flatnonzero(~piece.special)
    of = np.concatenate(([before.ordinary], window[ordinary]))
    ends = np.concatenate(([before.end], piece.byte_end[ordinary])).astype(np.int64)
    if (np.diff(ends)[of[1:] == of[:-1]] < 0).any():
        yield f"{name}: a token ends before the one that precedes it"
        return
    outside = piece.id < 0 if vocabulary is None else (piece.id < 0) | (piece.id >= vocabulary)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        yield (f"{name}: row {piece.start + row} has token id {piece.id[row]}, outside the vocabulary of {vocabulary}")
    if (piece.role >= len(ROLES)).any():
        yield f"{name}: a token has an unknown role"


def pilot_problems(name: str, layer: int, median: NDArray[np.float64], origin: NDArray[np.floating]) -> Iterator[str]:
    """The pilot's figures of a layer, against which sinks are told and about which moments are summed, are numbers.

    Args:
        name: Of the model.
        layer: Its number.
        median: ``(1,)``, the median norm.
        origin: ``(width,)``.
    """
    if not (np.isfinite(median) & (median >= 0)).all():
        yield f"{name}: layer {layer}: the median norm is {median[0]}, not a finite number"
    if not np.isfinite(origin).all():
        yield f"{name}: layer {layer}: the origin is not {len(origin)} finite numbers"


def pair_problems(what: str, row_a: NDArray[np.int64], row_b: NDArray[np.int64], a: Tokens, b: Tokens) -> Iterator[str]:
    """Pairs are of rows that exist, each once and in document order, and end at the same byte of the same window.

    Args:
        what: The pairs, for messages.
        row_a: int64 ``(m,)``, rows of the first model.
        row_b: int64 ``(m,)``, of the other.
        a: The first model's tokens.
        b: The other's.
    """
    if len(row_a) != len(row_b):
        yield f"{what}: {len(row_a)} rows of the one and {len(row_b)} of the other"
        return
    past = (-1, -1)
    for at in pieces(len(row_a)):
        wrong = list(_pair_problems(what, at.start, row_a[at], row_b[at], a, b, past))
        yield from wrong
        if wrong:
            return
        past = int(row_a[at][-1]), int(row_b[at][-1])


def _pair_problems(
    what: str,
    start: int,
    row_a: NDArray[np.int64],
    row_b: NDArray[np.int64],
    a: Tokens,
    b: Tokens,
    past: tuple[int, int],
) -> Iterator[str]:
    """What is wrong with a stretch of the pairs, which begins after a pair of rows."""
    for rows, table in ((row_a, a), (row_b, b)):
        outside = (rows < 0) | (rows >= len(table.id))
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            yield f"{what}: pair {start + at} names row {rows[at]}, outside 0..{len(table.id) - 1}"
            return
    ends = a.byte_end[row_a]
    apart = (a.window[row_a] != b.window[row_b]) | (ends != b.byte_end[row_b])
    if apart.any():
        yield f"{what}: {int(apart.sum())} do not end at the same byte"
        return
    if (np.diff(row_a, prepend=past[0]) <= 0).any() or (np.diff(row_b, prepend=past[1]) <= 0).any():
        yield f"{what}: rows are repeated, or not in document order"
        return
    unfit = a.special[row_a] | b.special[row_b] | ~a.exact[row_a] | ~b.exact[row_b] | (ends == 0)
    if unfit.any():
        yield f"{what}: {int(unfit.sum())} are of tokens that never pair"
