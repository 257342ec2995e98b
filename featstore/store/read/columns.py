"""Columns too long to hold: they index as arrays do, and read or compute what is asked for, a piece at a time.

A store of 100 million rows has token tables and pair indexes of gigabytes, of which most work looks at a stretch or at
a few thousand places. :class:`StoredColumn` is an array on disk; :class:`RowSet` holds rising row numbers in an eighth
of a byte for every row that there is; :class:`OfRows` is what follows from a row.

Whatever needs all of a column at once still gets it: ``np.asarray(column)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import DTypeLike, NDArray

#: Entries that are looked at together where a column is gone through.
PIECE = 1 << 20
#: Chunks of a column on disk that are kept.
_KEPT_CHUNKS = 4
#: Rows of a block, whose members are counted: 2 KiB of bits.
_BLOCK = 1 << 14

Numbers = NDArray[np.int64]


def whole_windows(window: Any) -> Iterator[slice]:
    """Neighbouring stretches of a token table that begin where windows do.

    Args:
        window: int32 ``(n,)``, non-decreasing: an array or a column.
    """
    start, size = 0, PIECE
    while start < len(window):
        stop = min(start + size, len(window))
        of = window[start : min(stop + 1, len(window))]
        begins = np.flatnonzero(of[1:] != of[:-1]) + 1
        if stop < len(window) and not len(begins):
            size *= 2  # one window is longer
            continue
        stop = stop if stop == len(window) else start + int(begins[-1])
        yield slice(start, stop)
        start, size = stop, PIECE


def pieces(length: int, size: int | None = None) -> Iterator[slice]:
    """Neighbouring stretches of a column.

    Args:
        length: Of the column.
        size: Of a stretch; :data:`PIECE` when not given.
    """
    size = size or PIECE
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class Column(NDArrayOperatorsMixin, ABC):
    """An array of one dimension, of which what is asked for is made.

    Attributes:
        dtype: Of the values.
    """

    dtype: np.dtype[Any]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def part(self, start: int, stop: int) -> NDArray[Any]:
        """A stretch of the column.

        Args:
            start: First entry, within the column.
            stop: Entry after the last.
        """

    @abstractmethod
    def take(self, numbers: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Entries in any order.

        Args:
            numbers: Which, from 0 on.
        """

    @property
    def shape(self) -> tuple[int]:
        """One dimension."""
        return (len(self),)

    @property
    def size(self) -> int:
        """Number of entries."""
        return len(self)

    @property
    def ndim(self) -> int:
        """One."""
        return 1

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self.part(start, max(start, stop)) if step == 1 else self.take(np.arange(start, stop, step))
        chosen = np.asarray(key)
        if chosen.dtype == bool:
            if chosen.shape != self.shape:
                raise IndexError(f"a mask of {chosen.shape} does not choose from a column of {self.shape}")
            return np.concatenate(
                [self.part(at.start, at.stop)[chosen[at]] for at in pieces(len(self))] or [self.part(0, 0)]
            )
        numbers = chosen.astype(np.int64, copy=False)
        least, most = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, -1)
        if least < -len(self) or most >= len(self):
            raise IndexError(f"entry {least if least < -len(self) else most} is outside a column of {len(self)}")
        if least < 0:
            numbers = np.where(numbers < 0, numbers + len(self), numbers)
        found = self.take(numbers.reshape(-1)).reshape(chosen.shape)
        return found if chosen.ndim else found[()]

    def __iter__(self) -> Iterator[Any]:
        for at in pieces(len(self)):
            yield from self.part(at.start, at.stop)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a column is made when it is asked for; use np.asarray(column)")
        result = np.empty(len(self), self.dtype if dtype is None else dtype)
        for at in pieces(len(self)):
            result[at] = self.part(at.start, at.stop)
        return result

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """What numpy calculates with columns, a piece of all of them at a time: ``~column``, ``column == 2``."""
        plain = all(np.ndim(each) == 0 or np.shape(each) == self.shape for each in inputs)
        if method != "__call__" or options or not plain or not len(self):
            whole = [np.asarray(each) if isinstance(each, Column) else each for each in inputs]
            return getattr(ufunc, method)(*whole, **options)
        result: NDArray[Any] | None = None
        for at in pieces(len(self)):
            part = ufunc(*(each if np.ndim(each) == 0 else each[at] for each in inputs))
            result = np.empty(len(self), part.dtype) if result is None else result
            result[at] = part
        return result

    def astype(self, dtype: DTypeLike, copy: bool = True) -> NDArray[Any]:
        """All of the column, of another type.

        Args:
            dtype: Which.
            copy: Always.
        """
        del copy
        return np.asarray(self, dtype)

    def __getattr__(self, name: str) -> Any:
        # Arrays can do more than this; what nobody does to a long column needs no way that saves memory.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


