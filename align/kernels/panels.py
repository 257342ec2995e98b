"""HSIC in sample space: macro-tiles of all layers' Gram matrices, above the diagonal, one at a time.

No n x n array exists. Two back ends do the same: the Triton kernels, and products of the torch library where those
cannot run. See ``gram_panel`` for what is computed and why the RBF kernel is shifted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from align.kernels.centre import Centred
from align.kernels.documents import shared_of
from align.kernels.reference import Estimator, median_bandwidth
from align.kernels.triton.launch import PanelKernels, Path
from align.solvers.row_effects import Documents, alone
from featstore.errors import FitError

#: Bytes of the panels of all layers.
_PANEL_BYTES = {"cpu": 2**28, "cuda": 2**31}
_TYPICAL_ROWS = 256
#: Entries of a layer's panel that are widened to float64 at a time.
_WIDENED = 2**16


@dataclass(frozen=True, eq=False)
class Sums:
    """What both estimators need of the Gram matrices, in float64.

    Attributes:
        products: ``(layers, layers)``, the sum of K_ij L_ij over i < j of different documents.
        rows: ``(layers, n)``, row sums over other documents; without the diagonal, where every row is its own.
        diagonal: ``(layers, n)``.
        documents: In the order of the rows; None where every row is its own.
    """

    products: torch.Tensor
    rows: torch.Tensor
    diagonal: torch.Tensor
    documents: Documents | None = None

    def hsic(self, estimator: Estimator) -> tuple[torch.Tensor, torch.Tensor]:
        """HSIC_1 or HSIC_0 of every two layers, and the size of the terms that a self-HSIC is the difference of.

        Args:
            estimator: ``debiased`` or ``biased``.

        Returns:
            float64 ``(layers, layers)`` and ``(layers,)``.
        """
        n = self.rows.shape[1]
        if self.documents is not None:
            products = 2 * self.products
            shared = shared_of(self.rows, self.documents)
            whole = self.documents.freedom
            return (products - 2 * shared) / whole, (products + 2 * shared.abs()).diagonal() / whole
        if estimator == "debiased":
            total = self.rows.sum(1)
            products, totals = 2 * self.products, torch.outer(total, total) / ((n - 1) * (n - 2))
            cross, whole = 2 / (n - 2) * (self.rows @ self.rows.T), n * (n - 3)
        else:
            full = self.rows + self.diagonal
            total = full.sum(1)
            products, totals = 2 * self.products + self.diagonal @ self.diagonal.T, torch.outer(total, total) / n**2
            cross, whole = 2 / n * (full @ full.T), (n - 1) ** 2
        return (products + totals - cross) / whole, (products + totals + cross).diagonal() / whole


def panel_size(n: int, layers: int, device: str) -> int:
    """Samples along a macro-tile: as many as the panels' memory allows, a multiple of 256, at most 4096.

    Args:
        n: Rows.
        layers: Layers that are held at once.
        device: ``cpu``, ``cuda``.
    """
    fits = math.isqrt(_PANEL_BYTES.get(device, 2**28) // (4 * layers)) // 256 * 256
    return max(256, min(fits, 4096 if device == "cuda" else 2048, -(-n // 256) * 256))


class _PanelProducts:
    """The same as :class:`PanelKernels` from products of the torch library."""

    def __init__(
        self,
        layers: Sequence[Centred],
        ends: torch.Tensor,
        factors: Sequence[float] | None,
        shifts: Sequence[float],
        size: int,
    ) -> None:
        self._layers, self._factors, self._shifts, self._size = layers, factors, shifts, size
        self._ends, self._places = ends, torch.arange(len(ends), device=ends.device)

    def __call__(self, first: int, second: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        upper, lower = slice(first, first + self._size), slice(second, second + self._size)
        panels, rows, columns = [], [], []
        left_out = self._ends[upper, None] > self._places[None, lower]
        for position, layer in enumerate(self._layers):
            left, right = layer.rows[upper], layer.rows[lower]
            panel = left @ right.T
            if self._factors is not None:
                norms = layer.norms.to(panel.dtype)
                panel.mul_(-2).add_(norms[upper][:, None]).add_(norms[lower][None, :]).clamp_(min=0)
                panel.mul_(self._factors[position]).exp_().sub_(self._shifts[position])
            panel.masked_fill_(left_out, 0)
            rows.append(panel.sum(1, dtype=torch.float64))
            columns.append(panel.sum(0, dtype=torch.float64))
            panels.append(panel.flatten())
        return _contracted(torch.stack(panels)), torch.stack(rows), torch.stack(columns)


def _contracted(panels: torch.Tensor) -> torch.Tensor:
    """Products of all layers over the macro-tile in float64: a few huge entries must not swallow the others."""
    total = torch.zeros((len(panels), len(panels)), dtype=torch.float64, device=panels.device)
    for part in panels.split(_WIDENED, dim=1):
        wide = part.to(torch.float64)
        total += wide @ wide.T
    return total


def shift_of(layer: Centred, factor: float) -> float:
    """The RBF kernel at the typical distance of a layer; any constant would be right, this one loses fewest digits.

    Args:
        layer: Centred rows.
        factor: -1/(2 sigma^2), in the units of the centred rows.
    """
    try:
        typical = median_bandwidth(layer.rows, most=_TYPICAL_ROWS)
    except FitError:
        typical = 0.0
    return float(torch.tensor(math.exp(factor * typical**2), dtype=torch.float32))


def panel_sums(
    layers: Sequence[Centred],
    sigmas: Sequence[float] | None,
    *,
    documents: Documents | None = None,
    path: Path | None = None,
    size: int | None = None,
) -> Sums:
    """Sums over the Gram matrices of all layers.

    Args:
        layers: Centred layers of the same number of rows, on one device.
        sigmas: Bandwidths in the units of the centred rows; None for the linear kernel.
        documents: In whose order the rows are; pairs within them are left out. None for every row its own.
        path: How the Triton kernels read operands; None for the torch library.
        size: Samples along a macro-tile, a multiple of 256; :func:`panel_size` when None.

    Raises:
        FitError: The size is no multiple of 256.
    """
    n, device, count = len(layers[0].rows), layers[0].rows.device, len(layers)
    size = panel_size(n, count, device.type) if size is None else size
    if size < 256 or size % 256:
        raise FitError(f"macro-tiles of {size} samples: give a multiple of 256")
    factors = None if sigmas is None else [-0.5 / s**2 for s in sigmas]
    shifts = [0.0] * count if factors is None else [shift_of(x, f) for x, f in zip(layers, factors, strict=True)]
    of = alone(n) if documents is None else documents
    ends = torch.from_numpy(np.repeat(np.cumsum(of.sizes), of.sizes).astype(np.int32)).to(device)
    step: PanelKernels | _PanelProducts = _PanelProducts(layers, ends, factors, shifts, size)
    if path is not None:
        step = PanelKernels([x.rows for x in layers], [x.norms for x in layers], ends, factors, shifts, size, path)
    products = torch.zeros((count, count), dtype=torch.float64, device=device)
    rows = torch.zeros((count, n), dtype=torch.float64, device=device)
    # The diagonal first: off it every place of a buffer is written, on it only those of the upper triangle.
    starts = range(0, n, size)
    for first, second in [(i, i) for i in starts] + [(i, j) for i in starts for j in starts if i < j]:
        product, below, beside = step(first, second)
        products += product
        for start, sums in ((first, below), (second, beside)):
            part = rows[:, start : start + size]
            part += sums[:, : part.shape[1]]
    if factors is None:
        diagonal = torch.stack([x.norms for x in layers])
    else:
        diagonal = (1 - torch.tensor(shifts, dtype=torch.float64, device=device))[:, None].expand(count, n)
    return Sums(products, rows, diagonal, documents)
