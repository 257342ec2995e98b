"""One model's rows to whole, committed shards, whatever order they arrive in.

The unit is one shard of one layer. How many of its leading rows are on disk decides everything else: what has to be
computed, what a resume skips, what a layer added later lacks, and what a store that grew by more documents has to
rewrite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import StoreStateError
from featstore.store.format import documents, shards
from featstore.store.format.elements import Encoded, Format
from featstore.store.read.rows import RowReader
from featstore.store.read.vectors import read_chunk
from featstore.store.write.content import Content, padded_chunk
from featstore.store.write.writer import StoreWriter


def rows_unit(model: str, layer: int, shard: int) -> str:
    """Name of the unit that holds one shard of one layer.

    Args:
        model: Model name.
        layer: Layer.
        shard: Shard number.
    """
    return f"{rows_folder(model, layer)}/rows-{shard:06d}"


def rows_folder(model: str, layer: int) -> str:
    """The folder of the manifest that holds the units of a layer's rows, and nothing else.

    Args:
        model: Model name.
        layer: Layer.
    """
    return f"models/{model}/resid/{layer}"


def write_groups(writer: StoreWriter, model: str, form: Format) -> None:
    """Write the group documents above a model's arrays; without them other readers miss what lies below.

    Args:
        writer: The store's writer.
        model: Model name.
        form: Element format of its rows.
    """
    groups = ["tokens", "resid", "norm", "origin", "median_norm"]
    groups += ["row_scale"] * form.row_scaled + ["column_scale"] * form.column_scaled
    for group in groups:
        writer.group(f"models/{model}/{group}", {})


@dataclass
class _Buffer:
    """A shard that is being filled: stored rows, norms, scales."""

    stored: NDArray[Any]
    norms: NDArray[np.float32]
    scale: NDArray[np.float32] | None

    @classmethod
    def empty(cls, rows: int, width: int, form: Format) -> _Buffer:
        scale = np.zeros(rows, np.float32) if form.row_scaled else None
        return cls(np.zeros((rows, width), form.storage), np.zeros(rows, np.float32), scale)

    def put(self, at: int, rows: Encoded) -> None:
        self.stored[at : at + len(rows)] = rows.stored
        self.norms[at : at + len(rows)] = rows.norms
        if self.scale is not None:
            self.scale[at : at + len(rows)] = rows.row_scale


@dataclass(frozen=True)
class RowArrays:
    """What a model's row arrays look like on disk.

    Attributes:
        rows: Rows of the model in all.
        width: Hidden width.
        layers: Layers.
        shard_rows: Rows of a shard.
        form: Element format.
        layout: Inner chunking.
        column_scale: float32 ``(width,)`` by layer, where the format has one.
    """

    rows: int
    width: int
    layers: tuple[int, ...]
    shard_rows: int
    form: Format
    layout: shards.Layout
    column_scale: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shard_rows % self.layout.chunk_rows:
            raise StoreStateError(
                f"--shard-rows {self.shard_rows} is not a multiple of {self.layout.chunk_rows}, the chunk of layout "
                f"{self.layout.name}"
                "; choose a multiple"
            )

    @property
    def shards(self) -> int:
        """Number of shards of every layer."""
        return -(-self.rows // self.shard_rows)

    def size(self, shard: int) -> int:
        """Rows of a shard.

        Args:
            shard: Shard number.
        """
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def documents(self, model: str, layer: int, rows: int) -> dict[str, dict[str, Any]]:
        """The ``zarr.json`` documents of a layer's arrays, by path.

        Args:
            model: Model name.
            layer: Layer.
            rows: Rows that exist.
        """
        base = f"models/{model}"
        vector = documents.vector_document(np.empty(0, np.float32), self.shard_rows) | {"shape": [rows]}
        result = {
            f"{base}/resid/{layer}": documents.rows_document(rows, self.width, self.shard_rows, self.form, self.layout),
            f"{base}/norm/{layer}": vector,
        }
        if self.form.row_scaled:
            result[f"{base}/row_scale/{layer}"] = vector
        return result


class RowWriter:
    """Gathers one model's rows, arriving in any order within a group, and commits whole shards.

    Args:
        writer: The store's writer.
        model: Model name.
        arrays: What the arrays look like.
        owned: Shards that this process writes; None for all. Row counts are left to :meth:`count_rows` where some
            belong to other processes.
    """

    def __init__(self, writer: StoreWriter, model: str, arrays: RowArrays, owned: Iterable[int] | None = None) -> None:
        self.arrays = arrays
        self._writer, self._model = writer, model
        self._alone = owned is None
        self._owned = frozenset(range(arrays.shards) if owned is None else owned)
        self._have = {
            (layer, shard): rows for layer in arrays.layers for shard, rows in enumerate(self._rows_of_layer(layer))
        }
        self._open: dict[tuple[int, int], _Buffer] = {}
        for layer in self.missing(0, arrays.rows):
            # Now, and not after the model has run: nothing is written through links.
            writer.check(*arrays.documents(model, layer, 0))
        if self._alone:
            self.count_rows()

    def use(self, column_scale: Mapping[int, NDArray[np.float32]]) -> None:
        """Take over the column scales once the pilot has frozen them.

        Args:
            column_scale: float32 ``(width,)`` by layer.
        """
        self.arrays = replace(self.arrays, column_scale=column_scale)

    def _rows_of_layer(self, layer: int) -> list[int]:
        """Rows on disk of every shard of a layer."""
        entries = self._writer.entries(rows_folder(self._model, layer))
        units = (rows_unit(self._model, layer, shard) for shard in range(self.arrays.shards))
        held = (int(entries[unit].get("rows", 0)) if unit in entries else 0 for unit in units)
        return [min(rows, self.arrays.size(shard)) for shard, rows in enumerate(held)]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing of the shards that this process owns."""
        return all(have == self.arrays.size(shard) for (_, shard), have in self._have.items() if shard in self._owned)

    def missing(self, first: int, end: int) -> tuple[int, ...]:
        """Layers of which some of the rows first..end are not on disk and are this process's to write.

        Args:
            first: First row.
            end: Row after the last.
        """
        size = self.arrays.shard_rows
        touched = [s for s in range(first // size, (max(end, first + 1) - 1) // size + 1) if s in self._owned]
        return tuple(
            layer
            for layer in self.arrays.layers
            if any(min(end, s * size + self.arrays.size(s)) > s * size + self._have[layer, s] for s in touched)
        )

    def put(self, start: int, layer: int, rows: Encoded) -> None:
        """Place consecutive rows of one layer; those that are on disk or belong to another process are passed over.

        Args:
            start: First row.
            layer: Layer.
            rows: The rows.
        """
        at, size = 0, self.arrays.shard_rows
        while at < len(rows):
            shard, within = divmod(start + at, size)
            stop = min(len(rows), at + size - within)
            have = self._have[layer, shard]
            if shard in self._owned and within + stop - at > have:
                skip = max(have - within, 0)
                self._buffer(layer, shard).put(within + skip, rows.part(at + skip, stop))
            at = stop

    def advance(self, row: int) -> int:
        """Commit every shard whose rows are all below a row.

        Args:
            row: All rows before this one have been put.

        Returns:
            Number of shards committed.
        """
        size = self.arrays.shard_rows
        ready = [key for key in sorted(self._open) if key[1] * size + self.arrays.size(key[1]) <= row]
        for layer, shard in sorted(ready, key=lambda key: key[::-1]):
            self._commit(layer, shard, self._open.pop((layer, shard)))
        if ready and self._alone:
            self.count_rows()
        return len(ready)

    def _buffer(self, layer: int, shard: int) -> _Buffer:
        key = (layer, shard)
        if key not in self._open:
            buffer = _Buffer.empty(self.arrays.size(shard), self.arrays.width, self.arrays.form)
            if self._have[key]:
                buffer.put(0, self._read_back(layer, shard))
            self._open[key] = buffer
        return self._open[key]

    def _read_back(self, layer: int, shard: int) -> Encoded:
        """The rows of a part-filled shard as an earlier, shorter plan left them."""
        first, have = shard * self.arrays.shard_rows, self._have[layer, shard]
        base = self._writer.path / "models" / self._model
        document = self.arrays.documents(self._model, layer, first + have)[f"models/{self._model}/resid/{layer}"]
        reader = RowReader(
            base / "resid" / str(layer),
            document,
            base / "row_scale" / str(layer),
            self.arrays.column_scale.get(layer),
        )
        numbers = np.arange(first, first + have)
        norms = read_chunk(base / "norm" / str(layer) / "c" / str(shard), np.dtype("<f4"), self.arrays.shard_rows)
        return Encoded(reader.stored(numbers), norms[:have], reader.row_scale(numbers))

    def _commit(self, layer: int, shard: int, buffer: _Buffer) -> None:
        base, size = f"models/{self._model}", self.arrays.shard_rows
        files: dict[str, Content] = {
            f"{base}/resid/{layer}/c/{shard}/0": shards.shard_pieces(buffer.stored, size, self.arrays.layout),
            f"{base}/norm/{layer}/c/{shard}": padded_chunk(buffer.norms, size),
        }
        if buffer.scale is not None:
            files[f"{base}/row_scale/{layer}/c/{shard}"] = padded_chunk(buffer.scale, size)
        rows = self.arrays.size(shard)
        self._writer.commit(rows_unit(self._model, layer, shard), files, rows=rows)
        self._have[layer, shard] = rows

    def count_rows(self) -> None:
        """Let the arrays grow to the rows committed without a gap."""
        for layer in self.arrays.layers:
            rows = 0
            # Other processes have written some of them.
            held = None if self._alone else self._rows_of_layer(layer)
            for shard in range(self.arrays.shards):
                have = self._have[layer, shard] if held is None else held[shard]
                rows += have
                if have < self.arrays.size(shard):
                    break
            self._writer.describe(self.arrays.documents(self._model, layer, rows))
