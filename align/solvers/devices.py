"""Second moments on the device that solves, and results back on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numpy.typing import ArrayLike

from align.moments.scatter import Array, Scatter
from align.solvers.linalg import host, namespace
from featstore.errors import FitError


def to_numpy(array: ArrayLike) -> Array:
    """The same elements as a numpy array.

    Args:
        array: numpy or torch, on any device, any shape.

    Returns:
        float64 of the same shape; what was a float64 numpy array is passed through.
    """
    return host(namespace(array).asarray(array))


def to_device(scatter: Scatter, device: str) -> Scatter:
    """Bring second moments to the device whose linear algebra is wanted.

    Args:
        scatter: Of numpy arrays or torch tensors.
        device: ``cpu`` for numpy; else what torch calls a device, such as ``cuda`` or ``cuda:1``, for float64 tensors
            there. Only then torch is imported.

    Raises:
        FitError: torch does not know the device, or it has no float64.
    """
    convert = to_numpy if device == "cpu" else _sender(device)
    parts: dict[str, Any] = {name: convert(getattr(scatter, name)) for name in ("mean_x", "mean_y", "gx", "gy", "c")}
    return replace(scatter, **parts)


def _sender(device: str) -> Any:
    import torch

    def send(array: Array) -> Any:
        try:
            return torch.as_tensor(array, dtype=torch.float64, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise FitError(f"device {device!r} cannot hold the moments; use 'cpu' or 'cuda': {error}") from error

    return send
