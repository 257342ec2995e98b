"""Sums over rows for two groups of layers side by side, and the scalars that linear CKA needs of them.

The layers of a group stand side by side, ``Z = [X_1 .. X_K]`` about fixed origins, so one product ``Z_p' Z_q`` holds
every cross-covariance of two groups at once. With ``A`` the ``(n, layers)`` squared row norms, the sums of ``Z``,
``Z_p' A_q``, ``Z_q' A_p`` and ``A_p' A_q`` complete what the unbiased HSIC of Song et al. (2012) takes. All of them add
up over disjoint rows, in any order.

Once all rows are in, a pair of layers is left as four scalars about its mean (:func:`terms_of`), and the matrices are
let go: what a scan keeps does not grow with the number of layer pairs times the width squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk

from align.moments.scatter import Array
from align.similarity.scan.terms import effective_rank
from featstore.errors import FitError

Rows = NDArray[np.float32]
#: Rows widened to float64 at a time: few enough to stay in the processor's cache.
_PIECE = 64


class UnusableRow(Exception):  # noqa: N818 - caught and renamed where the layer's name is known
    """A row that cannot be multiplied.

    Args:
        row: Its place among the rows given.
        group: 0 for the first group, 1 for the second.
        index: Its layer's place in the group.
    """

    def __init__(self, row: int, group: int, index: int) -> None:
        super().__init__(row, group, index)
        self.row, self.group, self.index = row, group, index


def columns_of(widths: Sequence[int]) -> list[slice]:
    """Where layers of some widths stand side by side.

    Args:
        widths: Of each layer.
    """
    ends = list(accumulate(widths))
    return [slice(end - width, end) for width, end in zip(widths, ends, strict=True)]


@dataclass(frozen=True, eq=False)
class Partial:
    """Sums over some rows for a group p of layers with a group q, or with itself.

    Attributes:
        counts: int64 ``(3,)``: rows, batches, and rows that are in a batch.
        gram: float64 ``(width_p, width_q)``, ``Z_p' Z_q``; of a group with itself the upper triangle alone.
        products: float64 ``(layers_p + 1, layers_q + 1)``, ``[A_p 1]' [A_q 1]``: the sums of the squared row norms are
            in the last column and the last row.
        cross_p: float64 ``(width_p, layers_q + 1)``, ``Z_p' [A_q 1]``: the sum of the rows is the last column.
        cross_q: ``(width_q, layers_p + 1)``, ``Z_q' [A_p 1]``; of a group with itself without rows.
        batched: float64 ``(layers_p, layers_q)``, the sum of HSIC_1 over batches; zeros where none are made.
    """

    counts: NDArray[np.int64]
    gram: Array
    products: Array
    cross_p: Array
    cross_q: Array
    batched: Array

    @property
    def n(self) -> int:
        """Rows."""
        return int(self.counts[0])

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by name."""
        return {name: getattr(self, name) for name in Partial.__dataclass_fields__}

    def include(self, other: Partial) -> None:
        """Add the sums over other rows to these, in place.

        Args:
            other: Of the same groups.

        Raises:
            FitError: Of groups of other widths.
        """
        if self.gram.shape != other.gram.shape or self.products.shape != other.products.shape:
            raise FitError(
                f"sums of shapes {self.gram.shape} and {other.gram.shape} do not add: they are of other "
                "layers; add those of one plan"
            )
        for name, value in self.arrays.items():
            np.add(value, getattr(other, name), out=value)


def nothing(widths_p: Sequence[int], widths_q: Sequence[int] | None) -> Partial:
    """The sums over no rows.

    Args:
        widths_p: Of each layer of the first group.
        widths_q: Of the second; None for the first with itself.
    """
    same = widths_q is None
    both = widths_p if widths_q is None else widths_q
    p, q, i, j = sum(widths_p), sum(both), len(widths_p), len(both)
    return Partial(
        np.zeros(3, np.int64),
        # BLAS fills triangles column by column.
        np.zeros((p, q), order="F" if same else "C"),
        np.zeros((i + 1, j + 1)),
        np.zeros((p, j + 1)),
        np.zeros((0 if same else q, i + 1)),
        np.zeros((i, j)),
    )


