"""Which rows and columns are meant: row numbers for readers, and numpy's square brackets resolved into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: How readers are asked for rows: a slice, or row numbers in any order.
Rows: TypeAlias = slice | Sequence[int] | NDArray[np.integer[Any]]
#: What may stand in square brackets: as for a numpy array of two axes, but no new axes and no mask of single elements.
Index: TypeAlias = (
    SupportsIndex | slice | EllipsisType | Sequence[int] | Sequence[bool] | NDArray[Any] | tuple[Any, ...]
)

_ALL = slice(None)


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
    if given.size and (given.min() < 0 or given.max() >= count):
        outside = given[(given < 0) | (given >= count)]
        raise IndexError(f"row {outside[0]} is outside 0..{count - 1} of {where}")
    return given.astype(np.int64)


@dataclass(frozen=True)
class Selection:
    """Square brackets, resolved.

    Attributes:
        rows: A slice, or int64 ``(m,)`` row numbers within 0..n-1.
        shape: What the row axis becomes; None for a slice, whose axis stays one.
        columns: Selection within a row, as numpy takes it.
    """

    rows: slice | NDArray[np.int64]
    shape: tuple[int, ...] | None
    columns: Any

    @classmethod
    def of(cls, key: Index, count: int, where: object) -> Selection:
        """Resolve what stands in square brackets.

        Args:
            key: Integers (negative ones count from the end), slices, lists and arrays of numbers, masks of n rows, an
                ellipsis, or a pair of these for rows and columns.
            count: n, rows that exist.
            where: Named in errors.

        Raises:
            IndexError: A row outside -n..n-1, a mask of another length, or something that chooses no rows.
        """
        rows, columns = _two_axes(key)
        if isinstance(rows, slice):
            return cls(rows, None, columns)
        given = np.asarray(rows)
        if given.dtype.kind == "b":
            if given.shape != (count,):
                raise IndexError(
                    f"a mask of shape {given.shape} does not choose rows of {where}: it must be ({count},); to choose "
                    "single elements, read first: np.asarray(rows)[mask]"
                )
            numbers = np.flatnonzero(given)
            return cls(numbers, numbers.shape, columns)
        if given.size and given.dtype.kind in "iu" and given.min() < 0 and given.min() >= -count:
            given = np.where(given < 0, given + count, given)
        return cls(row_numbers(given, count, where), given.shape, columns)

    def within(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is left of the rows read.

        Args:
            values: float32 ``(m, width)``, the chosen rows one after another.
        """
        if self.shape is None:
            return values if self.columns is _ALL else values[:, self.columns]
        if self.columns is _ALL:
            return values.reshape(*self.shape, values.shape[1])
        # Let numpy combine the two, with the rows numbered anew: it broadcasts lists of rows with lists of columns.
        result: NDArray[np.float32] = values[np.arange(len(values)).reshape(self.shape), self.columns]
        return result


def _two_axes(key: Index) -> tuple[Any, Any]:
    """Rows and columns of a key, its ellipsis written out."""
    parts = key if isinstance(key, tuple) else (key,)
    if any(part is None for part in parts):
        raise IndexError("rows on disk take no new axis; read first: rows[...][:, None]")
    dots = [place for place, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1 or len(parts) - len(dots) > 2:
        raise IndexError(f"{len(parts)} indices for an array of two axes; rows are read as rows[rows, columns]")
    for place in dots:
        parts = (*parts[:place], *(_ALL,) * (3 - len(parts)), *parts[place + 1 :])
    return (*parts, _ALL, _ALL)[:2]
