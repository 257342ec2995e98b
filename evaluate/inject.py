"""Which target position takes which source state, and a forward pass with states put in.

A target position takes the mapped state of the last ordinary source token that ends at or before it: what the source
had read by then. Special tokens, attention sinks of either side and positions before the first source token keep the
target's own state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from featstore import sites
from featstore.tokens import TokenizedWindow


def source_positions(source: TokenizedWindow, target: TokenizedWindow) -> NDArray[np.int64]:
    """For every target token the source token whose state it takes.

    Args:
        source: Tokens of a text under the source's tokenizer.
        target: Tokens of the same text under the target's.

    Returns:
        int64 ``(target tokens,)`` positions in the source, -1 where the target keeps its own state.
    """
    ordinary = np.flatnonzero(~source.special)
    # Several tokens may end at one byte; 'right' takes the last of them, which has read the whole character.
    at = np.searchsorted(source.byte_end[ordinary], target.byte_end, side="right") - 1
    positions = np.where(at >= 0, ordinary[np.maximum(at, 0)] if len(ordinary) else -1, -1)
    positions[target.special] = -1
    return positions.astype(np.int64)


@contextmanager
def injecting(stream: sites.ResidualStream, layer: int, hidden: torch.Tensor, *, whole: bool) -> Iterator[None]:
    """Replace the stream at a layer by given states during forward passes over exactly these tokens.

    Passes over fewer tokens (the steps of cached generation) are left alone.

    Args:
        stream: The target's residual stream.
        layer: 0..L.
        hidden: ``(batch, tokens, width)``.
        whole: The pass has no cache, so the blocks below need not run.
    """

    def put(current: torch.Tensor) -> torch.Tensor | None:
        if current.shape[:2] != hidden.shape[:2]:
            return None
        return hidden.to(current.device, current.dtype)

    with sites.at_site(stream, layer, put):
        if whole:
            with sites.skipping_below(stream, layer):
                yield
        else:
            yield
