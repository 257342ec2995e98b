"""Whole shards to disk so that a store is never half true.

A *unit* is the set of files that appear together: the corpus, a model's token table, one shard of one layer, a pair
index. Every file is written aside, fsynced and renamed; then one manifest entry, written the same way, records
each file's size and checksum and makes the unit exist; the row counts in ``zarr.json`` move last. What the manifest
does not name is not there, whatever lies on disk.

Nothing that could differ between two runs of the same plan (time, host, process) is written.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from featstore.errors import NoSpaceError, StoreAccessError, StoreBusyError, StoreStateError
from featstore.runtime.provenance import digest, fsync_directory, json_text, read_json, write_atomic, write_json
from featstore.store.format import documents
from featstore.store.format.shards import Buffer, file_checksum, seal
from featstore.store.format.version import MANIFEST, METADATA_UNIT, REBUILDING
from featstore.store.read.files import LocalFiles, parse_entry
from featstore.store.read.portable import store_files
from featstore.store.read.store import Store, open_files

_LOCK = ".writer.lock"
#: Of these a reader keeps nothing: every look goes to the files.
_NOT_KEPT = ("pairs", "moments")

#: What a file will hold.
Content = bytes | Iterator[Buffer]

#: Chunk length of token tables and pair indexes.
VECTOR_CHUNK = 1 << 20


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the store's writer lock, and remove what a killed writer left half written aside.

    The lock goes with the process, so a crash leaves no stale one.

    Args:
        path: The store; created if it does not exist.

    Raises:
        StoreAccessError: It cannot be written to.
        StoreBusyError: Another process holds it.
    """
    with _lock_file(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreBusyError(
                f"{path} is being written by another process; wait for it, or choose another --store"
            ) from error
        for left in path.rglob(".*.part"):
            left.unlink()
        yield


def _lock_file(path: Path) -> TextIO:
    """The store's lock file, open; made with its directory if there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return (path / _LOCK).open("w")
    except OSError as error:
        raise StoreAccessError(
            f"{path} cannot be written to ({error.strerror}); copy it to where you may write, or choose another --store"
        ) from error


@contextmanager
def adding_to(path: Path, *, rebuild: bool = False) -> Iterator[StoreWriter]:
    """Hold the lock of a complete store on this machine, to add to it what follows from its rows.

    Args:
        path: The store.
        rebuild: To derive token tables and pairs again: the store may be of an older format version, or half rebuilt.

    Yields:
        Its writer, whose view is the store as it is now that nobody else writes.

    Raises:
        StoreNotFoundError: No such store.
        StoreStateError: It is unfinished, of an older format version, or not on this machine.
        StoreAccessError: It cannot be written to.
        StoreBusyError: Another process writes to it.
    """
    with exclusive(_to_add_to(path, rebuild=rebuild).directory):
        # Only now: what another process added while we waited to begin belongs to it.
        yield StoreWriter(path, _to_add_to(path, rebuild=rebuild))


def _to_add_to(path: Path, *, rebuild: bool) -> Store:
    """A store as :func:`adding_to` asks for it; an older version is not announced, but accepted or refused."""
    store = open_files(store_files(path), allow_incomplete=rebuild)
    if not rebuild:
        store.require_current()
    elif not store.attributes.get("complete") and not store.attributes.get(REBUILDING):
        raise StoreStateError(f"{path} is unfinished; run the same `featstore extract` command again to complete it")
    return store


def read_entry(path: Path, unit: str) -> dict[str, Any]:
    """Read a manifest entry.

    Args:
        path: An existing manifest file.
        unit: The unit it must name.

    Returns:
        ``{"unit": ..., "files": {path: {"bytes": ..., "crc32": ...}}, ...}``.

    Raises:
        CorruptDataError: It is damaged or names a file outside the store.
    """
    return parse_entry(path.read_bytes(), str(path), unit)


def check_space(path: Path, needed: int, remedy: str) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        path: Where the store is or will be.
        needed: Bytes still to write.
        remedy: The flag that would make it fit.

    Raises:
        NoSpaceError: Too little is free.
    """
    free = free_bytes(path)
    if needed > free:
        from featstore.runtime.console import human_bytes

        raise NoSpaceError(f"{path} needs {human_bytes(needed)} and {human_bytes(free)} are free; {remedy}")


def free_bytes(path: Path) -> int:
    """Free space on the disk a path lies, or would lie, on.

    Args:
        path: May not exist yet.
    """
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


class StoreWriter:
    """Writes units into a store directory. Use inside :func:`exclusive`.

    Args:
        path: The directory.
        view: The store as it was opened a moment ago, where it was.
    """

    def __init__(self, path: Path, view: Store | None = None) -> None:
        self.path = path
        self._view = view

    @property
    def view(self) -> Store:
        """What has been committed, as a reader of the store sees it; valid until something else is written.

        The steps after the rows (sink masks, pair indexes, moments, the summary) read through it. It keeps what it has
        read until this writer changes that.

        Raises:
            FeatstoreError: No root has been written, or what is there is damaged.
        """
        if self._view is None:
            self._view = open_files(LocalFiles(self.path), allow_incomplete=True)
        return self._view

    def _changed(self, name: str) -> None:
        """Something was written: forget what the view may have kept of it."""
        if self._view is not None and (name.partition("/")[0] not in _NOT_KEPT or "manifest" in vars(self._view)):
            self._view = None

    def has(self, unit: str) -> bool:
        """Whether the manifest names a unit and its files have the recorded sizes.

        Args:
            unit: Such as ``models/llama/rows-000003``.

        Raises:
            CorruptDataError: The manifest entry is damaged.
        """
        return self.entry(unit) is not None

    def entry(self, unit: str) -> dict[str, Any] | None:
        """The manifest entry of a unit whose files have the recorded sizes, or None.

        Args:
            unit: Name of the unit.

        Raises:
            CorruptDataError: The manifest entry is damaged.
        """
        path = self._manifest_path(unit)
        if not path.exists():
            return None
        entry = read_entry(path, unit)
        whole = all(
            (self.path / name).is_file() and (self.path / name).stat().st_size == record["bytes"]
            for name, record in entry["files"].items()
        )
        return entry if whole else None

    def commit(self, unit: str, files: Mapping[str, Content], **facts: int | str) -> None:
        """Write a unit's files and then its manifest entry.

        Args:
            unit: Name of the unit.
            files: Content by path relative to the store: bytes, or pieces one after another.
            facts: Recorded in the entry beside the files, such as the number of rows.

        Raises:
            NoSpaceError: The disk filled up; nothing of the unit counts as written.
        """
        record = {}
        self._changed(unit)
        try:
            for name, data in files.items():
                record[name] = self._place(name, data)
            write_json(self._manifest_path(unit), {"unit": unit, "files": record, **facts})
        except NoSpaceError:
            raise
        except OSError as error:
            raise NoSpaceError(
                f"cannot write {unit} to {self.path} ({error.strerror or error}); what was committed is kept: "
                "free some space and run the same command again"
            ) from error

    def group(self, name: str, attributes: dict[str, Any]) -> None:
        """Write a group document.

        Args:
            name: Path within the store; empty for the root.
            attributes: JSON attributes.
        """
        self._changed(name)
        write_json(self.path / name / "zarr.json", documents.group_document(attributes))

    def attributes(self, name: str = "") -> dict[str, Any] | None:
        """Attributes of a group, or None where there is no group.

        Args:
            name: Path within the store.
        """
        path = self.path / name / "zarr.json"
        return read_json(path).get("attributes", {}) if path.exists() else None

    def describe(self, described: Mapping[str, dict[str, Any]]) -> None:
        """Write the ``zarr.json`` of arrays, before the commit of the unit they belong to.

        Args:
            described: Documents by path within the store, without the names of dimensions, which are added; those
                that are there already are left alone.
        """
        for name, document in described.items():
            path, text = self.path / name / "zarr.json", json_text(documents.named(name, document))
            if not path.is_file() or path.read_bytes() != text.encode():
                self._changed(name)
                write_atomic(path, text)

    def vectors(
        self,
        unit: str,
        arrays: Mapping[str, NDArray[Any]],
        *,
        more: Mapping[str, Content] | None = None,
        **facts: int | str,
    ) -> None:
        """Commit small arrays as one unit.

        Args:
            unit: Name of the unit.
            arrays: By path within the store.
            more: Further files of the unit.
            facts: Recorded in the manifest entry.
        """
        files: dict[str, Content] = dict(more or {})
        for name, array in arrays.items():
            chunk = max(min(len(array), VECTOR_CHUNK), 1)
            files.update(vector_files(name, array, chunk))
            # Before the commit: a resume does not come back to a unit that counts as written.
            self.describe({name: documents.vector_document(array, chunk)})
        self.commit(unit, files, **facts)

    def seal(self, attributes: dict[str, Any]) -> None:
        """Mark the store complete: consolidate its metadata (it would go stale any earlier) and checksum it.

        The root's attributes get a checksum of their own: they are the same before and after a pair index is added, so
        a crash between the two writes below leaves a store that can still be read.

        Args:
            attributes: The root's attributes.
        """
        self._view = None
        held = {}
        for path in sorted(self.path.rglob("zarr.json")):
            name = path.parent.relative_to(self.path).as_posix()
            if name != ".":
                held[name] = read_json(path)
        root = documents.group_document(attributes)
        root["consolidated_metadata"] = documents.consolidated(held)
        texts = {f"{name}/zarr.json": json_text(document) for name, document in held.items()}
        texts["zarr.json"] = json_text(root)
        record = {
            name: {"bytes": len(text.encode()), "crc32": file_checksum(text.encode())} for name, text in texts.items()
        }
        rows = {
            unit: file_checksum(self._manifest_path(unit).read_bytes())
            for unit in self.unit_names()
            if unit != METADATA_UNIT
        }
        write_json(
            self._manifest_path(METADATA_UNIT),
            {"unit": METADATA_UNIT, "files": record, "attributes": digest(attributes), "units": rows},
        )
        write_atomic(self.path / "zarr.json", texts["zarr.json"])

    def drop(self, unit: str) -> None:
        """Take a unit out of the manifest; its files stay until they are written over.

        Args:
            unit: Name of the unit; nothing happens where there is none.
        """
        path = self._manifest_path(unit)
        self._changed(unit)
        if path.exists():
            path.unlink()
            fsync_directory(path.parent)

    def restate(self, unit: str, **facts: int | str) -> None:
        """Record other facts of a unit whose files stay as they are.

        Args:
            unit: Name of a unit that is there.
            facts: Take the place of those of the same names.
        """
        self._changed(unit)
        path = self._manifest_path(unit)
        write_json(path, {**read_entry(path, unit), **facts})

    def unit_names(self) -> Iterator[str]:
        """Names of all units in the manifest, sorted."""
        root = self.path / MANIFEST
        for path in sorted(root.rglob("*.json")):
            yield path.relative_to(root).with_suffix("").as_posix()

    def _manifest_path(self, unit: str) -> Path:
        return self.path / MANIFEST / f"{unit}.json"

    def _place(self, name: str, content: Content) -> dict[str, Any]:
        """Write a file aside, sync it and rename it; returns what the manifest records of it."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.part")
        with aside.open("wb", buffering=0) as handle:
            if isinstance(content, bytes):
                _write(handle, content)
                size, checksum = len(content), zlib.crc32(content)
            else:
                size, checksum = _write_pieces(handle, content)
            os.fsync(handle.fileno())
        aside.replace(path)
        fsync_directory(path.parent)
        return {"bytes": size, "crc32": f"{checksum:08x}"}


def _write(handle: FileIO, piece: Buffer) -> None:
    """All of a piece: one call may write less."""
    left = memoryview(piece)
    while left:
        left = left[handle.write(left) or 0 :]


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
            _write(handle, piece)
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
