"""What a window costs to send, in bytes, as latents and as what one could send instead."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from align.compress.layout import NUMBER_BYTES
from align.compress.windows import Windows
from featstore.errors import FitError

#: Beside the latents: the number of source tokens and the window's bytes, 2 bytes each.
HEADER_BYTES = 4


@dataclass(frozen=True)
class Rate:
    """Mean bytes of a window.

    Attributes:
        windows: Over how many windows.
        latent_bytes: M * R numbers in bfloat16, always all of them.
        text_bytes: The window's UTF-8 text.
        token_id_bytes: Ids of the source's ordinary tokens, each in as many whole bits as its vocabulary needs.
        raw_bytes: The source states that went in, in bfloat16.
        side_bytes: What the receiver needs beside the latents: the byte ends of its own tokens, a byte a token
            delta-coded, and a header. Every codec that answers at positions needs it.
        target_tokens: Target positions that are reconstructed.
        source_tokens: Source tokens that went in.
    """

    windows: int
    latent_bytes: float
    text_bytes: float
    token_id_bytes: float
    raw_bytes: float
    side_bytes: float
    source_tokens: float
    target_tokens: float

    @property
    def per_text_byte(self) -> float:
        """Bytes of latents for a byte of text."""
        return self.latent_bytes / self.text_bytes


def rate_of(windows: Windows, latents: int, latent_dim: int) -> Rate:
    """Mean rates over a split.

    Args:
        windows: The split; reads no states.
        latents: M.
        latent_dim: R.

    Raises:
        FitError: M or R is below 1, or the source's vocabulary is not recorded.
    """
    if min(latents, latent_dim) < 1:
        raise FitError(f"{latents} latents of {latent_dim}: both must be at least 1")
    store, pair = windows.store, windows.pair
    corpus = store.corpus
    text = (corpus.window_end - corpus.window_start)[windows.numbers]
    vocabulary = store.model(pair.source).attributes.get("vocabulary")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise FitError(f"{store.path} does not record the vocabulary of {pair.source!r}; extract again")
    bits = max(int(vocabulary - 1).bit_length(), 1)
    tokens = [store.tokens(name) for name in (pair.source, pair.target)]
    ordinary = [np.bincount(t.window[~t.special], minlength=len(corpus.window_split))[windows.numbers] for t in tokens]
    source, target = windows.sizes()
    return Rate(
        len(windows),
        float(latents * latent_dim * NUMBER_BYTES),
        float(text.mean()),
        float((ordinary[0] * bits / 8).mean()),
        float(source.mean() * windows.width_x * NUMBER_BYTES),
        float(ordinary[1].mean() + HEADER_BYTES),
        float(source.mean()),
        float(target.mean()),
    )


def rate_card(rate: Rate) -> dict[str, float | int]:
    """A rate as JSON, with bytes of latents for a byte of text.

    Args:
        rate: From :func:`rate_of`.
    """
    return {**asdict(rate), "latent_bytes_per_text_byte": rate.per_text_byte}
