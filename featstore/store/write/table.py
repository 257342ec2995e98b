"""Layer 0 as a table: the embedding output depends on the token alone, so one row for every id is all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.store.format import documents, shards
from featstore.store.format.elements import Encoded
from featstore.store.write.content import Content, padded_chunk
from featstore.store.write.row_writer import RowArrays
from featstore.store.write.writer import StoreWriter


def table_unit(model: str) -> str:
    """Name of the unit that holds a model's layer 0 table.

    Args:
        model: Model name.
    """
    return f"models/{model}/embedding"


def write_table(
    writer: StoreWriter,
    model: str,
    ids: NDArray[np.int32],
    parts: Sequence[Encoded],
    arrays: RowArrays,
    *,
    basis: str,
) -> None:
    """Commit a layer 0 table.

    Args:
        writer: The store's writer.
        model: Model name.
        ids: int32 ``(u,)`` token ids, sorted.
        parts: The rows of these ids, one piece after another.
        arrays: The model's row arrays; format, layout and shard length are theirs.
        basis: Hash of the tokens that the table serves; recorded in the manifest.
    """
    base, size = table_unit(model), arrays.shard_rows
    stored = np.concatenate([part.stored for part in parts])
    vectors = {"norm": np.concatenate([part.norms for part in parts])}
    if arrays.form.row_scaled:
        vectors["row_scale"] = np.concatenate([part.row_scale for part in parts if part.row_scale is not None])
    files: dict[str, Content] = {}
    described: dict[str, dict[str, Any]] = {}
    for shard, start in enumerate(range(0, len(ids), size)):
        files[f"{base}/state/c/{shard}/0"] = shards.shard_pieces(stored[start : start + size], size, arrays.layout)
        for name, vector in vectors.items():
            files[f"{base}/{name}/c/{shard}"] = padded_chunk(vector[start : start + size], size)
    described[f"{base}/state"] = documents.rows_document(len(ids), arrays.width, size, arrays.form, arrays.layout)
    for name, vector in vectors.items():
        described[f"{base}/{name}"] = documents.vector_document(vector, size)
    writer.group(base, {})
    writer.describe(described)
    writer.vectors(base, {f"{base}/id": ids}, more=files, basis=basis)
