"""Tasks on the workers of a Dask scheduler that is there already, over TLS or, with a warning, without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from align.execution.options import Execution
from featstore.errors import SpecError, WorkersError
from featstore.runtime.console import err

#: How long a scheduler may take to answer.
SCHEDULER_SECONDS = 10.0
#: Schemes of addresses over which both sides prove who they are, and of those that never leave this process.
_SECURE = ("tls://", "wss://", "inproc://")


@contextmanager
def connected(execution: Execution, *, quiet: bool = False) -> Iterator[Cluster]:
    """A scheduler's workers as an executor. Says on stderr where its dashboard is, and if the connection is plain.

    Args:
        execution: With the scheduler's address, and the files of a TLS connection. Without these Dask's own
            configuration (``distributed.comm.tls``) has the word.
        quiet: Say nothing.

    Raises:
        SpecError: No scheduler answers there within :data:`SCHEDULER_SECONDS`, or the files are no certificates.
    """
    address = str(execution.scheduler)
    with _client(address, _security(execution), secure=execution.tls_ca is not None) as client:
        if not quiet:
            _tell(client, address)
        yield Cluster(client)


def _security(execution: Execution) -> Any:
    """What Dask takes for the files that were given; None for its own configuration."""
    from distributed.security import Security

    if execution.tls_ca is None or execution.tls_cert is None:
        return None
    # A key may stand in the certificate's file.
    files = {"tls_ca_file": execution.tls_ca, "tls_client_cert": execution.tls_cert}
    files["tls_client_key"] = execution.tls_key or execution.tls_cert
    for path in files.values():
        try:
            path.read_bytes()
        except OSError as error:
            raise SpecError(
                f"{path} cannot be read ({error.strerror}); name the files of the TLS connection"
            ) from error
    security = Security(require_encryption=True, **{name: str(path) for name, path in files.items()})
    try:
        security.get_connection_args("client")
    except OSError as error:
        names = ", ".join(str(path) for path in dict.fromkeys(files.values()))
        raise SpecError(f"{names}: no certificate with its key, or not in PEM form ({error})") from error
    return security


@contextmanager
def _client(address: str, security: Any, *, secure: bool) -> Iterator[Any]:
    from distributed import Client

    place = f"tls://{address}" if secure and "://" not in address else address
    try:
        client = Client(place, timeout=SCHEDULER_SECONDS, security=security)
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        # The reason of a failed handshake stands at the end of a chain of attempts.
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        if first is not error and str(first) not in why:
            why = f"{why}: {first}"
        raise SpecError(
            f"--scheduler {address}: no Dask scheduler answers there ({why}); start it, or correct the address"
        ) from error
    with client:
        yield client


def _tell(client: Any, address: str) -> None:
    where = client.scheduler.address
    if not where.startswith(_SECURE):
        err.print(
            f"the connection to the Dask scheduler at {where} is plain: whoever reaches that port can run code as the "
            "owner of its workers; use tls:// with --tls-ca, --tls-cert and --tls-key",
        )
    if client.scheduler_info()["services"].get("dashboard"):
        err.print(f"Dask dashboard: {client.dashboard_link}")
    if not client.nthreads():
        err.print(f"the Dask scheduler at {address} has no workers yet: waiting for them")


class Cluster:
    """An :class:`align.execution.executor.Executor` over a Dask client.

    Args:
        client: A ``distributed.Client``.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._submitted = 0

    @property
    def width(self) -> int:
        """Number of threads of all workers."""
        with _in_a_line():
            return sum(self._client.nthreads().values())

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Remote:
        """Hand in a task.

        Args:
            function: At the top of a module that the workers can import.
            *arguments: Its arguments.

        Raises:
            WorkersError: The scheduler went away.
        """
        self._submitted += 1
        with _in_a_line():
            # In order: what is waited for comes first.
            return Remote(self._client.submit(function, *arguments, pure=False, priority=-self._submitted))

    def as_completed(self, tasks: Iterable[Remote]) -> Iterator[Remote]:
        """Tasks, each when it is done.

        Args:
            tasks: From :meth:`submit`.

        Raises:
            WorkersError: The scheduler went away.
        """
        from distributed import as_completed

        by_key = {task.future.key: task for task in tasks}
        with _in_a_line():
            for future in as_completed([task.future for task in by_key.values()]):
                yield by_key[future.key]


class Remote:
    """A task that a scheduler has.

    Args:
        future: Dask's.
    """

    def __init__(self, future: Any) -> None:
        self.future = future

    def result(self) -> Any:
        """Wait for the task and return what it returned.

        Raises:
            WorkersError: Its workers died again and again, or the scheduler went away.
        """
        with _in_a_line():
            return self.future.result()

    def exception(self) -> BaseException | None:
        """Wait for the task and return what went wrong; None if nothing did.

        Raises:
            WorkersError: The scheduler went away.
        """
        from distributed import KilledWorker

        with _in_a_line():
            error: BaseException | None = self.future.exception()
        return _deaths(error) if isinstance(error, KilledWorker) else error

    def cancel(self) -> None:
        """Do not begin the task, if the scheduler is still there and it has not begun."""
        with _in_a_line():
            self.future.cancel()


def _deaths(error: BaseException) -> WorkersError:
    return WorkersError(
        f"workers died over the same task again and again ({error}): out of memory? Allow less memory or run fewer "
        "workers"
    )


@contextmanager
def _in_a_line() -> Iterator[None]:
    """Around what asks the scheduler: says in a line what became of it."""
    from distributed import KilledWorker
    from distributed.client import ClosedClientError
    from distributed.comm import CommClosedError

    try:
        yield
    except KilledWorker as error:
        raise _deaths(error) from error
    except (CancelledError, ClosedClientError, CommClosedError, TimeoutError) as error:
        raise WorkersError(f"the Dask scheduler went away ({error!r}); start it and run again") from error
