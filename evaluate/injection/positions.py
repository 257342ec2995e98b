"""Which target position takes which source state.

A target position takes the mapped state of the last ordinary source token that has read no more than it has: what the
source had read by then. Special tokens, attention sinks of either side and positions before the first source token keep
the target's own state. Ends are true byte ends, so this holds inside a character as well; a source token of which
nobody can tell what it has read (it ends inside a rewritten character) says nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featstore.text.tokens import TokenizedWindow


def source_positions(source: TokenizedWindow, target: TokenizedWindow) -> NDArray[np.int64]:
    """For every target token the source token whose state it takes.

    Args:
        source: Tokens of a text under the source's tokenizer.
        target: Tokens of the same text under the target's.

    Returns:
        int64 ``(target tokens,)`` positions in the source, -1 where the target keeps its own state.
    """
    readers = np.flatnonzero(~source.special & source.exact & (source.byte_end > 0))
    takers = np.flatnonzero(~target.special)
    at = np.searchsorted(source.byte_end[readers], target.byte_end[takers], side="right") - 1
    positions = np.full(len(target.special), -1, dtype=np.int64)
    positions[takers[at >= 0]] = readers[at[at >= 0]]
    return positions
