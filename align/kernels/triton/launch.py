"""Kernels started on a device: operands padded, tile orders, buffers, and partial sums added in float64.

Nothing here imports triton before it is used, so the package works where triton is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

#: A tile of every product, and how far the contraction advances at a time: 128 bytes.
BM, BN, _BYTES = 128, 256, 128
#: Entries of a panel that one program of `contract` takes.
CHUNK = 16384
#: Entries of it that are summed in float32.
CONTRACT_STEP = 64
#: Tile rows that are done together, so that what they share stays in the cache.
_GROUP = 8
Path = Literal["descriptors", "pointers"]


def triton_path(device: torch.device) -> Path | None:
    """How kernels read their operands on a device; None where they cannot run.

    Descriptors need the copy engine and the shared memory of sm_90 or sm_100.

    Args:
        device: Where the rows are.
    """
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return None
    major = torch.cuda.get_device_capability(device)[0]
    if major < 8:
        return None
    return "descriptors" if major in (9, 10) else "pointers"


def tile_order(rows: int, columns: int, *, upper: bool) -> NDArray[np.int32]:
    """Tile rows and tile columns in the order in which programs take them.

    Args:
        rows: Rows of the product; tiles have :data:`BM` of them.
        columns: Its columns; tiles have :data:`BN` of them.
        upper: Leave out tiles that lie wholly below the diagonal.

    Returns:
        int32 ``(programs, 2)``.
    """
    found = [
        (i // _GROUP, j, i)
        for i in range(-(-rows // BM))
        for j in range(-(-columns // BN))
        if not upper or (j + 1) * BN > i * BM
    ]
    return np.array([(i, j) for _, j, i in sorted(found)], dtype=np.int32).reshape(-1, 2)


def operand(x: torch.Tensor) -> torch.Tensor:
    """A matrix whose rows start on 16 bytes and are zero up to a multiple of the contraction's step.

    Args:
        x: ``(rows, depth)``.

    Returns:
        ``x`` itself where it is so already.
    """
    step = _BYTES // x.element_size()
    depth = -(-x.shape[1] // step) * step
    if depth == x.shape[1] and x.is_contiguous():
        return x
    padded = torch.zeros((len(x), depth), dtype=x.dtype, device=x.device)
    padded[:, : x.shape[1]] = x
    return padded


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _descriptor(x: torch.Tensor, rows: int, step: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, step])


def cross_square(x: torch.Tensor, y: torch.Tensor, path: Path) -> torch.Tensor:
    """|X'Y|_F^2 without X'Y, float64 scalar.

    Args:
        x: ``(n, dx)`` float32, float16 or bfloat16; n at most 65,536, over which float32 sums hold.
        y: ``(n, dy)`` of the same type; ``x`` itself for a self term, which takes half the work.
        path: How operands are read.
    """
    from align.kernels.triton.xcov_fro import xcov_fro, xcov_fro_pointers

    own = x is y
    a = operand(x.T)
    b = a if own else operand(y.T)
    dx, depth, dy = len(a), a.shape[1], len(b)
    order = torch.from_numpy(tile_order(dx, dy, upper=own)).to(x.device)
    sums = torch.empty((len(order), BM), dtype=torch.float32, device=x.device)
    step = _BYTES // a.element_size()
    sizes = {"SELF": own, "BM": BM, "BN": BN, "BK": step, "num_warps": 8}
    with _on(x.device):
        if path == "descriptors":
            left, right = _descriptor(a, BM, step), _descriptor(b, BN, step)
            xcov_fro[(len(order),)](left, right, sums, order, dx, dy, depth, **sizes, num_stages=4)
        else:
            left, right = (a, a.stride(0)), (b, b.stride(0))
            xcov_fro_pointers[(len(order),)](*left, *right, sums, order, dx, dy, depth, **sizes, num_stages=3)
    return sums.sum(dtype=torch.float64)


class PanelKernels:
    """Panels of all layers on the device, one macro-tile after another.

    Args:
        rows: Layers ``(n, d)`` of one type or several.
        norms: float64 ``(n,)`` each.
        ends: int32 ``(n,)``, the row after the last of each row's document.
        factors: -1/(2 sigma^2) of each layer; None for the linear kernel.
        shifts: What is subtracted from the RBF kernel, one a layer.
        size: Samples along a macro-tile, a multiple of 256.
        path: How operands are read.
    """

    def __init__(
        self,
        rows: Sequence[torch.Tensor],
        norms: Sequence[torch.Tensor],
        ends: torch.Tensor,
        factors: Sequence[float] | None,
        shifts: Sequence[float],
        size: int,
        path: Path,
    ) -> None:
        device = rows[0].device
        count = len(rows)
        self._rows = [operand(x) for x in rows]
        self._norms, self._ends = [x.to(torch.float32) for x in norms], ends
        self._factors, self._shifts, self._size, self._path = factors, shifts, size, path
        self._panels = torch.zeros((count, size * size), dtype=torch.float32, device=device)
        self._row_sums = torch.zeros((count, size // BN, size), dtype=torch.float32, device=device)
        self._column_sums = torch.zeros((count, size // BM, size), dtype=torch.float32, device=device)
        self._partial = torch.empty((size * size // CHUNK, count, count), dtype=torch.float64, device=device)
        self._orders = {
            upper: torch.from_numpy(tile_order(size, size, upper=upper)).to(device) for upper in (True, False)
        }

    def __call__(self, first: int, second: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One macro-tile; those on the diagonal must come first.

        They write only tiles that reach above the diagonal and need the others zero, as they are to begin with; those
        beside it write all.

        Args:
            first: Its first sample on the left edge.
            second: That on the top edge; equal to ``first`` on the diagonal.

        Returns:
            float64: products of all layers ``(layers, layers)`` over the macro-tile above the diagonal, row sums and
            column sums ``(layers, size)``.
        """
        with _on(self._panels.device):
            for layer in range(len(self._rows)):
                self._fill(layer, first, second)
            self._contract()
        return (
            self._partial.sum(0),
            self._row_sums.sum(1, dtype=torch.float64),
            self._column_sums.sum(1, dtype=torch.float64),
        )

    def _fill(self, layer: int, first: int, second: int) -> None:
        from align.kernels.triton.gram_panel import gram_panel, gram_panel_pointers

        x, order, rbf = self._rows[layer], self._orders[first == second], self._factors is not None
        factor = 0.0 if self._factors is None else self._factors[layer] * float(np.log2(np.e))
        step = _BYTES // x.element_size()
        buffers = (self._ends, self._panels[layer], self._row_sums[layer], self._column_sums[layer], order)
        numbers = (*x.shape, first, second, factor, self._shifts[layer])
        sizes = {"RBF": rbf, "TS": self._size, "BM": BM, "BN": BN, "BK": step, "num_warps": 8}
        if self._path == "descriptors":
            left, right = _descriptor(x, BM, step), _descriptor(x, BN, step)
            stages = 4 if rbf else 3
            gram_panel[(len(order),)](left, right, self._norms[layer], *buffers, *numbers, **sizes, num_stages=stages)
        else:
            gram_panel_pointers[(len(order),)](
                x, x.stride(0), self._norms[layer], *buffers, *numbers, **sizes, num_stages=3
            )

    def _contract(self) -> None:
        from align.kernels.triton.contract import contract

        chunks, count, _ = self._partial.shape
        block = 16 if count <= 16 else 32 if count <= 32 else 64
        blocks = -(-count // block)
        sizes = {"SIZE": self._size**2, "CHUNK": CHUNK, "BL": block, "BK": CONTRACT_STEP}
        contract[(chunks, blocks, blocks)](self._panels, self._partial, count, **sizes, num_warps=4)
