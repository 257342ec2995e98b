"""What runs tasks: the contract that threads, processes and a Dask scheduler's workers keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol


class Pending(Protocol):
    """A task that was handed in. Whoever drops it drops its result."""

    def result(self) -> Any:
        """Wait for the task and return what it returned.

        Raises:
            WorkersError: Its workers or their scheduler were lost.
            Exception: Whatever the task raised.
        """

    def exception(self) -> BaseException | None:
        """Wait for the task and return what it raised, or that its workers were lost; None if it succeeded.

        Raises:
            WorkersError: The scheduler was lost.
        """

    def cancel(self) -> object:
        """Do not begin the task, if it has not begun."""


class Executor(Protocol):
    """Runs functions that their modules name, on arguments that can be sent to another process.

    Tasks are begun in the order in which they were handed in. A task whose worker dies is begun again elsewhere, so it
    may run more than once.
    """

    @property
    def width(self) -> int:
        """Number of tasks that run at a time; 0 while a scheduler waits for workers."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Pending:
        """Hand in a task.

        Args:
            function: At the top of a module that workers can import.
            *arguments: Its arguments.

        Raises:
            WorkersError: The scheduler was lost.
        """

    def as_completed(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Tasks of this executor, each when it is done.

        Args:
            tasks: What :meth:`submit` returned.

        Raises:
            WorkersError: The scheduler was lost.
        """
