"""Layer 0 as a table: one row for every token id, read as if the rows had been stored one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.store.read.arrays import RowArray
from featstore.store.read.rows import RowReader
from featstore.store.read.selection import Rows, row_numbers


class TableReader(RowArray):
    """Rows of a layer that is a table.

    Args:
        table: One row for every id.
        index: int64 ``(n,)``, the place in the table of every token.
    """

    def __init__(self, table: RowReader, index: NDArray[np.int64]) -> None:
        self.table, self.index = table, index
        self.path, self.rows, self.width = table.path, len(index), table.width
        self.shard_rows, self.form, self.layout = table.shard_rows, table.form, table.layout

    def stored(self, rows: Rows, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows in the storage type, as :meth:`RowReader.stored`; always a copy.

        Args:
            rows: A slice, or row numbers in any order.
            out: Where to put them: ``(m, width)`` of the storage type.
        """
        return self.table.stored(self.index[row_numbers(rows, self.rows, self.path)], out)

    def decoded(self, rows: Rows) -> NDArray[np.float32]:
        """Rows as float32 ``(m, width)``.

        Args:
            rows: A slice, or row numbers in any order.
        """
        return self.table.decoded(self.index[row_numbers(rows, self.rows, self.path)])

    def release(self) -> None:
        """Let go of the table's pages, as :meth:`RowArray.release`."""
        self.table.release()

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return self.table.__dask_tokenize__(), self.index
