"""How predictions under a condition differ from the untouched ones, without the whole vocabulary at every position.

With p the untouched predictions and q those under a condition, in nats at every position:

    loss = -log q(next token)        KL = sum_v p(v) (log p(v) - log q(v))

The head runs over the positions of many conditions at once: its product is the faster the more rows it has. What
follows goes over few rows at a time: it reads and writes the vocabulary several times, and is the faster the more of
that stays in the processor's cache. Only the untouched log-probabilities of a text stand whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

#: Gives logits ``(n, vocabulary)`` for states ``(n, width)``.
Head = Callable[[torch.Tensor], torch.Tensor]
#: Rows that go through the head at once, and bytes of them that the loss works on at once: on a processor about its
#: cache, elsewhere enough to be worth a kernel.
_ROWS, _CACHED, _ELSEWHERE = 512, 4 << 20, 256 << 20

Figures = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class Untouched:
    """A text's predictions with nothing replaced.

    Attributes:
        log_p: float32 ``(n, vocabulary)`` at the n positions that are scored.
        wanted: int64 ``(n,)``, the tokens that come there.
        best: int64 ``(n,)``, the tokens that are likeliest there.
        nats: float64 ``(n,)``, the loss.
    """

    log_p: torch.Tensor
    wanted: torch.Tensor
    best: torch.Tensor
    nats: NDArray[np.float64]


def untouched(head: Head, states: torch.Tensor, wanted: NDArray[np.int64]) -> Untouched:
    """Predict with nothing replaced.

    Args:
        head: Of the model.
        states: ``(n, width)`` at the positions that are scored.
        wanted: int64 ``(n,)``, the tokens that come there.
    """
    parts = [head(states[part]).float().log_softmax(dim=-1) for part in _parts(len(states), _ROWS)]
    log_p = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else states.new_zeros((0, 1), dtype=torch.float32)
    ids = torch.from_numpy(wanted).to(log_p.device)
    nats = -log_p.gather(1, ids[:, None])[:, 0]
    return Untouched(log_p, ids, log_p.argmax(dim=-1), nats.double().cpu().numpy())


def compared(head: Head, states: torch.Tensor, with_: Untouched) -> Figures:
    """Predict under several conditions, and compare with the untouched predictions.

    Args:
        head: Of the model.
        states: ``(conditions, n, width)`` at the positions that are scored.
        with_: The untouched predictions there.

    Returns:
        Loss and divergence, float64 ``(conditions, n)``, and whether the likeliest token is the untouched one, bool of
        the same shape; of the likeliest tokens the one with the lowest number counts.
    """
    count, n = states.shape[:2]
    nats, divergence = (torch.empty((n, count), dtype=torch.float32) for _ in range(2))
    same = torch.empty((n, count), dtype=torch.bool)
    for part in _parts(n, max(1, _ROWS // count)):
        # Position by position, so that a position's conditions lie side by side.
        rows = states[:, part].transpose(0, 1)
        logits = head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        at_once = (_CACHED if logits.device.type == "cpu" else _ELSEWHERE) // (4 * logits[0].numel())
        for few in _parts(len(logits), max(1, at_once)):
            here = slice(part.start + few.start, part.start + few.stop)
            log_p, wanted, best = with_.log_p[here], with_.wanted[here], with_.best[here]
            log_q = logits[few].float().log_softmax(dim=-1)
            nats[here] = -log_q.gather(2, wanted[:, None, None].expand(-1, count, 1))[..., 0].cpu()
            same[here] = (log_q.argmax(dim=-1) == best[:, None]).cpu()
            apart = torch.sub(log_p[:, None], log_q, out=log_q)
            divergence[here] = torch.matmul(apart, log_p.exp()[:, :, None])[..., 0].cpu()
    return nats.T.double().numpy(), divergence.T.double().numpy(), same.T.numpy()


def _parts(count: int, size: int) -> Iterator[slice]:
    """Slices of a range."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
