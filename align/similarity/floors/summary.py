"""What exchanges say of a value: mean, 95th percentile, p value, and one that holds over all pairs of layers."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np

from align.moments.scatter import Array
from align.statistics import permutation_p

#: Draws that differ from the value by less than this share of the largest figure are equal to it, to float32 rounding.
_EQUAL = 1e-6


def summary(found: Array, closer: Literal["higher", "lower"], *, alone: bool = False) -> dict[str, Any]:
    """Value, floor and p values of every pair of layers.

    ``p = (1 + #{draws at least as close as the value}) / (1 + draws)`` (Phipson and Smyth, Stat. Appl. Genet. Mol.
    Biol. 9:39, 2010). ``p_max`` compares the value with the closest figure of each draw over all pairs of layers, made
    with the same exchange: the chance that any of them comes so close where nothing is to be found (Westfall and Young,
    *Resampling-Based Multiple Testing*, 1993). Each pair of layers is first taken about the mean of its own value and
    draws, in units of their spread, which no exchange changes: similar embeddings have a high floor, and would else
    be the rival of every deeper pair.

    Args:
        found: float64 ``(1 + draws, layers, layers)``, the true pairing first, NaN where undefined.
        closer: Whether higher or lower values are closer.
        alone: Of one model with itself: a layer with itself takes no part in the maximum.

    Returns:
        float64 matrices ``value``, ``mean``, ``p95`` (for ``lower`` the 5th percentile), ``p`` and ``p_max``, NaN where
        undefined or without draws.
    """
    value, draws = found[0], found[1:]
    nothing = np.full(value.shape, np.nan)
    if not len(draws):
        return {"value": value, "mean": nothing, "p95": nothing, "p": nothing, "p_max": nothing}
    sign = 1.0 if closer == "higher" else -1.0
    known = np.isfinite(value) & np.isfinite(draws).all(axis=0)
    finite = np.abs(found[np.isfinite(found)])
    bar = value - sign * _EQUAL * (float(finite.max()) if finite.size else 0.0)
    itself = np.arange(value.shape[0])[:, None] == np.arange(value.shape[1])
    # Where nothing varies nothing stands out.
    spread = np.where(known, found.std(axis=0), 1.0)
    spread[spread == 0] = np.inf
    centre = np.where(known, found.mean(axis=0), 0.0)
    counted = np.where(known & np.logical_not(itself) if alone else known, sign * (draws - centre) / spread, -np.inf)
    largest = np.broadcast_to(counted.max(axis=(1, 2))[:, None, None], draws.shape)
    with warnings.catch_warnings():
        # Layers without values have no quantiles.
        warnings.simplefilter("ignore", RuntimeWarning)
        tables = {
            "mean": draws.mean(axis=0),
            "p95": sign * np.quantile(sign * draws, 0.95, axis=0),
            "p": permutation_p(bar, draws, closer=closer),
            "p_max": permutation_p(sign * (bar - centre) / spread, largest),
        }
    return {"value": value, **{name: np.where(known, table, np.nan) for name, table in tables.items()}}
