"""Work on every core this process may use, for reading alone: decoding, copying, waiting for the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

_Item = TypeVar("_Item")


def width() -> int:
    """How many threads there are."""
    return min(len(os.sched_getaffinity(0)), 8)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(width(), thread_name_prefix="rows")


# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_threads.cache_clear)


def in_threads(work: Callable[[_Item], None], items: Sequence[_Item]) -> None:
    """Do something for every item, on all cores this process may use.

    Args:
        work: Spends its time outside the interpreter's lock: decoding, copying, waiting for the disk.
        items: What for.

    Raises:
        Exception: What the first item in order raised.
    """
    if len(items) < 2:
        for item in items:
            work(item)
        return
    for _ in _threads().map(work, items):
        pass
