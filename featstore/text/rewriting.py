"""Where each byte of a text that a tokenizer rewrites lies in the text itself.

A normaliser works on neighbourhoods: a mark joins the letter before it, two spaces become one. Where a text can be cut
in two and both halves are rewritten to what the whole is rewritten to, what was read up to the cut is known on both
sides. The cuts are found by halving, so that only the neighbourhoods of what changes are looked at closely.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

#: No byte of the text has been read exactly here.
NOWHERE = -1

_WORD = re.compile(r"\s*\S+|\s+")


def places(rewrite: Callable[[str], str], text: str) -> tuple[bytes, NDArray[np.int64]]:
    """Rewrite a text and tell where each byte of the result ends in it.

    Args:
        rewrite: What is done to the text.
        text: The text.

    Returns:
        The rewritten text and int64 of one more than its bytes: how many bytes of ``text`` have been read at each of
        its positions, :data:`NOWHERE` inside a stretch that is rewritten as a whole.
    """
    rewritten = rewrite(text)
    place, read = [0], 0
    # Stretches still to be looked at, the first of them last. Words are nearly always rewritten apart.
    words = [(word, rewrite(word)) for word in _WORD.findall(text)]
    waiting = words[::-1] if "".join(result for _, result in words) == rewritten else [(text, rewritten)]
    while waiting:
        stretch, result = waiting.pop()
        size = len(stretch.encode())
        if stretch == result:
            place.extend(range(read + 1, read + size + 1))
        elif cut := _cut(rewrite, stretch, result):
            first, second = stretch[:cut], stretch[cut:]
            waiting += [(second, rewrite(second)), (first, rewrite(first))]
            continue
        else:
            inside = len(result.encode())
            place += [NOWHERE] * (inside - 1) + [read + size] * (inside > 0)
        read += size
    return rewritten.encode(), np.array(place, dtype=np.int64)


def _cut(rewrite: Callable[[str], str], stretch: str, result: str) -> int:
    """The character nearest to the middle before which a stretch can be cut, or 0."""
    middle = len(stretch) // 2
    for away in range(middle + 1):
        for cut in {middle - away, middle + away}:
            if 0 < cut < len(stretch) and rewrite(stretch[:cut]) + rewrite(stretch[cut:]) == result:
                return cut
    return 0
