"""Sums over documents of unequal length whose true figures are known, for intervals and tests to be tried on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Spread of the logarithm of a document's length; Wikitext's articles have about 0.9.
LENGTHS = {"equal": 0.0, "unequal": 0.6, "very unequal": 1.0}


@dataclass(frozen=True)
class Documents:
    """Sums by document.

    Attributes:
        n: float64 ``(documents,)``, rows.
        sst: Squared distance of the target from its mean.
        sse: float64 ``(maps, documents)``, squared errors.
        truth: float64 ``(maps,)``, the R2 that each map has over all documents there are.
    """

    n: Array
    sst: Array
    sse: Array
    truth: Array


def documents(
    count: int,
    rng: np.random.Generator,
    *,
    truth: tuple[float, ...] = (0.5,),
    lengths: str = "unequal",
    shared: float = 0.7,
) -> Documents:
    """Draw documents that are hard or easy as wholes.

    Each document has its own length, its own spread, and its own share of it that a map leaves unexplained; the share's
    mean over documents, whatever their length, is 1 - R2.

    Args:
        count: Documents.
        rng: Source of randomness.
        truth: R2 of every map.
        lengths: A name of :data:`LENGTHS`.
        shared: How much of a document's difficulty is common to all maps.
    """
    spread = LENGTHS[lengths]
    n = np.maximum(rng.lognormal(5.3, spread, count) if spread else np.full(count, 200.0), 20).round()
    sst = n * rng.gamma(20, 1 / 20, count)
    common = rng.gamma(10, 1 / 10, count)
    own = rng.gamma(10, 1 / 10, (len(truth), count))
    hard = shared * common + (1 - shared) * own
    unexplained = (1 - np.array(truth))[:, None] * hard
    # Rows of a document differ as well.
    noise = 1 + rng.normal(0, 1, unexplained.shape) / np.sqrt(n)
    return Documents(n, sst, sst * unexplained * np.maximum(noise, 0.05), np.array(truth))
