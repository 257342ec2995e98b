"""Sums of products as 24-bit correlations: each element over the roots of its row's and its column's sum of squares.

By the inequality of Cauchy and Schwarz such a quotient lies in -1..1. It is stored as ``round(quotient * 2**23) +
2**23`` in an array of uint32, whose highest byte is nearly always zero and disappears under byte shuffle and zstd. A
sum that is symmetric leaves the tiles below its diagonal out: other readers see zeros there, the fill value. What lies
beside the array in float64, the roots, turns quotients back into sums (:func:`sums_of`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError
from featstore.store.format import documents
from featstore.store.format.attributes import MOST
from featstore.store.format.plain import chunk_shape, damaged, sizes
from featstore.store.format.shards import CRC_BYTES, Layout, decode_chunk, decode_index, encode_chunk, seal

#: A quotient of 1.
ONE = 1 << 23
#: Rows and columns of a tile; narrower arrays have narrower tiles.
TILE = 256
#: Tiles are compressed as chunks of the archive layout are.
_CODEC = Layout("archive", TILE, compressed=True)
_TYPE = np.dtype("<u4")
_MISSING = 2**64 - 1
#: A blosc frame begins with so many bytes.
_LEAST_TILE = 16 + CRC_BYTES
#: Most tiles of an array: a width of 65,536 has as many.
_MOST_TILES = 2**16


@dataclass(frozen=True)
class PackedArray:
    """What the ``zarr.json`` of such an array says, checked.

    Attributes:
        shape: Rows and columns, both at least 1.
    """

    shape: tuple[int, int]

    @classmethod
    def parse(cls, document: dict[str, Any], where: str) -> PackedArray:
        """Read what a document says.

        Args:
            document: The array's ``zarr.json``.
            where: The array's path, named in errors.

        Raises:
            CorruptDataError: It is not such a document.
        """
        shape = sizes(document, "shape", where)
        chunk_shape(document, where)
        if len(shape) != 2 or min(shape) < 1 or math.prod(shape) > MOST or math.prod(grid(shape)) > _MOST_TILES:
            raise damaged(where, f"shape {list(shape)} is not usable")
        wrong = documents.difference(document, packed_document(shape))
        if wrong is not None:
            raise damaged(where, f"{wrong!r} is not what this format has there")
        return cls((shape[0], shape[1]))

    #: One file holds the array.
    files = 1

    @staticmethod
    def file(number: int) -> str:
        """Path of the file within the array.

        Args:
            number: 0.
        """
        return f"c/{number}/0"

    def least_bytes(self, number: int) -> int:
        """Fewest bytes that the file can have: its index, and the tiles on and above the diagonal.

        Args:
            number: 0.
        """
        del number
        down, across = grid(self.shape)
        return 16 * down * across + CRC_BYTES + _LEAST_TILE * min(down, across)


def tile(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tile of an array.

    Args:
        shape: Of the array.
    """
    return min(shape[0], TILE), min(shape[1], TILE)


def grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many tiles an array has down and across.

    Args:
        shape: Of the array.
    """
    high, wide = tile(shape)
    return -(-shape[0] // high), -(-shape[1] // wide)


def most_bytes(shape: tuple[int, int], half: bool) -> int:
    """Bytes of a packed array at most, in practice: three of every element that is stored.

    Args:
        shape: Rows and columns.
        half: Leave out tiles below the diagonal.
    """
    (high, wide), (down, across) = tile(shape), grid(shape)
    tiles = down * (down + 1) // 2 if half else down * across
    return tiles * (3 * high * wide + 64)


def packed_document(shape: tuple[int, ...]) -> dict[str, Any]:
    """The ``zarr.json`` of a packed array.

    Args:
        shape: Rows and columns.
    """
    high, wide = tile(shape)
    down, across = grid(shape)
    return documents.tiled_document((shape[0], shape[1]), "uint32", (down * high, across * wide), (high, wide))


def pack(product: NDArray[np.float64], roots: tuple[NDArray[np.float64], NDArray[np.float64]], half: bool) -> bytes:
    """The file of a packed array.

    Args:
        product: float64 ``(dx, dy)`` sums of products.
        roots: float64 ``(dx,)`` and ``(dy,)``, roots of the sums of squares of the two sides.
        half: Leave out tiles below the diagonal, of a symmetric product.

    Raises:
        ValueError: A sum is larger than its roots allow.
    """
    high, wide = tile(product.shape)
    down, across = grid(product.shape)
    index = np.full((down * across, 2), _MISSING, dtype="<u8")
    pieces, offset = [], 0
    inverse = [np.divide(1.0, root, out=np.zeros_like(root), where=root > 0) for root in roots]
    for row in range(down):
        for column in range(row if half else 0, across):
            rows, columns = slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide)
            quotient = product[rows, columns] * inverse[0][rows, None] * inverse[1][columns]
            if not (np.abs(quotient) <= 2).all():
                raise ValueError("a sum of products is larger than the roots of the sums of squares allow")
            stored = np.full((high, wide), ONE, dtype=_TYPE)
            stored[: quotient.shape[0], : quotient.shape[1]] = np.rint(quotient * ONE) + ONE
            body = encode_chunk(stored, _CODEC)
            index[row * across + column] = offset, len(body)
            pieces.append(body)
            offset += len(body)
    return b"".join([*pieces, seal(index.tobytes())])


def unpack(data: bytes | None, array: PackedArray, where: str, half: bool) -> NDArray[np.uint32]:
    """The numbers of a packed array.

    Args:
        data: Its file, None where there is none.
        array: What its document says.
        where: The file, named in errors.
        half: Whether tiles below the diagonal are left out.

    Returns:
        uint32 ``(dx, dy)``; what is left out is filled in from above the diagonal.

    Raises:
        CorruptDataError: The file is missing or damaged, or lacks other tiles than it should.
    """
    if data is None:
        raise CorruptDataError(f"{where} is missing; run the same `featstore extract` command again")
    view = memoryview(data)
    (high, wide), (down, across) = tile(array.shape), grid(array.shape)
    ranges = decode_index(view, down * across, where)
    found = np.empty(array.shape, dtype=np.uint32)
    for number, (row, column) in enumerate(np.ndindex(down, across)):
        place = ranges[number]
        if (place is None) != (half and column < row):
            raise CorruptDataError(f"{where} lacks other tiles than it should; run `featstore moments` again")
        if place is None:
            continue
        values = decode_chunk(view[place[0] : place[0] + place[1]], _TYPE, _CODEC, where)
        if values.size != high * wide:
            raise CorruptDataError(
                f"{where} has a tile of {values.size} values, not {high * wide}; restore it or extract again"
            )
        target = found[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
        target[:] = values.reshape(high, wide)[: target.shape[0], : target.shape[1]]
        if half:
            found[column * wide : (column + 1) * wide, row * high : (row + 1) * high] = target.T
    return found


def sums_of(stored: NDArray[np.uint32], roots: tuple[NDArray[np.float64], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sums of products again, to 6e-8 of the product of their roots.

    Args:
        stored: uint32 ``(dx, dy)`` of :func:`unpack`.
        roots: As :func:`pack` had them.

    Returns:
        float64 ``(dx, dy)``.
    """
    found = stored.astype(np.float64)
    found -= ONE
    found /= ONE
    for start in range(0, len(found), TILE):
        rows = slice(start, start + TILE)
        # The roots first: their product is the same both ways round, so what is symmetric stays so.
        found[rows] *= roots[0][rows, None] * roots[1]
    return found
