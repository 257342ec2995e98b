"""Documents to train, validation and test, by the hash of their text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorpusError

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLITS = ("train", "val", "test")

#: u = first 8 bytes of the document id / 2^64; test below the first bound, validation below the second.
TEST_BELOW, VALIDATION_BELOW = 0.1, 0.2


def split_of(ids: Sequence[bytes]) -> NDArray[np.uint8]:
    """Assign documents to train, validation and test by the hash of their text.

    Where a split comes out empty, the document nearest to its range moves in, never the last one of another split.

    Args:
        ids: SHA-256 digests, at least three *different* ones.

    Returns:
        ``(n_documents,)`` of 0 train, 1 validation, 2 test; equal texts share a split.

    Raises:
        CorpusError: Fewer than three different documents.
    """
    distinct = sorted(set(ids))
    if len(distinct) < 3:
        raise CorpusError(
            f"{len(distinct)} different document(s): train, validation and test need at least three; "
            "add text, or give files (text:'dir/*.txt') or lines (jsonl:) that each hold one document"
        )
    u = {key: int.from_bytes(key[:8], "big") / 2**64 for key in distinct}
    split = {
        key: TEST if value < TEST_BELOW else VALIDATION if value < VALIDATION_BELOW else TRAIN
        for key, value in u.items()
    }
    ranges = {
        TEST: (0.0, TEST_BELOW),
        VALIDATION: (TEST_BELOW, VALIDATION_BELOW),
        TRAIN: (VALIDATION_BELOW, 1.0),
    }
    for wanted, (low, high) in ranges.items():
        members = list(split.values())
        if wanted in members:
            continue
        spare = [key for key in distinct if members.count(split[key]) > 1]
        nearest = min(spare, key=lambda key: max(low - u[key], u[key] - high, 0.0))
        split[nearest] = wanted
    return np.array([split[key] for key in ids], dtype=np.uint8)
