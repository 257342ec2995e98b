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

#: What the writer writes of a unit that has files and a number of rows, as most units do: `json_text` of it.
_OF_ROWS = re.compile(
    rb'\{\n "files": \{\n((?:  "[A-Za-z0-9._/-]+": \{\n   "bytes": [0-9]{1,15},\n   "crc32": "[0-9a-f]{8}"\n  \},?\n)+)'
    rb' \},\n "rows": ([0-9]{1,15}),\n "unit": "([A-Za-z0-9._/-]+)"\n\}\n\Z'
)
_OF_FILE = re.compile(rb'  "([^"]+)": \{\n   "bytes": ([0-9]+),\n   "crc32": "([0-9a-f]{8})"\n  \}(,?)\n')

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

    def manifest_sizes(self) -> dict[str, int | None]:
        """Bytes of every manifest document by the name of its unit, None where they are not known; nothing is read."""
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
            # Not through Path: there may be hundreds of thousands.
            found = os.stat(f"{self.location}/{name}")  # noqa: PTH116
        except (OSError, ValueError):
            return -1
        return found.st_size if S_ISREG(found.st_mode) else -1

    def manifest(self) -> dict[str, bytes]:
        """Every manifest document by the name of its unit, sorted."""
        return {unit: read_document(f"{self.location}/{MANIFEST}/{unit}.json") for unit in self.manifest_sizes()}

    def manifest_sizes(self) -> dict[str, int | None]:
        """Bytes of every manifest document by the name of its unit."""
        return dict(manifest_files(self.location / MANIFEST))

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


def read_document(path: str) -> bytes:
    """The content of a small file that is there.

    Args:
        path: The file; text, as there may be hundreds of thousands.

    Raises:
        StoreAccessError: It cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return file.readall()
    except OSError as error:
        raise _unreadable(Path(path), error) from error


def manifest_files(root: Path) -> dict[str, int]:
    """Bytes of the manifest's documents by the names of their units, sorted.

    Arrays may lie on another disk; the manifest says what they have to be, and so it lies in the store itself.

    Args:
        root: The manifest's folder, or one in it; need not exist.

    Raises:
        CorruptDataError: It holds a link, or something that is no file.
    """
    found: list[tuple[str, int]] = []
    folders = [(str(root), "")] if os.path.lexists(root) else []
    for folder, above in folders:
        # A root that is a link is seen here, and what stands in the place of a folder as well.
        if os.path.islink(folder) or not os.path.isdir(folder):  # noqa: PTH112, PTH114
            raise _no_manifest(Path(folder))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append((entry.path, f"{above}{entry.name}/"))
                elif entry.is_symlink() or (entry.name.endswith(".json") and not entry.is_file()):
                    raise _no_manifest(Path(entry.path))
                elif entry.name.endswith(".json"):
                    found.append((above + entry.name, entry.stat().st_size))
    return {name.removesuffix(".json"): size for name, size in sorted(found, key=lambda each: each[0].split("/"))}


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
    known = _entry_of_rows(data, unit)
    if known is not None:
        return known
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
    if unit == METADATA_UNIT:
        if not {"attributes", "units"} <= entry.keys():
            raise CorruptDataError(
                f"{where} does not list the units, or what the root says; restore it or extract again"
            )
        _check_units(entry["units"], where)
    return entry


def _entry_of_rows(data: bytes, unit: str) -> dict[str, Any] | None:
    """An entry that stands as the writer writes it; None for any other, which is parsed and judged part by part.

    There are as many as shards, and parsing each takes twenty times as long.
    """
    found = _OF_ROWS.match(data)
    if found is None or found[3].decode() != unit:
        return None
    files = _OF_FILE.findall(found[1])
    names = [name.decode() for name, *_ in files]
    sound = all(_FILE_NAME.match(name) and ".." not in name.split("/") for name in names)
    commas = [comma for *_, comma in files] == [b","] * (len(files) - 1) + [b""]
    numbers = [number for _, number, *_ in files] + [found[2]]
    if not sound or not commas or len(set(names)) < len(names):
        return None
    if any(int(number) > MOST or (len(number) > 1 and number.startswith(b"0")) for number in numbers):
        return None
    records = {
        name: {"bytes": int(size), "crc32": checksum.decode()}
        for name, (_, size, checksum, _) in zip(names, files, strict=True)
    }
    return {"files": records, "rows": int(found[2]), "unit": unit}


def _check_units(units: Any, where: str) -> None:
    """The units that were sealed, with the checksums of their entries: as many as shards, and so not by the schema."""
    if not isinstance(units, dict):
        raise CorruptDataError(f"{where} lists no units; restore it or extract again")
    for name, checksum in units.items():
        if not _FILE_NAME.match(name) or ".." in name.split("/"):
            raise CorruptDataError(f"{where} names {name!r}, which is not a unit of this store; do not trust it")
        if type(checksum) is not str or not _CHECKSUM.match(checksum):
            raise CorruptDataError(f"{where} records {checksum!r} for {name!r}; restore it or extract again")
