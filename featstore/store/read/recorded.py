"""The manifest against what the documents announce and what is on disk: sizes, before anything is read or allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
