"""Where in its document a paired row stands."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featstore.store import Store
from featstore.store.read.pairs import Pairs


def places(store: Store, pairs: Pairs) -> NDArray[np.int64]:
    """The number of a pair's window within its document, and that of the pair within the window, in one number.

    At equal places two rows have about as much text before them; how often tokens of both models end together makes the
    difference.

    Args:
        store: Complete store.
        pairs: Any.

    Returns:
        int64 ``(m,)``, no two equal within a document.
    """
    document = pairs.document.astype(np.int64)
    window = store.tokens(pairs.source).window[pairs.row_source].astype(np.int64)
    order = np.lexsort((pairs.row_source, window, document))
    count = np.arange(len(order))
    begins = np.diff(document[order], prepend=-1) != 0
    first = window[order][np.maximum.accumulate(np.where(begins, count, 0))]
    opens = begins | (np.diff(window[order], prepend=-1) != 0)
    within = count - np.maximum.accumulate(np.where(opens, count, 0))
    found = np.empty(len(order), dtype=np.int64)
    found[order] = (window[order] - first << 32) + within
    return found