class Adder:
    """Adds blocks of rows to one partial; what it works in is allocated once.

    Args:
        widths_p: Of each layer of the first group.
        widths_q: Of the second; None for the first with itself, at half the work.
        most: Rows of a block at most. One float32 product sums so many, and is then added up in float64.
    """

    def __init__(self, widths_p: Sequence[int], widths_q: Sequence[int] | None, most: int) -> None:
        self.total = nothing(widths_p, widths_q)
        self.columns = [columns_of(widths) for widths in (widths_p, widths_q) if widths is not None]
        self._same = widths_q is None
        self._product = np.zeros(self.total.gram.shape, np.float32, order="F" if self._same else "C")
        # No float32 product can overflow while every squared norm is below this.
        self._limit = float(np.finfo(np.float32).max) / most

    def add(self, rows: Sequence[Rows]) -> None:
        """Add the next rows.

        Args:
            rows: float32 ``(m, width)``, C-contiguous, about the origins: of the first group, and of the second where
                it is another.

        Raises:
            UnusableRow: NaN, infinity, or a row too large to square in float32.
        """
        total, m = self.total, len(rows[0])
        norms = [np.ones((m, len(columns) + 1)) for columns in self.columns]
        # Of rows that are refused a moment later.
        with np.errstate(invalid="ignore", over="ignore"):
            for at in range(0, m, _PIECE):
                self._add_piece([z[at : at + _PIECE] for z in rows], [a[at : at + _PIECE] for a in norms])
        # Written so that NaN fails it, too.
        bad = [(int(row), g, int(i)) for g, a in enumerate(norms) for row, i in np.argwhere(~(a <= self._limit))]
        if bad:
            raise UnusableRow(*min(bad))
        total.counts[0] += m
        np.add(total.products, norms[0].T @ norms[-1], out=total.products)
        if self._same:
            product = ssyrk(1.0, rows[0].T, c=self._product, overwrite_c=1)
        else:
            product = np.matmul(rows[0].T, rows[1], out=self._product)
        np.add(total.gram, product, out=total.gram)

    def _add_piece(self, rows: Sequence[Rows], norms: Sequence[Array]) -> None:
        """``Z' [A 1]``; fills in the squared row norms, from the rounded rows that the products see."""
        wide = [z.astype(np.float64) for z in rows]
        for z, a, columns in zip(wide, norms, self.columns, strict=True):
            for i, part in enumerate(columns):
                np.einsum("ij,ij->i", z[:, part], z[:, part], out=a[:, i])
        crosses = (self.total.cross_p, self.total.cross_q)
        for cross, z, a in zip(crosses, wide, reversed(norms), strict=False):
            np.add(cross, z.T @ a, out=cross)

    def add_batches(self, rows: Sequence[Rows], batch: int, order: NDArray[np.int64]) -> None:
        """Add HSIC_1 of every batch of some rows, as Song et al. (2012) print it, from its Gram matrices.

        Args:
            rows: As :meth:`add` takes them.
            batch: Rows of a batch, at least 4. Rows beyond the last whole batch are in none.
            order: int64 ``(m,)``, the order in which rows are dealt into batches.
        """
        count = len(order) // batch
        for k in range(count):
            chosen = order[k * batch : (k + 1) * batch]
            grams = [_grams(z[chosen], columns) for z, columns in zip(rows, self.columns, strict=True)]
            (k_p, r_p), (k_q, r_q) = grams[0], grams[-1]
            # r holds the row sums of each Gram matrix without its diagonal.
            hsic = k_p @ k_q.T - 2 / (batch - 2) * (r_p @ r_q.T)
            hsic += np.outer(r_p.sum(axis=1), r_q.sum(axis=1)) / ((batch - 1) * (batch - 2))
            np.add(self.total.batched, hsic / (batch * (batch - 3)), out=self.total.batched)
        self.total.counts[1:] += count, count * batch


