"""Where a window of a model without a start token begins: its first token takes the part of one."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.store.read.columns import whole_windows


class _Window(Protocol):
    """The tokens of one window."""

    @property
    def byte_end(self) -> NDArray[np.int32]: ...

    @property
    def special(self) -> NDArray[np.bool_]: ...


def first_rows(
    window: NDArray[np.integer], byte_end: NDArray[np.integer], special: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """The first token of every window that begins without a special token, which is its attention sink.

    A model attends to the first position of what it reads, whatever stands there: a start token where there is one,
    else the first token of the text. That is the first one to have read a byte, and any before it that read none (a
    SentencePiece space before a line feed). Later tokens of the same word are ordinary (decision 0026).

    Args:
        window: int32 ``(n,)``, non-decreasing.
        byte_end: int32 ``(n,)``, bytes of the window read once the token is; 0 for a special token.
        special: bool ``(n,)``.

    Returns:
        bool ``(n,)``.
    """
    found = np.zeros(len(window), dtype=bool)
    for at in whole_windows(window):
        found[at] = _of_windows(window[at], byte_end[at], special[at])
    return found


def _of_windows(
    window: NDArray[np.integer], byte_end: NDArray[np.integer], special: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    begins = np.r_[True, window[1:] != window[:-1]]
    starts = np.flatnonzero(begins)
    number = np.cumsum(begins) - 1
    reads = (byte_end > 0) & ~special
    # How many tokens of its window have read something, once a token is read.
    total = np.cumsum(reads)
    before = total - reads - np.where(starts > 0, total[starts - 1], 0)[number]
    return np.asarray(~special & (before == 0) & ~special[starts][number])


def first_of_window(window: _Window) -> NDArray[np.bool_]:
    """:func:`first_rows` of one window, such as a prompt.

    Args:
        window: Its tokens.

    Returns:
        bool ``(tokens,)``.
    """
    return first_rows(np.zeros(len(window.special), dtype=np.int32), window.byte_end, window.special)
