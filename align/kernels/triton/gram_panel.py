r"""One macro-tile of one layer's Gram matrix, above the diagonal, with its row and column sums.

With K the Gram matrix and K~ its copy with a zero diagonal, both estimators need only

    tr(K~ L~) = 2 \sum_{i<j} K_ij L_ij,     r_i = \sum_j K~_ij,     1'K~1 = \sum_i r_i,

and 1'K~L~1 = r(K)'r(L). Over documents K~ is zero for all pairs of rows within a document, and the same sums are all
that is needed (:mod:`align.solvers.row_effects`): rows come in the order of their documents, so of row i those pairs
are left whose j is at or past the end of its document.

So nothing below the diagonal is ever computed, and of the upper triangle one macro-tile of TS x TS samples at a time is
enough: this kernel writes it for every layer in turn, ``contract`` multiplies the layers' panels, and the next
macro-tile overwrites them. The sums over the rows of a tile belong to the samples on its left edge, those over its
columns to the samples on its top edge, since K is symmetric. Each program writes its own sums to its own place; the
host adds them in float64 in a fixed order.

Linear: K_ij = x_i'x_j. RBF: K_ij = exp(-max(|x_i|^2 + |x_j|^2 - 2 x_i'x_j, 0) / (2 sigma^2)) - shift. Both estimators
are blind to a constant added to K (U-centring and centring remove it); subtracting the kernel's value at the typical
distance leaves float32 the part that matters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from align.kernels.triton.products import tile_from_descriptors, tile_from_pointers


@triton.jit
def finish(
    gram: tl.tensor,
    norms: tl.tensor,
    ends: tl.tensor,
    panel: tl.tensor,
    row_sums: tl.tensor,
    column_sums: tl.tensor,
    n: tl.tensor,
    row0: tl.tensor,
    column0: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    factor: tl.tensor,
    shift: tl.tensor,
    RBF: tl.constexpr,
    TS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Kernel values of a tile to the panel, and their sums; zero below the diagonal, within documents, past the end.

    ``ends`` int32 ``(n,)`` is the row after the last of each row's document: of its own where each has one.
    ``row`` and ``column`` count within the macro-tile, whose first sample is ``row0`` and ``column0``. Sums over the
    columns of tile column t go to row t of ``row_sums`` (TS / BN, TS), those over the rows of tile row t to row t of
    ``column_sums`` (TS / BM, TS).
    """
    r = row + tl.arange(0, BM)
    c = column + tl.arange(0, BN)
    i = row0 + r
    j = column0 + c
    value = gram
    if RBF:
        left = tl.load(norms + i, mask=i < n, other=0.0)
        right = tl.load(norms + j, mask=j < n, other=0.0)
        distance = tl.maximum(left[:, None] + right[None, :] - 2.0 * gram, 0.0)
        value = tl.exp2(distance * factor) - shift
    end = tl.load(ends + i, mask=i < n, other=n)
    value = tl.where((end[:, None] <= j[None, :]) & (j < n)[None, :], value, 0.0)
    tl.store(panel + r[:, None] * TS + c[None, :], value)
    tl.store(row_sums + (column // BN) * TS + r, tl.sum(value, axis=1))
    tl.store(column_sums + (row // BM) * TS + c, tl.sum(value, axis=0))


@triton.jit
def gram_panel(
    a: tl.tensor,
    b: tl.tensor,
    norms: tl.tensor,
    ends: tl.tensor,
    panel: tl.tensor,
    row_sums: tl.tensor,
    column_sums: tl.tensor,
    order: tl.tensor,
    n: tl.tensor,
    depth: tl.tensor,
    row0: tl.tensor,
    column0: tl.tensor,
    factor: tl.tensor,
    shift: tl.tensor,
    RBF: tl.constexpr,
    TS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """A panel from tensor descriptors of the same rows: ``a`` in blocks (BM, BK), ``b`` in blocks (BN, BK).

    ``order`` (programs, 2) int32 names each program's tile row and tile column. ``factor`` is -log2(e)/(2 sigma^2).
    """
    row = tl.load(order + 2 * tl.program_id(0)) * BM
    column = tl.load(order + 2 * tl.program_id(0) + 1) * BN
    gram = tile_from_descriptors(a, b, row0 + row, column0 + column, depth, BM, BN, BK)
    finish(
        gram, norms, ends, panel, row_sums, column_sums, n, row0, column0, row, column, factor, shift, RBF, TS, BM, BN
    )


@triton.jit
def gram_panel_pointers(
    x: tl.tensor,
    stride: tl.tensor,
    norms: tl.tensor,
    ends: tl.tensor,
    panel: tl.tensor,
    row_sums: tl.tensor,
    column_sums: tl.tensor,
    order: tl.tensor,
    n: tl.tensor,
    depth: tl.tensor,
    row0: tl.tensor,
    column0: tl.tensor,
    factor: tl.tensor,
    shift: tl.tensor,
    RBF: tl.constexpr,
    TS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """The same from a pointer to rows ``stride`` apart."""
    row = tl.load(order + 2 * tl.program_id(0)) * BM
    column = tl.load(order + 2 * tl.program_id(0) + 1) * BN
    gram = tile_from_pointers(x, x, row0 + row, column0 + column, n, n, depth, stride, stride, BM, BN, BK)
    finish(
        gram, norms, ends, panel, row_sums, column_sums, n, row0, column0, row, column, factor, shift, RBF, TS, BM, BN
    )
