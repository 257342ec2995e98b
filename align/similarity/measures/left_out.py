"""Debiased CKA without each document, of all pairs of layers, from one pass over the pairs of rows.

With A and B two kernels less their row effects, whose rows sum to zero (:mod:`align.solvers.row_effects`), let P_d be
the sum of ``A_ij B_ij`` over rows i of document d, and c_d the sums of the rows of A over the columns of d. Without d
the products sum to ``P - 2 P_d``, since there are no pairs within d, and the rows of A that are left sum to ``-c_d``.
So the row effects of the rest are those of ``-c_d``, and these are taken off once more. That is exact: row effects of
the whole are row effects of the rest, which fitting them again removes. A Gaussian kernel keeps the bandwidth of all
rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from align.moments.scatter import Array, Rows
from align.similarity.measures.base import Tick
from align.similarity.measures.kernel_cka import similarities
from align.solvers.row_effects import Documents, in_order
from align.statistics.linearised import FEWEST, FEWEST_EFFECTIVE, LEVEL

#: Rows of all layers that are multiplied at a time.
_PANEL = 64


def left_out(
    layers: Sequence[Rows], document: NDArray[np.int64], *, fraction: float | None = None, tick: Tick = lambda _: None
) -> Array:
    """Debiased CKA of every two layers without each document.

    Args:
        layers: float32 ``(n, d)`` each, rows paired throughout.
        document: int64 ``(n,)``, numbered from 0 without gaps.
        fraction: Bandwidth of a Gaussian kernel in median distances; None for the linear kernel.
        tick: Called with the share of the work done since the last call.

    Returns:
        float64 ``(documents, layers, layers)``, NaN where undefined.
    """
    order, documents = in_order(document)
    count, n, sizes = len(layers), documents.n, documents.sizes
    found = np.full((len(sizes), count, count), math.nan)
    kernels = [similarities(layer[order], document[order], fraction) for layer in layers]
    held = [i for i, kernel in enumerate(kernels) if kernel is not None]
    if not held:
        tick(1.0)
        return found
    least = np.array([kernel.least for kernel in kernels if kernel is not None])
    products, columns = np.zeros((len(sizes), len(held), len(held))), []
    starts = np.cumsum(sizes) - sizes
    for d, (first, last) in enumerate(zip(starts.tolist(), np.cumsum(sizes).tolist(), strict=True)):
        sums = np.zeros((len(held), n))
        for start in range(first, last, _PANEL):
            stop = min(start + _PANEL, last)
            panel = np.stack([kernel.panel(start, stop) for kernel in kernels if kernel is not None])
            sums += panel.sum(axis=1, dtype=np.float64)
            flat = panel.reshape(len(held), -1)
            products[d] += flat @ flat.T
            tick((stop - start) / n)
        columns.append(_effects(sums, d, documents))
    total = products.sum(axis=0)
    for d, effects in enumerate(columns):
        if effects is None:
            continue
        rest = total - 2 * products[d] - 2 * effects
        own = np.diagonal(rest)
        size = np.sqrt(np.where(own > least, own, math.nan))
        found[np.ix_([d], held, held)] = rest / np.multiply.outer(size, size)
    return found


def _effects(columns: Array, d: int, documents: Documents) -> Array | None:
    """``sum_i r_i b_i`` over the rows without document d, from ``(layers, n)`` sums over its columns.

    None where the rest has nothing to compare.
    """
    rest = Documents(np.delete(documents.sizes, d))
    if rest.reason is not None:
        return None
    first = int(documents.sizes[:d].sum())
    sums = -np.delete(columns, np.s_[first : first + int(documents.sizes[d])], axis=1)
    by_document = np.add.reduceat(sums, np.cumsum(rest.sizes) - rest.sizes, axis=1)
    return rest.shared((sums * np.repeat(rest.weights, rest.sizes)) @ sums.T, by_document, by_document)


def half_widths(without: Array, effective: float) -> Array:
    """How far the 95 % interval of a figure reaches to either side, from its values without each document.

    The jackknife's standard error, the root of ``(D - 1) / D sum_d (T_d - mean T_d)^2`` (Efron 1982, chapter 3), times
    the quantile of a t distribution with one degree of freedom less than there are effective documents.

    Args:
        without: float64 ``(documents, ...)``.
        effective: Documents of equal length that would weigh as much.

    Returns:
        float64 ``(...)``; NaN of fewer than :data:`align.statistics.linearised.FEWEST` documents, and where a value
        without a document is undefined.
    """
    count = len(without)
    if count < FEWEST or effective < FEWEST_EFFECTIVE:
        return np.full(without.shape[1:], math.nan)
    error = np.sqrt((count - 1) / count * np.square(without - without.mean(axis=0)).sum(axis=0))
    reach: Array = error * float(stdtrit(effective - 1, 1 - (1 - LEVEL) / 2))
    return reach
