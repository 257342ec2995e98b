"""Intervals over documents without fitting again: what each row adds to a statistic, to first order.

A statistic of rows is a functional T of their weights, one each on the rows as they are. Its influence function (Hampel
1974) tells what a little more weight on a row does; drawing documents changes weights, so to first order

    T(w) = T + sum_i w_i IF_i / sum_i w_i,    sum_i IF_i = 0,

with w_i how often the document of row i was drawn: the infinitesimal jackknife (Jaeckel 1972; Efron, *The Jackknife,
the Bootstrap and Other Resampling Plans*, 1982, section 6), of which only sums over documents are needed. Division by
the drawn rows, not by n, makes it exact for every mean over rows when documents differ in length. What is a smooth
function of a few sums over rows is drawn through that function instead, which is closer still.

A draw is centred on the value: what a refit on duplicated rows adds to a statistic that few rows inflate (canonical
correlations, nuclear norms) is not in it, and neither is that inflation taken off. The interval tells how far the
choice of documents moves the figure; controls tell how much of the figure is there without any relation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array
from align.similarity.measures.base import Resampling

#: What float32 keeps of a number.
_EPS = float(np.finfo(np.float32).eps)


def centred(rows: NDArray[np.float32]) -> Array:
    """Rows about their own mean, in float64.

    Args:
        rows: float32 ``(n, d)``.

    Returns:
        float64 ``(n, d)``.
    """
    wide = rows.astype(np.float64)
    wide -= wide.sum(axis=0) / max(len(wide), 1)
    return wide


def still(rows: NDArray[np.float32], spread: float) -> bool:
    """Whether all rows are equal, to the float32 rounding of their mean.

    Args:
        rows: float32 ``(n, d)``, as they were given.
        spread: Sum of squares of the centred rows.
    """
    mean = rows.sum(axis=0, dtype=np.float64) / max(len(rows), 1)
    return spread <= len(rows) * _EPS**2 * float(mean @ mean)


def unfit(sides: Sequence[bool], n: int, name: str) -> str | None:
    """Why a measure of variation is undefined; None where it is defined.

    Args:
        sides: Whether the first and the second layer stand :func:`still`.
        n: Rows.
        name: The measure's.
    """
    if n < 2:
        return f"{name} needs at least 2 rows, not {n}"
    for side, constant in zip(("first", "second"), sides, strict=True):
        if constant:
            return f"the {side} set of states does not vary"
    return None


def by_document(values: Array, draws: Resampling) -> Array:
    """Sums over the rows of each document.

    Args:
        values: float64 ``(n,)`` or ``(n, k)``.
        draws: Documents of the rows.

    Returns:
        float64 ``(documents,)`` or ``(documents, k)``.
    """
    sums = np.zeros((draws.counts.shape[1], *values.shape[1:]))
    np.add.at(sums, draws.document, values)
    return sums


def drawn_sums(values: Array, draws: Resampling) -> Array:
    """Sums over the rows of every draw, each row as often as its document was drawn.

    Args:
        values: float64 ``(n,)`` or ``(n, k)``.
        draws: Documents, and how often each is drawn.

    Returns:
        float64 ``(draws,)`` or ``(draws, k)``.
    """
    sums: Array = draws.counts @ by_document(values, draws)
    return sums


def linear_draws(value: float, influence: Array, draws: Resampling | None) -> Array | None:
    """The statistic on every draw, to first order.

    Args:
        value: On all rows.
        influence: float64 ``(n,)``, the influence function at each row; its mean is 0 but for rounding.
        draws: Documents, and how often each is drawn; None passes through.

    Returns:
        float64 ``(draws,)``.
    """
    if draws is None:
        return None
    sums = drawn_sums(np.stack([influence, np.ones_like(influence)], axis=1), draws)
    drawn: Array = value + sums[:, 0] / sums[:, 1]
    return drawn
