"""Rows of a store, read straight from mapped shard files.

In the hot layout a chunk's checksum is verified when the chunk is first touched; from then on its rows are views of the
page cache. In the archive layout every read verifies and decompresses, straight from the map into the caller's array.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, SpecError
from featstore.store.format import shards
from featstore.store.read.arrays import RowArray
from featstore.store.read.geometry import Geometry
from featstore.store.read.selection import Rows, row_numbers
from featstore.store.read.threads import in_threads, width
from featstore.store.read.together import MOST_FILES, SideBySide
from featstore.store.read.vectors import parse_chunk

#: Bytes gathered at a time where rows are wanted out of order: the second copy then comes from the processor's cache.
_PIECE_BYTES = 1 << 17
#: Bytes of rows from which several threads copy them.
_THREADED_BYTES = 4 << 20
#: Bytes that are moved at a time where rows are gathered from shards that lie side by side, at least and at most. Of
#: larger pieces the C library makes string moves, which take three times as long from memory that was not read before.
_LEAST_UNIT, _MOST_UNIT = 64, 512
#: Shards of a layer that stay mapped one by one.
_MOST_SHARDS = 256


@dataclass(frozen=True)
class _Shard:
    """A mapped shard.

    Attributes:
        held: The map.
        data: Its bytes.
        index: Where its chunks lie.
        checked: Those of the hot layout whose checksums were right.
        expected: Those that the system was told to read.
    """

    held: mmap.mmap
    data: memoryview
    index: list[tuple[int, int] | None]
    checked: dict[int, NDArray[Any]]
    expected: set[int]

    def expect(self, first: int, end: int) -> None:
        """Have chunks read that will be wanted, if that was not said before: a fault at a time is half as fast."""
        fresh = [number for number in range(first, end) if number not in self.expected]
        places = [place for number in fresh if (place := self.index[number]) is not None]
        self.expected.update(fresh)
        if places and hasattr(mmap, "MADV_WILLNEED"):
            start = min(at for at, _ in places) // mmap.PAGESIZE * mmap.PAGESIZE
            self.held.madvise(mmap.MADV_WILLNEED, start, max(at + size for at, size in places) - start)


class _Gathering:
    """How rows of the hot layout are copied from shards that lie side by side: in units that divide every address.

    Args:
        shards: Number of shards.
        chunks: Chunks of a shard.
        distance: Bytes of a shard's file at most.
        unit: Bytes that divide a row, and where chunks begin.
    """

    def __init__(self, shards: int, chunks: int, distance: int, unit: int) -> None:
        self.files, self.unit = SideBySide(shards, distance), unit
        self.units: NDArray[Any] = self.files.bytes.view(f"V{unit}")
        #: First unit of every chunk; -1 where its checksum has not been compared here.
        self.first = np.full(shards * chunks, -1, np.int64)
        #: Whether all chunks so far begin at a whole unit; those of older stores do not.
        self.even = True
        self.index: dict[int, list[tuple[int, int] | None]] = {}

    def of(self, shard: int, size: int) -> memoryview:
        """The bytes of a shard's file."""
        at = shard * self.files.distance
        return self.files.bytes[at : at + size].data


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
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._gathering: _Gathering | None = None
        # Chunk after the last that was read in order; whoever begins there goes on.
        self._reached = -1
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
        shape = (self.layout.chunk_rows, self.width)
        if self.layout.compressed:
            decoded = np.empty(shape, self.form.storage)
            self._decompress(number, decoded)
            return decoded
        self._check_chunk(number)
        shard, within = divmod(number, self._chunks)
        checked = self._shard(shard).checked
        if within in checked:
            return checked[within]
        # Looking costs nothing to keep, so the checksum is not paid for again.
        body = self._body(number)[0]
        rows: NDArray[Any] = np.frombuffer(body, self.form.storage).reshape(shape)
        checked[within] = rows
        return rows

    @property
    def _chunks(self) -> int:
        """Inner chunks of a shard."""
        return self.shard_rows // self.layout.chunk_rows

    def _check_chunk(self, number: int) -> None:
        count = -(-self.rows // self.layout.chunk_rows)
        if not 0 <= number < count:
            raise IndexError(f"chunk {number} is outside 0..{count - 1} of {self.path}")

    def _body(self, number: int) -> tuple[memoryview, str]:
        """The bytes of a chunk, their checksum verified and stripped, and what to call them in errors."""
        self._check_chunk(number)
        shard, within = divmod(number, self._chunks)
        mapped = self._shard(shard)
        return self._sealed(number, mapped.data, mapped.index[within])

    def _sealed(self, number: int, data: memoryview, place: tuple[int, int] | None) -> tuple[memoryview, str]:
        """The bytes of a chunk by its place in the shard's file."""
        what = f"{self.path}, chunk {number}"
        if place is None:
            raise CorruptDataError(f"{what} is missing from its shard; run `featstore verify`")
        body = shards.unseal(data[place[0] : place[0] + place[1]], what)
        shape = (self.layout.chunk_rows, self.width)
        if not self.layout.compressed and len(body) != shape[0] * shape[1] * self.form.storage.itemsize:
            raise CorruptDataError(
                f"{what} holds {len(body)} bytes, expected {shape} of {self.form.storage}; restore it or extract again"
            )
        return body, what

    def _decompress(self, number: int, out: NDArray[Any]) -> None:
        """Decode a chunk of the archive layout into contiguous ``(chunk_rows, width)`` memory."""
        body, what = self._body(number)
        decompress(body, out, what)

    def _shard(self, shard: int) -> _Shard:
        with self._lock:
            if shard in self._shards:
                self._shards.move_to_end(shard)
                return self._shards[shard]
        file, what = self._shard_file(shard)
        with file.open("rb") as handle:
            held = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        data = memoryview(held)
        index = shards.decode_index(data, self._chunks, what)
        with self._lock:
            # Whoever looks into a shard that goes keeps its map; a process may have only so many.
            while len(self._shards) >= _MOST_SHARDS:
                self._shards.popitem(last=False)
            return self._shards.setdefault(shard, _Shard(held, data, index, {}, set()))

    def _shard_file(self, shard: int) -> tuple[Path, str]:
        """A shard's file, which is there, and what to call it in errors."""
        name = f"c/{shard}/0"
        file, what = self._place / name, f"{self.path}/{name}"
        if not file.is_file() or file.stat().st_size == 0:
            raise CorruptDataError(f"{what} is missing or empty; run the same `featstore extract` command again")
        return file, what

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
        ahead = len(numbers) if numbers.start in (self._reached, self._reached - 1) else 0
        self._expect(numbers.start, numbers.stop + ahead)
        self._reached = numbers.stop
        if self.layout.compressed or out.nbytes > _THREADED_BYTES:
            # Decoding a chunk keeps one core busy, and waits where its bytes are not in memory yet; one core alone does
            # not copy as fast as memory gives, nor pages new memory in.
            in_threads(copy, numbers)
        else:
            for number in numbers:
                copy(number)

    def _expect(self, first: int, end: int) -> None:
        """Have chunks read that are wanted now, or soon; those that are not there are found out about elsewhere."""
        end = min(end, -(-self.rows // self.layout.chunk_rows))
        while first < end:
            shard, within = divmod(first, self._chunks)
            stop = min(end, (shard + 1) * self._chunks)
            try:
                self._shard(shard).expect(within, within + stop - first)
            except CorruptDataError:
                return
            first = stop

    def _gather(self, numbers: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Rows in any order into an array."""
        if not len(numbers):
            return
        side_by_side = None if self.layout.compressed else self._side_by_side()
        if side_by_side is None:
            self._gather_by_chunk(numbers, out)
            return
        size, unit = self.layout.chunk_rows, side_by_side.unit
        row = self.width * self.form.storage.itemsize // unit
        wanted, target = numbers // size, out.view(np.uint8).reshape(-1).view(f"V{unit}")
        first = side_by_side.first[wanted]
        if first.min() < 0:
            unseen = np.unique(wanted[first < 0])
            in_threads(lambda number: self._check_beside(side_by_side, number), unseen.tolist())
            if not side_by_side.even:
                self._gather_by_chunk(numbers, out)
                return
            first = side_by_side.first[wanted]
        first += (numbers - wanted * size) * row
        places = first if row == 1 else (first[:, None] + np.arange(row)).reshape(-1)

        def gather(part: slice) -> None:
            # mode="clip" because "raise" gathers into a buffer of its own first.
            np.take(side_by_side.units, places[part], out=target[part], mode="clip")

        count = width() if out.nbytes > _THREADED_BYTES else 1
        edges = [len(places) * at // count for at in range(count + 1)]
        in_threads(gather, [slice(*edge) for edge in pairwise(edges)])

    def _side_by_side(self) -> _Gathering | None:
        """The layer's shards as one stretch of memory; None where they are too many, or rows too uneven."""
        if self._gathering is None:
            row = self.width * self.form.storage.itemsize
            unit = min(math.gcd(row, shards.HOT_ALIGNMENT), _MOST_UNIT)
            if unit < min(_LEAST_UNIT, row) or self.geometry.files > MOST_FILES:
                return None
            # A chunk, its checksum, and as much again before it as its alignment asks for; the index.
            chunk = self.layout.chunk_rows * row + shards.CRC_BYTES + shards.HOT_ALIGNMENT
            distance = self._chunks * (chunk + 16) + shards.CRC_BYTES
            try:
                self._gathering = _Gathering(self.geometry.files, self._chunks, distance, unit)
            except OSError:
                return None
        return self._gathering

    def _check_beside(self, side_by_side: _Gathering, number: int) -> None:
        """Compare a chunk's checksum where it lies beside the others, and say where that is."""
        self._check_chunk(number)
        shard, within = divmod(number, self._chunks)
        file, what = self._shard_file(shard)
        try:
            data = side_by_side.of(shard, side_by_side.files.put(shard, file))
        except OSError:
            side_by_side.even = False
            return
        if shard not in side_by_side.index:
            side_by_side.index[shard] = shards.decode_index(data, self._chunks, what)
        place = side_by_side.index[shard][within]
        self._sealed(number, data, place)
        at = shard * side_by_side.files.distance + (place or (0, 0))[0]
        if at % side_by_side.unit:
            side_by_side.even = False
        else:
            side_by_side.first[number] = at // side_by_side.unit

    def _gather_by_chunk(self, numbers: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Rows in any order, each chunk touched once."""
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

    def release(self) -> None:
        """Give back the pages of files that were read: they stay in the system's cache, where others may need them.

        They would otherwise count as this process's memory, once for every map of a file, until it ends.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        with self._lock:
            held = list(self._shards.values())
        for shard in held:
            # A process may have locked its memory; then the pages stay.
            with suppress(OSError):
                shard.held.madvise(mmap.MADV_DONTNEED)
            # The system may drop them altogether now, and has to be told again.
            shard.expected.clear()
        if self._gathering is not None:
            self._gathering.files.release()

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
            "; restore it or extract again"
        )
    try:
        Blosc().decode(body, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptDataError(f"{what} does not decompress ({error}); restore it or extract again") from error
