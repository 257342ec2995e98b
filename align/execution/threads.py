"""Tasks on threads of this process: nothing is sent, nothing listens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from types import TracebackType
from typing import Any, Self


class Threads:
    """An :class:`align.execution.executor.Executor` of threads, to be closed by ``with``.

    Args:
        width: Number of threads; None for as many as this process may use cores.
    """

    def __init__(self, width: int | None = None) -> None:
        self.width = width or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self.width, thread_name_prefix="task")

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Hand in a task.

        Args:
            function: Any function.
            *arguments: Its arguments.
        """
        return self._pool.submit(function, *arguments)

    def as_completed(self, tasks: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
        """Tasks, each when it is done.

        Args:
            tasks: From :meth:`submit`.
        """
        return as_completed(tasks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # A thread cannot be stopped: what runs is waited for, what has not begun never begins.
        self._pool.shutdown(wait=True, cancel_futures=True)
