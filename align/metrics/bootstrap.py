"""Intervals that resample whole documents: tokens of one document are not independent."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from align.moments.scatter import Array
from featstore.errors import FitError


def document_bootstrap(
    values_by_document: ArrayLike,
    statistic: Callable[[Array], Array] | tuple[int, int],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """A 95 % percentile interval of a statistic of sums, resampling whole documents.

    Tokens of one document depend on each other, so resampling tokens would give intervals far too
    narrow. Draws in which the statistic is undefined (a zero denominator) are left out.

    Args:
        values_by_document: (n_documents, k) sums over each document, say nats and tokens.
        statistic: Takes resampled totals (draws, k) and returns (draws,); or ``(i, j)`` for column
            i over column j.
        draws: Resamples.
        seed: Fixes them.

    Returns:
        The 2.5 % and 97.5 % quantiles; ``(nan, nan)`` below two documents or where no draw is
        defined.

    Raises:
        FitError: The values are not a finite matrix, or there are no draws.
    """
    values = np.asarray(values_by_document, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all() or draws < 1:
        raise FitError(f"need a finite (documents, k) matrix and draws: {values.shape}, {draws}")
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    # Counts in slices: 1000 draws of all Wikitext documents at once would take gigabytes.
    totals = [
        rng.multinomial(n, np.full(n, 1 / n), size=min(100, draws - start)) @ values for start in range(0, draws, 100)
    ]
    resampled = np.concatenate(totals)
    with np.errstate(divide="ignore", invalid="ignore"):
        if callable(statistic):
            found = np.asarray(statistic(resampled), dtype=np.float64)
        else:
            found = resampled[:, statistic[0]] / resampled[:, statistic[1]]
    found = found[np.isfinite(found)]
    if not found.size:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
