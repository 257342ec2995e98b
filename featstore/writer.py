"""Whole shards to disk so that a store is never half true.

A *unit* is the set of files that appear together: the corpus, a model's token table, one shard of all its layers, a
pair index. Every file is written aside, fsynced and renamed; then one manifest entry, written the same way, records
each file's size and checksum and makes the unit exist; the row counts in ``zarr.json`` move last. What the manifest
does not name is not there, whatever lies on disk.

Nothing that could differ between two runs of the same plan (time, host, process) is written.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore import formats
from featstore.errors import CorruptDataError, NoSpaceError, StoreBusyError, StoreStateError
from featstore.provenance import digest, fsync_directory, json_text, read_json, write_atomic, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest"
_LOCK = ".writer.lock"
METADATA_UNIT = "metadata"
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}(/[A-Za-z0-9._-]{1,255}){0,12}\Z")
_CHECKSUM = re.compile(r"[0-9a-f]{8}\Z")

#: Chunk length of token tables and pair indexes.
VECTOR_CHUNK = 1 << 20


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the store's writer lock, and remove what a killed writer left half written aside.

    The lock goes with the process, so a crash leaves no stale one.

    Args:
        path: The store; created if it does not exist.

    Raises:
        StoreBusyError: Another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / _LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreBusyError(
                f"{path} is being written by another process; wait for it, or choose another --store"
            ) from error
        for left in path.rglob(".*.part"):
            left.unlink()
        yield


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
    entry = read_json(path)
    files = entry.get("files")
    if entry.get("unit") != unit or not isinstance(files, dict):
        raise CorruptDataError(f"{path} is not the manifest entry of {unit!r}; restore it or extract again")
    for name, record in files.items():
        if not _FILE_NAME.match(name) or ".." in name.split("/"):
            raise CorruptDataError(f"{path} names {name!r}, which is not a file of this store; do not trust it")
        if not (
            isinstance(record, dict)
            and record.keys() == {"bytes", "crc32"}
            and type(record["bytes"]) is int
            and _CHECKSUM.match(str(record["crc32"]))
        ):
            raise CorruptDataError(f"{path} records {record!r} for {name!r}; restore it or extract again")
    return entry


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
        from featstore.console import human_bytes

        raise NoSpaceError(f"{path} needs {human_bytes(needed)} and {human_bytes(free)} are free; {remedy}")


def free_bytes(path: Path) -> int:
    """Free space on the disk a path lies, or would lie, on.

    Args:
        path: May not exist yet.
    """
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


class StoreWriter:
    """Writes units into a store directory. Use inside :func:`exclusive`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, unit: str) -> bool:
        """Whether the manifest names a unit and its files have the recorded sizes.

        Args:
            unit: Such as ``models/llama/rows-000003``.

        Raises:
            CorruptDataError: The manifest entry is damaged.
        """
        entry = self._manifest_path(unit)
        if not entry.exists():
            return False
        files = read_entry(entry, unit)["files"]
        return all(
            (self.path / name).is_file() and (self.path / name).stat().st_size == record["bytes"]
            for name, record in files.items()
        )

    def commit(self, unit: str, files: dict[str, bytes]) -> None:
        """Write a unit's files and then its manifest entry.

        Args:
            unit: Name of the unit.
            files: Content by path relative to the store.

        Raises:
            NoSpaceError: The disk filled up; nothing of the unit counts as written.
        """
        record = {}
        try:
            for name, data in files.items():
                self._place(name, data)
                record[name] = {"bytes": len(data), "crc32": formats.file_checksum(data)}
            write_json(self._manifest_path(unit), {"unit": unit, "files": record})
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
        write_json(self.path / name / "zarr.json", formats.group_document(attributes))

    def attributes(self, name: str = "") -> dict[str, Any] | None:
        """Attributes of a group, or None where there is no group.

        Args:
            name: Path within the store.
        """
        path = self.path / name / "zarr.json"
        return read_json(path).get("attributes", {}) if path.exists() else None

    def vectors(self, unit: str, arrays: dict[str, NDArray[Any]]) -> None:
        """Commit small arrays as one unit.

        Args:
            unit: Name of the unit.
            arrays: By path within the store.
        """
        files: dict[str, bytes] = {}
        for name, array in arrays.items():
            chunk = max(min(len(array), VECTOR_CHUNK), 1)
            files.update(vector_files(name, array, chunk))
            # Before the commit: a resume does not come back to a unit that counts as written.
            write_json(self.path / name / "zarr.json", formats.vector_document(array, chunk))
        self.commit(unit, files)

    def seal(self, attributes: dict[str, Any]) -> None:
        """Mark the store complete: consolidate its metadata (it would go stale any earlier) and checksum it.

        The root's attributes get a checksum of their own: they are the same before and after a pair index is added, so
        a crash between the two writes below leaves a store that can still be read.

        Args:
            attributes: The root's attributes.
        """
        documents = {}
        for path in sorted(self.path.rglob("zarr.json")):
            name = path.parent.relative_to(self.path).as_posix()
            if name != ".":
                documents[name] = read_json(path)
        root = formats.group_document(attributes)
        root["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": documents,
        }
        texts = {f"{name}/zarr.json": json_text(document) for name, document in documents.items()}
        texts["zarr.json"] = json_text(root)
        record = {
            name: {"bytes": len(text.encode()), "crc32": formats.file_checksum(text.encode())}
            for name, text in texts.items()
        }
        write_json(
            self._manifest_path(METADATA_UNIT),
            {"unit": METADATA_UNIT, "files": record, "attributes": digest(attributes)},
        )
        write_atomic(self.path / "zarr.json", texts["zarr.json"])

    def unit_names(self) -> Iterator[str]:
        """Names of all units in the manifest, sorted."""
        root = self.path / MANIFEST
        for path in sorted(root.rglob("*.json")):
            yield path.relative_to(root).with_suffix("").as_posix()

    def _manifest_path(self, unit: str) -> Path:
        return self.path / MANIFEST / f"{unit}.json"

    def _place(self, name: str, data: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.part")
        with aside.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        aside.replace(path)
        fsync_directory(path.parent)


def vector_files(name: str, array: NDArray[Any], chunk: int) -> dict[str, bytes]:
    """Chunk files of a small array, by path.

    Args:
        name: The array's path within the store.
        array: Any boolean, integer or float array.
        chunk: Length along the first axis; the last chunk is padded with zeros.
    """
    rest = "/0" * (array.ndim - 1)
    return {
        f"{name}/c/{i}{rest}": _padded_chunk(array[start : start + chunk], chunk)
        for i, start in enumerate(range(0, len(array), chunk))
    }


def _padded_chunk(part: NDArray[Any], chunk: int) -> bytes:
    if len(part) < chunk:
        full = np.zeros((chunk, *part.shape[1:]), dtype=part.dtype)
        full[: len(part)] = part
        part = full
    return formats.seal(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<"), copy=False).tobytes())


def rows_unit(model: str, shard: int) -> str:
    """Name of the unit that holds one shard of all layers of a model.

    Args:
        model: Model name.
        shard: Shard number.
    """
    return f"models/{model}/rows-{shard:06d}"


class RowWriter:
    """Gathers one model's rows, arriving in any order within a group, and commits whole shards.

    Args:
        writer: The store's writer.
        model: Model name.
        rows: Rows of the model in all.
        width: Hidden width.
        layers: Layers stored.
        shard_rows: Rows of a shard.
        form: Element format.
        layout: Inner chunking.
    """

    def __init__(
        self,
        writer: StoreWriter,
        model: str,
        *,
        rows: int,
        width: int,
        layers: Iterable[int],
        shard_rows: int,
        form: formats.Format,
        layout: formats.Layout,
    ) -> None:
        if shard_rows % layout.chunk_rows:
            raise StoreStateError(
                f"--shard-rows {shard_rows} is not a multiple of {layout.chunk_rows}, the chunk of layout {layout.name}"
            )
        self.rows, self.width, self.layers, self.shard_rows = rows, width, tuple(layers), shard_rows
        self._writer, self._model, self.form, self._layout = writer, model, form, layout
        self.shards = -(-rows // shard_rows)
        self.done = {s for s in range(self.shards) if writer.has(rows_unit(model, s))}
        self._open: dict[int, dict[int, tuple[NDArray[Any], NDArray[np.float32]]]] = {}
        self._count_rows()

    def wanted(self, first: int, end: int) -> bool:
        """Whether any shard that rows first..end touch is still missing.

        Args:
            first: First row.
            end: Row after the last.
        """
        return any(
            s not in self.done
            for s in range(first // self.shard_rows, (max(end, first + 1) - 1) // self.shard_rows + 1)
        )

    def put(self, start: int, layer: int, stored: NDArray[Any], norms: NDArray[np.float32]) -> None:
        """Place consecutive rows of one layer.

        Args:
            start: First row.
            layer: Layer.
            stored: ``(rows, width)`` of the storage type.
            norms: float32 ``(rows,)``, Euclidean norm of the stored values.
        """
        end = start + len(stored)
        while start < end:
            shard = start // self.shard_rows
            base = shard * self.shard_rows
            stop = min(end, base + self.shard_rows)
            if shard not in self.done:
                rows, norm = self._buffers(shard)[layer]
                count = stop - start
                rows[start - base : stop - base] = stored[:count]
                norm[start - base : stop - base] = norms[:count]
            stored, norms = stored[stop - start :], norms[stop - start :]
            start = stop

    def advance(self, row: int) -> int:
        """Commit every shard whose rows are all below a row.

        Args:
            row: All rows before this one have been put.

        Returns:
            Number of shards committed.
        """
        ready = [s for s in sorted(self._open) if min((s + 1) * self.shard_rows, self.rows) <= row]
        for shard in ready:
            self._commit(shard, self._open.pop(shard))
        return len(ready)

    def _buffers(self, shard: int) -> dict[int, tuple[NDArray[Any], NDArray[np.float32]]]:
        if shard not in self._open:
            size = min(self.shard_rows, self.rows - shard * self.shard_rows)
            self._open[shard] = {
                k: (np.zeros((size, self.width), self.form.storage), np.zeros(size, np.float32)) for k in self.layers
            }
        return self._open[shard]

    def _commit(self, shard: int, buffers: dict[int, tuple[NDArray[Any], NDArray[np.float32]]]) -> None:
        files: dict[str, bytes] = {}
        for layer, (rows, norm) in buffers.items():
            base = f"models/{self._model}"
            files[f"{base}/resid/{layer}/c/{shard}/0"] = formats.encode_shard(rows, self.shard_rows, self._layout)
            files[f"{base}/norm/{layer}/c/{shard}"] = _padded_chunk(norm, self.shard_rows)
        self._writer.commit(rows_unit(self._model, shard), files)
        self.done.add(shard)
        self._count_rows()

    def _count_rows(self) -> None:
        """Let the arrays grow to the rows committed without a gap."""
        whole = next((s for s in range(self.shards) if s not in self.done), self.shards)
        rows = min(whole * self.shard_rows, self.rows)
        for layer in self.layers:
            base = self._writer.path / "models" / self._model
            document = formats.rows_document(rows, self.width, self.shard_rows, self.form, self._layout)
            write_json(base / "resid" / str(layer) / "zarr.json", document)
            norm = formats.vector_document(np.empty(0, np.float32), self.shard_rows)
            write_json(base / "norm" / str(layer) / "zarr.json", {**norm, "shape": [rows]})
