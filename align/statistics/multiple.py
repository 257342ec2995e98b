"""Many tests at once, and tests against permutations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featstore.errors import FitError


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Adjust p values for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    Rejecting where the adjusted value is at most 0.05 rejects any true null hypothesis among them in at most 5 % of
    tables, however the tests depend on each other.

    Args:
        p: One for each test; None where there is none, which is not counted.

    Returns:
        In the same order, each at least its own p and at most 1; None stays None.

    Raises:
        FitError: A value outside [0, 1].
    """
    known = [(value, place) for place, value in enumerate(p) if value is not None]
    if wrong := [value for value, _ in known if not 0 <= value <= 1]:
        raise FitError(f"p values lie within 0 and 1, not {wrong[0]}; give probabilities")
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, place) in enumerate(sorted(known)):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        adjusted[place] = largest
    return adjusted


def permutation_p(
    value: ArrayLike, null: ArrayLike, *, closer: Literal["higher", "lower"] = "higher"
) -> NDArray[np.float64]:
    """One-sided p value of a statistic among its permutations, which is never zero.

    ``(1 + #{null >= value}) / (1 + draws)``: the statistic itself is one of the arrangements (Phipson and Smyth,
    Statistical Applications in Genetics and Molecular Biology 9, 2010).

    Args:
        value: Any shape.
        null: ``(draws, ...)``, the same statistic under each permutation; draws without a value (NaN) are left out.
        closer: ``lower`` for a distance: null values at or below the statistic count.

    Returns:
        float64, of the value's shape; NaN where the value or every draw is NaN.
    """
    observed, draws = np.asarray(value, dtype=np.float64), np.asarray(null, dtype=np.float64)
    if draws.shape[1:] != observed.shape:
        raise FitError(
            f"null values of shape {draws.shape} for a statistic of shape {observed.shape}; give draws first"
        )
    with np.errstate(invalid="ignore"):
        as_far = draws >= observed if closer == "higher" else draws <= observed
    count = np.isfinite(draws).sum(axis=0)
    p = (1.0 + as_far.sum(axis=0)) / (1.0 + count)
    found: NDArray[np.float64] = np.where(np.isfinite(observed) & (count > 0), p, np.nan)
    return found
