"""Sums over whole documents for two groups of layers side by side: what debiased CKA over documents takes.

Rows come about the mean of all of them, so that they sum to zero. With ``C_d = X_d'Y_d``, s_d and t_d the sums over the
n_d rows of document d, and ``h_d = |s_d|^2``, the row effects of :mod:`align.solvers.row_effects` take of a document
no more than

    |C_d|_F^2,    w_d s_d' C_d t_d,    h_d of both layers,

w_d and the other weights being known from the documents' lengths before a row is read. So what is kept is the product
over all rows and a few numbers for each two layers, whatever the number of documents.

The first two follow from ``K_d = X_d X_d'`` and ``L_d = Y_d Y_d'`` of a short document as well as from C_d of a long
one: ``|C_d|_F^2 = sum K_d L_d`` and ``s_d' C_d t_d = (K_d 1)'(L_d 1)``. The cheaper is taken.

A document longer than one product of rows comes in pieces, of which the product over all rows is C_d itself: its sums
are kept apart until its last piece (:func:`close`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk

from align.moments.scatter import Array
from align.similarity.scan.partials import Rows, UnusableRow, columns_of
from align.similarity.scan.planning import TOGETHER, longest_kernel
from align.similarity.scan.terms import effective_rank
from align.solvers.row_effects import Documents

#: Rows of the kernel of a document that are widened to float64 at a time.
_PIECE = 64
#: Columns of a product that are widened at a time.
_COLUMNS = 256
#: Sums over documents for every feature alone, in this order: the square of its sum of squares, the weighted product of
#: its sum and this, the two sums for shared_of_sums, and the longest document's.
_ALONE = 5


@dataclass(frozen=True, eq=False)
class Between:
    """Sums over whole documents for a group p of layers with a group q, or with itself; or over a piece of one.

    Attributes:
        counts: int64 ``(3,)``: rows, and two zeros.
        gram: float64 ``(width_p, width_q)``, ``Z_p' Z_q``; of a group with itself the upper triangle alone.
        own: float64 ``(layers_p, layers_q)``, ``sum_d |C_d|_F^2``.
        weighted: ``(layers_p, layers_q)``, ``sum_d w_d s_d' C_d t_d``.
        quadratic: ``(layers_p, layers_q)``, ``sum_d w_d g_d h_d h_d``, g_d the inverses of the normal equations.
        linear_p: ``(layers_p,)``, ``sum_d g_d h_d``.
        linear_q: ``(layers_q,)``.
        longest_p: ``(layers_p,)``, h_d of the longest document.
        longest_q: ``(layers_q,)``.
        sum_p: ``(width_p,)``, the sum over the rows of a piece; zeros where documents are whole.
        sum_q: ``(width_q,)``.
        alone: ``(5, width_p)``, the same sums for the kernel of every feature alone; without columns where these are
            not asked for, or the groups are two.
    """

    counts: NDArray[np.int64]
    gram: Array
    own: Array
    weighted: Array
    quadratic: Array
    linear_p: Array
    linear_q: Array
    longest_p: Array
    longest_q: Array
    sum_p: Array
    sum_q: Array
    alone: Array

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by name."""
        return {name: getattr(self, name) for name in Between.__dataclass_fields__}

    def include(self, other: Between) -> None:
        """Add the sums over other rows to these, in place.

        Args:
            other: Of the same groups.
        """
        for name, value in self.arrays.items():
            np.add(value, getattr(other, name), out=value)


def nothing_between(widths_p: Sequence[int], widths_q: Sequence[int] | None, *, alone: bool = False) -> Between:
    """The sums over no documents.

    Args:
        widths_p: Of each layer of the first group.
        widths_q: Of the second; None for the first with itself.
        alone: Whether to sum for every feature alone as well.
    """
    same = widths_q is None
    both = widths_p if widths_q is None else widths_q
    p, q, i, j = sum(widths_p), sum(both), len(widths_p), len(both)
    return Between(
        np.zeros(3, np.int64),
        # BLAS fills triangles column by column.
        np.zeros((p, q), order="F" if same else "C"),
        own=np.zeros((i, j)),
        weighted=np.zeros((i, j)),
        quadratic=np.zeros((i, j)),
        linear_p=np.zeros(i),
        linear_q=np.zeros(j),
        longest_p=np.zeros(i),
        longest_q=np.zeros(j),
        sum_p=np.zeros(p),
        sum_q=np.zeros(q),
        alone=np.zeros((_ALONE, p if alone and same else 0)),
    )


