"""Partners of the same token elsewhere: rows whose source token is the same, in another document, change places.

What is left of a similarity is what the current token gives away. Every row gets the partner of another row, and every
partner is used once: a partner used twice would be a pair of equal rows, from which similarities between rows take more
than the token gives. The rows of a token are laid in a circle, document by document, in random order, and everybody
takes the partner s places further: with c rows of its commonest document among n, no row meets its own document for
``c <= s <= n - c``. So a token needs another document for every row of a document; rows beyond that drop out, once and
for all draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from align.similarity.floors.strata import numbered
from align.similarity.measures.base import Partners

Index = NDArray[np.int64]


def exchangeable(token: Index, document: Index, rng: np.random.Generator) -> Index:
    """The rows that can have a partner of the same token in another document.

    Args:
        token: int64 ``(n,)``.
        document: int64 ``(n,)``.
        rng: Chooses the rows that drop out where one document has more than half of a token's.

    Returns:
        Numbers of rows, ascending.
    """
    order = rng.permutation(len(token))
    _, kind = np.unique(token, return_inverse=True)
    kind, cell = kind.ravel(), numbered(token, document)
    of_kind, of_cell = np.bincount(kind), np.bincount(cell)
    # The others of a token's rows; only the document with more than half of them loses rows.
    allowed = of_kind[kind] - of_cell[cell]
    rank = np.empty(len(token), dtype=np.int64)
    by_cell = order[np.argsort(cell[order], kind="stable")]
    starts = np.cumsum(of_cell) - of_cell
    rank[by_cell] = np.arange(len(token)) - starts[cell[by_cell]]
    return np.flatnonzero(rank < allowed)


def partners(token: Index, document: Index, draws: int, rng: np.random.Generator) -> Partners:
    """The true pairing and random exchanges within tokens, never within a document.

    Args:
        token: int64 ``(n,)``, of rows that :func:`exchangeable` has left.
        document: int64 ``(n,)``.
        draws: Exchanges.
        rng: Of the draws.

    Returns:
        The true pairing first.
    """
    n = len(token)
    _, kind = np.unique(token, return_inverse=True)
    kind, cell = kind.ravel(), numbered(token, document)
    sizes = np.bincount(kind)
    starts = np.cumsum(sizes) - sizes
    most = np.zeros(len(sizes), dtype=np.int64)
    np.maximum.at(most, kind, np.bincount(cell)[cell])
    index = np.tile(np.arange(n), (1 + draws, 1))
    for line in index[1:]:
        order = np.lexsort((rng.random(n), rng.random(n)[cell], kind))
        shift = most + (rng.random(len(sizes)) * (sizes - 2 * most + 1)).astype(np.int64)
        # kind[order] ascends, so position k of the circle of a token is starts[token] + k.
        of = kind[order]
        place = np.arange(n) - starts[of]
        line[order] = order[starts[of] + (place + shift[of]) % sizes[of]]
    return Partners(index, np.unique(document, return_inverse=True)[1].astype(np.int64))
