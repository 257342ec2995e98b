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
from align.solvers.ridge import ridge_weight
from align.tokens.sums import TRAIN, VALIDATION, Features, TokenSums
from featstore.errors import FitError

#: Strengths of the shrinkage, in rows: 0 is the plain table, the last hardly a table at all.
SHRINKAGE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0)
#: Tokens in hand at a time.
_BLOCK = 4096
#: Bytes of features that are kept in the basis of the regression instead of being turned again for every k.
_TURNED = 1 << 28


@dataclass(frozen=True, eq=False)
class Regressors:
    """What a prior is fitted on: the features of train tokens, each counted as often as it occurs.

    Attributes:
        mean_x: float64 ``(dx,)``, their mean.
        spectrum: Of their centred Gram matrix.
    """

    mean_x: Array
    spectrum: solvers.Spectrum


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


def fit_shrunken(sums: TokenSums, features: Features | None, regressors: Regressors | None = None) -> Shrunken:
    """Fit the prediction, its two strengths chosen together on the validation rows.

    Args:
        sums: Of all train and validation rows.
        features: Those that the sums were made with; None to shrink towards the train mean.
        regressors: :func:`regressors_of` of the same tokens and features if they are known already.

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
    known = regressors_of(sums, features) if regressors is None else regressors
    projected = _projected(sums, features, mean, known)
    found = _errors(sums, features, mean, known, projected)
    at = np.unravel_index(int(np.argmin(found)), found.shape)
    k, ridge = SHRINKAGE[at[0]], float(solvers.lambda_grid()[at[1]])
    prior = Prior(known.mean_x, mean + sums.origin, ridge_weight(known.spectrum, projected, ridge), features)
    return Shrunken(sums, k, ridge, prior, mean + sums.origin, float(found[at]))


def _blocks(sums: TokenSums, split: int) -> Iterator[NDArray[np.int64]]:
    """Places of the tokens that occur in a split."""
    occurs = np.flatnonzero(sums.vocabulary.rows[split])
    for start in range(0, len(occurs), _BLOCK):
        yield occurs[start : start + _BLOCK]


def regressors_of(sums: TokenSums, features: Features) -> Regressors:
    """What a prior is fitted on; it says nothing of the target, so the targets of a source share it.

    Args:
        sums: Of all train rows; their tokens alone count.
        features: Of a token.

    Raises:
        FitError: There are no train rows, or a feature is not finite.
    """
    vocabulary, n = sums.vocabulary, sums.vocabulary.rows[TRAIN]
    if n.sum() < 1:
        raise FitError("no train rows: the token baseline needs some; extract more text")
    mean_x = _mean_features(sums, features)
    gram = np.zeros((mean_x.size, mean_x.size))
    for place in _blocks(sums, TRAIN):
        x = features(vocabulary.ids[place])
        x -= mean_x
        x *= np.sqrt(n[place])[:, None]
        # One array on both sides: numpy then computes one triangle only.
        gram += x.T @ x
    return Regressors(mean_x, solvers.Spectrum.of(gram))


def _projected(sums: TokenSums, features: Features, mean: Array, known: Regressors) -> Array:
    """V'C of train rows and their token's features: with the spectrum, the ridge regression for every strength."""
    vocabulary, mean_x = sums.vocabulary, known.mean_x
    cross = np.zeros((mean_x.size, mean.size))
    for place in _blocks(sums, TRAIN):
        x = features(vocabulary.ids[place])
        x -= mean_x
        cross += x.T @ sums.of(TRAIN, place)
    rest = sums.product[TRAIN]
    if rest is not None:
        cross += rest - np.outer(mean_x, sums.rest[TRAIN])
    # What is left of the states about their own mean: the features' own sum is zero but for rounding.
    projected: Array = known.spectrum.vectors.T @ cross
    return projected


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


def _errors(sums: TokenSums, features: Features, mean: Array, known: Regressors, projected: Array) -> Array:
    """Squared error on the validation rows for every shrinkage k and every ridge strength.

    The prior's part of a prediction is ``left_t z_t S P`` with z_t = (x_t - mean_x) V the token's features in the
    basis of the regression, S the strength, P = V'C. What it multiplies belongs to single tokens, and so do the sums of
    validation rows: in that basis a k costs one symmetric product over the tokens, however many strengths there are.

    Returns:
        float64 ``(len(SHRINKAGE), strengths)``.
    """
    vocabulary, spectrum = sums.vocabulary, known.spectrum
    damped = np.stack([spectrum.damped(float(strength)) for strength in solvers.lambda_grid()])
    linear = np.zeros((len(SHRINKAGE), damped.shape[1]))
    of_mean = projected @ mean
    tokens = _Turned(sums, features, known)
    for place, z in tokens.blocks():
        m, n = vocabulary.rows[VALIDATION][place], _own_rows(sums, place)
        left = _left(n)
        sums_p = sums.of(VALIDATION, place) @ projected.T
        table_p = (sums.of(TRAIN, place) / np.maximum(n, 1)[:, None]) @ projected.T
        linear += left @ (z * sums_p) - (left * (1 - left) * m) @ (z * table_p) - ((left**2 * m) @ z) * of_mean
        del sums_p, table_p
    rest = sums.product[VALIDATION]
    if rest is not None:
        rest = rest - np.outer(known.mean_x, sums.rest[VALIDATION])
        linear += np.einsum("ij,ij->i", projected, spectrum.vectors.T @ rest)
    squares = projected @ projected.T
    found = np.empty((len(SHRINKAGE), len(damped)))
    for at, k in enumerate(SHRINKAGE):
        quadratic = tokens.gram(at)
        quadratic *= squares
        sse = np.sum(damped * (damped @ quadratic - 2 * linear[at]), axis=1)
        found[at] = np.maximum(_total(sums, k, mean) + sse, 0.0)
    return found


def _own_rows(sums: TokenSums, place: NDArray[np.int64]) -> NDArray[np.int64]:
    """Train rows of tokens that have sums of their own, 0 of the others."""
    rows: NDArray[np.int64] = np.where(sums.vocabulary.own[place], sums.vocabulary.rows[TRAIN][place], 0)
    return rows


def _left(n: NDArray[np.int64]) -> Array:
    """The share that every k leaves to the prior, float64 ``(len(SHRINKAGE), m)``."""
    k = np.array(SHRINKAGE)[:, None]
    left: Array = np.divide(k, n + k, out=np.ones((len(SHRINKAGE), len(n))), where=n + k > 0)
    return left


class _Turned:
    """The features of the validation text's tokens in the basis of the regression, kept where they fit."""

    def __init__(self, sums: TokenSums, features: Features, known: Regressors) -> None:
        self._sums, self._features, self._known = sums, features, known
        size = 8 * known.mean_x.size * int(np.count_nonzero(sums.vocabulary.rows[VALIDATION]))
        self._kept: list[tuple[NDArray[np.int64], Array]] | None = None
        if size <= _TURNED:
            self._kept = list(self._make())

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], Array]]:
        """Places in the vocabulary and float64 ``(m, dx)``, some at a time."""
        yield from self._make() if self._kept is None else self._kept

    def gram(self, at: int) -> Array:
        """Second moments (dx, dx) of what multiplies the prior's weight on validation rows, for one k."""
        width = self._known.mean_x.size
        total = np.zeros((0, 0))
        for place, z in self.blocks():
            left = _left(_own_rows(self._sums, place))[at]
            part = z * (left * np.sqrt(self._sums.vocabulary.rows[VALIDATION][place]))[:, None]
            # One array on both sides: numpy then computes one triangle only.
            product = part.T @ part
            total = total + product if total.size else product
        return total if total.size else np.zeros((width, width))

    def _make(self) -> Iterator[tuple[NDArray[np.int64], Array]]:
        for place in _blocks(self._sums, VALIDATION):
            x = self._features(self._sums.vocabulary.ids[place])
            x -= self._known.mean_x
            yield place, x @ self._known.spectrum.vectors
