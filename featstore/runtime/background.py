"""A bounded queue to one thread, so that a model does not wait for a disk and memory does not fill up either."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Background:
    """Runs submitted work in order, in a thread of its own.

    :meth:`submit` blocks while ``depth`` pieces wait; nothing is ever dropped. What a piece of work raises is raised
    again by the next :meth:`submit`, or at the end of the context; pieces after it are not run. Leaving the context
    waits for what was submitted, also when it is left by an exception, so that whole shards get committed.

    Args:
        depth: Pieces of work that may wait.
    """

    def __init__(self, depth: int = 2) -> None:
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def submit(self, work: Callable[[], object]) -> None:
        """Queue a piece of work.

        Args:
            work: Called without arguments.

        Raises:
            BaseException: What an earlier piece of work raised.
        """
        self._raise()
        self._queue.put(work)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            # After an error the queue is still emptied, so that whoever submits never waits for ever.
            if self._error is None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - raised again by whoever submitted
                    self._error = error
