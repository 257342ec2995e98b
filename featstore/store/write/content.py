"""What the files of a unit hold: pieces of a shard as they are encoded, or the chunks of a small array."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.runtime.writing import write_all
from featstore.store.format.shards import Buffer, seal

#: What a file will hold.
Content = bytes | Iterator[Buffer]

#: Chunk length of token tables and pair indexes.
VECTOR_CHUNK = 1 << 20


def write_content(handle: FileIO, content: Content) -> tuple[int, int]:
    """Write what a file will hold.

    Args:
        handle: Open for writing, without a buffer.
        content: Bytes, or pieces one after another.

    Returns:
        Size in bytes, and CRC-32.
    """
    if isinstance(content, bytes):
        write_all(handle, content)
        return len(content), zlib.crc32(content)
    return _write_pieces(handle, content)


def _write_pieces(handle: FileIO, pieces: Iterator[Buffer]) -> tuple[int, int]:
    """Write while another thread encodes the next piece and sums it; returns size and CRC-32."""
    size = checksum = 0

    def following() -> Buffer | None:
        nonlocal size, checksum
        piece = next(pieces, None)
        if piece is not None:
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
        return piece

    at = 0
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(following)
        while (piece := ahead.result()) is not None:
            ahead = thread.submit(following)
            write_all(handle, piece)
            # So that the disk begins now and not when the file is complete; pages still to be written stay in memory.
            os.posix_fadvise(handle.fileno(), at, len(piece), os.POSIX_FADV_DONTNEED)
            at += len(piece)
    return size, checksum


def vector_files(name: str, array: NDArray[Any], chunk: int) -> dict[str, bytes]:
    """Chunk files of a small array, by path.

    Args:
        name: The array's path within the store.
        array: Any boolean, integer or float array.
        chunk: Length along the first axis; the last chunk is padded with zeros.
    """
    rest = "/0" * (array.ndim - 1)
    return {
        f"{name}/c/{i}{rest}": padded_chunk(array[start : start + chunk], chunk)
        for i, start in enumerate(range(0, len(array), chunk))
    }


def padded_chunk(part: NDArray[Any], chunk: int) -> bytes:
    """One plain chunk file, checksum included.

    Args:
        part: Values along the first axis, at most ``chunk`` of them; zeros fill up.
        chunk: Length of a full chunk.
    """
    if len(part) < chunk:
        full = np.zeros((chunk, *part.shape[1:]), dtype=part.dtype)
        full[: len(part)] = part
        part = full
    return seal(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
