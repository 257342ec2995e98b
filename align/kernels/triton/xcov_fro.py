"""Sum of squares of the cross-covariance C = X'Y, tile by tile; C itself is never stored.

In feature space HSIC_0 is |C|_F^2 / (n-1)^2 and HSIC_1 is |C|_F^2 with two corrections that need only row norms. So a
tile of C lives in registers, is squared and summed over its columns there, and leaves behind BM float32 numbers of at
most BN squares each, which the host adds in float64. X and Y come transposed, (d, n) with n contiguous: the axis that
is contracted is then the contiguous one, which tensor cores want for every number type.

A self term needs only the tiles that touch the upper triangle: C is symmetric, so an entry above the diagonal counts
twice, one on it once and one below it not at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from align.kernels.triton.products import tile_from_descriptors, tile_from_pointers


@triton.jit
def square_sums(
    c: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    dx: tl.tensor,
    dy: tl.tensor,
    SELF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> tl.tensor:
    """Sums over columns of the squares of a tile, weighted as a self term where it is one; float32 (BM,)."""
    i = (row + tl.arange(0, BM))[:, None]
    j = (column + tl.arange(0, BN))[None, :]
    squares = tl.where((i < dx) & (j < dy), c * c, 0.0)
    if SELF:
        squares = tl.where(i < j, 2.0 * squares, tl.where(i == j, squares, 0.0))
    return tl.sum(squares, axis=1)


@triton.jit
def xcov_fro(
    x: tl.tensor,
    y: tl.tensor,
    sums: tl.tensor,
    order: tl.tensor,
    dx: tl.tensor,
    dy: tl.tensor,
    n: tl.tensor,
    SELF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Sums of squares from tensor descriptors: ``x`` (dx, n) in blocks (BM, BK), ``y`` (dy, n) in blocks (BN, BK).

    ``order`` (programs, 2) int32 names tiles; ``sums`` (programs, BM) float32 takes the results.
    """
    program = tl.program_id(0)
    row = tl.load(order + 2 * program) * BM
    column = tl.load(order + 2 * program + 1) * BN
    c = tile_from_descriptors(x, y, row, column, n, BM, BN, BK)
    tl.store(sums + program * BM + tl.arange(0, BM), square_sums(c, row, column, dx, dy, SELF, BM, BN))


@triton.jit
def xcov_fro_pointers(
    x: tl.tensor,
    stride_x: tl.tensor,
    y: tl.tensor,
    stride_y: tl.tensor,
    sums: tl.tensor,
    order: tl.tensor,
    dx: tl.tensor,
    dy: tl.tensor,
    n: tl.tensor,
    SELF: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """The same from pointers to rows ``stride_x`` and ``stride_y`` apart."""
    program = tl.program_id(0)
    row = tl.load(order + 2 * program) * BM
    column = tl.load(order + 2 * program + 1) * BN
    c = tile_from_pointers(x, y, row, column, dx, dy, n, stride_x, stride_y, BM, BN, BK)
    tl.store(sums + program * BM + tl.arange(0, BM), square_sums(c, row, column, dx, dy, SELF, BM, BN))
