"""The manifest of a sealed store held against its sorted index, one entry at a time.

A corpus has an entry for every shard, tens of thousands. What is sound needs none of them but the one being read; only
where something is wrong are all of them held, so that every fault can be told.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from featstore.errors import CorruptDataError
from featstore.store.format.index import INDEX, FileIndex
from featstore.store.format.shards import file_checksum
from featstore.store.format.version import MANIFEST, METADATA_UNIT
from featstore.store.read.files import parse_entry
from featstore.store.read.recorded import Records, entry_problems, index_problems
from featstore.store.read.store import Store


def recorded(store: Store) -> tuple[Records, list[str]]:
    """Every committed file, and what is wrong with the entries that tell of them.

    Args:
        store: Complete store in a directory.

    Returns:
        ``bytes`` and ``crc32`` by path, and lines of damage: where there are none, the files are those of the sorted
        index, held as arrays; otherwise, and in stores from before there was an index, those that the entries name.

    Raises:
        CorruptDataError: An entry is damaged or points outside the store.
    """
    try:
        index = None if store.sealed_index is None else store.index
        said = None
    except CorruptDataError as error:
        index, said = None, str(error)
    if index is not None and _agree(store, index):
        return index.without(f"{MANIFEST}/"), []
    files = store.recorded_files
    damage = list(entry_problems(store.sealed_units, store.entries))
    if index is not None:
        damage += index_problems(index, files, store.entries)
    elif store.sealed_index is not None:
        damage.append(said or f"{INDEX}: missing, or not the index that the store was sealed with")
    return files, damage


def _agree(store: Store, index: FileIndex) -> bool:
    """Whether every entry is the one that was sealed, and the index says what all of them say and nothing else."""
    seen = np.zeros(len(index), bool)
    try:
        for name, size, checksum in _told(store):
            at = index.place(name)
            if at is None or index.record(at) != {"bytes": size, "crc32": checksum}:
                return False
            seen[at] = True
    except CorruptDataError:
        return False  # told with all other faults
    return bool(seen.all())


def _told(store: Store) -> Iterator[tuple[str, int, str]]:
    """Path, bytes and checksum of every file, as the entries tell; the entries, which were sealed as well, among them.

    Raises:
        CorruptDataError: An entry is damaged, missing, or not what was sealed.
    """
    sealed = store.sealed_units
    units = store.files.manifest_sizes()
    if sealed.keys() | {METADATA_UNIT} != units.keys():
        raise CorruptDataError(f"{store.path}/{MANIFEST} has other entries than were sealed; restore them")
    for unit in units:
        name = f"{MANIFEST}/{unit}.json"
        data = store.files.read(name)
        if data is None:
            raise CorruptDataError(f"{store.path}/{name} is missing; restore it")
        # The metadata's own entry, which seals the others, is sealed by the root.
        if unit != METADATA_UNIT:
            checksum = file_checksum(data)
            if checksum != sealed[unit]:
                raise CorruptDataError(f"{store.path}/{name} is not the entry that was sealed; restore it")
            yield name, len(data), checksum
        for path, record in parse_entry(data, f"{store.path}/{name}", unit)["files"].items():
            yield path, record["bytes"], record["crc32"]
