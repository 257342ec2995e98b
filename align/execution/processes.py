"""Tasks on processes of this machine, which are asked over pipes: no socket, no port, no name in a folder.

Each worker has a thread here that hands it one task after another. A worker that dies is replaced, and its task begun
again.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, as_completed
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from align.execution.pipes import receive, send, unpacked
from featstore.errors import SpecError, WorkersError

#: Deaths of workers over one task before it is given up.
DEATHS = 4
#: Of a worker that reads no more, before it is killed.
_GRACE_SECONDS = 2.0
#: What a worker runs. It looks for modules where this process does, not in the folder where it was started.
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from align.execution.pipes import serve; "
    "serve(*map(int, sys.argv[2:]))"
)
#: A worker is one of several: each has a core.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

_Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Processes:
    """An :class:`align.execution.executor.Executor` of processes, to be closed by ``with``.

    Closing it ends the workers, whatever they are doing. They end with this process as well, however it ends.

    Args:
        width: Number of processes; each starts with its first task.

    Raises:
        SpecError: Fewer than one.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise SpecError(f"{width} worker processes: at least one is needed")
        self.width = width
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._closing = False
        self._workers: set[_Worker] = set()
        self._guard = threading.Lock()
        self._threads = [threading.Thread(target=self._hand_out, name="worker", daemon=True) for _ in range(width)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Hand in a task.

        Args:
            function: At the top of a module.
            *arguments: Its arguments, which are pickled.
        """
        future: Future[Any] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def as_completed(self, tasks: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
        """Tasks, each when it is done.

        Args:
            tasks: From :meth:`submit`.
        """
        return as_completed(tasks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._guard:
            self._closing = True
            for worker in self._workers:
                worker.process.kill()
        with contextlib.suppress(Empty):
            while (task := self._tasks.get_nowait()) is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _hand_out(self) -> None:
        worker: _Worker | None = None
        while (task := self._tasks.get()) is not None:
            if task[0].set_running_or_notify_cancel():
                worker = self._carry_out(worker, *task)
            # A thread that waits for the next task must not keep the last one's result.
            del task
        self._dismiss(worker)

    def _carry_out(
        self, worker: _Worker | None, future: Future[Any], function: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> _Worker | None:
        """Have a task done, by other workers if this one dies; returns who is there for the next."""
        ends: list[str] = []
        while len(ends) < DEATHS:
            try:
                worker = worker or self._hire()
                succeeded, value = worker.ask(function, arguments)
            except (EOFError, BrokenPipeError):
                ends.append(self._dismiss(worker))
                worker = None
                continue
            except Exception as error:  # noqa: BLE001 - the task cannot be sent, or its answer not be read
                future.set_exception(error)
            else:
                if succeeded:
                    future.set_result(value)
                else:
                    future.set_exception(value)
            return worker
        future.set_exception(
            WorkersError(
                f"workers died over the same task again and again ({', '.join(dict.fromkeys(ends))}): out of memory? "
                "Allow less memory or run fewer workers"
            )
        )
        return None

    def _hire(self) -> _Worker:
        with self._guard:
            if self._closing:
                raise CancelledError
            worker = _Worker()
            self._workers.add(worker)
            return worker

    def _dismiss(self, worker: _Worker | None) -> str:
        if worker is None:
            return ""
        with self._guard:
            self._workers.discard(worker)
        return worker.end()


class _Worker:
    """A process and the pipes to it. No other process inherits its ends of them."""

    def __init__(self) -> None:
        (read, ask), (answer, write), (watch, self._life) = os.pipe(), os.pipe(), os.pipe()
        own, given = (ask, answer, self._life), (read, write, watch)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, json.dumps(sys.path), *map(str, given)],
                stdin=subprocess.DEVNULL,
                env={**_ONE_THREAD, **os.environ},
                pass_fds=given,
            )
        except OSError as error:
            for descriptor in own:
                os.close(descriptor)
            raise WorkersError(f"no worker process can be started ({error}); run without workers") from error
        finally:
            for descriptor in given:
                os.close(descriptor)
        self._requests, self._answers = os.fdopen(ask, "wb"), os.fdopen(answer, "rb")

    def ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """Have it done: whether it succeeded, and the result or the exception."""
        send(self._requests, (function, arguments))
        answer: tuple[bool, Any] = unpacked(receive(self._answers))
        return answer

    def end(self) -> str:
        """Have it end, and say how it did."""
        os.close(self._life)
        # What a dead worker did not read is dropped.
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()
        try:
            code = self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
