"""Which target position takes which source state.

A target position takes the mapped state of the last ordinary source token that ends at or before it: what the source
had read by then. Special tokens, attention sinks of either side and positions before the first source token keep the
target's own state.

Where a character takes several tokens (byte fallback), all of them have its end, though only the last has read it: the
state of the source's last one would tell the target's first one what comes next. As many tokens on either side
correspond one by one; otherwise the earlier ones take what the source had read before the character.
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
    readers, takers = np.flatnonzero(~source.special), np.flatnonzero(~target.special)
    ends, own = source.byte_end[readers], target.byte_end[takers]
    # The tokens that share an end are first..after-1; on the target's side this one is the rank-th of them.
    first, after = np.searchsorted(ends, own, side="left"), np.searchsorted(ends, own, side="right")
    own_first, own_after = np.searchsorted(own, own, side="left"), np.searchsorted(own, own, side="right")
    rank = np.arange(len(own)) - own_first
    last = rank == own_after - own_first - 1
    one_by_one = after - first == own_after - own_first
    at = np.where(one_by_one, first + rank, np.where(last, after, first) - 1)
    positions = np.full(len(target.special), -1, dtype=np.int64)
    positions[takers[at >= 0]] = readers[at[at >= 0]]
    return positions