class DocumentAdder:
    """Adds whole documents, or pieces of one, to sums; what it works in is allocated once.

    Args:
        widths_p: Of each layer of the first group.
        widths_q: Of the second; None for the first with itself, at half the work.
        documents: All of them; their lengths give the weights.
        most: Rows of a block at most. One float32 product sums so many, and is then added up in float64.
        alone: Whether to sum for every feature alone as well.
    """

    def __init__(
        self,
        widths_p: Sequence[int],
        widths_q: Sequence[int] | None,
        documents: Documents,
        most: int,
        *,
        alone: bool = False,
    ) -> None:
        self.total = nothing_between(widths_p, widths_q, alone=alone)
        self.columns = [columns_of(widths) for widths in (widths_p, widths_q) if widths is not None]
        self._documents, self._same = documents, widths_q is None
        self._kernel_rows = longest_kernel(*self.total.gram.shape)
        self._product = np.zeros(self.total.gram.shape, np.float32, order="F" if self._same else "C")
        # No float32 product can overflow while every squared norm is below this.
        self._limit = float(np.finfo(np.float32).max) / most

    def cuts(self, first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
        """Which documents go into one product of rows: a long one alone, short ones together.

        Args:
            first: First document.
            last: The one after the last; none of them has more rows than go into a product.
            most: Rows of a product at most.
        """
        begun, rows = first, 0
        for d, size in enumerate(self._documents.sizes[first:last].tolist(), first):
            apart = size > self._kernel_rows
            if d > begun and (apart or rows + size > most):
                yield begun, d
                begun, rows = d, 0
            rows += size
            if apart:
                yield d, d + 1
                begun, rows = d + 1, 0
        if begun < last:
            yield begun, last

    def add(self, rows: Sequence[Rows], first: int, last: int) -> None:
        """Add whole documents.

        Args:
            rows: float32 ``(m, width)``, C-contiguous, about the mean: of the first group, and of the second where it
                is another. The documents' rows one after another.
            first: First document.
            last: The one after the last, of one of :meth:`cuts`.

        Raises:
            UnusableRow: NaN, infinity, or a row too large to square in float32.
        """
        product = self._multiplied(rows)
        sizes = self._documents.sizes[first:last]
        if last - first == 1 and sizes[0] > self._kernel_rows:
            squares = _squares(product, self.columns, same=self._same)
            of_rows = [_of_rows(z, columns) for z, columns in zip(rows, self.columns, strict=True)]
            self._weigh(of_rows, first, last, squares)
        else:
            ends = np.cumsum(sizes)
            for a, b in _together(sizes, self._kernel_rows):
                part = slice(int(ends[a] - sizes[a]), int(ends[b - 1]))
                labels = np.repeat(np.arange(b - a), sizes[a:b]) if b - a > 1 else None
                kernels = [_kernels(z[part], columns, labels) for z, columns in zip(rows, self.columns, strict=True)]
                of_rows = [k.sum(axis=2).astype(np.float64) for k in kernels]
                self._weigh(of_rows, first + a, first + b, _products(kernels[0], kernels[-1]))
        if self.total.alone.size:
            starts = np.cumsum(sizes) - sizes
            sums = np.add.reduceat(rows[0], starts, axis=0).astype(np.float64)
            squares = np.add.reduceat(np.square(rows[0]), starts, axis=0).astype(np.float64)
            np.add(self.total.alone, _features(self._documents, first, last, sums, squares), out=self.total.alone)

    def add_piece(self, rows: Sequence[Rows]) -> None:
        """Add a piece of a document, which is all that these sums are of until it is closed.

        Args:
            rows: As :meth:`add` takes them.

        Raises:
            UnusableRow: NaN, infinity, or a row too large to square in float32.
        """
        self._multiplied(rows)
        for kept, z in zip((self.total.sum_p, self.total.sum_q), (rows[0], rows[-1]), strict=True):
            np.add(kept, z.sum(axis=0, dtype=np.float64), out=kept)

    def _multiplied(self, rows: Sequence[Rows]) -> Rows:
        with np.errstate(invalid="ignore", over="ignore"):
            norms = [
                np.stack([np.einsum("ij,ij->i", z[:, part], z[:, part]) for part in columns], axis=1)
                for z, columns in zip(rows, self.columns, strict=True)
            ]
        # Written so that NaN fails it, too.
        bad = [(int(row), g, int(i)) for g, a in enumerate(norms) for row, i in np.argwhere(~(a <= self._limit))]
        if bad:
            raise UnusableRow(*min(bad))
        if self._same:
            product: Rows = ssyrk(1.0, rows[0].T, c=self._product, overwrite_c=1)
        else:
            product = np.matmul(rows[0].T, rows[1], out=self._product)
        np.add(self.total.gram, product, out=self.total.gram)
        self.total.counts[0] += len(rows[0])
        return product

    def _weigh(self, of_rows: Sequence[Array], first: int, last: int, own: Array) -> None:
        """Adds the sums of documents ``first:last`` from ``x_i . s_d`` of their rows, ``(layers, rows)``."""
        total, documents, here = self.total, self._documents, slice(first, last)
        sizes, w, g = documents.sizes[here], documents.weights[here], documents.inverses[here]
        p, q = of_rows[0], of_rows[-1]
        np.add(total.own, own, out=total.own)
        np.add(total.weighted, (p * np.repeat(w, sizes)) @ q.T, out=total.weighted)
        starts = np.cumsum(sizes) - sizes
        h_p, h_q = (np.add.reduceat(each, starts, axis=1) for each in (p, q))
        _add_squares_of_sums(total, documents, first, h_p, h_q, w, g)


def _add_squares_of_sums(
    total: Between, documents: Documents, first: int, h_p: Array, h_q: Array, w: Array, g: Array
) -> None:
    np.add(total.quadratic, (h_p * (w * g)) @ h_q.T, out=total.quadratic)
    np.add(total.linear_p, h_p @ g, out=total.linear_p)
    np.add(total.linear_q, h_q @ g, out=total.linear_q)
    longest = documents.longest - first
    if 0 <= longest < h_p.shape[1]:
        np.add(total.longest_p, h_p[:, longest], out=total.longest_p)
        np.add(total.longest_q, h_q[:, longest], out=total.longest_q)


def close(total: Between, widths: Sequence[Sequence[int]], documents: Documents, document: int) -> None:
    """Make the sums over all pieces of a document those over a whole one, in place.

    Args:
        total: Over all its pieces and nothing else.
        widths: Of each layer, of the first group and, where it is another, of the second.
        documents: All of them.
        document: Which one it is.
    """
    columns, same = [columns_of(of) for of in widths], len(widths) == 1
    sums = (total.sum_p, total.sum_q)
    here = slice(document, document + 1)
    w, g = documents.weights[here], documents.inverses[here]
    np.add(total.own, _squares(total.gram, columns, same=same), out=total.own)
    for i, x in enumerate(columns[0]):
        for j, y in enumerate(columns[-1]):
            if not same:
                value = sums[0][x] @ (total.gram[x, y] @ sums[1][y])
            elif i == j:
                value = sums[0][x] @ _whole(total.gram[x, x]) @ sums[1][x]
            else:
                block = total.gram[x, y] if i < j else total.gram[y, x].T
                value = sums[0][x] @ (block @ sums[1][y])
            total.weighted[i, j] += w[0] * value
    h_p, h_q = (
        np.array([[float(each[part] @ each[part])] for part in of])
        for each, of in zip(sums, (columns[0], columns[-1]), strict=True)
    )
    _add_squares_of_sums(total, documents, document, h_p, h_q, w, g)
    if total.alone.size:
        squares = np.diag(total.gram)[None]
        np.add(total.alone, _features(documents, document, document + 1, sums[0][None], squares), out=total.alone)
    for each in sums:
        each[:] = 0


def _whole(triangle: Array) -> Array:
    """A symmetric matrix from its upper triangle."""
    upper = np.triu(triangle)
    upper += np.triu(triangle, 1).T
    return upper


def _features(documents: Documents, first: int, last: int, sums: Array, squares: Array) -> Array:
    """The sums of :class:`Between` for every feature alone, ``(5, width)``."""
    here = slice(first, last)
    w, g, h = documents.weights[here], documents.inverses[here], sums**2
    longest = documents.longest - first
    return np.stack(
        [
            (squares**2).sum(axis=0),
            w @ (h * squares),
            (w * g) @ h**2,
            g @ h,
            h[longest] if 0 <= longest < len(h) else np.zeros(h.shape[1]),
        ]
    )


def _together(sizes: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Documents whose kernels are made in one product: a long one alone, short ones together."""
    begun, rows, limit = 0, 0, min(TOGETHER, most)
    for d, size in enumerate(sizes.tolist()):
        if d > begun and rows + size > limit:
            yield begun, d
            begun, rows = d, 0
        rows += size
    if begun < len(sizes):
        yield begun, len(sizes)


def _kernels(z: Rows, columns: Sequence[slice], labels: NDArray[np.int64] | None) -> Rows:
    """Products of rows with rows, float32 ``(layers, m, m)``, zero between documents."""
    kernels = np.empty((len(columns), len(z), len(z)), np.float32)
    for k, part in zip(kernels, columns, strict=True):
        np.matmul(z[:, part], z[:, part].T, out=k)
    if labels is not None:
        kernels *= labels[:, None] == labels
    return kernels


def _products(p: Rows, q: Rows) -> Array:
    """Sums of products of every two kernels, float64 ``(layers_p, layers_q)``, from the upper triangles."""
    m, found = p.shape[1], np.zeros((len(p), len(q)))
    for at in range(0, m, _PIECE):
        stop = min(at + _PIECE, m)
        for columns, times in ((slice(at, stop), 1.0), (slice(stop, m), 2.0)):
            a = p[:, at:stop, columns].reshape(len(p), -1).astype(np.float64)
            b = a if q is p else q[:, at:stop, columns].reshape(len(q), -1).astype(np.float64)
            found += times * (a @ b.T)
    return found


def _of_rows(z: Rows, columns: Sequence[slice]) -> Array:
    """``x_i . s_d`` of the rows of one document, float64 ``(layers, m)``."""
    sums = z.sum(axis=0, dtype=np.float64).astype(np.float32)
    return np.stack([z[:, part] @ sums[part] for part in columns]).astype(np.float64)


def _squares(product: NDArray[Any], columns: Sequence[Sequence[slice]], *, same: bool) -> Array:
    """Squared Frobenius norms of the blocks of a product, float64; of an upper triangle where the groups are one."""
    found = np.zeros((len(columns[0]), len(columns[-1])))
    for i, x in enumerate(columns[0]):
        for j, y in enumerate(columns[-1]):
            if same and j < i:
                found[i, j] = found[j, i]
                continue
            for at in range(y.start, y.stop, _COLUMNS):
                block = product[x, at : min(at + _COLUMNS, y.stop)].astype(np.float64)
                found[i, j] += np.einsum("ij,ij->", block, block)
            if same and i == j:
                diagonal = np.diagonal(product)[x].astype(np.float64)
                found[i, j] = 2 * found[i, j] - diagonal @ diagonal
    return found


def terms_between(
    total: Between,
    widths: Sequence[Sequence[int]],
    origins: Sequence[Array],
    documents: Documents,
    *,
    ranks: bool,
) -> dict[str, NDArray[Any]]:
    """What debiased CKA needs of two groups.

    Args:
        total: Sums over all documents.
        widths: Of each layer, of the first group and, where it is another, of the second.
        origins: float64 ``(width,)`` of each layer of the first group, in their own units: the means.
        documents: All of them.
        ranks: Whether to solve for the eigenvalues of each layer of a group with itself.

    Returns:
        ``counts``; ``fro`` and ``hsic``, float64 ``(layers_p, layers_q)``: ``|X'Y|_F^2``, and the sum of products over
        pairs of rows of different documents without row effects. Of a group with itself also ``a``, ``mean``,
        ``effective_rank``, ``size`` and ``alone``, float64 ``(layers,)``: the sum of squared row norms, the norm of the
        mean, exp of the entropy of the eigenvalues' shares, the size of the terms that hsic of a layer with itself is
        the difference of, and the part of it in which a feature meets itself (NaN where it was not summed).
    """
    columns, same = [columns_of(of) for of in widths], len(widths) == 1
    fro = _squares(total.gram, columns, same=same)
    linear_p, longest_p = -total.linear_p[:, None], -total.longest_p[:, None]
    shared = documents.shared_of_sums(
        total.weighted, total.quadratic, (linear_p, longest_p), (-total.linear_q, -total.longest_q)
    )
    hsic = fro - total.own - 2 * shared
    found = {"counts": total.counts, "fro": fro, "hsic": hsic}
    if not same:
        return found
    alone = np.full(len(widths[0]), np.nan)
    diagonal = np.diag(total.gram)
    if total.alone.size:
        own, weighted, quadratic, linear, longest = total.alone
        of_features = documents.shared_of_sums(weighted, quadratic, (-linear, -longest), (-linear, -longest))
        by_feature = diagonal**2 - own - 2 * of_features
        alone = np.array([by_feature[part].sum() for part in columns[0]])
    rank = np.full(len(widths[0]), np.nan)
    if ranks:
        rank = np.array([effective_rank(_whole(total.gram[part, part])) for part in columns[0]])
    return found | {
        "a": np.array([diagonal[part].sum() for part in columns[0]]),
        "mean": np.array([float(np.linalg.norm(origin)) for origin in origins]),
        "effective_rank": rank,
        "size": np.diag(fro + total.own + 2 * np.abs(shared)).copy(),
        "alone": alone,
    }
