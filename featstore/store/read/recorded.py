"""The manifest against what the documents announce and what is on disk: sizes, before anything is read or allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from featstore.store.format.index import INDEX
from featstore.store.format.plain import Plain
from featstore.store.format.shards import file_checksum
from featstore.store.format.version import MANIFEST
from featstore.store.read.structure import Arrays

#: Committed files by path: ``bytes`` and ``crc32``.
Records = Mapping[str, Mapping[str, Any]]
#: Lines about one kind of damage before the others are counted alone.
MOST_LINES = 1000


def entry_problems(units: Mapping[str, str], entries: Mapping[str, bytes]) -> Iterator[str]:
    """Entries of the manifest that are not what they were when the store was sealed, whatever it is that they say.

    Args:
        units: Checksum of every entry when the store was sealed, by unit.
        entries: The entries' documents.
    """
    for unit, checksum in units.items():
        if unit not in entries:
            yield f"{MANIFEST}/{unit}.json: missing"
        elif file_checksum(entries[unit]) != checksum:
            yield f"{MANIFEST}/{unit}.json: checksum differs from the one recorded when the store was sealed"


def sealed_problems(
    units: Mapping[str, str],
    documents: Records,
    index: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, int | None],
) -> Iterator[str]:
    """What :func:`entry_problems` tells, as far as it can be told without reading the entries.

    What they say stands in the sorted index as well, which is read in their place.

    Args:
        units: Checksum of every entry when the store was sealed, by unit.
        documents: The metadata's documents as they were sealed.
        index: Every file of the store as it was then, the entries among them.
        found: Bytes of the entries that are there, by unit; None for unknown.
    """
    for name, sealed in documents.items():
        if index.get(name) != sealed:
            yield f"{INDEX}: it does not have {name} as the store was sealed with it"
    for unit, checksum in units.items():
        name = f"{MANIFEST}/{unit}.json"
        record = index.get(name)
        if record is None or record["crc32"] != checksum:
            yield f"{INDEX}: it does not have the entry of {unit} that the store was sealed with"
        elif unit not in found:
            yield f"{name}: missing"
        elif found[unit] not in (None, record["bytes"]):
            yield f"{name}: {found[unit]} bytes, {record['bytes']} when the store was sealed"


def index_problems(index: Mapping[str, Mapping[str, Any]], records: Records, entries: Mapping[str, bytes]) -> list[str]:
    """Where the sorted index says something else than the documents that it was made of.

    Args:
        index: Every file of the store, but the metadata's own entry.
        records: Every committed file, as the entries tell.
        entries: The entries' documents.
    """
    told = {f"{MANIFEST}/{unit}.json": (len(data), file_checksum(data)) for unit, data in entries.items()}
    told |= {name: (record["bytes"], record["crc32"]) for name, record in records.items()}
    wrong = [name for name, record in index.items() if told.get(name) != (record["bytes"], record["crc32"])]
    return [f"{INDEX}: {name} is not what its entry in the manifest says" for name in wrong]


def size_problems(records: Records, size: Callable[[str], int | None]) -> Iterator[str]:
    """Files that are not there, or not of their recorded size.

    Args:
        records: Every committed file.
        size: Bytes of a file; -1 where there is none, None where that is not known without reading it.
    """
    for name, record in records.items():
        found = size(name)
        if found == -1:
            yield f"{name}: missing"
        elif found is not None and found != record["bytes"]:
            yield f"{name}: {found} bytes, the manifest says {record['bytes']}"


def announced_problems(arrays: Arrays, records: Records) -> Iterator[str]:
    """Chunks that an array must have but the manifest does not name, or that are too small for what is announced.

    Args:
        arrays: As their documents describe them.
        records: Every committed file.
    """
    for name, array in arrays.items():
        if array.files > len(records):
            # Counted before they are listed: an array may announce any number.
            yield f"{name}: {array.files} chunk files are announced, the manifest names {len(records)} files in all"
            continue
        for number in range(array.files):
            chunk = f"{name}/{array.file(number)}"
            if chunk not in records:
                yield f"{chunk}: not in the manifest"
            elif isinstance(array, Plain):
                if records[chunk]["bytes"] != array.file_bytes:
                    yield f"{chunk}: {records[chunk]['bytes']} bytes, its array says {array.file_bytes}"
            elif records[chunk]["bytes"] < array.least_bytes(number):
                least = array.least_bytes(number)
                yield f"{chunk}: {records[chunk]['bytes']} bytes, its array says {least} or more"
