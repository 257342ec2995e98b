"""The sorted index of a sealed store: a line for every file, so that no reader opens a document for every shard.

A line is the file's path, its size and its CRC-32, between tabs: ``models/llama/norm/2/c/17 65540 8c2f1d03``.
Lines are sorted by their bytes. The manifest's documents are among the files, so that one list tells all there is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import ItemsView, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError
from featstore.store.format.attributes import MOST
from featstore.store.format.version import MANIFEST

#: Where it lies. No document of the manifest, so that readers from before pass it over.
INDEX = f"{MANIFEST}/index"

#: What a path is made of; with a letter before and after the separators, what :data:`_PATH` of the manifest asks for.
_PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-/"
_HEX = b"0123456789abcdef"
_MOST_PARTS = 13
_MOST_NAME = 255


def index_text(files: Iterable[tuple[str, int, str]]) -> bytes:
    """The content of an index.

    Args:
        files: Path within the store, bytes and CRC-32 of each, in any order.
    """
    lines = sorted(f"{name}\t{size}\t{checksum}\n" for name, size, checksum in files)
    return "".join(lines).encode()


class FileIndex(Mapping[str, Mapping[str, Any]]):
    """Files of a store by path, each with ``bytes`` and ``crc32``; sorted, and held as arrays.

    Args:
        names: Paths, sorted.
        sizes: int64 ``(n,)``.
        checksums: CRC-32 of each, 8 hexadecimal digits as bytes ``S8``.
    """

    def __init__(self, names: list[str], sizes: NDArray[np.int64], checksums: NDArray[np.bytes_]) -> None:
        self._names, self._sizes, self._checksums = names, sizes, checksums

    @classmethod
    def parse(cls, data: bytes, where: str) -> FileIndex:
        """Read an index that may come from anybody.

        Args:
            data: Its content.
            where: Named in errors.

        Raises:
            CorruptDataError: It is damaged, not sorted, or names a file outside the store.
        """
        columns = data.replace(b"\n", b"\t").split(b"\t")
        if columns.pop() != b"" or len(columns) != 3 * data.count(b"\n"):
            raise _damaged(where, "a line is not a path, a size and a checksum")
        paths, sizes, sums = columns[0::3], columns[1::3], columns[2::3]
        _check_paths(paths, where)
        digits = b"".join(sizes)
        if (sizes and not digits.isdigit()) or not all(0 < len(size) <= len(str(MOST)) for size in sizes):
            raise _damaged(where, "a size is no number")
        numbers = np.array(list(map(int, sizes)), np.int64)
        if len(numbers) and numbers.max() > MOST:
            raise _damaged(where, f"a size is {numbers.max()}")
        if any(len(each) != 8 for each in sums) or b"".join(sums).translate(None, _HEX):
            raise _damaged(where, "a checksum is not 8 hexadecimal digits")
        return cls([path.decode() for path in paths], numbers, np.array(sums, "S8"))

    def below(self, prefix: str) -> FileIndex:
        """The files whose paths begin with something.

        Args:
            prefix: Such as ``models/llama/``.
        """
        first = bisect_left(self._names, prefix)
        # No character of a path comes after this one.
        end = bisect_left(self._names, prefix + "\x7f")
        return FileIndex(self._names[first:end], self._sizes[first:end], self._checksums[first:end])

    def without(self, prefix: str) -> FileIndex:
        """The files whose paths do not begin with something.

        Args:
            prefix: Such as ``manifest/``.
        """
        first, end = bisect_left(self._names, prefix), bisect_left(self._names, prefix + "\x7f")
        keep = np.ones(len(self._names), bool)
        keep[first:end] = False
        return FileIndex(self._names[:first] + self._names[end:], self._sizes[keep], self._checksums[keep])

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return int(self._sizes.sum())

    def place(self, name: str) -> int | None:
        """The line of a file, None where there is none.

        Args:
            name: Its path.
        """
        at = bisect_left(self._names, name)
        return at if at < len(self._names) and self._names[at] == name else None

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        at = self.place(name)
        if at is None:
            raise KeyError(name)
        return self.record(at)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.place(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> ItemsView[str, Mapping[str, Any]]:
        """Path and record of every file, sorted."""
        return _Items(self)

    def record(self, at: int) -> dict[str, Any]:
        """What is recorded of a file.

        Args:
            at: Its line.
        """
        return {"bytes": int(self._sizes[at]), "crc32": self._checksums[at].decode()}


class _Items(ItemsView[str, Mapping[str, Any]]):
    """Items in order, without looking each up."""

    _mapping: FileIndex

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        held = self._mapping
        for at, name in enumerate(held):
            yield name, held.record(at)


def _check_paths(paths: list[bytes], where: str) -> None:
    """Each is a file of the store, and comes after the one before it."""
    joined = b"\n".join(paths)
    if joined.translate(None, _PLAIN + b"\n") or not all(paths):
        raise _damaged(where, "it names something that is not a file of this store; do not trust it")
    framed = b"\n" + joined.replace(b"/", b"\n/\n") + b"\n"
    # Between separators: no empty part, no way up.
    if paths and (b"\n\n" in framed or b"\n..\n" in framed):
        raise _damaged(where, "it names something that is not a file of this store; do not trust it")
    if any(path.count(b"/") >= _MOST_PARTS for path in paths) or max(map(len, framed.split(b"\n"))) > _MOST_NAME:
        raise _damaged(where, "it names a path that is longer than any is")
    if any(first >= second for first, second in pairwise(paths)):
        raise _damaged(where, "its lines are not sorted, or a file stands twice")


def _damaged(where: str, what: str) -> CorruptDataError:
    return CorruptDataError(f"{where}: {what}; restore it or extract again")
