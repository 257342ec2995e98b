"""Shard files mapped side by side, so that rows of any of them are gathered by one call, in the order wanted.

A row is gathered fastest by copying it once, from where it lies to where it is wanted. numpy does that within one
array, and shards are many files; but files can be mapped next to each other into one stretch of addresses that was set
aside for them. Python's own ``mmap`` has no way to say where, the C library has.

Such a map is for copying alone. Nothing that looks into it is given away, so it can go when its reader goes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Files that are mapped at a time: the system allows a process some 65,000 maps, and a store may have more shards.
MOST_FILES = 256
_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value


def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
    ]  # fmt: skip
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


class SideBySide:
    """Files mapped at equal distances.

    Args:
        files: How many there may be, at most :data:`MOST_FILES`.
        distance: Bytes from where one begins to where the next does; a file may be no longer.

    Raises:
        OSError: The system does not give so many addresses, or has no such call.
    """

    def __init__(self, files: int, distance: int) -> None:
        if sys.platform != "linux":
            raise OSError("files are mapped side by side on Linux only")
        self.distance = -(-distance // mmap.PAGESIZE) * mmap.PAGESIZE
        self._size = size = files * self.distance
        self._library, self._sizes, self._lock = _library(), dict[int, int](), threading.Lock()
        # Addresses and no memory; nobody may read what has no file yet.
        self._address = self._map(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1)
        weakref.finalize(self, self._library.munmap, self._address, size)
        held = (ctypes.c_uint8 * size).from_address(self._address)
        #: uint8 ``(files * distance,)``; bytes of a file that has not been put are not there to be read.
        self.bytes: NDArray[np.uint8] = np.ctypeslib.as_array(held)

    def _map(self, at: int | None, size: int, protection: int, flags: int, handle: int) -> int:
        address = self._library.mmap(at, size, protection, flags, handle, 0)
        if address is None or address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(address)

    def release(self) -> None:
        """Give back the pages that were read; they are mapped again when somebody reads them."""
        self._library.madvise(self._address, self._size, mmap.MADV_DONTNEED)

    def put(self, place: int, file: Path) -> int:
        """Map a file.

        Args:
            place: Which of the places; one that has its file keeps it.
            file: It.

        Returns:
            Its size.

        Raises:
            OSError: It cannot be mapped, or is longer than its place.
        """
        with self._lock:
            if place not in self._sizes:
                with file.open("rb") as handle:
                    size = os.fstat(handle.fileno()).st_size
                    if not 0 < size <= self.distance:
                        raise OSError(f"{file} has {size} bytes, its place {self.distance}")
                    at = self._address + place * self.distance
                    self._map(at, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, handle.fileno())
                self._sizes[place] = size
            return self._sizes[place]
