"""Distances between shapes: what is left between two layers after the best rotation of one onto the other.

Both are metrics on centred rows up to rotation and reflection, the zero-padded narrower layer in the wider one's space
(Williams et al., *Generalized Shape Metrics on Neural Representations*, NeurIPS 2021). With C = X'Y and its nuclear
norm N = |C|_*, the sum of its singular values, max over rotations Q of tr(Q'X'Y) is N, reached at Q = U V' (Schoenemann
1966):

    procrustes-distance   min_Q |XQ - Y|_F / sqrt(n)  = sqrt((|X|_F^2 + |Y|_F^2 - 2 N) / n)
    angular-distance      min_Q angle(XQ, Y)          = arccos(N / (|X|_F |Y|_F))

The first keeps sizes: it is the root mean square distance of paired rows, in the units of the states, and a layer twice
as loud is another shape. Williams et al. and their ``netrep`` leave out 1/sqrt(n); ours times sqrt(n) is theirs. The
second takes rows to unit Frobenius norm first, so it ignores isotropic scale; it lies in 0 to pi/2, and
2 sin(angle/2) is the Procrustes distance of normalised rows (Ding et al. 2021).

With fewer rows than dimensions any two layers can be turned onto each other rather well: read both beside their floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from align.moments.scatter import Array
from align.similarity.measures.base import Partners, Resampling, Result, Tick, Wanted
from align.similarity.measures.influence import centred, drawn_sums, still, unfit
from align.similarity.measures.partners import each
from align.solvers.linalg import svd

#: Below this share of the sizes a squared distance is summed from what is left, not as a difference of sizes.
_CLOSE = 1e-6


class ShapeDistance:
    """What is left between two layers after the best rotation; see the module for both kinds.

    Args:
        angular: The angle between rows of unit Frobenius norm, not the distance between rows as they are.
    """

    closer: Literal["higher", "lower"] = "lower"
    symmetric = True
    biased: bool = True
    floor_rows: int = 2048

    def __init__(self, *, angular: bool) -> None:
        self.angular = angular
        self.name = "angular-distance" if angular else "procrustes-distance"
        self.title = "Angular shape distance" if angular else "Procrustes distance, sizes kept"
        self.bounds: tuple[float | None, float | None] = (0.0, math.pi / 2 if angular else None)

    def __call__(
        self, layers: Sequence[NDArray[np.float32]], wanted: Wanted, draws: Resampling | None, tick: Tick
    ) -> dict[tuple[int, int], Result]:
        """Compare layers; see :class:`align.similarity.measures.base.Measure`.

        Args:
            layers: float32 ``(n, d)`` each. Centred copies in float64 are held while the call lasts.
            wanted: Pairs.
            draws: For intervals. The rotation is held at the one found: |C|_* is the largest tr(Q'C), so its derivative
                along C is that of tr(Q'C) at that Q, whose rows are ``x_i' Q y_i``. Sums over rows are drawn and the
                distance made from them.
            tick: Progress.

        Returns:
            With ``rms_x`` and ``rms_y``, the root mean squares of the centred rows, or with the ``cosine`` of the
            angle.
        """
        used = sorted({i for pair in wanted for i in pair})
        part = 1 / max(len(used) + len(wanted), 1)
        rows, constant, squares = {}, {}, {}
        for i in used:
            rows[i], squares[i], constant[i] = self._prepared(layers[i])
            tick(part)
        results = {}
        for i, j in wanted:
            reason = unfit((constant[i], constant[j]), len(layers[i]), self.name)
            if reason is None:
                results[i, j] = self._compare(rows[i], rows[j], squares[i], squares[j], draws)
            else:
                results[i, j] = Result(math.nan, reason)
            tick(part)
        return results

    def under(
        self, xs: Sequence[NDArray[np.float32]], ys: Sequence[NDArray[np.float32]], partners: Partners, tick: Tick
    ) -> Array:
        """Compare layers under exchanged partners (:class:`align.similarity.measures.base.Measure`)."""
        found = np.full((len(partners.index), len(xs), len(ys)), math.nan)
        first, second = ([self._prepared(layer) for layer in side] for side in (xs, ys))
        for b, i, j in each(partners, first, second, tick):
            (x, xx, still_x), (y, yy, still_y) = first[i], second[j]
            if unfit((still_x, still_y), len(x), self.name) is None:
                line = partners.index[b]
                found[b, i, j] = self._compare(x, y[line], xx, yy[line], None).value
        return found

    def _prepared(self, layer: NDArray[np.float32]) -> tuple[Array, Array, bool]:
        """Rows as they are compared, the squares of each and whether none varies."""
        x = centred(layer)
        spread = float(np.einsum("ij,ij->", x, x))
        constant = still(layer, spread)
        if self.angular and not constant:
            x /= math.sqrt(spread)
        return x, np.einsum("ij,ij->i", x, x), constant

    def _compare(self, x: Array, y: Array, xx: Array, yy: Array, draws: Resampling | None) -> Result:
        cross = x.T @ y
        q = None
        if draws is None:
            nuclear = float(scipy.linalg.svdvals(cross, check_finite=False).sum())
        else:
            q, nuclear = _rotation(cross)
        sizes = float(xx.sum() + yy.sum())
        gap, close = sizes - 2 * nuclear, sizes - 2 * nuclear < _CLOSE * sizes
        left = None
        if close or q is not None:
            left = _residuals(x, y, _rotation(cross)[0] if q is None else q)
        if close and left is not None:
            gap = float(left.sum())
        one = np.array([[gap, float(xx.sum()), float(yy.sum()), len(xx)]])
        value = float(self._distance(one)[0])
        facts = {"rms_x": math.sqrt(float(xx.mean())), "rms_y": math.sqrt(float(yy.mean()))}
        if self.angular:
            facts = {"cosine": nuclear}
        if draws is None or left is None:
            return Result(value, facts=facts)
        drawn = drawn_sums(np.stack([left, xx, yy, np.ones_like(xx)], axis=1), draws)
        return Result(value, draws=self._distance(drawn), facts=facts)

    def _distance(self, sums: Array) -> Array:
        """From sums over rows (draws, 4): squared residuals, squares of both sides, ones."""
        left, xx, yy, n = sums.T
        with np.errstate(invalid="ignore", divide="ignore"):
            if not self.angular:
                distance: Array = np.sqrt(left / n)
                return distance
            # 1 - cos = (|x - y|^2 - (|x| - |y|)^2) / (2 |x||y|): arccos would lose half of the digits near 0. It is a
            # squared distance, which rounding alone can put below zero.
            a, b = np.sqrt(xx), np.sqrt(yy)
            chord = np.maximum(left - (a - b) ** 2, 0.0) / (a * b)
        angle: Array = 2 * np.arcsin(np.sqrt(chord) / 2)
        return angle


def _rotation(cross: Array) -> tuple[Array, float]:
    """The semi-orthogonal Q (dx, dy) of largest tr(Q'C), and that trace."""
    u, singular, vt = svd(cross)
    return u @ vt, float(singular.sum())


def _residuals(x: Array, y: Array, q: Array) -> Array:
    """Squared distances (n,) of paired rows, the narrower side rotated into the wider one's space."""
    apart = x @ q - y if x.shape[1] <= y.shape[1] else x - y @ q.T
    squares: Array = np.einsum("ij,ij->i", apart, apart)
    return squares


def procrustes_distance() -> ShapeDistance:
    """The root mean square distance of paired rows after the best rotation, in the units of the states."""
    return ShapeDistance(angular=False)


def angular_distance() -> ShapeDistance:
    """The angle between two layers after the best rotation, in radians; isotropic scale does not matter."""
    return ShapeDistance(angular=True)
