"""Row effects of a kernel over pairs of rows of different documents: what debiased CKA takes off before it compares.

Rows of one document have much in common whatever the model, so a pair of them is as good as a row with itself: neither
says anything of another model. Left are the pairs of rows of different documents. On these a symmetric K is split as

    K_ij = a_i + a_j + A_ij,   sum over rows j of other documents of A_ij = 0 for every i,

the a by least squares. With one row a document this is U-centring (Szekely and Rizzo, Annals of Statistics 2014,
equation 2.5), and ``sum_ij A_ij B_ij / (n (n - 3))`` is HSIC_1 (Song et al., JMLR 2012, equation 5).

With n rows, n_d of them in document d, r_i the sum of K_ij over rows of other documents, R_d the sum of r_i over the
rows of d, and T_d that of a_i, the normal equations are

    (n - n_d) a_i = r_i - (T - T_d),     (n - 2 n_d) T_d + n_d T = R_d,     T = sum_d T_d:

one unknown a document, whose matrix is a diagonal and one of rank one. A is orthogonal to all that has the form
``c_i + c_j``, so of another kernel L with row effects b

    sum A_ij B_ij = P - 2 sum_i r_i b_i,   P = sum of K_ij L_ij over the pairs left.

Of two documents the equations are singular (the pairs form a bipartite graph: what is added to every a of one document
may be taken off those of the other), and every solution leaves the same A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featstore.errors import FitError

Array = NDArray[np.float64]


def _float64(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Documents:
    """How many rows each document has, and the least squares that follow from it.

    Attributes:
        sizes: int64 ``(documents,)``, each at least 1.
    """

    sizes: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.sizes.ndim != 1 or (self.sizes < 1).any():
            raise FitError(f"documents of {self.sizes.tolist()[:8]} rows: every document has at least one")

    @cached_property
    def n(self) -> int:
        """Rows."""
        return int(self.sizes.sum())

    @cached_property
    def pairs(self) -> int:
        """Ordered pairs of rows of different documents."""
        return int(self.n**2 - sum(size * size for size in self.sizes.tolist()))

    @property
    def freedom(self) -> int:
        """Ordered pairs less twice the rank of the row effects: n (n - 3) where each row is its own document.

        ``sum A_ij B_ij`` over it is the estimate of HSIC.
        """
        return self.pairs - 2 * (self.n - (len(self.sizes) == 2))

    @property
    def effective(self) -> float:
        """How many documents of equal length would weigh as much: ``1 / sum (n_d / n)^2`` (Kish 1965)."""
        return self.n**2 / (self.n**2 - self.pairs) if self.n else 0.0

    @property
    def reason(self) -> str | None:
        """Why nothing is left to compare; None where something is."""
        if self.n < 4:
            return f"debiased CKA needs at least 4 rows, not {self.n}"
        if len(self.sizes) < 2:
            return f"debiased CKA compares rows of different documents, and all {self.n} are of one"
        if self.freedom <= 0:
            return (
                f"debiased CKA needs more pairs of rows of different documents than {self.n} rows of "
                f"{len(self.sizes)} documents have"
            )
        return None

    @cached_property
    def weights(self) -> Array:
        """``1 / (n - n_d)``, float64 ``(documents,)``; 0 for a single document, which leaves no pairs."""
        return np.asarray(1.0 / (self.n - self.sizes) if len(self.sizes) > 1 else np.zeros(len(self.sizes)))

    @cached_property
    def longest(self) -> int:
        """The place of the longest document, whose diagonal entry n - 2 n_d alone may be zero or below."""
        return int(np.argmax(self.sizes))

    @cached_property
    def inverses(self) -> Array:
        """``1 / (n - 2 n_d)``, 0 in the place of the longest; of two documents 1 and 0."""
        found = np.zeros(len(self.sizes))
        others = np.arange(len(found)) != self.longest
        found[others] = 1.0 if len(found) == 2 else 1.0 / (self.n - 2 * self.sizes[others])
        return found

    def others(self, sums: ArrayLike) -> Array:
        """``T - T_d`` of every document.

        Args:
            sums: ``(..., documents)``, R_d.

        Returns:
            float64 ``(..., documents)``; zeros for a single document.
        """
        r = np.asarray(sums, dtype=np.float64)
        n, sizes, longest = self.n, self.sizes, self.longest
        if len(sizes) < 2:
            return np.zeros_like(r)
        if len(sizes) == 2:
            # R_0 = R_1: both are the sum over the same pairs.
            return r[..., ::-1] / (2.0 * sizes)
        g, first = self.inverses, r[..., longest]
        p, q, f = r @ g, float(sizes @ g), n - 2 * int(sizes[longest])
        total = (first + f * p) / (f * (1 + q) + int(sizes[longest]))
        found: Array = (total[..., None] * (n - sizes) - r) * g
        found[..., longest] = p - total * q
        return found

    def effects(self, rows: ArrayLike) -> Array:
        """The row effects a.

        Args:
            rows: ``(..., n)``, r_i, rows in the order of their documents.

        Returns:
            float64 ``(..., n)``.
        """
        r = np.asarray(rows, dtype=np.float64)
        starts = np.cumsum(self.sizes) - self.sizes
        rest = self.others(np.add.reduceat(r, starts, axis=-1))
        found: Array = np.repeat(self.weights, self.sizes) * (r - np.repeat(rest, self.sizes, axis=-1))
        return found

    def shared(self, products: ArrayLike, first: ArrayLike, second: ArrayLike) -> Array:
        """``sum_i r_i b_i`` of kernels with kernels, from sums by document.

        Args:
            products: ``(p, q)``, ``sum_d weights_d sum_i r_i s_i`` over the rows i of d, r and s of two kernels.
            first: ``(p, documents)``, R_d of the first.
            second: ``(q, documents)``, of the second.

        Returns:
            float64 ``(p, q)``.
        """
        found: Array = _float64(products) - (_float64(first) * self.weights) @ self.others(second).T
        return found

    def shared_of_sums(
        self, products: ArrayLike, quadratic: ArrayLike, first: tuple[Array, Array], second: tuple[Array, Array]
    ) -> Array:
        """The same where no document is held: from sums over documents, weighted by what is known beforehand.

        Args:
            products: ``(...)``, as for :meth:`shared`.
            quadratic: ``(...)``, ``sum_d weights_d inverses_d R_d S_d``, R of the first kernel and S of the second.
            first: ``sum_d inverses_d R_d`` and R of the longest document, each of a shape that broadcasts to theirs.
            second: The same of S.

        Returns:
            float64 ``(...)``.
        """
        (r, r_longest), (s, s_longest) = first, second
        n, longest = self.n, int(self.sizes[self.longest])
        if len(self.sizes) < 2:
            return np.full(np.shape(products), np.nan)
        if len(self.sizes) == 2:
            effects: Array = (r * s_longest + r_longest * s) / (2.0 * longest * (n - longest))
            return _float64(products) - effects
        f, q = n - 2 * longest, float(self.sizes @ self.inverses)
        total = (s_longest + f * s) / (f * (1 + q) + longest)
        effects = total * r - _float64(quadratic) + (s - q * total) * r_longest / (n - longest)
        return _float64(products) - effects


def in_order(labels: ArrayLike) -> tuple[NDArray[np.int64], Documents]:
    """Rows in the order of their documents.

    Args:
        labels: ``(n,)``, any labels, such as numbers of documents; rows of one need not follow each other.

    Returns:
        ``(order, documents)``: int64 ``(n,)``, which row comes where, rows of a document as they came; and what the
        documents are.

    Raises:
        FitError: Labels that are no list.
    """
    given = np.asarray(labels)
    if given.ndim != 1:
        raise FitError(f"document labels of shape {given.shape}: give one for each row")
    _, places, sizes = np.unique(given, return_inverse=True, return_counts=True)
    return np.argsort(places, kind="stable").astype(np.int64), Documents(sizes.astype(np.int64))


#: Labels that are looked at together.
_PIECE = 1 << 20


def one_after_another(labels: Sequence[int] | NDArray[np.integer]) -> Documents | None:
    """The documents of rows that stand in the order of their documents already, in memory for these alone.

    Args:
        labels: ``(n,)`` of integers: an array, or what gives arrays for slices.

    Returns:
        What :func:`in_order` finds; None where rows stand in another order.
    """
    edges, last = [np.zeros(0, np.int64)], None
    for start in range(0, len(labels), _PIECE):
        part = np.asarray(labels[start : start + _PIECE])
        before = part[0] - 1 if last is None else last
        steps = part[1:] != part[:-1]
        if part[0] < before or (part[1:] < part[:-1]).any():
            return None
        edges.append(np.flatnonzero(np.concatenate(([part[0] != before], steps))) + start)
        last = part[-1]
    return Documents(np.diff(np.concatenate(edges), append=len(labels)).astype(np.int64))


def alone(n: int) -> Documents:
    """Every row a document of its own.

    Args:
        n: Rows.
    """
    return Documents(np.ones(n, np.int64))
