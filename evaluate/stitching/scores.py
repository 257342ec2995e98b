"""What a stitched run is judged by, as sums over documents: the tokens of one document depend on each other.

With p the target's own predictions on untouched states and q those under a condition, in nats for every scored token:

    loss = -log q(next token)        KL = sum_v p(v) (log p(v) - log q(v))

A loss can stay the same while the predictions change; the divergence cannot. Bits per byte divide by the bytes that the
scored tokens span, and so compare across tokenizers; perplexities, exp(loss), do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.text.tokens import TokenizedWindow

#: The first token whose prediction counts: the first ones are read off the start of the text alone.
FIRST_SCORED = 2
#: Columns of a tally.
NATS, TOKENS, BYTES, DIVERGENCE, SAME = range(5)
#: Positions whose predictions over the whole vocabulary are held at once beside the logits.
_SLICE = 128


@dataclass
class Tally:
    """Sums by document: nats, tokens, bytes, nats of divergence, tokens with the same first choice."""

    sums: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def add(
        self, document: int, nats: float, tokens: int, size: int, divergence: float = 0.0, same: int | None = None
    ) -> None:
        """Add a window.

        Args:
            document: Document number.
            nats: Summed loss.
            tokens: Scored tokens.
            size: Bytes those tokens span.
            divergence: Summed KL from the untouched predictions.
            same: Tokens at which the likeliest prediction is that of the untouched model; None for all of them.
        """
        row = np.array([nats, tokens, size, divergence, tokens if same is None else same], dtype=np.float64)
        self.sums[document] = self.sums.get(document, np.zeros(len(row))) + row

    @property
    def documents(self) -> list[int]:
        """Numbers of the documents with a scored token, ascending: others say nothing, and are no documents here."""
        return [number for number in sorted(self.sums) if self.sums[number][TOKENS] > 0]

    def table(self) -> NDArray[np.float64]:
        """``(documents, 5)``, a row for each of :attr:`documents`."""
        return np.array([self.sums[number] for number in self.documents]).reshape(-1, 5)


def add_window(
    tally: Tally,
    document: int,
    tokens: TokenizedWindow,
    logits: torch.Tensor,
    clean: torch.Tensor | None = None,
    *,
    counts: NDArray[np.bool_] | None = None,
) -> None:
    """Score a window's predictions of its third token on, special tokens left out.

    Args:
        tally: Takes the sums.
        document: Its document.
        tokens: The window as the predicting model reads it, three tokens at least.
        logits: ``(tokens, vocabulary)`` under the condition.
        clean: The same with nothing replaced; None where these are the ones.
        counts: bool ``(tokens,)``, which of its ordinary tokens are scored; None for all.
    """
    ids = torch.from_numpy(tokens.ids.astype(np.int64)).to(logits.device)
    ordinary = ~tokens.special[FIRST_SCORED:]
    scored = ordinary if counts is None else ordinary & counts[FIRST_SCORED:]
    nats, divergence, same = _predictions(logits, logits if clean is None else clean, ids)
    ends = np.where(ordinary, tokens.byte_end[FIRST_SCORED:], 0)
    # What each token adds to the text read so far; special tokens, which read nothing, have 0.
    spans = np.diff(np.maximum.accumulate(np.r_[tokens.byte_end[:FIRST_SCORED].max(), ends]))
    tally.add(
        document,
        float(nats[scored].sum()),
        int(scored.sum()),
        int(spans[scored].sum()),
        float(divergence[scored].sum()),
        int(same[scored].sum()),
    )


def _predictions(
    logits: torch.Tensor, clean: torch.Tensor, ids: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Loss, divergence and agreement of every scored prediction, each ``(tokens - 2,)``."""
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for start in range(FIRST_SCORED - 1, len(ids) - 1, _SLICE):
        stop = min(start + _SLICE, len(ids) - 1)
        log_q = logits[start:stop].float().log_softmax(dim=-1)
        nats = -log_q.gather(1, ids[start + 1 : stop + 1, None])[:, 0]
        if logits is clean:
            parts.append((nats, torch.zeros_like(nats), torch.ones_like(nats, dtype=torch.bool)))
            continue
        log_p = clean[start:stop].float().log_softmax(dim=-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        parts.append((nats, divergence, log_p.argmax(dim=-1) == log_q.argmax(dim=-1)))
    nats, divergence, same = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return nats.double().numpy(), divergence.double().numpy(), same.numpy()