def _grams(z: Rows, columns: Sequence[slice]) -> tuple[Array, Array]:
    """Gram matrices without their diagonals, flat, ``(layers, b b)``, and their row sums ``(layers, b)``."""
    flat = np.empty((len(columns), len(z), len(z)))
    for i, part in enumerate(columns):
        # A batch is few rows: of float32 products an outlier among them takes more digits than the others have.
        wide = z[:, part].astype(np.float64)
        np.matmul(wide, wide.T, out=flat[i])
        np.fill_diagonal(flat[i], 0.0)
    return flat.reshape(len(columns), -1), flat.sum(axis=2)


def terms_of(
    total: Partial, widths: Sequence[Sequence[int]], origins: Sequence[Array], *, ranks: bool
) -> dict[str, NDArray[Any]]:
    """What CKA needs of two groups, about the means of all rows.

    With d and e the means about the origins, C the product, ``u_x = X'b``, ``u_y = Y'a`` and ``A``, ``B``, ``D`` the
    sums of a, b and a b, all about the origins, the lines of :func:`align.moments.scatter.moved` become at the mean::

        C' = C - n d e'        A' = A - n |d|^2
        D' = D - 2 e.u_y - 2 d.u_x + 4 d'Ce + |e|^2 A + |d|^2 B - 3 n |d|^2 |e|^2

    Args:
        total: Sums over all rows.
        widths: Of each layer, of the first group and, where it is another, of the second.
        origins: float64 ``(width,)`` of each layer of the first group, in their own units.
        ranks: Whether to solve for the eigenvalues of each layer of a group with itself.

    Returns:
        ``counts`` and ``batched`` as in :class:`Partial`; ``fro`` and ``d``, float64 ``(layers_p, layers_q)``:
        ``|C'|_F^2`` and ``D'``. Of a group with itself also ``a``, ``mean`` and ``effective_rank``, float64
        ``(layers,)``: ``A'``, the norm of the mean, and exp of the entropy of the eigenvalues' shares (Roy and
        Vetterli, EUSIPCO 2007; NaN where not asked for, or where nothing varies).
    """
    n, same = total.n, len(widths) == 1
    columns = [columns_of(of) for of in widths]
    cross_p, cross_q = total.cross_p, total.cross_p if same else total.cross_q
    means_p, means_q = cross_p[:, -1] / n, cross_q[:, -1] / n
    fro, d = np.zeros(total.batched.shape), np.zeros(total.batched.shape)
    a, mean, rank = (np.full(len(widths[0]), np.nan) for _ in range(3))
    for i, x in enumerate(columns[0]):
        for j, y in enumerate(columns[-1]):
            if same and j < i:
                fro[i, j], d[i, j] = fro[j, i], d[j, i]
                continue
            c, dx, ey = total.gram[x, y], means_p[x], means_q[y]
            if same and i == j:
                c = np.triu(c) + np.triu(c, 1).T
            dx2, ey2 = float(dx @ dx), float(ey @ ey)
            sum_a, sum_b = total.products[i, -1], total.products[-1, j]
            d[i, j] = (
                total.products[i, j] - 2 * float(ey @ cross_q[y, i]) - 2 * float(dx @ cross_p[x, j])
                + 4 * float(dx @ (c @ ey)) + ey2 * sum_a + dx2 * sum_b - 3 * n * dx2 * ey2
            )  # fmt: skip
            centred = c - np.outer(n * dx, ey)
            if same and i == j:
                a[i], mean[i] = sum_a - n * dx2, np.linalg.norm(origins[i] + dx)
                rank[i] = effective_rank(centred) if ranks else np.nan
            fro[i, j] = np.square(centred, out=centred).sum()
    found = {"counts": total.counts, "batched": total.batched, "fro": fro, "d": d}
    return found | {"a": a, "mean": mean, "effective_rank": rank} if same else found
