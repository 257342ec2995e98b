"""Rows of a store, read straight from mapped shard files.

In the hot layout a chunk's checksum is verified when the chunk is first touched; from then on its rows are views of the
page cache. In the archive layout every read verifies and decompresses, straight from the map into the caller's array.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, SpecError
from featstore.store.format import documents, shards
from featstore.store.format.elements import BY_DATA_TYPE, Format

#: How rows are chosen: a slice, or row numbers in any order.
Rows = slice | Sequence[int] | NDArray[np.integer[Any]]

#: Bytes gathered at a time where rows are wanted out of order: the second copy then comes from the processor's cache.
_PIECE_BYTES = 1 << 17
#: Bytes of rows wanted in any order from which several threads gather them.
_THREADED_BYTES = 4 << 20


@dataclass(frozen=True)
class Geometry:
    """What the ``zarr.json`` of a rows array says, checked.

    Attributes:
        rows: Rows that exist.
        width: Hidden width.
        shard_rows: Rows of a shard.
        form: Element format.
        layout: Inner chunking and codec.
    """

    rows: int
    width: int
    shard_rows: int
    form: Format
    layout: shards.Layout

    @classmethod
    def parse(cls, document: dict[str, Any], where: str) -> Geometry:
        """Read the geometry from a document.

        Args:
            document: The array's ``zarr.json``.
            where: Named in errors.

        Raises:
            CorruptDataError: It is not such a document.
        """
        try:
            form = BY_DATA_TYPE[document["data_type"]]
            rows, width = (int(v) for v in document["shape"])
            shard_rows = int(document["chunk_grid"]["configuration"]["chunk_shape"][0])
            inner = document["codecs"][0]["configuration"]
            compressed = any(codec["name"] == "blosc" for codec in inner["codecs"])
            layout = shards.Layout(
                "archive" if compressed else "hot", int(inner["chunk_shape"][0]), compressed=compressed
            )
            expected = documents.rows_document(rows, width, shard_rows, form, layout)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise CorruptDataError(f"{where} is damaged ({error!r}); extract again") from error
        positive = min(rows + 1, width, shard_rows, layout.chunk_rows) > 0
        if not positive or shard_rows % layout.chunk_rows or document["codecs"] != expected["codecs"]:
            raise CorruptDataError(f"{where} describes an array this format does not have; extract again")
        return cls(rows, width, shard_rows, form, layout)


@dataclass(frozen=True)
class _Shard:
    """A mapped shard: its bytes, and where its chunks lie."""

    data: memoryview
    index: list[tuple[int, int] | None]


class RowReader:
    """Rows of one ``(n, width)`` array, read from mapped shards.

    Args:
        path: The array's directory.
        document: Its ``zarr.json``.
        scales: The directory of its ``row_scale`` array, for formats that have one.
        column_scale: float32 ``(width,)``, for formats that have one.
        private: Map copy-on-write: rows are writable, and what is written is seen through this reader alone and never
            reaches the file.

    Raises:
        CorruptDataError: Its metadata is not what the format document describes.
    """

    def __init__(
        self,
        path: Path | str,
        document: dict[str, Any],
        scales: Path | None = None,
        column_scale: NDArray[np.float32] | None = None,
        *,
        private: bool = False,
    ) -> None:
        self.path = path
        self._document = document
        self._mode: Literal["c", "r"] = "c" if private else "r"
        self.geometry = Geometry.parse(document, f"{path}/zarr.json")
        self.rows, self.width = self.geometry.rows, self.geometry.width
        self.shard_rows, self.form, self.layout = (
            self.geometry.shard_rows,
            self.geometry.form,
            self.geometry.layout,
        )
        self._scales, self._column_scale = scales, column_scale
        self._shards: dict[int, _Shard] = {}
        self._checked: dict[int, NDArray[Any]] = {}
        self._scale_of: dict[int, NDArray[np.float32]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, width)``."""
        return self.rows, self.width

    @cached_property
    def private(self) -> RowReader:
        """The same rows mapped a second time, copy-on-write: memory that may be lent to those who insist on writing.

        A second map, and not one for both, so that nothing written there can come back as a row of this reader.
        """
        return RowReader(self.path, self._document, self._scales, self._column_scale, private=True)

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
            path = Path(self.path) / "c" / str(shard) / "0"
            if not path.is_file() or path.stat().st_size == 0:
                raise CorruptDataError(f"{path} is missing or empty; run the same `featstore extract` command again")
            data = memoryview(np.memmap(path, dtype=np.uint8, mode=self._mode).data)
            index = shards.decode_index(data, self.shard_rows // self.layout.chunk_rows, str(path))
            self._shards[shard] = _Shard(data, index)
        return self._shards[shard]

    def _scale(self, shard: int) -> NDArray[np.float32]:
        """The scales of a shard's rows."""
        if shard not in self._scale_of:
            if self._scales is None:
                raise CorruptDataError(f"{self.path} has no row scales; open it through its store")
            file = self._scales / "c" / str(shard)
            self._scale_of[shard] = read_chunk(file, np.dtype("<f4"), self.shard_rows)
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

    def __getitem__(self, rows: Rows) -> NDArray[np.float32]:
        """Rows as float32 ``(m, width)``.

        Args:
            rows: As :meth:`stored`.
        """
        if not self.form.row_scaled:
            return self.form.decode(self.stored(rows))
        scale = self.row_scale(row_numbers(rows, self.rows, self.path))
        return self.form.decode(self.stored(rows), scale, self._column_scale)


_Item = TypeVar("_Item")


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8), thread_name_prefix="rows")


# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_threads.cache_clear)


