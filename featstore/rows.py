"""Rows of a store, read straight from mapped shard files.

A chunk's checksum is verified when the chunk is first touched; in the hot layout its rows are then views of the page
cache. Only numpy is needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore import formats
from featstore.errors import CorruptDataError


class RowReader:
    """Rows of one ``(n, width)`` array, read from mapped shards.

    Args:
        path: The array's directory.
        document: Its ``zarr.json``.

    Raises:
        CorruptDataError: Its metadata is not what the format document describes.
    """

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        try:
            self.form = formats.FORMATS[document["data_type"]]
            self.rows, self.width = (int(v) for v in document["shape"])
            self.shard_rows = int(document["chunk_grid"]["configuration"]["chunk_shape"][0])
            inner = document["codecs"][0]["configuration"]
            compressed = any(codec["name"] == "blosc" for codec in inner["codecs"])
            name = "archive" if compressed else "hot"
            self.layout = formats.Layout(name, int(inner["chunk_shape"][0]), compressed)
            expected = formats.rows_document(self.rows, self.width, self.shard_rows, self.form, self.layout)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise CorruptDataError(f"{path}/zarr.json is damaged ({error!r}); extract again") from error
        positive = min(self.rows + 1, self.width, self.shard_rows, self.layout.chunk_rows) > 0
        if not positive or self.shard_rows % self.layout.chunk_rows or document["codecs"] != expected["codecs"]:
            raise CorruptDataError(f"{path}/zarr.json describes an array this format does not have; extract again")
        self._shards: dict[int, tuple[memoryview, list[tuple[int, int] | None]]] = {}
        self._checked: dict[int, NDArray[Any]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, width)``."""
        return self.rows, self.width

    def chunk(self, number: int) -> NDArray[Any]:
        """One inner chunk in the storage type; in the hot layout a read-only view of the file.

        Args:
            number: Chunk number, counted through all shards.

        Raises:
            CorruptDataError: Checksum mismatch, truncated or missing shard.
            IndexError: No such chunk.
        """
        if number in self._checked:
            return self._checked[number]
        per_shard = self.shard_rows // self.layout.chunk_rows
        shard, within = divmod(number, per_shard)
        data, index = self._shard(shard)
        place = index[within]
        what = f"{self.path}, chunk {number}"
        if place is None:
            raise CorruptDataError(f"{what} is missing from its shard; run `featstore verify`")
        raw = data[place[0] : place[0] + place[1]]
        flat = formats.decode_chunk(raw, self.form.storage, self.layout, what)
        if flat.size != self.layout.chunk_rows * self.width:
            raise CorruptDataError(f"{what} holds {flat.size} values, expected {self.layout.chunk_rows * self.width}")
        rows = flat.reshape(self.layout.chunk_rows, self.width)
        if not self.layout.compressed:
            # A view costs nothing to keep; a decoded chunk would.
            self._checked[number] = rows
        return rows

    def _shard(self, shard: int) -> tuple[memoryview, list[tuple[int, int] | None]]:
        if shard not in self._shards:
            path = self.path / "c" / str(shard) / "0"
            if not path.is_file() or path.stat().st_size == 0:
                raise CorruptDataError(f"{path} is missing or empty; run the same `featstore extract` command again")
            data = memoryview(np.memmap(path, dtype=np.uint8, mode="r").data)
            self._shards[shard] = (
                data,
                formats.decode_index(data, self.shard_rows // self.layout.chunk_rows, str(path)),
            )
        return self._shards[shard]

    def stored(self, rows: slice | Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Rows in the storage type (uint16 payloads for bfloat16).

        Args:
            rows: A slice with step 1, or row numbers in any order.

        Returns:
            ``(m, width)``; a view where a slice lies within one chunk of the hot layout, else a copy.

        Raises:
            IndexError: A row outside 0..n-1, or something other than row numbers (a boolean mask).
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.rows)
            if step != 1:
                return self.stored(np.arange(start, stop, step))
            size = self.layout.chunk_rows
            if start < stop and start // size == (stop - 1) // size:
                base = start // size * size
                return self.chunk(start // size)[start - base : stop - base]
            numbers = np.arange(start, max(stop, start), dtype=np.int64)
        else:
            given = np.asarray(rows).reshape(-1)
            if given.size and given.dtype.kind not in "iu":
                raise IndexError(f"rows are chosen by number, not by {given.dtype}; for a mask use np.flatnonzero")
            numbers = given.astype(np.int64)
        return self._gather(numbers)

    def _gather(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        result = np.empty((len(numbers), self.width), dtype=self.form.storage)
        if not len(numbers):
            return result
        outside = numbers[(numbers < 0) | (numbers >= self.rows)]
        if len(outside):
            raise IndexError(f"row {outside[0]} is outside 0..{self.rows - 1} of {self.path}")
        chunk = numbers // self.layout.chunk_rows
        order = np.argsort(chunk, kind="stable")
        edges = np.flatnonzero(np.diff(chunk[order])) + 1
        for places in np.split(order, edges):
            rows = self.chunk(int(chunk[places[0]]))
            result[places] = rows[numbers[places] - chunk[places[0]] * self.layout.chunk_rows]
        return result

    def __getitem__(self, rows: slice | Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Rows as float32 ``(m, width)``.

        Args:
            rows: As :meth:`stored`.
        """
        return self.form.decode(self.stored(rows))


def read_vector(path: Path, document: dict[str, Any]) -> NDArray[Any]:
    """Read a small array of plain checksummed chunks whole.

    Args:
        path: The array's directory.
        document: Its ``zarr.json``.

    Raises:
        CorruptDataError: Missing, damaged, or not such an array.
    """
    try:
        shape = tuple(int(v) for v in document["shape"])
        dtype = np.dtype(document["data_type"]).newbyteorder("<")
        chunk = int(document["chunk_grid"]["configuration"]["chunk_shape"][0])
        usable = chunk >= 1 and min(shape) >= 0 and 1 <= len(shape) <= 2 and not dtype.hasobject
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise CorruptDataError(f"{path}/zarr.json is damaged ({error!r}); extract again") from error
    if not usable:
        raise CorruptDataError(f"{path}/zarr.json has shape {shape}, chunk {chunk}, {dtype}: not usable; extract again")
    rest = shape[1:]
    parts = []
    for i in range(-(-shape[0] // chunk)):
        file = path / "c" / "/".join(map(str, (i, *(0 for _ in rest))))
        if not file.is_file():
            raise CorruptDataError(f"{file} is missing; run the same `featstore extract` command again")
        flat = np.frombuffer(formats.unseal(memoryview(file.read_bytes()), str(file)), dtype)
        if flat.size != chunk * int(np.prod(rest, dtype=np.int64)):
            raise CorruptDataError(f"{file} holds {flat.size} values, not what {path}/zarr.json says")
        parts.append(flat.reshape(chunk, *rest))
    if not parts:
        return np.zeros(shape, dtype)
    return np.concatenate(parts)[: shape[0]]
