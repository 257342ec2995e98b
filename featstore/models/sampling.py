"""Which token comes next: the likeliest, or one that is drawn, with draws that nothing else in a batch decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from featstore.errors import SpecError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: Divides the logits; above 0.
        top_p: Draw from the fewest likeliest tokens that together have this probability, in (0, 1] (nucleus sampling,
            arXiv 1904.09751).
        seed: 0 or more. With the row's number and the step it fixes a draw, whatever else is in the batch.

    Raises:
        SpecError: A value outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise SpecError(f"temperature {self.temperature}: must be above 0; leave sampling out for greedy text")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if self.seed < 0:
            raise SpecError(f"seed {self.seed}: must be 0 or more")


def next_tokens(logits: torch.Tensor, sample: Sampling | None, numbers: Sequence[int], step: int) -> list[int]:
    """The next token of every row.

    Args:
        logits: ``(batch, vocabulary)``.
        sample: How to draw; None for the likeliest token each time.
        numbers: Numbers of the rows, 0 or more, which fix their draws.
        step: How many tokens each row has had before.
    """
    if sample is None:
        chosen: list[int] = logits.argmax(dim=-1).tolist()
        return chosen
    rows = logits.double().cpu()
    return [_drawn(row, sample, number, step) for row, number in zip(rows, numbers, strict=True)]


def _drawn(logits: torch.Tensor, sample: Sampling, number: int, step: int) -> int:
    """One token, by the inverse of the cumulative distribution: one uniform number decides."""
    share, order = torch.softmax(logits / sample.temperature, dim=-1).sort(descending=True, stable=True)
    total = share.cumsum(dim=0)
    # Kept are the tokens before which less than top_p has been reached; the likeliest always is.
    kept = int((total - share < sample.top_p).sum())
    drawn = np.random.default_rng((sample.seed, number, step)).random() * float(total[kept - 1])
    place = int(torch.searchsorted(total[:kept], drawn, right=True))
    return int(order[min(place, kept - 1)])
