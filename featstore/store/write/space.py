"""Whether a disk can hold what is to be written to it."""

from __future__ import annotations

import shutil
from pathlib import Path

from featstore.errors import NoSpaceError


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
