"""Planned batches through a model, and states to stored rows: rounded on the device, copied while it computes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.errors import NonFiniteStateError
from featstore.models import residual as sites
from featstore.models.devices import input_device
from featstore.models.fingerprint import UNKNOWN, Weights
from featstore.store.format.elements import Encoded, Format
from featstore.text.plan import Plan

_TORCH_TYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


class BatchReader:
    """Runs planned batches through one model.

    Args:
        stream: The model's residual stream.
        plan: The plan.
        name: The model's name in the plan.
        weights: Fingerprints of the model's weights.
    """

    def __init__(self, stream: sites.ResidualStream, plan: Plan, name: str, weights: Weights = UNKNOWN) -> None:
        self.plan, self.name, self.weights = plan, name, weights
        self.planned = plan.models[name]
        self._stream = stream
        self.device = input_device(stream.model)

    def tokens_in(self, batch: NDArray[np.int64]) -> int:
        """Real tokens of a batch.

        Args:
            batch: Window numbers.
        """
        starts = self.planned.row_start
        return int((starts[batch + 1] - starts[batch]).sum())

    def states(self, batch: NDArray[np.int64], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Hidden states of the windows' real tokens, one window after another.

        Args:
            batch: Window numbers.
            layers: Layers to capture.

        Returns:
            ``{layer: (tokens, width)}`` in the model's dtype, on its device.
        """
        starts = self.planned.row_start
        lengths = starts[batch + 1] - starts[batch]
        groups = self._stream.batching.groups(lengths.tolist())
        if len(groups) == 1:
            return self._pass(batch, lengths, layers)
        parts = [self._pass(batch[group], lengths[group], layers) for group in groups]
        # Rows came group by group; they leave window by window.
        first = np.concatenate([[0], np.cumsum(lengths)])
        rows = np.concatenate([np.arange(first[w], first[w + 1]) for group in groups for w in group])
        order = torch.from_numpy(np.argsort(rows))
        found = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
        return {layer: states[order.to(states.device)] for layer, states in found.items()}

    def _pass(
        self, batch: NDArray[np.int64], lengths: NDArray[np.int64], layers: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """One forward pass over windows that may share it, padded at the right."""
        starts = self.planned.row_start
        ids = torch.zeros((len(batch), int(lengths.max())), dtype=torch.long)
        for i, w in enumerate(batch):
            ids[i, : lengths[i]] = torch.from_numpy(self.planned.ids[starts[w] : starts[w + 1]].astype(np.int64))
        # Where the real tokens are is known here: a boolean mask on the device would make the host wait for it.
        real = torch.arange(ids.shape[1])[None, :] < torch.from_numpy(lengths)[:, None]
        places = real.reshape(-1).nonzero().squeeze(1)
        states = sites.capture(self._stream, ids.to(self.device, non_blocking=True), layers)
        # Under a device map, layers come from several devices; the rows of all of them go on from one.
        chosen: dict[torch.device, torch.Tensor] = {}
        rows = {}
        for layer, hidden in states.items():
            if hidden.device not in chosen:
                chosen[hidden.device] = places.to(hidden.device, non_blocking=True)
            rows[layer] = hidden.reshape(-1, hidden.shape[-1])[chosen[hidden.device]].to(self.device)
        return rows

    def embeddings(self, ids: NDArray[np.int32]) -> torch.Tensor:
        """Layer 0 of single tokens.

        Args:
            ids: int32 ``(u,)`` token ids.

        Returns:
            ``(u, width)`` in the model's dtype, on its device.
        """
        column = torch.from_numpy(ids.astype(np.int64))[:, None].to(self.device)
        return sites.capture(self._stream, column, [0])[0][:, 0].to(self.device)

    def where(self, batch: NDArray[np.int64], layer: int) -> Callable[[int], str]:
        """Say where a row of a batch is, for messages.

        Args:
            batch: Window numbers.
            layer: Layer.

        Returns:
            A function of the row's place within the batch.
        """

        def locate(place: int) -> str:
            starts = self.planned.row_start
            ends = np.cumsum(starts[batch + 1] - starts[batch])
            at = int(np.searchsorted(ends, place, side="right"))
            window = int(batch[at])
            row = int(starts[window + 1] - (ends[at] - place))
            document = int(self.plan.corpus.window_document[window])
            return f"model {self.name!r}, layer {layer}, row {row} (window {window}, document {document})"

        return locate


@dataclass(frozen=True)
class Packed:
    """Rows rounded to the stored type, still on the model's device.

    Attributes:
        form: Element format.
        stored: ``(rows, width)`` of the stored type.
        norms: float32 ``(rows,)``, Euclidean norm of what is stored.
        peaks: float32 ``(rows,)``, largest magnitude before rounding; tells a model's infinity from float16's.
        row_scale: float32 ``(rows,)`` or None.
    """

    form: Format
    stored: torch.Tensor
    norms: torch.Tensor
    peaks: torch.Tensor
    row_scale: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        """What has to reach the host."""
        return [t for t in (self.stored, self.norms, self.peaks, self.row_scale) if t is not None]


def pack(values: torch.Tensor, form: Format, column_scale: torch.Tensor | None = None) -> Packed:
    """Round states to the stored type where they are.

    Args:
        values: ``(rows, width)`` in the model's dtype.
        form: Element format.
        column_scale: float32 ``(width,)`` on the same device; needed by ``int8``.
    """
    peaks = values.abs().amax(dim=-1).float() if values.numel() else values.new_zeros(len(values)).float()
    scale, wide = None, values
    if form.largest is not None:
        wide = values.float()
        if column_scale is not None and form.column_scaled:
            wide = wide / column_scale
        scale = wide.abs().amax(dim=-1) / form.largest
        wide = wide / torch.where(scale > 0, scale, 1.0)[:, None]
    if form.name == "int8":
        wide = wide.round().clamp(-127, 127)
    elif form.name == "fp8":
        # The quotient of a row's peak and its own scale can round to just above the largest number, which is NaN.
        wide = wide.clamp(-448, 448)
    stored = wide.to(_TORCH_TYPES[form.name]).contiguous()
    back = stored.float()
    if scale is not None:
        back = back * scale[:, None]
        if column_scale is not None and form.column_scaled:
            back = back * column_scale
    return Packed(form, stored, back.norm(dim=-1), peaks, scale)


def unpacked(form: Format, tensors: Sequence[torch.Tensor], locate: Callable[[int], str]) -> Encoded:
    """What arrived on the host, as rows for the store, checked.

    Args:
        form: Element format.
        tensors: As :meth:`Packed.tensors` has them, on the host.
        locate: Says where a row is.

    Raises:
        NonFiniteStateError: NaN or infinity, or a value float16 cannot hold; the message names the row.
    """
    stored, norms, peaks = tensors[0], tensors[1].numpy(), tensors[2].numpy()
    # NaN does not survive every maximum, but every norm and every scale.
    bad = np.flatnonzero(~np.isfinite(norms) | ~np.isfinite(peaks))
    if bad.size:
        row = int(bad[0])
        if np.isfinite(peaks[row]) and form.name == "float16":
            raise NonFiniteStateError(
                f"{locate(row)} holds {peaks[row]:.4g}, more than float16 can (65504); use --format bfloat16"
            )
        raise NonFiniteStateError(
            f"{locate(row)} holds NaN or infinity; try --dtype float32, or check the model's weights"
        )
    if stored.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        stored = stored.view(torch.int16 if stored.dtype is torch.bfloat16 else torch.uint8)
    return Encoded(stored.numpy().view(form.storage), norms, tensors[3].numpy() if form.row_scaled else None)


class HostCopier:
    """Brings packed rows to the host, on CUDA through pinned buffers on a stream of its own.

    At most ``depth`` copies are under way: taking one more waits until an earlier one has been released, so that
    pinned memory stays bounded and a slow disk slows the model down instead of filling memory.

    Args:
        device: The model's.
        depth: Buffers of pinned memory.
    """

    def __init__(self, device: torch.device, depth: int = 2) -> None:
        import queue

        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: queue.Queue[dict[tuple[int, int], torch.Tensor]] = queue.Queue()
        for _ in range(depth):
            self._free.put({})

    def start(self, packed: Sequence[Packed]) -> HostCopy:
        """Begin to copy; waits for a free buffer.

        Args:
            packed: Rows of one batch, layer by layer.
        """
        if self._stream is None:
            return HostCopy([p.tensors() for p in packed], None, lambda: None)
        buffer = self._free.get()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        arrived = []
        with torch.cuda.stream(self._stream):
            for i, part in enumerate(packed):
                tensors = []
                for j, tensor in enumerate(part.tensors()):
                    tensors.append(_pinned(buffer, (i, j), tensor).copy_(tensor, non_blocking=True))
                    tensor.record_stream(self._stream)
                arrived.append(tensors)
            event = torch.cuda.Event()
            event.record(self._stream)
        return HostCopy(arrived, event, lambda: self._free.put(buffer))


def _pinned(buffer: dict[tuple[int, int], torch.Tensor], key: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Pinned memory for a tensor, kept from batch to batch and enlarged where it is too small."""
    needed = like.numel() * like.element_size()
    if key not in buffer or len(buffer[key]) < needed:
        buffer[key] = torch.empty(needed, dtype=torch.uint8, pin_memory=True)
    return buffer[key][:needed].view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class HostCopy:
    """A copy under way.

    Attributes:
        tensors: On the host; valid after :meth:`wait` and until :meth:`release`.
    """

    tensors: list[list[torch.Tensor]]
    _event: Any
    _release: Callable[[], None]

    def wait(self) -> list[list[torch.Tensor]]:
        """Wait until everything has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self.tensors

    def release(self) -> None:
        """Give the memory back."""
        self._release()
