"""Rows on disk that behave as an array of float32: square brackets, ``len``, iteration, ``np.asarray``, Dask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featstore.store.format.elements import Format
from featstore.store.format.shards import Layout
from featstore.store.read.selection import Index, Rows, Selection


class RowArray(ABC):
    """The states of one layer: a float32 array of shape ``(n, width)``, of which what is asked for is read.

    Indexing is numpy's: ``rows[-1]``, ``rows[10:20]``, ``rows[::-3]``, ``rows[[5, 2]]``, ``rows[mask]``,
    ``rows[10:20, :8]``. Every result is a new, writable array in memory, so ``torch.from_numpy(rows[10:20])`` works;
    ``np.asarray(rows)`` reads everything, ``dask.array.from_array(rows)`` nothing until it is computed.

    Attributes:
        path: The array, named in errors.
        rows: n.
        width: Hidden width.
        shard_rows: Rows of a shard file.
        form: Element format in the store.
        layout: Inner chunking and codec in the store.
    """

    path: Path | str
    rows: int
    width: int
    shard_rows: int
    form: Format
    layout: Layout

    @abstractmethod
    def stored(self, rows: Rows, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows in the storage type (unsigned payloads for bfloat16 and fp8), scales not applied.

        Args:
            rows: A slice, or row numbers in any order.
            out: Where to put them: C-contiguous ``(m, width)`` of the storage type.

        Raises:
            IndexError: A row outside 0..n-1, or something other than row numbers (a boolean mask).
            SpecError: ``out`` does not fit.
            CorruptDataError: Damaged or missing data.
        """

    @abstractmethod
    def decoded(self, rows: Rows) -> NDArray[np.float32]:
        """Rows as a new float32 array ``(m, width)``, scales applied.

        Args:
            rows: A slice, or row numbers in any order.

        Raises:
            IndexError: A row outside 0..n-1, or something other than row numbers (a boolean mask).
            CorruptDataError: Damaged or missing data.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of memory that only spares reading again what was read: for passes that come by once."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, width)``."""
        return self.rows, self.width

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """float32, whatever the store holds: values are widened when they are read."""
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        """Two."""
        return 2

    @property
    def size(self) -> int:
        """Elements, n times width."""
        return self.rows * self.width

    @property
    def nbytes(self) -> int:
        """Bytes of ``np.asarray(rows)``; the store holds fewer in most formats."""
        return self.size * self.dtype.itemsize

    @property
    def chunks(self) -> tuple[int, int]:
        """Rows and columns that are checked and decoded at a time; Dask makes its blocks of whole ones."""
        return self.layout.chunk_rows, self.width

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, key: Index) -> NDArray[np.float32]:
        """Read rows, as numpy has it.

        Args:
            key: Integers, slices, lists or arrays of row numbers, a mask of n rows; or a tuple of such a choice of rows
                and one of columns. Whole rows are read in either case.

        Returns:
            float32, of the shape that numpy gives.

        Raises:
            IndexError: Outside of the array, a mask of another shape, a new axis.
            CorruptDataError: Damaged or missing data.
        """
        if isinstance(key, slice):
            return self.decoded(key)
        chosen = Selection.of(key, self.rows, self.path)
        return chosen.within(self.decoded(chosen.rows))

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Row by row; read a chunk at a time."""
        for start in range(0, self.rows, self.layout.chunk_rows):
            yield from self.decoded(slice(start, start + self.layout.chunk_rows))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """All rows in memory, for ``np.asarray`` and every function of numpy.

        Args:
            dtype: Another type than float32.
            copy: False is refused.

        Raises:
            ValueError: ``copy=False``: rows are widened when they are read.
            CorruptDataError: Damaged or missing data.
        """
        if copy is False:
            raise ValueError(
                f"{self.path} lies on disk and is widened to float32 when it is read, which copies; "
                "use np.asarray(rows), or rows.stored(slice) for a view"
            )
        values = self.decoded(slice(None))
        return values if dtype is None else values.astype(dtype, copy=False)

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"<{kind} {self.shape} float32, stored as {self.form.name} {self.layout.name} in {self.path}>"
