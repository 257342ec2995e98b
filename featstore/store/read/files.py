"""Where the files of a store are: all that a reader asks of the place.

A store is read through the few methods of :class:`StoreFiles`. :class:`LocalFiles` answers from a directory, with rows
mapped; :class:`featstore.store.read.portable.PortableFiles` answers from anything that zarr-python can open.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, StoreAccessError
from featstore.runtime.provenance import parse_json
from featstore.runtime.schema import parse
from featstore.store.format.attributes import MOST, Facts
from featstore.store.format.version import MANIFEST, METADATA_UNIT
from featstore.store.read.rows import RowReader

_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}(/[A-Za-z0-9._-]{1,255}){0,12}\Z")
_CHECKSUM = re.compile(r"[0-9a-f]{8}\Z")

#: Path of an array within the store, and its ``zarr.json``.
Described = tuple[str, dict[str, Any]]


class StoreFiles(Protocol):
    """The files of one store."""

    @property
    def location(self) -> Path | str:
        """The directory or URL, as errors and callers name it."""
        ...

    @property
    def origin(self) -> Any:
        """What :func:`featstore.store.open_store` takes to open the same store in another process."""
        ...

    def read(self, name: str) -> bytes | None:
        """Content of a file, None where there is none.

        Args:
            name: Path within the store.
        """
        ...

    def read_all(self, names: Sequence[str]) -> dict[str, bytes | None]:
        """Content of many small files by name, None where there is none.

        Args:
            names: Paths within the store.
        """
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; -1 where there is none, None where that takes a request of its own.

        Args:
            name: Path within the store.
        """
        ...

    def manifest(self) -> dict[str, bytes]:
        """Every manifest document by the name of its unit, sorted."""
        ...

    def rows(self, array: Described, scales: Described | None, column_scale: NDArray[np.float32] | None) -> RowReader:
        """A reader of one ``(n, width)`` array.

        Args:
            array: The array.
            scales: Its scales by row, for formats that have them.
            column_scale: float32 ``(width,)``, for formats that have one.
        """
        ...


class LocalFiles:
    """A store in a directory.

    Args:
        root: The directory.
    """

    def __init__(self, root: Path) -> None:
        self.location = root
        # Absolute, and now: this process may move, and another may work elsewhere.
        self.origin = str(root.absolute())

    def read(self, name: str) -> bytes | None:
        """Content of a file, None where there is none.

        Args:
            name: Path within the store.
        """
        path = self.location / name
        try:
            return path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise _unreadable(path, error) from error

    def read_all(self, names: Sequence[str]) -> dict[str, bytes | None]:
        """Content of many small files by name, None where there is none.

        Args:
            names: Paths within the store.
        """
        return {name: self.read(name) for name in names}

    def size(self, name: str) -> int | None:
        """Bytes of a file; -1 where there is none.

        Args:
            name: Path within the store.
        """
        try:
            found = (self.location / name).stat()
        except OSError:
            return -1
        return found.st_size if S_ISREG(found.st_mode) else -1

    def manifest(self) -> dict[str, bytes]:
        """Every manifest document by the name of its unit, sorted."""
        found = {}
        for unit, path in manifest_files(self.location / MANIFEST).items():
            try:
                found[unit] = path.read_bytes()
            except OSError as error:
                raise _unreadable(path, error) from error
        return found

    def rows(self, array: Described, scales: Described | None, column_scale: NDArray[np.float32] | None) -> RowReader:
        """Rows read from mapped shards.

        Args:
            array: The array.
            scales: Its scales by row, for formats that have them.
            column_scale: float32 ``(width,)``, for formats that have one.
        """
        name, document = array
        return RowReader(
            self.location / name, document, None if scales is None else self.location / scales[0], column_scale
        )


def manifest_files(root: Path) -> dict[str, Path]:
    """The manifest's documents by the names of their units, sorted.

    Arrays may lie on another disk; the manifest says what they have to be, and so it lies in the store itself.

    Args:
        root: The manifest's folder; need not exist.

    Raises:
        CorruptDataError: It holds a link, or something that is no file.
    """
    found, folders = [], [root] if os.path.lexists(root) else []
    for folder in folders:
        # A root that is a link is seen here, and what stands in the place of a folder as well.
        if folder.is_symlink() or not folder.is_dir():
            raise _no_manifest(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_symlink() or (entry.name.endswith(".json") and not entry.is_file()):
                    raise _no_manifest(Path(entry.path))
                elif entry.name.endswith(".json"):
                    found.append(Path(entry.path))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(found)}


def _no_manifest(path: Path) -> CorruptDataError:
    leads = f"a link to {path.readlink()}" if path.is_symlink() else "neither a file nor a folder"
    return CorruptDataError(
        f"{path} is {leads}, and a manifest holds files and folders alone; put the file or folder itself there"
    )


def _unreadable(path: Path, error: OSError) -> StoreAccessError:
    return StoreAccessError(f"{path} cannot be read ({error.strerror}); restore it, or ask for permission to read it")


def parse_entry(data: bytes, where: str, unit: str) -> dict[str, Any]:
    """Check a manifest entry.

    Args:
        data: The document.
        where: Named in errors.
        unit: The unit it must name.

    Returns:
        ``{"unit": ..., "files": {path: {"bytes": ..., "crc32": ...}}, ...}``.

    Raises:
        CorruptDataError: It is damaged or names a file outside the store.
    """
    entry = parse_json(data, where)
    files = entry.get("files")
    if entry.get("unit") != unit or not isinstance(files, dict):
        raise CorruptDataError(f"{where} is not the manifest entry of {unit!r}; restore it or extract again")
    # Not by the schema: there are as many as shards, and as many records as files.
    for name, record in files.items():
        if not _FILE_NAME.match(name) or ".." in name.split("/"):
            raise CorruptDataError(f"{where} names {name!r}, which is not a file of this store; do not trust it")
        if not (
            isinstance(record, dict)
            and record.keys() == {"bytes", "crc32"}
            and type(record["bytes"]) is int
            and 0 <= record["bytes"] <= MOST
            and type(record["crc32"]) is str
            and _CHECKSUM.match(record["crc32"])
        ):
            raise CorruptDataError(f"{where} records {record!r} for {name!r}; restore it or extract again")
    parse(Facts, entry, where)
    if unit == METADATA_UNIT and not {"attributes", "units"} <= entry.keys():
        raise CorruptDataError(f"{where} does not list the units, or what the root says; restore it or extract again")
    return entry
