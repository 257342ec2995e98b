r"""All pairs of layers at once: \sum_p P_l[p] P_m[p] over the panels P (layers, TS * TS).

The long axis is cut into chunks of ``CHUNK`` entries, one a program, which multiplies BL layers by BL layers. Products
are full float32 ("ieee"): panels hold rounded products already, and rounding those to tf32 would be the largest error
of all. Only BK of them are summed in float32; a few rows of enormous norm fill one entry in ten thousand of a panel,
and what is added to such an entry in float32 is lost. The host adds the chunks in order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def contract(
    panels: tl.tensor,
    partial: tl.tensor,
    layers: tl.tensor,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Partial sums (SIZE / CHUNK, layers, layers) float64 of panels (layers, SIZE) float32.

    Programs: (SIZE / CHUNK, ceil(layers / BL), ceil(layers / BL)); BK divides CHUNK.
    """
    chunk = tl.program_id(0)
    rows = tl.program_id(1) * BL + tl.arange(0, BL)
    columns = tl.program_id(2) * BL + tl.arange(0, BL)
    total = tl.zeros((BL, BL), dtype=tl.float64)
    for k in range(0, CHUNK, BK):
        at = chunk * CHUNK + k + tl.arange(0, BK)
        a = tl.load(panels + rows.to(tl.int64)[:, None] * SIZE + at[None, :], mask=(rows < layers)[:, None], other=0.0)
        b = tl.load(
            panels + columns.to(tl.int64)[:, None] * SIZE + at[None, :], mask=(columns < layers)[:, None], other=0.0
        )
        total += tl.dot(a, tl.trans(b), input_precision="ieee").to(tl.float64)
    place = partial + (chunk * layers + rows)[:, None] * layers + columns[None, :]
    tl.store(place, total, mask=(rows < layers)[:, None] & (columns < layers)[None, :])
