"""Small arrays of plain checksummed chunks, read whole: token tables, norms, scales, pair indexes, sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError
from featstore.store.format import shards
from featstore.store.format.plain import Plain
from featstore.store.read.columns import StoredColumn


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
    plain = Plain.parse(document, where)
    parts = [
        parse_chunk(read(name), plain.dtype, plain.values, f"{where}/{name}").reshape(plain.chunk, *plain.shape[1:])
        for name in map(plain.file, range(plain.files))
    ]
    if not parts:
        return np.zeros(plain.shape, plain.dtype)
    return np.concatenate(parts)[: plain.shape[0]]


def column_of(read: Callable[[str], bytes | None], document: dict[str, Any], where: str) -> StoredColumn:
    """A small array of one dimension as a column, of which chunks are read when something in them is asked for.

    Args:
        read: As of :func:`vector_of`.
        document: Its ``zarr.json``.
        where: The array, named in errors.

    Raises:
        CorruptDataError: It is no such array; when its values are asked for: missing or damaged.
    """
    plain = Plain.parse(document, where)

    def chunk(number: int) -> NDArray[Any]:
        name = plain.file(number)
        return parse_chunk(read(name), plain.dtype, plain.values, f"{where}/{name}")

    return StoredColumn(chunk, plain.shape[0], plain.chunk, plain.dtype)


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
        raise CorruptDataError(
            f"{where} holds {len(body)} bytes, not {size} values of {dtype}; restore it or extract again"
        )
    return np.frombuffer(body, dtype)
