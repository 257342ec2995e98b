"""Pairs of rows within documents: what debiased CKA over documents takes off products over all rows.

Rows come in the order of their documents, and about their mean. Then, with C_d = X_d'Y_d and s_d, t_d the sums over the
rows of document d, of linear kernels

    sum over pairs of different documents of K_ij L_ij = |X'Y|_F^2 - sum_d |C_d|_F^2,    r_i = -x_i . s_d,

and the row effects follow as in :mod:`align.solvers.row_effects`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from align.kernels.centre import Centred
from align.solvers.row_effects import Documents

#: Rows of short documents whose kernels are made in one product.
_TOGETHER = 256
#: Bytes of the kernels of all layers that are held at once.
_BYTES = 2**28


def shared_of(rows: torch.Tensor, documents: Documents) -> torch.Tensor:
    """``sum_i r_i b_i`` of every two layers, b the row effects of the second.

    Args:
        rows: float64 ``(layers, n)``, r, sums of each kernel over rows of other documents.
        documents: In whose order the rows are.

    Returns:
        float64 ``(layers, layers)``, on the device of the rows.
    """
    sizes = torch.from_numpy(documents.sizes).to(rows.device)
    weights = torch.from_numpy(documents.weights).to(rows.device).repeat_interleave(sizes)
    # In one order whatever the device, for the same bits again.
    by_document = np.add.reduceat(rows.cpu().numpy(), np.cumsum(documents.sizes) - documents.sizes, axis=1)
    shared = documents.shared(((rows * weights) @ rows.T).cpu().numpy(), by_document, by_document)
    return torch.from_numpy(shared).to(rows.device)


def within(layers: Sequence[Centred], documents: Documents) -> tuple[torch.Tensor, torch.Tensor]:
    """What pairs of rows of one document add to products over all rows.

    Args:
        layers: Centred layers of the same rows, on one device.
        documents: In whose order the rows are.

    Returns:
        ``sum_d |C_d|_F^2`` of every two layers, float64 ``(layers, layers)``, and ``x_i . s_d`` of every row, float64
        ``(layers, n)``.
    """
    count, n, device = len(layers), documents.n, layers[0].rows.device
    own = torch.zeros((count, count), dtype=torch.float64, device=device)
    rows = torch.zeros((count, n), dtype=torch.float64, device=device)
    label = torch.repeat_interleave(torch.from_numpy(documents.sizes).to(device))
    for start, stop, mixed in _blocks(documents):
        strip = max(1, _BYTES // (12 * count * (stop - start)))
        for first in range(start, stop, strip):
            last = min(first + strip, stop)
            kernels = torch.stack([_product(x.rows[first:last], x.rows[start:stop]) for x in layers])
            if mixed:
                kernels *= label[first:last, None] == label[None, start:stop]
            flat = kernels.flatten(1)
            own += flat @ flat.T
            rows[:, first:last] = kernels.sum(2)
    return own, rows


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(wide) @ y.to(wide).T).to(torch.float64)


def _blocks(documents: Documents) -> Iterator[tuple[int, int, bool]]:
    """Rows whose kernels are made in one product, and whether they are of several documents."""
    begun = at = 0
    several = False
    for size in documents.sizes.tolist():
        if at > begun and at + size - begun > _TOGETHER:
            yield begun, at, several
            begun = at
        several = at > begun
        at += size
    yield begun, at, several
