"""Rows for torch and for Dask; each is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featstore.store.read.rows import RowReader, Rows, TableReader

if TYPE_CHECKING:
    import dask.array
    import torch

    from featstore.store.read.store import Store

#: torch's name of each format; where numpy lacks the type, the integer that carries it is reinterpreted.
_TORCH_TYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
}


def torch_rows(reader: RowReader | TableReader, rows: Rows) -> torch.Tensor:
    """Rows as a tensor of the stored type, scales not applied.

    A slice of step 1 within one chunk of a mapped, uncompressed array is not copied: the tensor looks at the page
    cache. Writing to it is safe, but seldom meant: the written pages become this process's own, so neither the file nor
    any array of the reader changes, while other tensors of the same rows do.

    Args:
        reader: Of one layer, from :meth:`featstore.store.Store.rows`.
        rows: A slice, or row numbers in any order.

    Returns:
        ``(m, width)`` of torch's bfloat16, float16, float32, int8 or float8_e4m3fn.

    Raises:
        IndexError: A row outside 0..n-1, or something other than row numbers (a boolean mask).
        CorruptDataError: Damaged or missing data.
    """
    import torch

    stored = (reader.private if isinstance(reader, RowReader) else reader).stored(rows)
    kind = getattr(torch, _TORCH_TYPES[reader.form.name])
    # Older torch knows no unsigned 16-bit integers; what they are called does not matter, since they are not numbers.
    carrier = stored.view(np.int16) if stored.dtype == np.uint16 else stored
    return torch.from_numpy(carrier).view(kind)


def dask_rows(store: Store, model: str, layer: int) -> dask.array.Array:
    """One layer as a lazy Dask array, in blocks of whole shards.

    Inner chunks, which Dask would choose by itself, make sixteen times as many tasks. A task carries the place of the
    store and the numbers of its rows, no data and no open file: any process that sees the store can run it.

    Args:
        store: Any store.
        model: Model name.
        layer: A stored layer.

    Returns:
        float32 ``(n, width)``, scales applied.
    """
    import dask.array

    reader = store.rows(model, layer)
    size = reader.shard_rows
    blocks = tuple(min(size, reader.rows - start) for start in range(0, reader.rows, size)) or (0,)
    # Named after the data: Dask takes arrays of one name for the same one.
    name = f"rows-{model}-{layer}-{store.fingerprint_of({model: [layer]})[:16]}"
    return dask.array.map_blocks(
        _block,
        chunks=(blocks, (reader.width,)),
        dtype=np.float32,
        meta=np.empty((0, 0), np.float32),
        name=name,
        store=store,
        model=model,
        layer=layer,
        size=size,
    )


def _block(*, store: Store, model: str, layer: int, size: int, block_id: tuple[int, int]) -> NDArray[Any]:
    """The rows of one block, in whatever process this runs."""
    start = block_id[0] * size
    return store.rows(model, layer)[start : start + size]
