"""The matrix loop that all kernels share: a tile of A B' from operands whose contracted axis is contiguous.

Rows of states are contracted over their width in sample space, and, stored transposed, over the rows in feature space;
so one loop serves both. Operands come as tensor descriptors (the copy engine of sm_90 feeds the tensor cores, and what
lies outside the matrix reads as zero) or as plain pointers, for sm_80. Any width and stride will do: the host copies
rows anyway to centre them, and pads them with zeros to whole steps of the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_from_descriptors(
    a: tl.tensor,
    b: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    depth: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """Rows ``row:row+BM`` of A times rows ``column:column+BN`` of B, float32 ``(BM, BN)``."""
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, depth, BK):
        total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
    return total


@triton.jit
def places(
    x: tl.tensor, row: tl.tensor, rows: tl.tensor, stride: tl.tensor, BR: tl.constexpr, BK: tl.constexpr
) -> tl.tensor:
    """Pointers to the first BK entries of rows ``row:row+BR``; past the last row, to the last one again.

    The offset is 64 bits wide: a million rows of width 4096 do not fit 32.
    """
    first = x + row.to(tl.int64) * stride
    r = tl.minimum(tl.arange(0, BR), rows - 1 - row)
    return first + r[:, None] * stride + tl.arange(0, BK)[None, :]


@triton.jit
def tile_from_pointers(
    a: tl.tensor,
    b: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows_a: tl.tensor,
    rows_b: tl.tensor,
    depth: tl.tensor,
    stride_a: tl.tensor,
    stride_b: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """The same from pointers to rows ``stride_a`` and ``stride_b`` apart.

    Rows must be zero from their width to the next multiple of BK, so that no load needs a mask; what is past the last
    row is a copy of it, for the caller to leave out.
    """
    a_at = places(a, row, rows_a, stride_a, BM, BK)
    b_at = places(b, column, rows_b, stride_b, BN, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in range(0, depth, BK):
        total = tl.dot(tl.load(a_at), tl.trans(tl.load(b_at)), total)
        a_at += BK
        b_at += BK
    return total
