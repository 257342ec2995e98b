"""Canonical correlations between the principal subspaces of two layers.

With U_x (n, p) and U_y (n, q) the principal components of the centred rows, scaled to unit length, the canonical
correlations are the singular values rho of U_x' U_y, and the canonical variates are sqrt(n) U_x A and sqrt(n) U_y B for
U_x' U_y = A diag(rho) B' (Bjoerck and Golub 1973). They do not change under any invertible map of either subspace, so
noise directions count as much as loud ones; that is what keeping few components is for.

Rows that share nothing correlate as well: for Gaussian ones the mean of rho squared is max(p, q) / (n - 1). ``chance``
in the facts is its root, no less than the mean of rho that such rows would have. At the ten rows for each kept
component that are asked for it is 0.32; below that the figure would tell of the number of rows, and is undefined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from align.moments.scatter import Array
from align.similarity.measures.base import Partners, Resampling, Result, Tick, Wanted
from align.similarity.measures.influence import centred, linear_draws, still, unfit
from align.similarity.measures.partners import each
from align.solvers.linalg import eigh, svd
from featstore.errors import FitError

#: Rows for each kept principal component, below which canonical correlations are undefined.
ROWS_PER_COMPONENT = 10
#: Share of the variance in the components that are kept (Raghu et al. 2017).
SHARE = 0.99
#: Variance of a direction over that of the loudest, below which it is float32 rounding of the loudest.
_ROUNDING = 1e-12
#: The same ratio below which scores from a Gram matrix are made orthogonal once more.
_SKEWED = 1e-6


@dataclass(frozen=True, eq=False)
class Principal:
    """The principal components of a layer that are kept.

    Attributes:
        scores: float64 ``(n, k)``, orthonormal, the loudest first; None where they would be more than the rows allow.
        loadings: float64 ``(k, d)``, ``scores.T @ centred rows``; None alike.
        kept: Their number k.
        width: The layer's width d.
        constant: Whether nothing varies; k is then 0.
    """

    scores: Array | None
    loadings: Array | None
    kept: int
    width: int
    constant: bool


def principal(rows: NDArray[np.float32], share: float = SHARE) -> Principal:
    """The fewest principal components that hold a share of the variance.

    Args:
        rows: float32 ``(n, d)``, n > 1.
        share: Of the variance; 1 for every direction louder than float32 rounding.

    Returns:
        Without scores where components times :data:`ROWS_PER_COMPONENT` exceed the rows.
    """
    x = centred(rows)
    n, d = x.shape
    # The two Gram matrices share all eigenvalues but zeros; the smaller one is decomposed.
    wide = n < d
    values, vectors = eigh(x @ x.T if wide else x.T @ x)
    values, vectors = values[::-1], vectors[:, ::-1]
    if still(rows, float(np.square(x).sum())):
        return Principal(None, None, 0, d, constant=True)
    alive = int(np.count_nonzero(values > _ROUNDING * values[0]))
    shares = np.cumsum(values[:alive]) / values[:alive].sum()
    kept = alive if share >= 1 else int(np.searchsorted(shares, share)) + 1
    if n < ROWS_PER_COMPONENT * kept:
        return Principal(None, None, kept, d, constant=False)
    scores = vectors[:, :kept] if wide else (x @ vectors[:, :kept]) / np.sqrt(values[:kept])
    if values[kept - 1] < _SKEWED * values[0]:
        # A Gram matrix squares the ratio of the loudest to the faintest direction, and so the rounding between them.
        scores = scipy.linalg.qr(scores, mode="economic", check_finite=False)[0]
    return Principal(scores, scores.T @ x, kept, d, constant=False)


class CanonicalCorrelation:
    """The mean canonical correlation of two layers' principal subspaces, plain or weighted.

    Args:
        weighted: Weigh each correlation by how much of the *first* layer its variate accounts for.
        share: Of each layer's variance that the kept components hold, above 0; 1 keeps every direction that varies.

    Raises:
        FitError: The share is not above 0 and at most 1.
    """

    closer: Literal["higher", "lower"] = "higher"
    bounds: tuple[float | None, float | None] = (0.0, 1.0)
    biased: bool = True
    floor_rows: int = 2048

    def __init__(self, *, weighted: bool, share: float) -> None:
        if not 0 < share <= 1:
            raise FitError(f"a share of the variance is above 0 and at most 1, not {share}; give one such as 0.99")
        self.weighted, self.share = weighted, share
        self.name = "pwcca" if weighted else "svcca"
        self.title = "PWCCA, weighted by the first layer" if weighted else "SVCCA"
        self.symmetric = not weighted

    def __call__(
        self, layers: Sequence[NDArray[np.float32]], wanted: Wanted, draws: Resampling | None, tick: Tick
    ) -> dict[tuple[int, int], Result]:
        """Compare layers; see :class:`align.similarity.measures.base.Measure`.

        Args:
            layers: float32 ``(n, d)`` each.
            wanted: Pairs; of a weighted measure in either order.
            draws: For intervals. Principal subspaces are held; the influence of row i on rho_j is ``a_ij b_ij - rho_j/2
                (a_ij^2 + b_ij^2)`` with a, b its canonical variates of unit variance (Romanazzi 1992). Weights follow
                the covariances of the variates with the layer's dimensions, the variates' own directions held: these
                turn without bound where two correlations are nearly equal.
            tick: Progress.

        Returns:
            With the components ``kept_x`` and ``kept_y``, ``chance``, and ``mean_square``, the plain mean of rho
            squared (``chance`` squared for unrelated Gaussian rows).
        """
        used = sorted({i for pair in wanted for i in pair})
        part = 1 / max(len(used) + len(wanted), 1)
        found: dict[int, Principal] = {}
        for i in used:
            few = len(layers[i]) < 2
            found[i] = Principal(None, None, 0, 0, constant=False) if few else principal(layers[i], self.share)
            tick(part)
        results = {}
        for i, j in wanted:
            results[i, j] = self._compare(found[i], found[j], len(layers[i]), draws)
            tick(part)
        return results

    def under(
        self, xs: Sequence[NDArray[np.float32]], ys: Sequence[NDArray[np.float32]], partners: Partners, tick: Tick
    ) -> Array:
        """Compare layers under exchanged partners (:class:`align.similarity.measures.base.Measure`)."""
        found = np.empty((len(partners.index), len(xs), len(ys)))
        first, second = ([principal(layer, self.share) for layer in side] for side in (xs, ys))
        n = len(partners.document)
        for b, i, j in each(partners, first, second, tick):
            y = second[j]
            # Scores in another order are those of the rows in that order; loadings do not change.
            moved = y if y.scores is None else replace(y, scores=y.scores[partners.index[b]])
            found[b, i, j] = self._compare(first[i], moved, n, None).value
        return found

    def _compare(self, x: Principal, y: Principal, n: int, draws: Resampling | None) -> Result:
        reason = unfit((x.constant, y.constant), n, self.name)
        if reason is not None:
            return Result(math.nan, reason)
        kept = max(x.kept, y.kept)
        facts = {"kept_x": float(x.kept), "kept_y": float(y.kept), "chance": math.sqrt(kept / (n - 1))}
        if x.scores is None or y.scores is None or x.loadings is None:
            return Result(
                math.nan,
                f"{n} rows of widths {x.width} and {y.width}, where {x.kept} and {y.kept} principal components hold "
                f"{self.share:.0%} of the variance: canonical correlations need {ROWS_PER_COMPONENT * kept} rows",
                facts=facts,
            )
        a, rho, bt = svd(x.scores.T @ y.scores)
        across = a.T @ x.loadings
        # Morcos et al. (2018): alpha_j = sum over the layer's dimensions of |<variate j, dimension>|.
        alpha = np.abs(across).sum(axis=1) if self.weighted else np.ones_like(rho)
        weights = alpha / alpha.sum()
        value = float(weights @ rho)
        facts["mean_square"] = float(np.square(rho).mean())
        if draws is None:
            return Result(value, facts=facts)
        va, vb = x.scores @ a, y.scores @ bt.T
        influence = np.einsum("ij,ij,j->i", va, vb, weights) - ((va**2 + vb**2) @ (weights * rho)) / 2
        if self.weighted:
            # Row i adds to alpha_j a_ij sum_c s_jc x_ic, s_jc the sign in dimension c, and to the variance of a_j.
            signed = x.scores @ (x.loadings @ np.sign(across).T)
            influence += (va * signed - alpha * (va**2 + 1 / n) / 2) @ ((rho - value) / alpha.sum())
        return Result(value, draws=linear_draws(value, n * influence, draws), facts=facts)


def svcca(share: float = SHARE) -> CanonicalCorrelation:
    """SVCCA: the mean canonical correlation of the leading principal subspaces (Raghu et al., NeurIPS 2017).

    The mean is over min(p, q) correlations for p and q kept components. 1 for any two layers with the same subspace
    scores up to an invertible map. Undefined below ten rows for each kept component.

    Args:
        share: Of the variance in the kept components; 1 for plain CCA of everything that varies.

    Raises:
        FitError: The share is not above 0 and at most 1.
    """
    return CanonicalCorrelation(weighted=False, share=share)


def pwcca(share: float = SHARE) -> CanonicalCorrelation:
    """PWCCA: canonical correlations weighted by how much of the first layer they account for (Morcos et al. 2018).

    The weights are those of the paper, sums over the *first* layer's dimensions of the absolute inner product with each
    canonical variate, whichever layer is the narrower one: (x, y) and (y, x) differ. They are sums of absolute values
    over dimensions, so that a rotation of the first layer changes them (one of the second does not). The paper takes
    all dimensions, as ``share=1`` does; by default the subspaces are those of :func:`svcca`, without which hidden
    states would hardly ever have rows enough.

    Args:
        share: Of the variance in the kept components.

    Raises:
        FitError: The share is not above 0 and at most 1.
    """
    return CanonicalCorrelation(weighted=True, share=share)
