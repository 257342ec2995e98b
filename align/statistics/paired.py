"""How much more often one answer is right than another on the same questions.

Only discordant questions tell: b that the first alone gets right, c that the second alone does. Tango's score interval
(Statistics in Medicine 17, 1998) inverts the test of p_1 - p_2 = delta and holds for few questions and for b or c of
zero, where differences of means have no width at all. Its test is asymptotic, and 4 to 0 would pass it; the p value is
therefore exact: under the null hypothesis each difference is as likely to have the other sign.

Questions may come in clusters (several about one landmark). The p value then flips the signs of whole clusters; the
interval has its counts divided by the design effect, the variance between clusters over that of independent questions
(Rao and Scott, Biometrics 48, 1992), and a t quantile for the number of clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit

from align.statistics.linearised import LEVEL, SIGNIFICANT, ratio
from featstore.errors import FitError


@dataclass(frozen=True)
class Paired:
    """A difference between two accuracies on the same questions.

    Attributes:
        value: Accuracy of the first less that of the second.
        low: Lower end of the 95 % interval.
        high: Its upper end.
        p: Exact two-sided p value of no difference.
        first_alone: Questions that the first alone gets right.
        second_alone: Questions that the second alone gets right.
        n: Questions.
        clusters: Clusters of questions.
    """

    value: float
    low: float
    high: float
    p: float
    first_alone: int
    second_alone: int
    n: int
    clusters: int

    @property
    def above(self) -> bool:
        """Whether the first is right more often: the interval is above 0 and the exact test agrees at 5 %."""
        return self.low > 0 and self.p <= SIGNIFICANT


def paired_proportions(first: ArrayLike, second: ArrayLike, clusters: ArrayLike | None = None) -> Paired:
    """Compare two sets of right and wrong answers to the same questions.

    Args:
        first: bool ``(n,)``.
        second: bool ``(n,)``.
        clusters: ``(n,)``, which questions belong together; None where each stands alone.

    Raises:
        FitError: No questions, or vectors of different lengths.
    """
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.ndim != 1 or one.shape != other.shape or not one.size:
        raise FitError(
            f"answers of shapes {one.shape} and {other.shape}; give two equal vectors, one answer a question"
        )
    n = len(one)
    owner = np.arange(n) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if owner.shape != one.shape:
        raise FitError(f"{n} answers came with clusters of shape {owner.shape}; give one a question")
    difference = one.astype(np.int64) - other.astype(np.int64)
    b, c = int((difference > 0).sum()), int((difference < 0).sum())
    sums = np.bincount(owner, weights=difference).astype(np.int64)
    sizes = np.bincount(owner)
    effect = _design_effect(sums, sizes, difference)
    groups = len(sizes)
    alone = groups == n
    quantile = float(ndtri((1 + LEVEL) / 2) if alone or groups < 2 else stdtrit(groups - 1, (1 + LEVEL) / 2))
    low, high = tango(b / effect, c / effect, n / effect, quantile)
    return Paired((b - c) / n, low, high, sign_flip_p(sums), b, c, n, groups)


def _design_effect(sums: NDArray[np.int64], sizes: NDArray[np.int64], difference: NDArray[np.int64]) -> float:
    """How many questions say as much as one independent one; at least 1."""
    if len(sizes) == len(difference) or len(sizes) < 2:
        return 1.0
    alone = ratio(difference, np.ones(len(difference)))
    together = ratio(sums, sizes)
    spread = float(np.square(alone.influence).sum())
    return max(1.0, float(np.square(together.influence).sum()) / spread) if spread > 0 else 1.0


def tango(b: float, c: float, n: float, quantile: float) -> tuple[float, float]:
    """The score interval of a difference between paired proportions.

    Args:
        b: Questions that the first alone gets right; need not be whole.
        c: Those of the second alone.
        n: Questions.
        quantile: Of the standard normal, 1.96 for 95 %.
    """

    def score(delta: float) -> float:
        # q is the second's share of discordant questions of its own, most likely given the difference.
        linear = -b - c + (2 * n - b + c) * delta
        q = (math.sqrt(max(linear**2 + 8 * n * c * delta * (1 - delta), 0.0)) - linear) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        away = b - c - n * delta
        if variance <= 0:
            return math.copysign(math.inf, away) if away else 0.0
        return away / math.sqrt(variance)

    def end(sign: float) -> float:
        # The score falls as delta grows; where it never reaches the quantile, the end is the last possible difference.
        edge = -sign * (1 - 1e-12)
        here = (b - c) / n
        if not (score(edge) - sign * quantile) * sign > 0 or abs(here) > abs(edge):
            return -sign
        return float(brentq(lambda delta: score(delta) - sign * quantile, edge, here, xtol=1e-12))

    return end(1.0), end(-1.0)


def sign_flip_p(sums: ArrayLike) -> float:
    """Exact two-sided p value of whole numbers whose signs are arbitrary under the null hypothesis.

    The distribution of their sum over all sign patterns is a product of two-point distributions, made by convolution;
    of single questions this is McNemar's exact test.

    Args:
        sums: int ``(clusters,)``.
    """
    sizes = np.abs(np.asarray(sums, dtype=np.int64))
    sizes = sizes[sizes > 0]
    if not sizes.size:
        return 1.0
    total, reach = int(abs(np.sum(sums))), int(sizes.sum())
    # Probabilities of the sum being -reach .. reach.
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    for size in sizes.tolist():
        moved = np.zeros_like(chances)
        moved[size:] += 0.5 * chances[:-size]
        moved[:-size] += 0.5 * chances[size:]
        chances = moved
    values = np.abs(np.arange(-reach, reach + 1))
    return float(min(1.0, chances[values >= total].sum()))
