"""Which metadata documents a store has, when it is sealed: those that lie in its groups, and none of them missing.

The manifest says which arrays there must be. Groups, and arrays without a single value, are named by no unit; they are
found by going from group to group. Links to folders are followed, since people move layers to another disk and link
them: what lies behind a link belongs to the store like everything else, and where nothing is behind it any more the
store is not sealed without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from featstore.errors import CorruptDataError, StoreAccessError
from featstore.runtime.provenance import read_json
from featstore.store.format.version import MANIFEST

#: Groups in groups, as many as the path of a file may have parts.
_DEEPEST = 13


def metadata_documents(root: Path) -> dict[str, dict[str, Any]]:
    """Every ``zarr.json`` of a store but the root's, by the path of its group or array.

    Args:
        root: The store.

    Raises:
        StoreAccessError: A link leads nowhere.
        CorruptDataError: A document is damaged, or links make the same folder part of the store twice.
    """
    found: dict[str, dict[str, Any]] = {}
    seen = {_identity(root): root}
    _gather(root, "", found, seen)
    return found


def _gather(
    folder: Path, above: str, found: dict[str, dict[str, Any]], seen: dict[tuple[int, int], Path], depth: int = 1
) -> None:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_symlink() or entry.is_dir())
    for name in names:
        path = folder / name
        if name.startswith(".") or (not above and name == MANIFEST):
            continue
        if not path.exists():
            raise StoreAccessError(
                f"{path} is a link to {path.readlink()}, where nothing is; make that folder available, or put it "
                "back into the store"
            )
        document = path / "zarr.json"
        if not document.is_file():
            continue
        other = seen.setdefault(_identity(path), path)
        if other is not path or depth > _DEEPEST:
            raise CorruptDataError(f"{path} is the same folder as {other}; remove the link that makes it so")
        inside = f"{above}/{name}" if above else name
        found[inside] = read_json(document)
        if found[inside].get("node_type") == "group":
            _gather(path, inside, found, seen, depth + 1)


def _identity(path: Path) -> tuple[int, int]:
    held = path.stat()
    return held.st_dev, held.st_ino


def arrays_of(files: Iterable[str]) -> Iterator[str]:
    """The arrays that files of a unit are chunks of.

    Args:
        files: Paths within the store.
    """
    seen = set()
    for file in files:
        name, chunk, _ = file.rpartition("/c/")
        if chunk and name not in seen:
            seen.add(name)
            yield name
