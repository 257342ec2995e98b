"""What a command runs on: a device."""

from __future__ import annotations

from pathlib import Path

from featstore.errors import SpecError
from featstore.runtime.extras import installed

#: There where a CUDA driver is loaded.
_DRIVER = Path("/dev/nvidiactl")


def choose_device(name: str, *, by_gradient: bool) -> str:
    """Resolve ``--device``.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        by_gradient: Whether torch is needed anyway. A closed form on the CPU never imports it, which would take longer
            than most of these fits, and need not be installed for one.

    Raises:
        SpecError: No such device.
    """
    if name == "cpu" or (name == "auto" and not by_gradient and not (_DRIVER.exists() and installed("torch"))):
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
