"""Rows with other partners: which row of the second side every row of the first is compared with, many times over.

A floor exchanges partners and asks the measure again. What a measure knows of one layer (a Gram matrix, neighbours,
principal components) does not change when the rows of that layer are put in another order, so a measure prepares every
layer once and only compares again; :func:`recomputed` is the plain way, which all of them must agree with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array
from align.similarity.measures.base import Measure, Partners, Resampling, Tick

Layers = Sequence[NDArray[np.float32]]


def recomputed(measure: Measure, xs: Layers, ys: Layers, partners: Partners, tick: Tick = lambda _: None) -> Array:
    """A measure under every exchange, computed anew from exchanged rows.

    Args:
        measure: Any.
        xs: Layers of the first side, float32 ``(n, d)`` each.
        ys: Layers of the second.
        partners: Exchanges.
        tick: Progress.

    Returns:
        float64 ``(exchanges, layers of the first side, layers of the second)``, NaN where undefined.
    """
    count = len(np.unique(partners.document))
    documents = Resampling(np.unique(partners.document, return_inverse=True)[1], np.zeros((0, count)))
    wanted = [(i, len(xs) + j) for i in range(len(xs)) for j in range(len(ys))]
    values = np.empty((len(partners.index), len(xs), len(ys)))
    for b, index in enumerate(partners.index):
        found = measure([*xs, *(y[index] for y in ys)], wanted, documents, lambda _: None)
        values[b] = np.reshape([found[pair].value for pair in wanted], values.shape[1:])
        tick(1 / len(values))
    return values


def each(partners: Partners, xs: Sequence[object], ys: Sequence[object], tick: Tick) -> Iterator[tuple[int, int, int]]:
    """Exchange, first and second layer, one after the other, with progress.

    Args:
        partners: Exchanges.
        xs: First side.
        ys: Second side.
        tick: Progress.
    """
    count = len(partners.index)
    for b in range(count):
        for j in range(len(ys)):
            for i in range(len(xs)):
                yield b, i, j
        tick(1 / count)
