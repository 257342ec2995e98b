"""What a command runs on: a device, a Dask scheduler."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featstore.console import err
from featstore.errors import SpecError

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
def dask_client(address: str | None) -> Iterator[Any]:
    """A client of the given Dask scheduler, or of one within this process.

    Args:
        address: Of a scheduler; None for a local one.

    Raises:
        SpecError: No scheduler answers there.
    """
    from distributed import Client

    try:
        if address is not None:
            client = Client(address, timeout=SCHEDULER_SECONDS)
        else:
            # Any free port, and for this machine only: None would take 8787 and offer it to the network.
            client = Client(
                processes=False, n_workers=1, threads_per_worker=os.cpu_count() or 1, dashboard_address="127.0.0.1:0"
            )
    except (OSError, TimeoutError, ValueError) as error:
        raise SpecError(f"--scheduler {address}: no Dask scheduler answers there ({error})") from error
    with client:
        if address is not None:
            err.print(f"Dask dashboard: {client.dashboard_link}")
        yield client