def in_threads(work: Callable[[_Item], None], items: Sequence[_Item]) -> None:
    """Do something for every item, on all cores this process may use.

    Args:
        work: Spends its time outside the interpreter's lock: decoding, copying, waiting for the disk.
        items: What for.

    Raises:
        Exception: What the first item in order raised.
    """
    if len(items) < 2:
        for item in items:
            work(item)
        return
    for _ in _threads().map(work, items):
        pass


class TableReader:
    """Rows of a layer that is a table, read as if they had been stored one by one.

    Args:
        table: One row for every id.
        index: int64 ``(n,)``, the place in the table of every token.
    """

    def __init__(self, table: RowReader, index: NDArray[np.int64]) -> None:
        self.table, self.index = table, index
        self.path, self.rows, self.width = table.path, len(index), table.width

    @property
    def form(self) -> Format:
        """Element format."""
        return self.table.form

    @property
    def layout(self) -> shards.Layout:
        """Inner chunking of the table."""
        return self.table.layout

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, width)``."""
        return self.rows, self.width

    @property
    def shard_rows(self) -> int:
        """Rows of a shard of the table."""
        return self.table.shard_rows

    def stored(self, rows: Rows, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows in the storage type, as :meth:`RowReader.stored`; always a copy.

        Args:
            rows: A slice, or row numbers in any order.
            out: Where to put them: ``(m, width)`` of the storage type.
        """
        return self.table.stored(self.index[row_numbers(rows, self.rows, self.path)], out)

    def __getitem__(self, rows: Rows) -> NDArray[np.float32]:
        """Rows as float32 ``(m, width)``.

        Args:
            rows: A slice, or row numbers in any order.
        """
        return self.table[self.index[row_numbers(rows, self.rows, self.path)]]


def row_numbers(rows: Rows, count: int, where: object) -> NDArray[np.int64]:
    """Row numbers that a slice or a list of numbers means.

    Args:
        rows: A slice, or row numbers in any order.
        count: Rows that exist.
        where: Named in errors.

    Returns:
        int64 ``(m,)``.

    Raises:
        IndexError: A row outside 0..count-1, or something other than row numbers (a boolean mask).
    """
    if isinstance(rows, slice):
        return np.arange(*rows.indices(count), dtype=np.int64)
    given = np.asarray(rows).reshape(-1)
    if given.size and given.dtype.kind not in "iu":
        raise IndexError(f"rows are chosen by number, not by {given.dtype}; for a mask use np.flatnonzero")
    numbers = given.astype(np.int64)
    outside = numbers[(numbers < 0) | (numbers >= count)]
    if len(outside):
        raise IndexError(f"row {outside[0]} is outside 0..{count - 1} of {where}")
    return numbers


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


def read_vector(path: Path, document: dict[str, Any]) -> NDArray[Any]:
    """Read a small array of plain checksummed chunks whole.

    Args:
        path: The array's directory.
        document: Its ``zarr.json``.

    Raises:
        CorruptDataError: Missing, damaged, or not such an array.
    """
    return vector_of(lambda name: (path / name).read_bytes() if (path / name).is_file() else None, document, str(path))


def vector_of(read: Callable[[str], bytes | None], document: dict[str, Any], where: str) -> NDArray[Any]:
    """A small array of plain checksummed chunks, wherever its files are.

    Args:
        read: Content of one of the array's files, None where there is none.
        document: Its ``zarr.json``.
        where: The array, named in errors.

    Raises:
        CorruptDataError: Missing, damaged, or not such an array.
    """
    try:
        shape = tuple(int(v) for v in document["shape"])
        dtype = np.dtype(document["data_type"]).newbyteorder("<")
        chunk = int(document["chunk_grid"]["configuration"]["chunk_shape"][0])
        usable = chunk >= 1 and min(shape) >= 0 and 1 <= len(shape) <= 2 and not dtype.hasobject
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise CorruptDataError(f"{where}/zarr.json is damaged ({error!r}); extract again") from error
    if not usable:
        raise CorruptDataError(
            f"{where}/zarr.json has shape {shape}, chunk {chunk}, {dtype}: not usable; extract again"
        )
    rest = shape[1:]
    size = chunk * int(np.prod(rest, dtype=np.int64))
    parts = []
    for i in range(-(-shape[0] // chunk)):
        name = "/".join(map(str, ("c", i, *(0 for _ in rest))))
        parts.append(parse_chunk(read(name), dtype, size, f"{where}/{name}").reshape(chunk, *rest))
    if not parts:
        return np.zeros(shape, dtype)
    return np.concatenate(parts)[: shape[0]]


def read_chunk(file: Path, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Read one plain checksummed chunk file.

    Args:
        file: The file.
        dtype: Its element type.
        size: Values it must hold.

    Returns:
        Flat, read-only.

    Raises:
        CorruptDataError: Missing, damaged, or of another size.
    """
    return parse_chunk(file.read_bytes() if file.is_file() else None, dtype, size, str(file))


def parse_chunk(data: bytes | None, dtype: np.dtype[Any], size: int, where: str) -> NDArray[Any]:
    """The values of one plain checksummed chunk.

    Args:
        data: Content of the chunk's file, None where there is none.
        dtype: Its element type.
        size: Values it must hold.
        where: The file, named in errors.

    Returns:
        Flat, read-only.

    Raises:
        CorruptDataError: Missing, damaged, or of another size.
    """
    if data is None:
        raise CorruptDataError(f"{where} is missing; run the same `featstore extract` command again")
    body = shards.unseal(memoryview(data), where)
    if len(body) != size * dtype.itemsize:
        raise CorruptDataError(f"{where} holds {len(body)} bytes, not {size} values of {dtype}")
    return np.frombuffer(body, dtype)
