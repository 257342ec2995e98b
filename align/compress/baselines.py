"""Two codecs without training at the rate of the latents: what they have to beat.

Both keep principal coordinates of source states (of the train windows), as many numbers for a window as its latents
have, and map them to the target by ridge regression with an intercept, its strength chosen on validation windows. Both
are told for free which source position belongs to which target position; the resampler pays for that itself.

``pca``: every source position keeps K = floor(M R / T_x) leading coordinates, T_x being the window's source tokens.
Where K would be 0, every ceil(T_x / (M R))-th position keeps one. A position without any takes those of the last one
before it that has some, else the first. Answers at pairs.

``strided``: M evenly spaced source positions keep R coordinates each, and a target position takes the last of them that
ends at its byte or before, else the first. Answers everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from align import solvers
from align.compress.start import START_TOKENS, project
from align.compress.windows import Rows, Window, Windows
from align.moments.scatter import Array, Moments, about, centered, merge, moments_of
from featstore.errors import FitError

Features = Callable[[Rows, Window], Rows]


def pca_features(numbers: int, width: int) -> Features:
    """Coordinates of baseline ``pca`` at the pairs of a window.

    Args:
        numbers: M R.
        width: Columns; coordinates beyond a window's own K are zero.
    """

    def features(z: Rows, window: Window) -> Rows:
        tokens = len(z)
        kept = min(numbers // tokens, width)
        step = 1 if kept else -(-tokens // numbers)
        own = np.zeros((len(window.paired_x), width), dtype=np.float32)
        own[:, : max(kept, 1)] = z[window.paired_x // step * step, : max(kept, 1)]
        return own

    return features


def strided_features(latents: int, latent_dim: int) -> Features:
    """Coordinates of baseline ``strided`` at every target position of a window.

    Args:
        latents: M.
        latent_dim: R.
    """

    def features(z: Rows, window: Window) -> Rows:
        # The middle of each of M equal parts; with fewer tokens than M, every token.
        count = min(latents, len(z))
        places = (2 * np.arange(count) + 1) * len(z) // (2 * count)
        last = np.searchsorted(window.ends_x[places], window.ends_y, side="right") - 1
        return z[places[np.maximum(last, 0)], :latent_dim]

    return features


@dataclass(frozen=True)
class LinearCodec:
    """Coordinates and the ridge map from them.

    Attributes:
        basis: float32 ``(d_source, K)``.
        mean_source: float32 ``(d_source,)``.
        features: From coordinates and window to the rows to map.
        weight: float32 ``(K, d_target)``.
        mean_features: float64 ``(K,)``.
        mean_target: float64 ``(d_target,)``.
        lam: Relative ridge strength.
        everywhere: Whether ``features`` gives a row for every target position, and not for the pairs alone.
    """

    basis: Rows
    mean_source: Rows
    features: Features
    weight: Rows
    mean_features: Array
    mean_target: Array
    lam: float
    everywhere: bool

    def window(self, window: Window) -> Rows:
        """See :meth:`align.compress.score.Codec.window`."""
        rows = self.features(project(window.x, self.mean_source, self.basis), window)
        mapped = (rows - self.mean_features.astype(np.float32)) @ self.weight + self.mean_target.astype(np.float32)
        return mapped.astype(np.float32, copy=False)


def fit_baselines(
    train: Windows, val: Windows, latents: int, latent_dim: int, basis: Rows, mean_source: Rows
) -> dict[str, LinearCodec]:
    """Fit both baselines.

    Args:
        train: Train windows.
        val: Validation windows.
        latents: M.
        latent_dim: R.
        basis: float32 ``(d_source, n)``, principal directions of the source's train states over their scale.
        mean_source: float32 ``(d_source,)``, the mean that they are about.

    Returns:
        ``pca`` and ``strided``.

    Raises:
        FitError: M or R is below 1, or there are no pairs.
    """
    if min(latents, latent_dim) < 1:
        raise FitError(f"{latents} latents of {latent_dim}: both must be at least 1")
    numbers, widest = latents * latent_dim, basis.shape[1]
    # The shortest train window keeps the most coordinates; none keeps more than there are.
    width = min(widest, max(1, numbers // int(train.sizes()[0].min())))
    wanted = {
        "pca": (pca_features(numbers, width), width, False),
        "strided": (strided_features(latents, min(latent_dim, widest)), min(latent_dim, widest), True),
    }
    return {
        name: _fit(train, val, features, everywhere, basis[:, :k], mean_source)
        for name, (features, k, everywhere) in wanted.items()
    }


def _fit(train: Windows, val: Windows, features: Features, everywhere: bool, basis: Rows, mean: Rows) -> LinearCodec:
    origin = next(iter(train)).y.mean(axis=0, dtype=np.float64)
    sums: list[Moments] = []
    for windows in (train, val):
        total: Moments | None = None
        for window in windows.some(START_TOKENS):
            rows = features(project(window.x, mean, basis), window)
            # At the pairs, where tables compare, for both.
            y = window.y[window.paired_y]
            if everywhere:
                rows = rows[window.paired_y]
            new = moments_of(rows, y, np.zeros(basis.shape[1]), origin)
            total = new if total is None else merge(total, new)
        if total is None or total.n < 1:
            raise FitError("there are no pairs to fit a baseline on; extract more documents")
        sums.append(total)
    fit = centered(sums[0])
    choice = solvers.select_ridge(fit, about(sums[1], fit.mean_x, fit.mean_y))
    weight = choice.weight.astype(np.float32)
    return LinearCodec(basis, mean, features, weight, fit.mean_x, fit.mean_y, choice.lam, everywhere)
