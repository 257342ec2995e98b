"""Where commands keep what they can find out again: never a result, and never needed."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The directory for caches; it need not exist, and may not be writable.

    ``FEATSTORE_CACHE`` names it; otherwise it is ``featstore`` under ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    own = os.environ.get("FEATSTORE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "featstore"
