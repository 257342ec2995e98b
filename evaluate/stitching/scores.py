"""What a stitched run is judged by, as sums over documents: the tokens of one document depend on each other.

Losses and divergences of single predictions are those of :mod:`evaluate.stitching.predictions`. A loss can stay the
same while the predictions change; the divergence cannot. Bits per byte divide by the bytes that the scored tokens span,
and so compare across tokenizers; perplexities, exp(loss), do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from evaluate.stitching.predictions import Figures, compared, untouched
from featstore.text.tokens import TokenizedWindow

#: The first token whose prediction counts: the first ones are read off the start of the text alone.
FIRST_SCORED = 2
#: Columns of a tally.
NATS, TOKENS, BYTES, DIVERGENCE, SAME = range(5)


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


@dataclass(frozen=True, eq=False)
class Scored:
    """Which predictions of a window are scored: those of its third token on, special tokens left out.

    Attributes:
        places: int64 ``(n,)``, the positions whose predictions these are; each is that before the predicted token.
        wanted: int64 ``(n,)``, the predicted tokens.
        size: Bytes they span.
    """

    places: NDArray[np.int64]
    wanted: NDArray[np.int64]
    size: int


def scored(tokens: TokenizedWindow, counts: NDArray[np.bool_] | None = None) -> Scored:
    """Find the predictions of a window that are scored.

    Args:
        tokens: The window as the predicting model reads it, three tokens at least.
        counts: bool ``(tokens,)``, which of its ordinary tokens are scored; None for all.
    """
    ordinary = ~tokens.special[FIRST_SCORED:]
    taken = ordinary if counts is None else ordinary & counts[FIRST_SCORED:]
    ends = np.where(ordinary, tokens.byte_end[FIRST_SCORED:], 0)
    # What each token adds to the text read so far; special tokens, which read nothing, have 0.
    spans = np.diff(np.maximum.accumulate(np.r_[tokens.byte_end[:FIRST_SCORED].max(), ends]))
    places = np.flatnonzero(taken).astype(np.int64) + FIRST_SCORED - 1
    return Scored(places, tokens.ids[places + 1].astype(np.int64), int(spans[taken].sum()))


def add_untouched(tally: Tally, document: int, window: Scored, nats: NDArray[np.float64]) -> None:
    """Add a window's predictions on untouched states, which do not diverge from themselves.

    Args:
        tally: Takes the sums.
        document: Its document.
        window: What is scored of it.
        nats: float64 ``(n,)``, the losses.
    """
    tally.add(document, float(nats.sum()), len(window.places), window.size)


def add_compared(tally: Tally, document: int, window: Scored, figures: Figures) -> None:
    """Add a window's predictions under a condition.

    Args:
        tally: Takes the sums.
        document: Its document.
        window: What is scored of it.
        figures: Losses, divergences and agreement, each ``(n,)``.
    """
    nats, divergence, same = figures
    sums = (float(divergence.sum()), int(same.sum()))
    tally.add(document, float(nats.sum()), len(window.places), window.size, *sums)


def add_window(
    tally: Tally,
    document: int,
    tokens: TokenizedWindow,
    logits: torch.Tensor,
    clean: torch.Tensor | None = None,
    *,
    counts: NDArray[np.bool_] | None = None,
) -> None:
    """Score a window from the logits of all its tokens.

    Args:
        tally: Takes the sums.
        document: Its document.
        tokens: The window as the predicting model reads it, three tokens at least.
        logits: ``(tokens, vocabulary)`` under the condition.
        clean: The same with nothing replaced; None where these are the ones.
        counts: bool ``(tokens,)``, which of its ordinary tokens are scored; None for all.
    """
    window = scored(tokens, counts)
    places = torch.from_numpy(window.places).to(logits.device)
    own = untouched(torch.Tensor.float, (logits if clean is None else clean)[places], window.wanted)
    if clean is None:
        add_untouched(tally, document, window, own.nats)
        return
    [figures] = zip(*compared(torch.Tensor.float, logits[places][None], own), strict=True)
    add_compared(tally, document, window, figures)
