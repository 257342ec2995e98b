"""Rows of a store, read straight from mapped shard files.

In the hot layout a chunk's checksum is verified when the chunk is first touched; from then on its rows are views of the
page cache. In the archive layout every read verifies and decompresses, straight from the map into the caller's array.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, SpecError
from featstore.store.format import shards
from featstore.store.read.arrays import RowArray
from featstore.store.read.geometry import Geometry
from featstore.store.read.selection import Rows, row_numbers
from featstore.store.read.threads import in_threads
from featstore.store.read.vectors import parse_chunk

#: Bytes gathered at a time where rows are wanted out of order: the second copy then comes from the processor's cache.
_PIECE_BYTES = 1 << 17
#: Bytes of rows wanted in any order from which several threads gather them.
_THREADED_BYTES = 4 << 20


@dataclass(frozen=True)
class _Shard:
    """A mapped shard: its bytes, and where its chunks lie."""

    data: memoryview
    index: list[tuple[int, int] | None]


class RowReader(RowArray):
    """Rows of one ``(n, width)`` array, read from mapped shards.

    Args:
        path: The array's directory.
        document: Its ``zarr.json``.
        scales: The directory of its ``row_scale`` array, for formats that have one.
        column_scale: float32 ``(width,)``, for formats that have one.

    Raises:
        CorruptDataError: Its metadata is not what the format document describes.
    """

    def __init__(
        self,
        path: Path | str,
        document: dict[str, Any],
        scales: Path | None = None,
        column_scale: NDArray[np.float32] | None = None,
    ) -> None:
        self.path = path
        self._document = document
        self.geometry = Geometry.parse(document, str(path))
        self.rows, self.width = self.geometry.rows, self.geometry.width
        self.shard_rows, self.form, self.layout = (
            self.geometry.shard_rows,
            self.geometry.form,
            self.geometry.layout,
        )
        # This process may change its directory before a shard is opened; errors name the path as it was given.
        self._place = Path(path).absolute()
        self._scales, self._column_scale = scales, column_scale
        self._scales_place = None if scales is None else scales.absolute()
        self._shards: dict[int, _Shard] = {}
        self._checked: dict[int, NDArray[Any]] = {}
        self._scale_of: dict[int, NDArray[np.float32]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the place and not the map: another process, which may work in another directory, opens it anew."""
        return RowReader, (self._place, self._document, self._scales_place, self._column_scale)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        """Dask takes arrays of one name for the same one: a store written anew at the same place is another."""
        files = sorted(self._place.glob("c/*/0"))
        written = [(file.parent.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return str(self._place), self._document, written, self._column_scale

    def chunk(self, number: int) -> NDArray[Any]:
        """One inner chunk in the storage type; in the hot layout a read-only view of the file.

        Args:
            number: Chunk number, counted through all shards.

        Returns:
            ``(chunk_rows, width)``; rows beyond the array's last are padding.

        Raises:
            CorruptDataError: Checksum mismatch, truncated or missing shard.
            IndexError: No such chunk.
        """
        if number in self._checked:
            return self._checked[number]
        shape = (self.layout.chunk_rows, self.width)
        if self.layout.compressed:
            decoded = np.empty(shape, self.form.storage)
            self._decompress(number, decoded)
            return decoded
        body, what = self._body(number)
        if len(body) != shape[0] * shape[1] * self.form.storage.itemsize:
            raise CorruptDataError(f"{what} holds {len(body)} bytes, expected {shape} of {self.form.storage}")
        # Looking costs nothing to keep, so the checksum is not paid for again.
        rows: NDArray[Any] = np.frombuffer(body, self.form.storage).reshape(shape)
        self._checked[number] = rows
        return rows

    def _check_chunk(self, number: int) -> None:
        count = -(-self.rows // self.layout.chunk_rows)
        if not 0 <= number < count:
            raise IndexError(f"chunk {number} is outside 0..{count - 1} of {self.path}")

    def _body(self, number: int) -> tuple[memoryview, str]:
        """The bytes of a chunk, their checksum verified and stripped, and what to call them in errors."""
        self._check_chunk(number)
        shard, within = divmod(number, self.shard_rows // self.layout.chunk_rows)
        mapped = self._shard(shard)
        place, what = mapped.index[within], f"{self.path}, chunk {number}"
        if place is None:
            raise CorruptDataError(f"{what} is missing from its shard; run `featstore verify`")
        return shards.unseal(mapped.data[place[0] : place[0] + place[1]], what), what

    def _decompress(self, number: int, out: NDArray[Any]) -> None:
        """Decode a chunk of the archive layout into contiguous ``(chunk_rows, width)`` memory."""
        body, what = self._body(number)
        decompress(body, out, what)

    def _shard(self, shard: int) -> _Shard:
        if shard not in self._shards:
            name = f"c/{shard}/0"
            file, what = self._place / name, f"{self.path}/{name}"
            if not file.is_file() or file.stat().st_size == 0:
                raise CorruptDataError(f"{what} is missing or empty; run the same `featstore extract` command again")
            data = memoryview(np.memmap(file, dtype=np.uint8, mode="r").data)
            index = shards.decode_index(data, self.shard_rows // self.layout.chunk_rows, what)
            self._shards[shard] = _Shard(data, index)
        return self._shards[shard]

    def _scale(self, shard: int) -> NDArray[np.float32]:
        """The scales of a shard's rows."""
        if shard not in self._scale_of:
            if self._scales_place is None:
                raise CorruptDataError(f"{self.path} has no row scales; open it through its store")
            name = f"c/{shard}"
            file = self._scales_place / name
            data = file.read_bytes() if file.is_file() else None
            self._scale_of[shard] = parse_chunk(data, np.dtype("<f4"), self.shard_rows, f"{self._scales}/{name}")
        return self._scale_of[shard]

    def row_scale(self, numbers: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Scales of rows, for formats that have them.

        Args:
            numbers: int64 ``(m,)`` row numbers.
        """
        if not self.form.row_scaled:
            return None
        result = np.empty(len(numbers), np.float32)
        shard = numbers // self.shard_rows
        for s in np.unique(shard):
            at = shard == s
            result[at] = self._scale(int(s))[numbers[at] - s * self.shard_rows]
        return result

    def stored(self, rows: Rows, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows in the storage type (unsigned payloads for bfloat16 and fp8), scales not applied.

        Args:
            rows: A slice, or row numbers in any order.
            out: Where to put them: C-contiguous ``(m, width)`` of the storage type. Memory that is used again is not
                paged in again, which is half of the time of reading.

        Returns:
            ``(m, width)``: ``out`` if given; else a read-only view where a slice of step 1 lies within one chunk of the
            hot layout; else a new array.

        Raises:
            IndexError: A row outside 0..n-1, or something other than row numbers (a boolean mask).
            SpecError: ``out`` does not fit.
            CorruptDataError: Damaged or missing data.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.rows)
            stop = max(start, stop)
            if step == 1:
                view = self._view(start, stop) if out is None else None
                if view is None:
                    view = self._room(stop - start, out)
                    self._copy(start, stop, view)
                return view
        numbers = row_numbers(rows, self.rows, self.path)
        result = self._room(len(numbers), out)
        self._gather(numbers, result)
        return result

    def _room(self, count: int, out: NDArray[Any] | None) -> NDArray[Any]:
        shape = (count, self.width)
        if out is None:
            return np.empty(shape, self.form.storage)
        if out.shape != shape or out.dtype != self.form.storage or not (out.flags.c_contiguous and out.flags.writeable):
            raise SpecError(
                f"out is {out.dtype} {out.shape}; it must be writable, C-contiguous, {self.form.storage} {shape}"
            )
        return out

    def _view(self, start: int, stop: int) -> NDArray[Any] | None:
        """Rows without a copy, where they lie together in the file."""
        number, first = divmod(start, self.layout.chunk_rows)
        if self.layout.compressed or start >= stop or first + stop - start > self.layout.chunk_rows:
            return None
        return self.chunk(number)[first : first + stop - start]

    def _copy(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Consecutive rows into an array, chunk by chunk."""
        size = self.layout.chunk_rows

        def copy(number: int) -> None:
            first, end = max(number * size, start), min((number + 1) * size, stop)
            place = out[first - start : end - start]
            if self.layout.compressed and end - first == size:
                self._decompress(number, place)
            else:
                place[:] = self.chunk(number)[first - number * size : end - number * size]

        numbers = range(start // size, -(-stop // size) if stop > start else start // size)
        if self.layout.compressed:
            # Decoding a chunk keeps one core busy, and waits where its bytes are not in memory yet.
            in_threads(copy, numbers)
        else:
            for number in numbers:
                copy(number)

    def _gather(self, numbers: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Rows in any order into an array, each chunk touched once."""
        if not len(numbers):
            return
        size = self.layout.chunk_rows
        chunk = numbers // size
        order = np.argsort(chunk, kind="stable")
        piece = max(_PIECE_BYTES // (self.width * self.form.storage.itemsize), 1)

        def gather(places: NDArray[np.int64]) -> None:
            number = int(chunk[places[0]])
            rows, wanted = self.chunk(number), numbers[places] - number * size
            first, end = int(places[0]), int(places[-1]) + 1
            if end - first == len(places):
                # Stable sorting kept them in order, so they are neighbours in the result. mode="clip" because "raise"
                # gathers into a buffer of its own first.
                np.take(rows, wanted, axis=0, out=out[first:end], mode="clip")
                return
            for at in range(0, len(places), piece):
                out[places[at : at + piece]] = rows.take(wanted[at : at + piece], axis=0)

        groups = np.split(order, np.flatnonzero(np.diff(chunk[order])) + 1)
        if self.layout.compressed or out.nbytes > _THREADED_BYTES:
            in_threads(gather, groups)
        else:
            for places in groups:
                gather(places)

    def decoded(self, rows: Rows) -> NDArray[np.float32]:
        """Rows as a new float32 array ``(m, width)``, scales applied.

        Args:
            rows: As :meth:`stored`.
        """
        if not self.form.row_scaled:
            return self.form.decode(self.stored(rows))
        scale = self.row_scale(row_numbers(rows, self.rows, self.path))
        return self.form.decode(self.stored(rows), scale, self._column_scale)


def decompress(body: memoryview, out: NDArray[Any], what: str) -> None:
    """Decode a blosc frame into memory of exactly its size.

    Args:
        body: The frame.
        out: C-contiguous, writable.
        what: Named in errors.

    Raises:
        CorruptDataError: Not such a frame.
    """
    from numcodecs import Blosc

    # The decoder believes the two lengths in the header: it would read past the end of a shorter frame, and leave the
    # rest of a larger array as it was.
    holds, length = (int.from_bytes(body[at : at + 4], "little") for at in (4, 12))
    if len(body) < 16 or length != len(body) or holds != out.nbytes:
        raise CorruptDataError(
            f"{what} does not decompress (its header does not fit its {len(body)} bytes, or {out.nbytes} decoded ones)"
        )
    try:
        Blosc().decode(body, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptDataError(f"{what} does not decompress ({error})") from error
