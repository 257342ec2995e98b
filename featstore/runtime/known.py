"""The ledger of what the user named: it tells the user's own references from those in somebody else's file.

It is one small JSON file among the caches. It must belong to the user, since a cache folder may be shared: a ledger
that somebody else wrote would vouch for somebody else's references.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from featstore.errors import FeatstoreError
from featstore.runtime.caches import cache_directory
from featstore.runtime.provenance import json_text, write_atomic

#: References at most; the oldest go first.
_MOST = 1000
#: Characters of a reference at most; longer ones are not kept.
_LONGEST = 4096
#: Bytes of the file at most.
_SIZE = 1 << 20


@dataclass(frozen=True, order=True)
class Named:
    """Something that can be read or fetched, as the user named it.

    Attributes:
        kind: ``hub`` or ``path`` for models, ``data`` for text.
        reference: Hub id, absolute real path, or dataset.
        revision: Of a hub id; empty for all else.
    """

    kind: str
    reference: str
    revision: str = ""


def ledger_path() -> Path:
    """The file; it need not exist."""
    return cache_directory() / "references.json"


def recall() -> tuple[frozenset[Named], str | None]:
    """What the user has named so far.

    Returns:
        The references, none where there is no ledger; and why the ledger cannot be used, None where it can or where
        there is none.
    """
    entries, trouble = _read()
    return frozenset(entries), trouble


def remember(named: Iterable[Named]) -> str | None:
    """Keep what the user named.

    Args:
        named: In any order; what is there already is moved to the end.

    Returns:
        Why it cannot be kept, in words; None where it is.
    """
    fresh = [one for one in dict.fromkeys(named) if len(one.reference) + len(one.revision) <= _LONGEST]
    if not fresh:
        return None
    path = ledger_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            held, trouble = _read()
            if trouble:
                return trouble
            if held[-len(fresh) :] == fresh:
                return None
            entries = [*(one for one in held if one not in fresh), *fresh][-_MOST:]
            text = _text(entries)
            while len(text.encode()) > _SIZE:
                entries = entries[len(entries) // 2 :]
                text = _text(entries)
            write_atomic(path, text)
            # Under some umasks a group may write new files; what vouches for references is the user's alone.
            path.chmod(0o600)
    except (OSError, FeatstoreError, UnicodeError) as error:
        return f"{path} cannot be written ({getattr(error, 'strerror', None) or error})"
    return None


def _text(entries: list[Named]) -> str:
    return json_text({"references": [[one.kind, one.reference, one.revision] for one in entries]})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, where its disk has locks: two commands that end together both keep what they were told."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read() -> tuple[list[Named], str | None]:
    """The ledger, oldest first; and why it cannot be used."""
    path = ledger_path()
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return [], None
    except (OSError, ValueError) as error:
        return [], f"{path} cannot be read ({getattr(error, 'strerror', None) or error})"
    with os.fdopen(handle, "rb") as stream:
        state = os.fstat(stream.fileno())
        if state.st_uid not in (os.geteuid(), 0) or state.st_mode & 0o022:
            return [], f"{path} is not yours alone to write"
        try:
            return _parsed(stream.read(_SIZE + 1)), None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return [], f"{path} is not a ledger of references; remove it"


def _parsed(data: bytes) -> list[Named]:
    if len(data) > _SIZE:
        raise ValueError(len(data))
    entries = []
    for kind, reference, revision in json.loads(data)["references"]:
        if not all(isinstance(value, str) for value in (kind, reference, revision)):
            raise TypeError(kind)
        entries.append(Named(kind, reference, revision))
    return entries
