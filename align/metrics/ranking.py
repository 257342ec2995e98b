"""Whether a predicted state is nearest to its own partner among a gallery."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from align.metrics.rows import ROUNDING, Figures, checked_rows
from align.moments.scatter import Array, Rows
from featstore.errors import FitError

RETRIEVAL_KEYS = (
    "retrieval_top1",
    "retrieval_top5",
    "retrieval_mrr",
    "retrieval_median_rank",
    "retrieval_chance",
    "retrieval_ceiling",
)

#: Equal rows need not give bitwise equal products; this is far below any real difference of cosines.
_TIE = 1e-12
_NOT_FINITE = "a true or predicted state is not finite"


def retrieval(y: Rows, y_hat: Rows, *, centre: ArrayLike) -> Figures:
    """Find each true row among all true rows by the cosine of its prediction, both centred.

    Ties count as if broken at random: the median rank takes the middle of the tied ranks, top-k and
    MRR their expectation. So a prediction that does not depend on its input scores exactly chance:
    top-1 1/N, median rank (N + 1)/2. A perfect prediction scores ``retrieval_ceiling``, below 1 where rows of the
    gallery are equal, as those of equal tokens are at layer 0.

    Args:
        y: (N, dy) the gallery.
        y_hat: (N, dy) the i-th row is the query for the i-th of the gallery.
        centre: (dy,) subtracted from both; the train mean.

    Returns:
        ``retrieval_top1 ... retrieval_ceiling`` and ``retrieval_gallery`` = N; all but the last None
        where the gallery has fewer than two rows or all its rows look the same.

    Raises:
        FitError: Shapes do not fit.
    """
    mean = np.asarray(centre, dtype=np.float64)
    y, y_hat = checked_rows("y", y, mean.size), checked_rows("y_hat", y_hat, mean.size)
    if len(y) != len(y_hat):
        raise FitError(f"y has {len(y)} rows and y_hat {len(y_hat)}; give a prediction for every true row")
    return rank_of_partners(y, y_hat, mean)[0]


@dataclass(frozen=True, eq=False)
class Gallery:
    """The true rows among which partners are looked for, the same for every map; see :func:`gallery_of`.

    Attributes:
        unit: float64 ``(N, dy)``, centred and of length 1.
        ceiling: Top-1 of the true rows against themselves.
        reason: Why nothing can be found there, or None.
    """

    unit: Array
    ceiling: float
    reason: str | None


def gallery_of(y: Rows, mean: Array) -> Gallery:
    """Prepare true rows once for all maps.

    Args:
        y: ``(N, dy)`` floating rows.
        mean: float64 ``(dy,)``, subtracted.
    """
    n, floor = len(y), ROUNDING * float(np.linalg.norm(mean))
    if n < 2:
        return Gallery(np.zeros(y.shape), 0.0, f"retrieval needs at least 2 rows, not {n}")
    if not np.isfinite(y).all():
        return Gallery(np.zeros(y.shape), 0.0, _NOT_FINITE)
    unit = _unit(y - mean, floor)
    if float(np.abs(unit - unit[0]).max()) < ROUNDING:
        return Gallery(unit, 0.0, "all target rows of the gallery point the same way")
    return Gallery(unit, _ceiling(unit), None)


def rank_of_partners(y: Rows, y_hat: Rows, mean: Array, gallery: Gallery | None = None) -> tuple[Figures, str | None]:
    """The figures of :func:`retrieval`, and why they are None.

    Args:
        y: ``(N, dy)`` floating rows.
        y_hat: The same of the predictions.
        mean: float64 ``(dy,)``, subtracted from both.
        gallery: :func:`gallery_of` of ``y`` and ``mean`` if it is known already.
    """
    n, floor = len(y), ROUNDING * float(np.linalg.norm(mean))
    figures: Figures = {**dict.fromkeys(RETRIEVAL_KEYS), "retrieval_gallery": n}
    known = gallery_of(y, mean) if gallery is None else gallery
    if n >= 2 and not np.isfinite(y_hat).all():
        return figures, _NOT_FINITE
    if known.reason is not None:
        return figures, known.reason
    queries = _unit(y_hat - mean, floor)
    gallery_rows = known.unit
    similarity = queries @ gallery_rows.T
    difference = similarity - np.diag(similarity)[:, None]
    better = (difference > _TIE).sum(axis=1)
    ties = (np.abs(difference) <= _TIE).sum(axis=1)
    figures["retrieval_top1"] = float(np.clip((1 - better) / ties, 0, 1).mean())
    figures["retrieval_top5"] = float(np.clip((5 - better) / ties, 0, 1).mean())
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])
    reciprocal = (harmonic[better + ties] - harmonic[better]) / ties
    figures["retrieval_mrr"] = float(reciprocal.mean())
    figures["retrieval_median_rank"] = float(np.median(better + (ties + 1) / 2))
    figures["retrieval_chance"] = 1 / n
    figures["retrieval_ceiling"] = known.ceiling
    return figures, None


def _ceiling(gallery: Array) -> float:
    """Top-1 of the true rows against themselves, equal rows sharing it."""
    # No row is nearer to one than itself. One without a direction is as near to all others.
    ties = (gallery @ gallery.T > np.square(np.linalg.norm(gallery, axis=1))[:, None] - _TIE).sum(axis=1)
    return float((1 / ties).mean())


def _unit(rows: Array, floor: float) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > floor, rows / np.where(norms > floor, norms, 1.0), 0.0)
