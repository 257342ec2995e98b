"""A store read through zarr-python alone, from wherever zarr-python can read: object stores, memory, any Zarr store.

The road of every other tool, and so the equality test of our own: mapped and portable rows are the same numbers, and
damage is refused on both. zarr-python takes a missing shard for zeros, and an empty one too; here every shard's index
is looked at before its rows are believed.
"""

from __future__ import annotations

import asyncio
import os
import re
import uuid
from collections.abc import Coroutine, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store as ZarrStore
from zarr.abc.store import SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

# zarr-python's own bridge from its coroutines; there is no public one.
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, ObjectStore, StorePath

from featstore.errors import (
    CorruptDataError,
    FeatstoreError,
    MissingPackageError,
    SpecError,
    StoreAccessError,
    StoreNotFoundError,
)
from featstore.runtime.extras import install_words
from featstore.store.format import shards
from featstore.store.format.version import MANIFEST
from featstore.store.read.files import Described, LocalFiles, StoreFiles
from featstore.store.read.rows import RowReader

#: Where a store may be.
Location: TypeAlias = str | Path | ZarrStore

#: A URL, also one that has been through Path, which merges slashes. One letter is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)", re.DOTALL)
#: Schemes for which obstore, one package for all of them, is asked first; every other scheme is fsspec's.
_OBJECT_STORES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")
#: Small files asked for at a time.
_REQUESTS = 64

#: Offset and length of an inner chunk that is not there.
_MISSING = np.uint64(2**64 - 1)

_T = TypeVar("_T")


def store_files(location: Location, *, portable: bool = False) -> StoreFiles:
    """The files of a store.

    Args:
        location: A directory, a URL such as ``s3://bucket/wt103.zarr``, or an open zarr-python store.
        portable: Read a directory through zarr-python, too.

    Raises:
        StoreNotFoundError: No such directory.
        MissingPackageError: The package that speaks the URL's protocol is not installed.
        SpecError: A URL that cannot be understood.
    """
    if isinstance(location, ZarrStore):
        return PortableFiles(location, str(location), location)
    if not isinstance(location, str | os.PathLike):
        raise SpecError(f"{location!r} is no store: give the path or URL of one, not {type(location).__name__}")
    path = Path(location)
    url = None if path.exists() else _URL.match(str(location))
    if url is not None:
        name = f"{url[1].lower()}://{url[2].rstrip('/')}"
        return PortableFiles(_open_url(name), name, name)
    if not path.exists():
        raise StoreNotFoundError(f"no store at {str(path)!r}; create one with `featstore extract --store {path}`")
    if portable and path.is_dir():
        return PortableFiles(LocalStore(path.absolute(), read_only=True), path, str(path.absolute()))
    return LocalFiles(path)


def _open_url(url: str) -> ZarrStore:
    """A read-only zarr-python store for a URL."""
    scheme = url.partition(":")[0]
    through_obstore = scheme in _OBJECT_STORES and find_spec("obstore") is not None
    try:
        if not through_obstore:
            return FsspecStore.from_url(url, read_only=True)
        import obstore

        try:
            return ObjectStore(obstore.store.from_url(url), read_only=True)
        except obstore.exceptions.BaseError as error:
            raise SpecError(f"{url!r} cannot be opened ({_first_line(error)}); correct the URL") from error
    except ImportError as error:
        remedy = (
            f"run `{install_words('obstore')}`"
            if scheme in _OBJECT_STORES
            else f"install the fsspec package for {scheme}://"
        )
        raise MissingPackageError(f"reading {url!r} needs a package ({error}); {remedy}") from error
    except ValueError as error:
        if isinstance(error, FeatstoreError):
            raise
        raise SpecError(f"{url!r} cannot be opened ({_first_line(error)}); use s3://, gs:// or a directory") from error


