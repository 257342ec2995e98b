"""Whole shards to disk so that a store is never half true.

A *unit* is the set of files that appear together: the corpus, a model's token table, one shard of one layer, a pair
index. Every file is written aside, fsynced and renamed; then one manifest entry, written the same way, records
each file's size and checksum and makes the unit exist; the row counts in ``zarr.json`` move last. What the manifest
does not name is not there, whatever lies on disk.

Nothing that could differ between two runs of the same plan (time, host, process) is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from featstore.errors import (
    CorruptDataError,
    FeatstoreError,
    LinkError,
    NoSpaceError,
    StoreAccessError,
    StoreBusyError,
    StoreStateError,
)
from featstore.runtime.provenance import digest, json_text, read_json, write_atomic
from featstore.runtime.writing import (
    fsync_directory,
    locked,
    make_folder,
    refusing,
    remove_asides,
    remove_folder,
    replacing,
)
from featstore.store.format import documents
from featstore.store.format.index import INDEX, index_text
from featstore.store.format.shards import file_checksum
from featstore.store.format.version import FORMAT_VERSION, MANIFEST, METADATA_UNIT, PACKED, PACKED_VERSION, REBUILDING
from featstore.store.read.files import LocalFiles, manifest_files, parse_entry, read_document
from featstore.store.read.portable import store_files
from featstore.store.read.store import Store, open_files
from featstore.store.write.content import VECTOR_CHUNK, Content, vector_files, write_content
from featstore.store.write.listing import arrays_of, metadata_documents

_LOCK = ".writer.lock"
#: Of these a reader keeps nothing: every look goes to the files.
_NOT_KEPT = ("pairs", "moments")


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
    with ExitStack() as held:
        _take_lock(path, held)
        remove_asides(path)
        yield


def _take_lock(path: Path, held: ExitStack) -> None:
    """Hold the store's lock until a stack is left; the store is made if there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(path / _LOCK, wait=False))
    except BlockingIOError as error:
        raise StoreBusyError(
            f"{path} is being written by another process; wait for it, or choose another --store"
        ) from error
    except LinkError as error:
        raise StoreAccessError(str(error)) from error
    except NoSpaceError:
        raise
    except OSError as error:
        said = getattr(error.__cause__ if isinstance(error, FeatstoreError) else error, "strerror", None) or error
        raise StoreAccessError(
            f"{path} cannot be written to ({said}); copy it to where you may write, or choose another --store"
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


class StoreWriter:
    """Writes units into a store directory. Use inside :func:`exclusive`.

    Args:
        path: The directory.
        view: The store as it was opened a moment ago, where it was.
    """

    def __init__(self, path: Path, view: Store | None = None) -> None:
        self.path = path
        self._view = view
        # Folders that have been found to be no links, or made; looked at once.
        self._folders: set[str] = set()

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
        return entry if _whole(entry, LocalFiles(self.path)) else None

    def entries(self, folder: str) -> dict[str, dict[str, Any]]:
        """What :meth:`entry` gives, of all units in a folder of the manifest at once.

        Args:
            folder: Such as ``models/llama/resid/3``; need not exist.

        Raises:
            CorruptDataError: An entry is damaged.
        """
        found, files = {}, LocalFiles(self.path)
        for name in manifest_files(self.path / MANIFEST / folder):
            unit = f"{folder}/{name}"
            path = f"{self.path}/{MANIFEST}/{unit}.json"
            entry = parse_entry(read_document(path), path, unit)
            if _whole(entry, files):
                found[unit] = entry
        return found

    def commit(self, unit: str, files: Mapping[str, Content], **facts: int | str) -> None:
        """Write a unit's files and then its manifest entry.

        Args:
            unit: Name of the unit.
            files: Content by path relative to the store: bytes, or pieces one after another.
            facts: Recorded in the entry beside the files, such as the number of rows.

        Raises:
            StoreAccessError: A file would go through a link; nothing of the unit counts as written.
            WriteError: A file cannot be written.
            NoSpaceError: The disk filled up; nothing of the unit counts as written.
        """
        record = {}
        self._changed(unit)
        for name, data in files.items():
            record[name] = self._place(name, data)
        self._write(f"{MANIFEST}/{unit}.json", json_text({"unit": unit, "files": record, **facts}))

    def group(self, name: str, attributes: dict[str, Any]) -> None:
        """Write a group document, unless it is there already.

        Args:
            name: Path within the store; empty for the root.
            attributes: JSON attributes.
        """
        self._document(name, json_text(documents.group_document(attributes)))

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
            self._document(name, json_text(documents.named(name, document)))

    def check(self, *names: str) -> None:
        """Refuse what cannot be written to before anything is done for it.

        Args:
            names: Groups or arrays; their folders are made if they are not there.

        Raises:
            StoreAccessError: A link stands there or on the way.
            WriteError: A folder cannot be made.
        """
        for name in names:
            self._folder(self.path / name)

    def _document(self, name: str, text: str) -> None:
        """Write a ``zarr.json`` that is not there yet, or says something else."""
        file = f"{name}/zarr.json" if name else "zarr.json"
        path = self.path / file
        if not path.is_file() or path.read_bytes() != text.encode():
            self._changed(name)
            self._write(file, text)

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
            attributes: The root's attributes; of a store that holds packed moments the format version is that of these.

        Raises:
            CorruptDataError: A document is damaged, or one is missing of an array that the manifest has values of.
            StoreAccessError: A link leads nowhere, or stands where the seal is to be written.
        """
        self._view = None
        held = metadata_documents(self.path)
        # Of a file that two units have the later one counts, as for whoever reads the entries.
        files: dict[str, tuple[int, str]] = {}
        units: dict[str, str] = {}
        arrays: set[str] = set()
        for unit in self.unit_names():
            if unit == METADATA_UNIT:
                continue
            path = self._manifest_path(unit)
            data = read_document(str(path))
            units[unit] = file_checksum(data)
            files[f"{MANIFEST}/{unit}.json"] = len(data), units[unit]
            for name, recorded in parse_entry(data, str(path), unit)["files"].items():
                files[name] = recorded["bytes"], recorded["crc32"]
                arrays |= set(arrays_of((name,)))
        self._refuse_lost(arrays - held.keys())
        attributes = _versioned(attributes, held)
        root = documents.group_document(attributes)
        root["consolidated_metadata"] = documents.consolidated(held)
        texts = {f"{name}/zarr.json": json_text(document) for name, document in held.items()}
        texts["zarr.json"] = json_text(root)
        record = {
            name: {"bytes": len(text.encode()), "crc32": file_checksum(text.encode())} for name, text in texts.items()
        }
        files |= {name: (len(text.encode()), file_checksum(text.encode())) for name, text in texts.items()}
        index = index_text((name, *facts) for name, facts in files.items())
        sealed = {
            "unit": METADATA_UNIT,
            "files": record,
            "attributes": digest(attributes),
            "units": units,
            "index": file_checksum(index),
        }
        # First: a reader that finds another index than it was told of reads the entries.
        self._folder(self.path / MANIFEST)
        write_atomic(self.path / INDEX, index)
        self._write(f"{MANIFEST}/{METADATA_UNIT}.json", json_text(sealed))
        self._write("zarr.json", texts["zarr.json"])

    def _refuse_lost(self, arrays: Iterable[str]) -> None:
        """Refuse to seal without the documents of arrays that the manifest has values of."""
        for array in sorted(arrays):
            raise CorruptDataError(
                f"{self.path / array}/zarr.json is missing, and the manifest has values of that array; restore "
                "it, or run the same `featstore extract` command again"
            )

    def drop(self, unit: str) -> None:
        """Take a unit out of the manifest; its files stay until they are written over.

        Args:
            unit: Name of the unit; nothing happens where there is none.
        """
        path = self._manifest_path(unit)
        self._changed(unit)
        if path.exists():
            self._folder(path.parent)
            with refusing(path):
                path.unlink()
                fsync_directory(path.parent)

    def remove(self, name: str) -> None:
        """Remove a folder with all that is in it, if it is there: what no unit of the manifest is made of.

        Args:
            name: Path within the store.

        Raises:
            StoreAccessError: A link stands there or on the way.
            WriteError: Something in it cannot be removed.
        """
        try:
            remove_folder(self.path, name)
        except LinkError as error:
            raise StoreAccessError(str(error)) from error
        gone = str(self.path / name)
        self._folders = {folder for folder in self._folders if folder != gone and not folder.startswith(f"{gone}/")}

    def restate(self, unit: str, **facts: int | str) -> None:
        """Record other facts of a unit whose files stay as they are.

        Args:
            unit: Name of a unit that is there.
            facts: Take the place of those of the same names.
        """
        self._changed(unit)
        entry = read_entry(self._manifest_path(unit), unit)
        self._write(f"{MANIFEST}/{unit}.json", json_text({**entry, **facts}))

    def unit_names(self) -> Iterator[str]:
        """Names of all units in the manifest, sorted."""
        yield from manifest_files(self.path / MANIFEST)

    def _manifest_path(self, unit: str) -> Path:
        return self.path / MANIFEST / f"{unit}.json"

    def _place(self, name: str, content: Content) -> dict[str, Any]:
        """Write a file aside, sync it and rename it; returns what the manifest records of it."""
        path = self.path / name
        self._folder(path.parent)
        with replacing(path) as handle:
            size, checksum = write_content(handle, content)
        return {"bytes": size, "crc32": f"{checksum:08x}"}

    def _write(self, name: str, text: str) -> None:
        """Write a document."""
        path = self.path / name
        self._folder(path.parent)
        write_atomic(path, text)

    def _folder(self, path: Path) -> None:
        """Make a folder of the store, once it is sure that neither it nor one above it is a link."""
        key = str(path)
        if key in self._folders:
            return
        if path != self.path:
            self._folder(path.parent)
            if path.is_symlink():
                raise StoreAccessError(
                    f"{path} is a link to {path.readlink()}, and nothing is written through links below {self.path}; "
                    "put the folder itself there"
                )
        make_folder(path)
        self._folders.add(key)


def _versioned(attributes: dict[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """The root's attributes with the format version that what the store holds asks for."""
    own = attributes.get("featstore")
    if not isinstance(own, dict) or own.get("format_version") not in (FORMAT_VERSION, PACKED_VERSION):
        return attributes
    packed = any(name.startswith("moments/") and name.endswith(f"/{PACKED}") for name in held)
    return {**attributes, "featstore": {**own, "format_version": PACKED_VERSION if packed else FORMAT_VERSION}}


def _whole(entry: Mapping[str, Any], files: LocalFiles) -> bool:
    """Whether a unit's files are there, of their recorded sizes."""
    return all(files.size(name) == record["bytes"] for name, record in entry["files"].items())
