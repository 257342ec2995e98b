"""Rows to shard files and back: inner chunks, codecs, checksums, the index.

Pure functions of arrays. A shard is one Zarr v3 ``sharding_indexed`` file: its inner chunks one after another, then an
index of (offset, length) pairs, then a crc32c of the index. In the *hot* layout an inner chunk is the plain
little-endian array followed by its crc32c, so a reader can map the file and view the rows without a copy.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, SpecError

#: What stands in a file.
Buffer = bytes | memoryview

CRC_BYTES = 4
BLOSC_BLOCK = 512 * 1024
#: Where a chunk of the hot layout may begin, in bytes.
HOT_ALIGNMENT = 4096
_MISSING = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Layout:
    """How rows are grouped into inner chunks and whether those are compressed.

    Attributes:
        name: Value of ``--layout``.
        chunk_rows: Rows of an inner chunk.
        compressed: blosc zstd, level 1, byte shuffle, 512 KiB blocks: the best ratio measured for its decode speed.
    """

    name: str
    chunk_rows: int
    compressed: bool


LAYOUTS = {
    "hot": Layout("hot", 1024, compressed=False),
    "archive": Layout("archive", 256, compressed=True),
}


def parse_layout(name: str) -> Layout:
    """Look up ``--layout``.

    Args:
        name: As typed.

    Raises:
        SpecError: No such layout.
    """
    if name not in LAYOUTS:
        raise SpecError(f"layout {name!r}: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def crc32c(data: Buffer) -> int:
    """CRC-32C (Castagnoli) of a buffer.

    Args:
        data: Any contiguous buffer.
    """
    # The library takes few kinds of buffers; a numpy view of the memory is one of them and costs no copy.
    return int(google_crc32c.value(np.frombuffer(data, np.uint8)))


def file_checksum(data: bytes) -> str:
    """CRC-32 of a whole file, as the manifest records it, in hexadecimal.

    Not CRC-32C: a file that is made of chunks followed by their own CRC-32C has a CRC-32C that depends on their lengths
    alone, so that it would neither tell two files apart nor notice that they changed places.

    Args:
        data: The file's content.
    """
    return f"{zlib.crc32(data):08x}"


def seal(data: bytes) -> bytes:
    """Append the little-endian crc32c that the zarr codec of that name expects.

    Args:
        data: An encoded chunk or shard index.
    """
    return data + crc32c(data).to_bytes(CRC_BYTES, "little")


def unseal(data: memoryview, what: str) -> memoryview:
    """Check and strip a trailing crc32c.

    Args:
        data: Bytes followed by their checksum.
        what: Named in the error.

    Raises:
        CorruptDataError: The checksum does not match.
    """
    body, tail = data[:-CRC_BYTES], data[-CRC_BYTES:]
    if len(data) < CRC_BYTES or crc32c(body) != int.from_bytes(tail, "little"):
        raise CorruptDataError(f"checksum mismatch in {what}; run `featstore verify` to see how far the damage goes")
    return body


def _blosc(typesize: int) -> Any:
    from numcodecs import Blosc

    return Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE, blocksize=BLOSC_BLOCK, typesize=typesize)


def encode_chunk(rows: NDArray[Any], layout: Layout) -> bytes:
    """Encode one inner chunk, checksum included.

    Args:
        rows: ``(chunk_rows, width)`` of a storage type.
        layout: Chooses the codec.
    """
    plain = np.ascontiguousarray(rows)
    return seal(_blosc(plain.itemsize).encode(plain) if layout.compressed else plain.tobytes())


def decode_chunk(data: memoryview, dtype: np.dtype[Any], layout: Layout, what: str) -> NDArray[Any]:
    """Decode one inner chunk to a flat array; a view of ``data`` in the hot layout.

    Args:
        data: Encoded bytes with their checksum.
        dtype: Storage type.
        layout: Chooses the codec.
        what: Named in errors.

    Raises:
        CorruptDataError: Checksum or compressed stream is damaged.
    """
    body = unseal(data, what)
    if not layout.compressed:
        return np.frombuffer(body, dtype)
    # The decoder believes the length in the blosc header and would read past the end of a shorter buffer.
    if int.from_bytes(body[12:16], "little") != len(body):
        raise CorruptDataError(
            f"{what} does not decompress (its header does not fit its {len(body)} bytes); restore it or extract again"
        )
    try:
        return np.frombuffer(_blosc(dtype.itemsize).decode(body), dtype)
    except (RuntimeError, ValueError) as error:
        raise CorruptDataError(f"{what} does not decompress ({error}); restore it or extract again") from error


def shard_pieces(rows: NDArray[Any], shard_rows: int, layout: Layout) -> Iterator[Buffer]:
    """Encode a whole shard file, piece by piece; in the hot layout most pieces are views of the rows.

    Args:
        rows: ``(m, width)`` of a storage type, 1 <= m <= shard_rows; the last inner chunk is padded with zeros, whole
            inner chunks beyond the rows are recorded as missing.
        shard_rows: Rows of a full shard, a multiple of the layout's chunk rows.
        layout: Inner chunking and codec.

    Yields:
        What stands in the file, in order.
    """
    count = shard_rows // layout.chunk_rows
    index = np.full((count, 2), _MISSING, dtype="<u8")
    offset = 0
    for i in range(-(-len(rows) // layout.chunk_rows)):
        chunk = np.ascontiguousarray(rows[i * layout.chunk_rows : (i + 1) * layout.chunk_rows])
        if len(chunk) < layout.chunk_rows:
            padded = np.zeros((layout.chunk_rows, rows.shape[1]), dtype=rows.dtype)
            padded[: len(chunk)] = chunk
            chunk = padded
        if not layout.compressed:
            # Plain chunks begin where pages do: copies from an address four bytes off (the last chunk's checksum) take
            # up to twice as long.
            gap = -offset % HOT_ALIGNMENT
            yield bytes(gap)
            offset += gap
        body = _blosc(chunk.itemsize).encode(chunk) if layout.compressed else chunk.data.cast("B")
        yield body
        yield crc32c(body).to_bytes(CRC_BYTES, "little")
        index[i] = offset, len(body) + CRC_BYTES
        offset += len(body) + CRC_BYTES
    yield seal(index.tobytes())


def encode_shard(rows: NDArray[Any], shard_rows: int, layout: Layout) -> bytes:
    """Encode a whole shard file, in memory.

    Args:
        rows: As :func:`shard_pieces`.
        shard_rows: As there.
        layout: As there.
    """
    return b"".join(shard_pieces(rows, shard_rows, layout))


def decode_index(data: memoryview, chunks: int, what: str) -> list[tuple[int, int] | None]:
    """Read the index at the end of a shard file.

    Args:
        data: The whole file.
        chunks: Inner chunks of a full shard.
        what: Named in errors.

    Returns:
        For each inner chunk its (offset, length), or None where it is missing.

    Raises:
        CorruptDataError: Too short, checksum wrong, or a range that leaves the file.
    """
    size = 16 * chunks + CRC_BYTES
    if len(data) < size:
        raise CorruptDataError(f"{what} has {len(data)} bytes, too few for its index of {size}; the file is truncated")
    index = np.frombuffer(unseal(data[-size:], f"the index of {what}"), "<u8").reshape(-1, 2)
    limit = len(data) - size
    ranges: list[tuple[int, int] | None] = []
    for offset, length in index:
        if offset == _MISSING and length == _MISSING:
            ranges.append(None)
        elif int(offset) + int(length) > limit:
            raise CorruptDataError(f"the index of {what} points outside the file; the file is damaged")
        else:
            ranges.append((int(offset), int(length)))
    return ranges
