"""Where products are made and systems solved: numpy on the host, or torch on a device. Torch is imported on use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featstore.errors import SpecError
from featstore.store.moments.sums import Multiply, Rows, steady_products

#: Names torch's host device, where ``cpu`` means numpy: the path that a GPU takes, on a machine without one.
TORCH_CPU = "torch-cpu"


def torch_device(device: str) -> str | None:
    """What torch calls a device, or None for numpy, which needs no torch.

    Args:
        device: ``cpu`` for numpy, ``torch-cpu``, or a torch device such as ``cuda`` or ``cuda:1``.

    Raises:
        SpecError: Torch knows no such device, this machine has none, or it has no float64.
    """
    if device == "cpu":
        return None
    import torch

    name = "cpu" if device == TORCH_CPU else device
    try:
        torch.zeros(1, dtype=torch.float64, device=name)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SpecError(
            f"device {device!r} cannot be used ({reason}); use cpu, or cuda where there is a GPU"
        ) from error
    return name


def multiplier(device: str) -> Multiply:
    """What makes the products of :class:`featstore.store.moments.sums.BlockSums`.

    Args:
        device: As :func:`torch_device` takes it. ``cpu`` gives the same bits on any number of cores.

    Raises:
        SpecError: There is no such device.
    """
    name = torch_device(device)
    return steady_products if name is None else DeviceProducts(name)


class DeviceProducts:
    """X'Y of every block by torch: each node's rows go to the device once, and products come back one at a time.

    float32 rows are multiplied in full float32, with TensorFloat-32 off, and the caller adds products up in float64 on
    the host. An element of a product of n rows is off by at most about ``n 2^-24 |x| |y|``, in practice by some
    ``sqrt(n) 2^-24 |x| |y|`` with |x|, |y| the norms of the two columns: as on the host, in another order. TF32 would
    be off by 2^-11 an element, which the small eigenvalues of a Gram do not survive.

    Args:
        device: Torch device name.
    """

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, rows: Mapping[Any, Rows], blocks: Sequence[tuple[Any, Any]]) -> Iterator[Rows]:
        """Multiply.

        Args:
            rows: Centred rows ``(n, width)`` by node.
            blocks: Pairs of nodes.

        Yields:
            X'Y of each block, numpy, of the rows' dtype.
        """
        import torch

        there = {node: torch.from_numpy(value).to(self.device) for node, value in rows.items()}
        for x, y in blocks:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                product = there[x].T @ there[y]
            finally:
                torch.set_float32_matmul_precision(before)
            result: Rows = product.cpu().numpy()
            yield result
