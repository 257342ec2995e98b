"""Products of all layers in feature space on a CPU, a block of rows at a time.

A block of every layer is centred into a buffer that is used again for the next, multiplied in float32 and added up in
float64. Nothing of the size of many rows is ever made: on a CPU, paging such copies in took a quarter of the time that
the products took.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from align.kernels.centre import mean_of, scale_of, varies

Array = NDArray[np.float64]
#: Rows over which products are summed in float32, at most: adding them up in float64 helps where few rows are huge. Of
#: fewer rows, a product takes longer than its share of the whole one, by how much depends on the processor's caches.
BLOCK_ROWS = 4096
#: Bytes that the blocks of all layers may take.
_BLOCKS = 1 << 28


@dataclass(frozen=True, eq=False)
class FeatureSums:
    """What HSIC of linear kernels needs of centred, scaled layers.

    Attributes:
        fro: float64 ``(layers, layers)``, squared Frobenius norms of the cross-products; NaN where not asked for.
        norms: float64 ``(layers, n)``, squared norms of the rows as the products saw them.
        scales: float64 ``(layers,)``, the power of two that each layer's centred rows were multiplied by.
        varies: Whether a layer's rows differ by more than the rounding of their mean; those that do not count as 0.
    """

    fro: Array
    norms: Array
    scales: Array
    varies: list[bool]


def feature_sums(layers: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> FeatureSums:
    """Centre, multiply and add up layers that lie in memory.

    Args:
        layers: Checked tensors ``(n, d)`` of the CPU, float32, float16 or bfloat16, of any widths.
        pairs: Positions ``(i, j)`` whose products are wanted, ``i <= j``.

    Raises:
        FitError: A value is not finite.
    """
    n = len(layers[0])
    means = [mean_of(x) for x in layers]
    scales = [scale_of(x, mean) for x, mean in zip(layers, means, strict=True)]
    origins = [mean.to(torch.float32) for mean in means]
    rows = max(min(BLOCK_ROWS, n, _BLOCKS // (4 * sum(x.shape[1] for x in layers))), 1)
    buffers = [torch.empty((rows, x.shape[1]), dtype=torch.float32) for x in layers]
    products = {
        shape: torch.empty(shape, dtype=torch.float32)
        for shape in {(layers[i].shape[1], layers[j].shape[1]) for i, j in pairs}
    }
    sums = {(i, j): torch.zeros(layers[i].shape[1], layers[j].shape[1], dtype=torch.float64) for i, j in pairs}
    norms = torch.empty((len(layers), n), dtype=torch.float64)
    for first in range(0, n, rows):
        part = slice(first, min(first + rows, n))
        blocks = [buffer[: part.stop - first] for buffer in buffers]
        for k, block in enumerate(blocks):
            torch.sub(layers[k][part], origins[k], out=block)
            if scales[k] != 1:
                block.mul_(scales[k])
            norms[k, part] = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
        for (i, j), total in sums.items():
            product = products[tuple(total.shape)]
            if i == j:
                _self_product(blocks[i], product)
            else:
                torch.mm(blocks[i].T, blocks[j], out=product)
            total += product
    norms.square_()
    vary = [
        varies(float(own.sum()), x, mean, scale)
        for own, x, mean, scale in zip(norms, layers, means, scales, strict=True)
    ]
    fro = np.full((len(layers), len(layers)), math.nan)
    for (i, j), total in sums.items():
        fro[i, j] = fro[j, i] = float(total.square_().sum()) if vary[i] and vary[j] else 0.0
    norms[[not v for v in vary]] = 0.0
    return FeatureSums(fro, norms.numpy(), np.array(scales), vary)


def _self_product(block: torch.Tensor, out: torch.Tensor) -> None:
    """X'X in three quarters of a product, by symmetry.

    numpy computes one triangle only, in half the time of a product, but its threads are not torch's: those of either go
    on looking for work for a while, and the other's wait for a core. Taking turns took longer than it spared.
    """
    half = len(out) // 2
    left, right = block[:, :half], block[:, half:]
    torch.mm(left.T, block, out=out[:half])
    torch.mm(right.T, right, out=out[half:, half:])
    out[half:, :half] = out[:half, half:].T