class StoredColumn(Column):
    """A small array's values on disk, some of whose chunks are kept.

    Args:
        read: The values of a chunk by its number, checked; the last may be longer than what is left.
        length: Of the column.
        chunk: Entries of a chunk.
        dtype: Of the values.
    """

    def __init__(self, read: Callable[[int], NDArray[Any]], length: int, chunk: int, dtype: np.dtype[Any]) -> None:
        self.dtype, self._read, self._length, self._chunk = dtype, read, length, chunk
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def __len__(self) -> int:
        return self._length

    def _values(self, number: int) -> NDArray[Any]:
        held = self._kept.get(number)
        if held is None:
            held = self._read(number)
            self._kept[number] = held
            while len(self._kept) > _KEPT_CHUNKS:
                self._kept.popitem(last=False)
        return held

    def part(self, start: int, stop: int) -> NDArray[Any]:
        """A stretch of the column."""
        size, result = self._chunk, np.empty(stop - start, self.dtype)
        for number in range(start // size, -(-stop // size) if stop > start else start // size):
            first, end = max(number * size, start), min((number + 1) * size, stop)
            result[first - start : end - start] = self._values(number)[first - number * size : end - number * size]
        return result

    def take(self, numbers: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Entries in any order, every chunk read once."""
        result = np.empty(len(numbers), self.dtype)
        for number, places in _by_block(numbers, self._chunk):
            result[places] = self._values(number)[numbers[places] - number * self._chunk]
        return result


class RowSet(Column):
    """Rising row numbers, each once, as a bit for every row that there is: entry k is the k-th row of the set.

    Args:
        bits: uint8, a bit a row, the lowest first; a multiple of a block's.
        dtype: Always int64.
    """

    dtype = np.dtype(np.int64)

    def __init__(self, bits: NDArray[np.uint8]) -> None:
        self.bits = bits
        held = np.bitwise_count(bits.view(np.uint64)).reshape(-1, _BLOCK // 64).sum(axis=1, dtype=np.int64)
        # How many rows of the set come before each block, and at the end how many there are.
        self._before = np.concatenate(([0], np.cumsum(held)))

    @classmethod
    def empty(cls, rows: int) -> NDArray[np.uint8]:
        """The bits of no row.

        Args:
            rows: How many there are.
        """
        return np.zeros(-(-rows // _BLOCK) * (_BLOCK // 8), np.uint8)

    @classmethod
    def of(cls, rows: int, numbers: Any) -> RowSet:
        """A set of rising row numbers.

        Args:
            rows: How many rows there are.
            numbers: Array or column of rising row numbers.
        """
        bits = cls.empty(rows)
        for at in pieces(len(numbers)):
            set_bits(bits, numbers[at])
        return cls(bits)

    def __len__(self) -> int:
        return int(self._before[-1])

    def _rows(self, block: int) -> Numbers:
        part = self.bits[block * _BLOCK // 8 : (block + 1) * _BLOCK // 8]
        return _rows_of(part, block * _BLOCK)

    def part(self, start: int, stop: int) -> Numbers:
        """A stretch of the rows."""
        if stop <= start:
            return np.zeros(0, np.int64)
        first = int(np.searchsorted(self._before, start, side="right")) - 1
        last = int(np.searchsorted(self._before, stop, side="left"))
        bits = self.bits[first * _BLOCK // 8 : last * _BLOCK // 8]
        return _rows_of(bits, first * _BLOCK)[start - self._before[first] : stop - self._before[first]]

    def take(self, numbers: NDArray[np.integer[Any]]) -> Numbers:
        """Rows of the set by their places in it, in any order."""
        result = np.empty(len(numbers), np.int64)
        order = np.argsort(numbers, kind="stable")
        block = np.searchsorted(self._before, numbers[order], side="right") - 1
        edges = np.flatnonzero(np.diff(block, prepend=-1, append=len(self._before)))
        for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            places, of = order[first:end], int(block[first])
            result[places] = self._rows(of)[numbers[places] - self._before[of]]
        return result

    def where(self, keep: NDArray[np.bool_]) -> RowSet:
        """The rows at whose places in the set a condition holds.

        Args:
            keep: bool, one for every row of the set.
        """
        bits = np.zeros_like(self.bits)
        for at in pieces(len(self)):
            set_bits(bits, self.part(at.start, at.stop)[keep[at]])
        return RowSet(bits)

    def counts(self, size: int) -> Numbers:
        """How many rows of the set are in every run of so many rows.

        Args:
            size: A multiple of 64 that divides a block.
        """
        words = np.bitwise_count(self.bits.view(np.uint64))
        found: Numbers = words.reshape(-1, size // 64).sum(axis=1, dtype=np.int64)
        return found


class OfRows(Column):
    """What follows from the rows of a set, such as their tokens' ids.

    Args:
        rows: The set.
        values: The values of int64 row numbers.
        dtype: Of the values.
    """

    def __init__(self, rows: RowSet, values: Callable[[Numbers], NDArray[Any]], dtype: DTypeLike) -> None:
        self.rows, self.values, self.dtype = rows, values, np.dtype(dtype)

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, start: int, stop: int) -> NDArray[Any]:
        """A stretch of the column."""
        return self.values(self.rows.part(start, stop)).astype(self.dtype, copy=False)

    def take(self, numbers: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Entries in any order."""
        return self.values(self.rows.take(numbers)).astype(self.dtype, copy=False)

    def over(self, rows: RowSet) -> OfRows:
        """The same of other rows.

        Args:
            rows: Which.
        """
        return OfRows(rows, self.values, self.dtype)


def _rows_of(bits: NDArray[np.uint8], first: int) -> Numbers:
    """The rows that bits stand for, the first of which has a number."""
    rows = np.flatnonzero(np.unpackbits(bits, bitorder="little").view(bool))
    rows += first
    return rows


def set_bits(bits: NDArray[np.uint8], rows: Numbers) -> None:
    """Take rising rows into a set.

    Args:
        bits: As of :class:`RowSet`; changed.
        rows: int64, rising.
    """
    if not len(rows):
        return
    first, end = int(rows[0]) // 8, int(rows[-1]) // 8 + 1
    held = np.zeros((end - first) * 8, bool)
    held[rows - first * 8] = True
    bits[first:end] |= np.packbits(held, bitorder="little")


def get_bits(bits: NDArray[np.uint8], rows: Numbers) -> NDArray[np.bool_]:
    """Whether rows are in a set.

    Args:
        bits: As of :class:`RowSet`.
        rows: int64, any order.
    """
    found: NDArray[np.bool_] = (bits[rows >> 3] >> (rows & 7).astype(np.uint8) & 1).astype(bool)
    return found


def _by_block(numbers: NDArray[np.integer[Any]], size: int) -> Iterator[tuple[int, Any]]:
    """Blocks of neighbours, and where the numbers that lie in each stand."""
    if not len(numbers):
        return
    if (numbers[1:] >= numbers[:-1]).all():
        first = int(numbers[0]) // size
        edges = np.searchsorted(numbers, np.arange(first, int(numbers[-1]) // size + 2) * size).tolist()
        yield from ((first + i, slice(*edges[i : i + 2])) for i in range(len(edges) - 1) if edges[i] < edges[i + 1])
        return
    block = numbers // size
    order = np.argsort(block, kind="stable")
    block = block[order]
    edges = [0, *(np.flatnonzero(block[1:] != block[:-1]) + 1).tolist(), len(block)]
    for at, end in pairwise(edges):
        yield int(block[at]), order[at:end]
