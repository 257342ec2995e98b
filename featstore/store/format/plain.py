"""What the ``zarr.json`` of a small array says: shape, type and chunks, checked before anything is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from featstore.errors import CorruptDataError
from featstore.store.format import documents
from featstore.store.format.attributes import MOST
from featstore.store.format.shards import CRC_BYTES


@dataclass(frozen=True)
class Plain:
    """A small array of plain checksummed chunks along its first axis.

    Attributes:
        shape: One or two dimensions.
        dtype: Little-endian.
        chunk: Length of a chunk along the first axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: int

    @classmethod
    def parse(cls, document: dict[str, Any], where: str) -> Plain:
        """Read what a document says.

        Args:
            document: The array's ``zarr.json``.
            where: The array's path, named in errors; its end tells which types it may have.

        Raises:
            CorruptDataError: It is not such a document.
        """
        shape, data_type = sizes(document, "shape", where), document.get("data_type")
        chunk = chunk_shape(document, where)
        types = documents.data_types(where) or tuple(documents.CORE_TYPES)
        if not isinstance(data_type, str) or data_type not in types or data_type not in documents.CORE_TYPES:
            raise damaged(where, f"data type {data_type!r} is not {' or '.join(types)}")
        if not 1 <= len(shape) <= 2 or not chunk or chunk[0] < 1 or math.prod(chunk) > MOST:
            raise damaged(where, f"shape {list(shape)} and chunks {list(chunk)} are not usable")
        wrong = documents.difference(document, documents.plain_document(shape, data_type, chunk[0]))
        if wrong is not None:
            raise damaged(where, f"{wrong!r} is not what this format has there")
        return cls(shape, np.dtype(data_type).newbyteorder("<"), chunk[0])

    @property
    def files(self) -> int:
        """Number of chunk files."""
        return -(-self.shape[0] // self.chunk)

    def file(self, number: int) -> str:
        """Path of a chunk file within the array.

        Args:
            number: Chunk along the first axis.
        """
        return "/".join(map(str, ("c", number, *(0 for _ in self.shape[1:]))))

    @property
    def values(self) -> int:
        """Values in a chunk."""
        return self.chunk * math.prod(self.shape[1:])

    @property
    def file_bytes(self) -> int:
        """Bytes of every chunk file."""
        return self.values * self.dtype.itemsize + CRC_BYTES


def sizes(document: Any, key: str, where: str) -> tuple[int, ...]:
    """A list of sizes, such as a shape.

    Args:
        document: A JSON value.
        key: Of the list in it.
        where: The array's path, named in errors.

    Raises:
        CorruptDataError: It is not an object, or has no list of integers from 0 to the largest array there.
    """
    found = document.get(key) if isinstance(document, dict) else None
    if not isinstance(found, list) or not all(type(each) is int and 0 <= each <= MOST for each in found):
        raise damaged(where, f"{key!r} is not a list of sizes")
    return tuple(found)


def _grid(document: dict[str, Any]) -> Any:
    grid = document.get("chunk_grid")
    return grid.get("configuration") if isinstance(grid, dict) else None


def chunk_shape(document: dict[str, Any], where: str) -> tuple[int, ...]:
    """Shape of a chunk file, which may be a shard.

    Args:
        document: The array's ``zarr.json``.
        where: The array's path, named in errors.

    Raises:
        CorruptDataError: The document has none.
    """
    return sizes(_grid(document), "chunk_shape", where)


def damaged(where: str, what: str) -> CorruptDataError:
    """The error about an array's document.

    Args:
        where: The array's path.
        what: What is wrong with it.
    """
    return CorruptDataError(f"{where}/zarr.json is damaged: {what}; restore it or extract again")
