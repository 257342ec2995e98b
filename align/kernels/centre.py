"""Rows made ready for products in low precision: centred, scaled by a power of two, rounded.

A mean of ten standard deviations costs uncentred float32 products every digit they have; centred, CKA comes out to
1e-9. The scale brings the root mean square near 1 without rounding anything, so that neither squares nor float16 leave
their range; results are scaled back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from align.kernels.reference import evenly_spaced
from featstore.errors import FitError

#: What products may be computed from: what the rows deserve, or what tensor cores take.
Precision = Literal["full", "tensor"]
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Rows that are widened to float64 at a time.
_BLOCK = 8192
#: Rows whose float32 sums are added up in float64: on a CPU six times sooner than widening every element.
_SUM_ROWS = 256
_SCALE_ROWS = 512


@dataclass(frozen=True, eq=False)
class Centred:
    """A layer ready for products.

    Attributes:
        rows: ``(n, d)``, centred, scaled and rounded; all zero where the layer does not vary.
        norms: float64 ``(n,)``, squared norms of ``rows`` as they are after rounding.
        scale: Power of two that the centred rows were multiplied by.
        varies: Whether rows differ by more than the rounding of their mean.
    """

    rows: torch.Tensor
    norms: torch.Tensor
    scale: float
    varies: bool


def check_layers(layers: list[torch.Tensor]) -> None:
    """Refuse layers that cannot be compared.

    Args:
        layers: Tensors.

    Raises:
        FitError: None, not matrices, fewer than 4 rows, different rows or devices, or no number type of states.
    """
    if not layers:
        raise FitError("no layers to compare: give at least one")
    for position, x in enumerate(layers):
        if x.ndim != 2 or x.shape[1] == 0:
            raise FitError(f"layer {position} has shape {tuple(x.shape)}: give rows (n, d) of at least one dimension")
        if x.dtype not in _TYPES:
            raise FitError(f"layer {position} is {x.dtype}: give float32, float16, bfloat16 or float64")
        if len(x) != len(layers[0]):
            raise FitError(f"layer {position} has {len(x)} rows and layer 0 has {len(layers[0])}: rows must be paired")
        if x.device != layers[0].device:
            raise FitError(f"layer {position} is on {x.device} and layer 0 on {layers[0].device}: move one of them")
    if len(layers[0]) < 4:
        raise FitError(f"HSIC needs at least 4 rows, not {len(layers[0])}; give more rows")


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to the 10 bits of fraction that tensor cores read, half to even.

    The hardware cuts the rest off; rounding first halves the error and takes its bias away.

    Args:
        x: float32, finite.
    """
    bits = x.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def mean_of(x: torch.Tensor) -> torch.Tensor:
    """The mean of each dimension, float64 ``(d,)``.

    Of float32 rows in memory, the sums of a few rows are float32, about the first row: what they lose is a share of
    the rows' spread, not of their mean.

    Args:
        x: ``(n, d)``.

    Raises:
        FitError: A value is not finite.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        sums = torch.stack([(part - x[0]).sum(0) for part in x.split(_SUM_ROWS)])
        total = sums.sum(0, dtype=torch.float64) + len(x) * x[0].to(torch.float64)
        if not bool(torch.isfinite(total).all()):
            # Sums of huge rows leave the range of float32 before those of float64 do.
            total = x.sum(0, dtype=torch.float64)
    else:
        total = x.sum(0, dtype=torch.float64)
    mean: torch.Tensor = total / len(x)
    if not bool(torch.isfinite(mean).all()):
        bad = torch.nonzero(~torch.isfinite(x).all(1)).flatten()
        named = f"row {int(bad[0])} holds" if len(bad) else "their sum holds"
        raise FitError(f"{named} a value that is not finite; leave such rows out")
    return mean


def scale_of(x: torch.Tensor, mean: torch.Tensor) -> float:
    """A power of two that brings centred rows to a root mean square near 1, judged by evenly spaced rows.

    Args:
        x: ``(n, d)``.
        mean: float64 ``(d,)``.
    """
    some = torch.from_numpy(evenly_spaced(len(x), _SCALE_ROWS)).to(x.device)
    square = float((x[some].to(torch.float64) - mean).square().mean())
    return 2.0 ** -round(math.log2(square) / 2) if 0 < square < math.inf else 1.0


def varies(square: float, x: torch.Tensor, mean: torch.Tensor, scale: float) -> bool:
    """Whether rows differ by more than the rounding of their mean.

    Args:
        square: Sum of the squares of the centred and scaled rows.
        x: The rows as they were, ``(n, d)``.
        mean: float64 ``(d,)``.
        scale: What the centred rows were multiplied by.
    """
    # The smallest spread that is more than the rounding of equal rows.
    eps = 1e-13 if x.dtype == torch.float64 else float(np.finfo(np.float32).eps)
    return square > len(x) * (eps * scale) ** 2 * float(mean @ mean)


def _rounded(x: torch.Tensor, mean: torch.Tensor, scale: float, kept: torch.dtype) -> torch.Tensor:
    # Subtracting a float32 mean leaves one of 6e-8 of it; what that does to HSIC is of its square.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    origin = mean.to(wide)
    rows = torch.empty(x.shape, dtype=kept, device=x.device)
    for first in range(0, len(x), _BLOCK):
        part = slice(first, first + _BLOCK)
        rows[part] = (x[part].to(wide) - origin).mul_(scale)
    return rows


def _norms(rows: torch.Tensor) -> torch.Tensor:
    # Widened within the kernel: no float64 copy.
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square_()


def centre(x: torch.Tensor, precision: Precision = "full") -> Centred:
    """Centre a layer by its mean of each dimension in float64, scale it and round it.

    Args:
        x: ``(n, d)`` float64, float32, float16 or bfloat16.
        precision: ``full`` keeps float64 and makes all else float32; ``tensor`` keeps bfloat16 and float16 (float32
            where a row does not fit float16) and rounds float32 to what tensor cores read of it.

    Raises:
        FitError: A value is not finite.
    """
    x = x.detach()
    mean = mean_of(x)
    scale = scale_of(x, mean)
    half = precision == "tensor" and x.dtype in (torch.float16, torch.bfloat16)
    kept = x.dtype if half or x.dtype == torch.float64 else torch.float32
    rows = _rounded(x, mean, scale, kept)
    norms = _norms(rows)
    if kept == torch.float16 and not bool(torch.isfinite(norms).all()):
        kept = torch.float32
        rows = _rounded(x, mean, scale, kept)
        norms = _norms(rows)
    if kept == torch.float32 and precision == "tensor":
        rows = round_to_tf32(rows)
        norms = _norms(rows)
    vary = varies(float(norms.sum()), x, mean, scale)
    if not vary:
        rows, norms = torch.zeros_like(rows), torch.zeros_like(norms)
    return Centred(rows, norms, scale, vary)