def _first_line(error: BaseException) -> str:
    """What went wrong, without the debugging output that some libraries append."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class PortableFiles:
    """A store behind zarr-python.

    Args:
        store: Where to read.
        location: The directory or URL, as errors and callers name it.
        origin: What :func:`featstore.store.open_store` takes to open the same store in another process.
    """

    def __init__(self, store: ZarrStore, location: Path | str, origin: Any) -> None:
        self.location, self.origin, self._store = location, origin, store

    def read(self, name: str) -> bytes | None:
        """Content of a file, None where there is none.

        Args:
            name: Path within the store.

        Raises:
            StoreAccessError: The place cannot be reached, or refuses.
        """
        return _wait(self._get(name), f"{self.location}/{name}")

    def read_all(self, names: Sequence[str]) -> dict[str, bytes | None]:
        """Content of many small files by name, None where there is none; many are asked for at a time.

        Args:
            names: Paths within the store.

        Raises:
            StoreAccessError: The place cannot be reached, or refuses.
        """
        return _wait(self._get_all(names), str(self.location))

    async def _get_all(self, names: Sequence[str]) -> dict[str, bytes | None]:
        result: dict[str, bytes | None] = {}
        for at in range(0, len(names), _REQUESTS):
            part = names[at : at + _REQUESTS]
            result |= dict(zip(part, await asyncio.gather(*(self._get(name) for name in part)), strict=True))
        return result

    def size(self, name: str) -> int | None:
        """Not known: every file would be a request.

        Args:
            name: Path within the store.
        """
        del name
        return None

    async def _get(self, name: str) -> bytes | None:
        data = await self._store.get(name, default_buffer_prototype())
        return None if data is None else data.to_bytes()

    def manifest(self) -> dict[str, bytes]:
        """Every manifest document by the name of its unit, sorted.

        Raises:
            StoreAccessError: The place cannot be reached, or refuses.
        """
        return _wait(self._manifest(), f"{self.location}/{MANIFEST}")

    def manifest_sizes(self) -> dict[str, int | None]:
        """Every unit of the manifest, sorted; how large its document is takes a request of its own.

        Raises:
            StoreAccessError: The place cannot be reached, or refuses.
        """
        names = _wait(self._manifest_names(), f"{self.location}/{MANIFEST}")
        return {name[len(MANIFEST) + 1 : -len(".json")]: None for name in names}

    async def _manifest_names(self) -> list[str]:
        listed = self._store.list_prefix(f"{MANIFEST}/")
        return sorted([name async for name in listed if name.endswith(".json")])

    async def _manifest(self) -> dict[str, bytes]:
        prefix, names = f"{MANIFEST}/", await self._manifest_names()
        # There are as many documents as shards: one after another they would take minutes from an object store.
        found = await self._get_all(names)
        return {name[len(prefix) : -len(".json")]: data for name, data in found.items() if data is not None}

    def rows(
        self, array: Described, scales: Described | None, column_scale: NDArray[np.float32] | None
    ) -> PortableRows:
        """Rows read through zarr-python.

        Args:
            array: The array.
            scales: Its scales by row, for formats that have them.
            column_scale: float32 ``(width,)``, for formats that have one.
        """
        return PortableRows(self._store, array, scales, column_scale, self.location)


class PortableRows(RowReader):
    """Rows of one ``(n, width)`` array, read through a ``zarr.Array``: the interface of :class:`RowReader`, all copies.

    Args:
        store: Where the array is.
        array: Its path there and its ``zarr.json``, which is believed as given and not read again.
        scales: The same of its scales by row, for formats that have them.
        column_scale: float32 ``(width,)``, for formats that have one.
        location: The directory or URL of the store, for errors.

    Raises:
        CorruptDataError: Its metadata is not what the format document describes.
    """

    def __init__(
        self,
        store: ZarrStore,
        array: Described,
        scales: Described | None = None,
        column_scale: NDArray[np.float32] | None = None,
        location: Path | str = "",
    ) -> None:
        prefix = f"{location}/" if str(location) else ""
        super().__init__(f"{prefix}{array[0]}", array[1], None, column_scale)
        self._store, self._name, self._location, self._scale_described = store, array[0], location, scales
        self.array = _array(store, array)
        self._scale_array = None if scales is None else _array(store, scales)
        self._scale_name = "" if scales is None else scales[0]
        self._scale_path = f"{prefix}{self._scale_name}"
        self._present: dict[int, NDArray[np.bool_]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        described = (self._store, (self._name, self._document), self._scale_described, self._column_scale)
        return PortableRows, (*described, self._location)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        """A name of its own every time: when the place was written anew cannot be told from here."""
        return (uuid.uuid4().hex,)

    def chunk(self, number: int) -> NDArray[Any]:
        """One inner chunk in the storage type, without padding.

        Args:
            number: Chunk number, counted through all shards.

        Raises:
            CorruptDataError: Damaged or missing data.
            IndexError: No such chunk.
        """
        self._check_chunk(number)
        start = number * self.layout.chunk_rows
        return self.stored(slice(start, start + self.layout.chunk_rows))

    def _view(self, start: int, stop: int) -> None:
        """Nothing lies in memory to be looked at."""
        del start, stop

    def _copy(self, start: int, stop: int, out: NDArray[Any]) -> None:
        if start < stop:
            size = self.layout.chunk_rows
            self._require(np.arange(start // size, (stop - 1) // size + 1))
            out[:] = self._read(self.array, (slice(start, stop), slice(None)), self.path)

    def _gather(self, numbers: NDArray[np.int64], out: NDArray[Any]) -> None:
        if len(numbers):
            self._require(np.unique(numbers // self.layout.chunk_rows))
            out[:] = self._read(self.array, (numbers, slice(None)), self.path)

    def _read(self, array: zarr.Array[Any], selection: Any, where: Path | str) -> Any:
        try:
            return array.oindex[selection]
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            # zarr-python has no error of its own for a checksum that differs or a stream that does not decompress.
            raise CorruptDataError(
                f"{where} is damaged ({_first_line(error)}); run `featstore verify` to see how far it goes"
            ) from error
        except Exception as error:
            raise _unreachable(str(where), error) from error

    def _require(self, chunks: NDArray[np.int64]) -> None:
        """Refuse chunks that are not there: zarr-python would give zeros for them."""
        per_shard = self.shard_rows // self.layout.chunk_rows
        for shard in np.unique(chunks // per_shard).tolist():
            if shard not in self._present:
                self._present[shard] = self._read_index(shard, per_shard)
            wanted = chunks[chunks // per_shard == shard]
            absent = wanted[~self._present[shard][wanted - shard * per_shard]]
            if len(absent):
                raise CorruptDataError(
                    f"{self.path}, chunk {absent[0]} is missing from its shard; run `featstore verify`"
                )

    def _read_index(self, shard: int, chunks: int) -> NDArray[np.bool_]:
        """Which chunks a shard's index names, its checksum verified."""
        size, key = 16 * chunks + shards.CRC_BYTES, f"c/{shard}/0"
        request = self._store.get(f"{self._name}/{key}", default_buffer_prototype(), SuffixByteRequest(size))
        data = _wait(request, f"{self.path}/{key}")
        if data is None or len(data) < size:
            raise CorruptDataError(
                f"{self.path}/{key} is missing or too short; run the same `featstore extract` command again"
            )
        body = shards.unseal(memoryview(data.to_bytes()), f"the index of {self.path}/{key}")
        return np.asarray((np.frombuffer(body, "<u8").reshape(-1, 2) != _MISSING).any(axis=1))

    def _scale(self, shard: int) -> NDArray[np.float32]:
        if shard in self._scale_of:
            return self._scale_of[shard]
        if self._scale_array is None:
            raise CorruptDataError(f"{self.path} has no row scales; open it through its store")
        where = f"{self._scale_path}/c/{shard}"
        if not _wait(self._store.exists(f"{self._scale_name}/c/{shard}"), where):
            raise CorruptDataError(f"{where} is missing; run the same `featstore extract` command again")
        rows = slice(shard * self.shard_rows, (shard + 1) * self.shard_rows)
        scale: NDArray[np.float32] = self._read(self._scale_array, rows, self._scale_path)
        self._scale_of[shard] = scale
        return scale


def _array(store: ZarrStore, array: Described) -> zarr.Array[Any]:
    try:
        return zarr.Array.from_dict(StorePath(store, array[0]), array[1])
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptDataError(f"{array[0]}/zarr.json is damaged ({_first_line(error)}); extract again") from error


def _wait(request: Coroutine[Any, Any, _T], where: str) -> _T:
    """The result of a request to a place that may be far away."""
    try:
        result: _T = sync(request)
        return result
    except Exception as error:
        # Every library behind zarr-python has errors of its own.
        raise _unreachable(where, error) from error


def _unreachable(where: str, error: Exception) -> StoreAccessError:
    return StoreAccessError(f"{where} cannot be read ({_first_line(error)}); check URL, login and network")
