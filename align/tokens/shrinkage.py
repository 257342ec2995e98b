"""A table of mean states by token, each shrunk towards a ridge regression from the token's own features.

With train rows n_t of token t and their mean m_t, the prediction is ``p_t = b_t + n_t / (n_t + k) (m_t - b_t)``: the
posterior mean of a token's own state where its prior has mean b_t and a k-th part of the variance of a row around it
(Efron and Morris, Journal of the American Statistical Association 70, 1975). The prior mean is
``b_t = mean_y + (x_t - mean_x) W``, with W fitted by ridge regression over the train rows; without features it is
mean_y. The ridge strength and k are those with the least error on the validation rows, all from :class:`TokenSums`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align import solvers
from align.moments.scatter import Array
from align.solvers.ridge import path_errors, ridge_weight
from align.tokens.sums import TRAIN, VALIDATION, Features, TokenSums
from featstore.errors import FitError

#: Strengths of the shrinkage, in rows: 0 is the plain table, the last hardly a table at all.
SHRINKAGE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0)
#: Tokens in hand at a time.
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Prior:
    """What a token's state is predicted to be before any row of it is seen.

    Attributes:
        mean_x: float64 ``(dx,)``, mean features over train rows.
        mean_y: float64 ``(dy,)``, mean state over train rows.
        weight: float64 ``(dx, dy)``.
        features: Of a token.
    """

    mean_x: Array
    mean_y: Array
    weight: Array
    features: Features

    def of(self, ids: NDArray[np.int64]) -> Array:
        """float64 ``(m, dy)`` for tokens.

        Args:
            ids: int64 ``(m,)``.
        """
        predicted: Array = (self.features(ids) - self.mean_x) @ self.weight + self.mean_y
        return predicted


@dataclass(frozen=True, eq=False)
class Shrunken:
    """A fitted prediction from the token alone.

    Attributes:
        sums: What it was fitted from.
        k: Rows at which a token's own mean and its prior count the same.
        ridge: Relative strength of the prior's ridge; None without features.
        prior: The prior; None for ``mean`` at every token.
        mean: float64 ``(dy,)``, mean state over train rows.
        val_error: Squared error on the validation rows, summed over rows and dimensions.
    """

    sums: TokenSums
    k: float
    ridge: float | None
    prior: Prior | None
    mean: Array
    val_error: float

    def of(self, ids: NDArray[np.int64]) -> Array:
        """Predict the target's state at tokens, whether or not they were seen.

        Args:
            ids: int64 ``(m,)``.

        Returns:
            float64 ``(m, dy)``.
        """
        vocabulary = self.sums.vocabulary
        if not len(ids):
            return np.zeros((0, self.mean.size))
        predicted = np.tile(self.mean, (len(ids), 1)) if self.prior is None else self.prior.of(ids)
        place = np.minimum(np.searchsorted(vocabulary.ids, ids), len(vocabulary) - 1)
        own = (vocabulary.ids[place] == ids) & vocabulary.own[place]
        place = place[own]
        n = vocabulary.rows[TRAIN][place][:, None]
        table = self.sums.of(TRAIN, place) / n + self.sums.origin
        predicted[own] += n / (n + self.k) * (table - predicted[own])
        return predicted


def fit_shrunken(sums: TokenSums, features: Features | None) -> Shrunken:
    """Fit the prediction, its two strengths chosen together on the validation rows.

    Args:
        sums: Of all train and validation rows.
        features: Those that the sums were made with; None to shrink towards the train mean.

    Raises:
        FitError: There are no train rows or no validation rows, or a feature is not finite.
    """
    n, m = sums.vocabulary.rows.sum(axis=1)
    if n < 1 or m < 1:
        raise FitError(f"{n} train and {m} validation rows: the token baseline needs some of both; extract more text")
    mean = sums.total(TRAIN) / n  # about the origin
    if features is None:
        errors = [_total(sums, k, mean) for k in SHRINKAGE]
        best = int(np.argmin(errors))
        return Shrunken(sums, SHRINKAGE[best], None, None, mean + sums.origin, errors[best])
    mean_x, spectrum, projected = _regression(sums, features, mean)
    grid = solvers.lambda_grid()
    found = []
    for k in SHRINKAGE:
        gx, c = _left_to_the_prior(sums, features, k, mean, mean_x)
        v = spectrum.vectors
        path = path_errors(spectrum, projected, v.T @ gx @ v, v.T @ c, _total(sums, k, mean), int(m), grid)
        found.append(path * (m * mean.size))
    at = np.unravel_index(int(np.argmin(found)), (len(SHRINKAGE), len(grid)))
    k, ridge = SHRINKAGE[at[0]], float(grid[at[1]])
    prior = Prior(mean_x, mean + sums.origin, ridge_weight(spectrum, projected, ridge), features)
    return Shrunken(sums, k, ridge, prior, mean + sums.origin, float(found[at[0]][at[1]]))


def _blocks(sums: TokenSums, split: int) -> Iterator[NDArray[np.int64]]:
    """Places of the tokens that occur in a split."""
    occurs = np.flatnonzero(sums.vocabulary.rows[split])
    for start in range(0, len(occurs), _BLOCK):
        yield occurs[start : start + _BLOCK]


def _regression(sums: TokenSums, features: Features, mean: Array) -> tuple[Array, solvers.Spectrum, Array]:
    """Ridge regression of train rows on their token's features, for every strength: mean_x, spectrum and V'C."""
    vocabulary, n = sums.vocabulary, sums.vocabulary.rows[TRAIN]
    mean_x = _mean_features(sums, features)
    gram, cross = np.zeros((mean_x.size, mean_x.size)), np.zeros((mean_x.size, mean.size))
    for place in _blocks(sums, TRAIN):
        x, rows = features(vocabulary.ids[place]) - mean_x, n[place][:, None]
        gram += x.T @ (x * rows)
        cross += x.T @ sums.of(TRAIN, place)
    rest = sums.product[TRAIN]
    if rest is not None:
        cross += rest - np.outer(mean_x, sums.rest[TRAIN])
    # What is left of the states about their own mean: the features' own sum is zero but for rounding.
    spectrum = solvers.Spectrum.of(gram)
    return mean_x, spectrum, spectrum.vectors.T @ cross


def _mean_features(sums: TokenSums, features: Features) -> Array:
    vocabulary, n = sums.vocabulary, sums.vocabulary.rows[TRAIN]
    parts = [(features(vocabulary.ids[place]) * n[place][:, None]).sum(axis=0) for place in _blocks(sums, TRAIN)]
    mean: Array = np.sum(parts, axis=0) / n.sum()
    return mean


def _seen(sums: TokenSums, place: NDArray[np.int64], k: float, mean: Array) -> tuple[Array, Array]:
    """The share ``1 - a_t`` that is left to the prior, ``(m, 1)``, and what is predicted beside it, ``(m, dy)``."""
    n = np.where(sums.vocabulary.own[place], sums.vocabulary.rows[TRAIN][place], 0)[:, None]
    table = sums.of(TRAIN, place) / np.maximum(n, 1)
    left = np.divide(k, n + k, out=np.ones(n.shape), where=n + k > 0)
    return left, (1 - left) * table + left * mean


def _total(sums: TokenSums, k: float, mean: Array) -> float:
    """Squared error on the validation rows where the prior is the train mean."""
    error, m = float(sums.squares[VALIDATION]), sums.vocabulary.rows[VALIDATION]
    for place in _blocks(sums, VALIDATION):
        _, fixed = _seen(sums, place, k, mean)
        error += float((m[place][:, None] * fixed**2).sum() - 2 * (fixed * sums.of(VALIDATION, place)).sum())
    # Rows of tokens without sums of their own: all of them are predicted to be the mean.
    return error - 2 * float(mean @ sums.rest[VALIDATION])


def _left_to_the_prior(
    sums: TokenSums, features: Features, k: float, mean: Array, mean_x: Array
) -> tuple[Array, Array]:
    """Second moments of what multiplies the prior's weight on validation rows, and of that with what is left of y."""
    vocabulary = sums.vocabulary
    gram, cross = np.zeros((mean_x.size, mean_x.size)), np.zeros((mean_x.size, mean.size))
    for place in _blocks(sums, VALIDATION):
        left, fixed = _seen(sums, place, k, mean)
        x, m = (features(vocabulary.ids[place]) - mean_x) * left, vocabulary.rows[VALIDATION][place][:, None]
        gram += x.T @ (x * m)
        cross += x.T @ (sums.of(VALIDATION, place) - m * fixed)
    rest = sums.product[VALIDATION]
    if rest is not None:
        cross += rest - np.outer(mean_x, sums.rest[VALIDATION])
    return gram, cross
