"""Planned batches through a model, and states to stored rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore import formats, sites
from featstore.errors import NonFiniteStateError
from featstore.plan import Plan


class BatchReader:
    """Runs planned batches through one model.

    Args:
        stream: The model's residual stream.
        plan: The plan.
        name: The model's name in the plan.
        layers: Layers to capture.
    """

    def __init__(self, stream: sites.ResidualStream, plan: Plan, name: str, layers: Sequence[int]) -> None:
        self.plan, self.name, self.layers = plan, name, layers
        self.planned = plan.models[name]
        self._stream = stream
        self._device = next(stream.decoder.parameters()).device

    def tokens_in(self, batch: NDArray[np.int64]) -> int:
        """Real tokens of a batch.

        Args:
            batch: Window numbers.
        """
        starts = self.planned.row_start
        return int((starts[batch + 1] - starts[batch]).sum())

    def states(self, batch: NDArray[np.int64]) -> dict[int, torch.Tensor]:
        """Hidden states of the windows' real tokens, one window after another.

        Args:
            batch: Window numbers.

        Returns:
            ``{layer: (tokens, width)}`` in the model's dtype, on its device.
        """
        starts = self.planned.row_start
        lengths = starts[batch + 1] - starts[batch]
        ids = torch.zeros((len(batch), int(lengths.max())), dtype=torch.long)
        for i, w in enumerate(batch):
            ids[i, : lengths[i]] = torch.from_numpy(self.planned.ids[starts[w] : starts[w + 1]].astype(np.int64))
        real = torch.arange(ids.shape[1])[None, :] < torch.from_numpy(lengths)[:, None]
        states = sites.capture(self._stream, ids.to(self._device), self.layers)
        return {layer: hidden[real.to(hidden.device)] for layer, hidden in states.items()}

    def where(self, batch: NDArray[np.int64], layer: int) -> str:
        """Say where a batch is, for messages.

        Args:
            batch: Window numbers.
            layer: Layer.
        """
        first = int(batch.min())
        document = int(self.plan.corpus.window_document[first])
        return f"model {self.name!r}, layer {layer}, in the batch of window {first} (document {document})"


def check_finite(norms: torch.Tensor, where: str) -> None:
    """Refuse states that are not numbers.

    Args:
        norms: ``(rows,)``, Euclidean norm of each row.
        where: Named in the error.

    Raises:
        NonFiniteStateError: NaN or infinity.
    """
    bad = ~torch.isfinite(norms)
    if bool(bad.any()):
        raise NonFiniteStateError(
            f"{where}: NaN or infinity at row {int(torch.nonzero(bad)[0])}; "
            "try --dtype float32, or check the model's weights"
        )


def to_storage(values: torch.Tensor, form: formats.Format, where: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Round states to the stored type on their device and bring them to the host.

    Args:
        values: ``(rows, width)`` in the model's dtype.
        form: Element format.
        where: Named in errors.

    Returns:
        The stored rows and the float32 norm of each.

    Raises:
        NonFiniteStateError: NaN or infinity, or a value float16 cannot hold.
    """
    stored = values.to(getattr(torch, form.name)).contiguous()
    norms = stored.float().norm(dim=-1)
    if not bool(torch.isfinite(norms).all()):
        row = int(torch.nonzero(~torch.isfinite(norms))[0])
        if bool(torch.isfinite(values[row]).all()):
            raise NonFiniteStateError(
                f"{where}: row {row} holds {float(values[row].abs().max()):.4g}, more than {form.name} can; "
                "use --format bfloat16"
            )
        check_finite(norms, where)
    host = stored.cpu()
    array = host.view(torch.int16).numpy().view(form.storage) if form.name == "bfloat16" else host.numpy()
    return array, norms.cpu().numpy()
