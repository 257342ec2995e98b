"""What a command runs on: a device, a Dask scheduler."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featstore.errors import SpecError
from featstore.runtime.console import err

#: How long a Dask scheduler may take to answer.
SCHEDULER_SECONDS = 10.0
#: There where a CUDA driver is loaded.
_DRIVER = Path("/dev/nvidiactl")


def choose_device(name: str, *, by_gradient: bool) -> str:
    """Resolve ``--device``.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        by_gradient: Whether torch is needed anyway. A closed form on the CPU never imports it, which would take longer
            than most of these fits.

    Raises:
        SpecError: No such device.
    """
    if name == "cpu" or (name == "auto" and not by_gradient and not _DRIVER.exists()):
        return "cpu"
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecError(f"device {name!r}: write auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SpecError(f"device {name!r}: this machine has no usable CUDA device; use --device cpu")
    return name


@contextmanager
def dask_client(address: str | None, *, workers: int | None = None, quiet: bool = False) -> Iterator[Any]:
    """A client of the given Dask scheduler, or of one for this machine alone. Says on stderr where its dashboard is.

    Args:
        address: Of a scheduler; None for a local one.
        workers: Processes of the local one, with a core each; one that dies is replaced. None for threads of this
            process, as many as it may use cores.
        quiet: Say nothing.

    Raises:
        SpecError: No scheduler answers there within :data:`SCHEDULER_SECONDS`, or workers make no sense.
    """
    if workers is not None and (workers < 1 or address is not None):
        reason = "at least one is needed" if workers < 1 else f"the scheduler at {address} has its own"
        raise SpecError(f"{workers} worker processes: {reason}")
    with _client(address, workers) as client:
        if not quiet:
            # The link of a local one names an address at which it does not listen.
            port = client.scheduler_info()["services"].get("dashboard")
            err.print(f"Dask dashboard: {client.dashboard_link if address else f'http://127.0.0.1:{port}/status'}")
            if not client.nthreads():
                err.print(f"the Dask scheduler at {address} has no workers yet: waiting for them")
        yield client


@contextmanager
def _client(address: str | None, workers: int | None) -> Iterator[Any]:
    from distributed import Client, LocalCluster

    if address is not None:
        try:
            client = Client(address, timeout=SCHEDULER_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise SpecError(f"--scheduler {address}: no Dask scheduler answers there ({error})") from error
        with client:
            yield client
        return
    cores = len(os.sched_getaffinity(0))
    # Any free port, and for this machine only: None would take 8787 and offer it to the network. What fails is told by
    # who waits for it, in a line.
    with (
        LocalCluster(
            n_workers=workers or 1,
            threads_per_worker=1 if workers else cores,
            processes=workers is not None,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
