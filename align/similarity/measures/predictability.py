"""How well one layer predicts another linearly, on documents that the map has not seen.

``ridge-r2`` of (x, y) is the pooled R2 of y from x: 1 - SSE / SST over all held-out rows, SST about the means of the
rows that the map was fitted on. It is not symmetric, and below 0 where the map does worse than those means. It ignores
rotation and isotropic scale of either side and, but for the ridge, any invertible map of x.

Documents are dealt to five folds of about equal rows. For each fold in turn, the strength of the ridge is chosen on
another fold by maps fitted to the remaining three, and the map is then fitted to all four. All strengths come from one
eigendecomposition of the source; it is the same for every target, and the choices for two folds share one where each
is the other's validation fold. The statistics of a document are its sums of squares, so its draws are exact, with the
maps held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array
from align.similarity.measures.base import Partners, Resampling, Result, Tick, Wanted
from align.similarity.measures.influence import centred, drawn_sums, still, unfit
from align.solvers.ridge import path_errors, ridge_weight, strengths
from align.solvers.spectrum import Spectrum

#: Folds, fewer where there are fewer documents.
FOLDS = 5
#: One fold to score on, one to choose the strength on, one to fit on.
_FEWEST = 3


def dealt(groups: NDArray[np.integer], folds: int) -> NDArray[np.int64]:
    """Whole groups dealt to folds of about equal rows: the largest first, each to the fold with fewest rows so far.

    Args:
        groups: ``(n,)``, which group a row belongs to, numbered from 0.
        folds: At most the number of groups.

    Returns:
        int64 ``(n,)``, the fold of each row.
    """
    sizes = np.bincount(groups)
    fold = np.zeros(len(sizes), dtype=np.int64)
    filled = np.zeros(folds, dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        fold[group] = np.argmin(filled)
        filled[fold[group]] += sizes[group]
    result: NDArray[np.int64] = fold[groups]
    return result


@dataclass(frozen=True, eq=False)
class _Side:
    """A layer sorted by fold, about its mean over all rows.

    Attributes:
        parts: float64 ``(rows of the fold, d)``, one for each fold.
        sums: float64 ``(folds, d)``, their sums.
        square: float64 ``(folds,)``, their sums of squares.
        constant: Whether nothing varies.
    """

    parts: list[Array]
    sums: Array
    square: Array
    constant: bool

    @classmethod
    def of(cls, rows: NDArray[np.float32], members: Sequence[NDArray[np.int64]]) -> _Side:
        x = centred(rows)
        parts = [x[member] for member in members]
        square = np.array([np.einsum("ij,ij->", part, part) for part in parts])
        return cls(parts, np.stack([part.sum(axis=0) for part in parts]), square, still(rows, float(square.sum())))


def _partner(fold: int, folds: int) -> int:
    """The fold on which the strength for another one is chosen: mutual, but for the last of an odd number."""
    partner = fold ^ 1
    return partner if partner < folds else 0


class _Source:
    """A source with the decompositions that all its targets share.

    Args:
        side: The source.
        counts: Rows of each fold.
    """

    def __init__(self, side: _Side, counts: NDArray[np.int64]) -> None:
        self.side, self.counts = side, counts
        self._grams = np.stack([part.T @ part for part in side.parts])
        self._spectra: dict[frozenset[int], Spectrum] = {}
        self._held: dict[tuple[frozenset[int], int], Array] = {}

    def fitted_on(self, left_out: frozenset[int]) -> tuple[NDArray[np.bool_], int, Array]:
        """The folds that are fitted on, their rows and their mean."""
        used = np.array([fold not in left_out for fold in range(len(self.counts))])
        n = int(self.counts[used].sum())
        return used, n, self.side.sums[used].sum(axis=0) / n

    def spectrum(self, left_out: frozenset[int]) -> Spectrum:
        """Of the rows of all other folds, about their mean."""
        if left_out not in self._spectra:
            used, n, mean = self.fitted_on(left_out)
            self._spectra[left_out] = Spectrum.of(self._grams[used].sum(axis=0) - n * np.outer(mean, mean))
        return self._spectra[left_out]

    def held(self, left_out: frozenset[int], fold: int) -> Array:
        """V'GV of a fold about the mean of the rows that the spectrum V is of."""
        if (left_out, fold) not in self._held:
            _, _, mean = self.fitted_on(left_out)
            total, v = np.outer(self.side.sums[fold], mean), self.spectrum(left_out).vectors
            gram = self._grams[fold] - total - total.T + self.counts[fold] * np.outer(mean, mean)
            self._held[left_out, fold] = v.T @ gram @ v
        return self._held[left_out, fold]


def _cross_validated(source: _Source, target: _Side, grid: Array) -> tuple[list[Array], Array]:
    """Held-out squared errors and distances from the train mean of every row by fold, and each fold's strength."""
    counts, folds = source.counts, len(source.counts)
    cross = np.stack([x.T @ y for x, y in zip(source.side.parts, target.parts, strict=True)])
    scored, chosen = [], np.zeros(folds)
    for fold in range(folds):
        partner = _partner(fold, folds)
        inner, outer = frozenset((fold, partner)), frozenset((fold,))
        c, _, mean_x, mean_y = _cross(source, target, cross, inner)
        spectrum = source.spectrum(inner)
        of_partner = cross[partner] - np.outer(source.side.sums[partner], mean_y)
        of_partner += np.outer(counts[partner] * mean_x, mean_y) - np.outer(mean_x, target.sums[partner])
        total = target.square[partner] - 2 * target.sums[partner] @ mean_y + counts[partner] * mean_y @ mean_y
        v = spectrum.vectors
        errors = path_errors(
            spectrum, v.T @ c, source.held(inner, partner), v.T @ of_partner, total, int(counts[partner]), grid
        )
        chosen[fold] = grid[np.argmin(errors)]
        c, _, mean_x, mean_y = _cross(source, target, cross, outer)
        spectrum = source.spectrum(outer)
        weight = ridge_weight(spectrum, spectrum.vectors.T @ c, float(chosen[fold]))
        true = target.parts[fold] - mean_y
        error = true - (source.side.parts[fold] - mean_x) @ weight
        scored.append(np.stack([np.einsum("ij,ij->i", part, part) for part in (error, true)], axis=1))
    return scored, chosen


def _cross(source: _Source, target: _Side, cross: Array, left_out: frozenset[int]) -> tuple[Array, int, Array, Array]:
    """X'Y of all other folds about their means, their rows and those means."""
    used, n, mean_x = source.fitted_on(left_out)
    mean_y = target.sums[used].sum(axis=0) / n
    return cross[used].sum(axis=0) - n * np.outer(mean_x, mean_y), n, mean_x, mean_y


class RidgeR2:
    """Held-out R2 of the second layer predicted from the first.

    Args:
        lambdas: Relative ridge strengths to choose among; :func:`align.solvers.ridge.lambda_grid` when None.

    Raises:
        FitError: There are no strengths.
    """

    name = "ridge-r2"
    title = "Held-out R2, second layer from first"
    closer: Literal["higher", "lower"] = "higher"
    symmetric = False
    bounds: tuple[float | None, float | None] = (None, 1.0)
    biased: bool = False
    floor_rows: int = 2048

    def __init__(self, lambdas: Sequence[float] | None = None) -> None:
        self.grid = strengths(lambdas)

    def __call__(
        self, layers: Sequence[NDArray[np.float32]], wanted: Wanted, draws: Resampling | None, tick: Tick
    ) -> dict[tuple[int, int], Result]:
        """Compare layers; see :class:`align.similarity.measures.base.Measure`.

        Args:
            layers: float32 ``(n, d)`` each. Centred copies in float64 are held while the call lasts.
            wanted: Pairs ``(source, target)`` in either order.
            draws: Documents for the folds, and for intervals; without them five runs of neighbouring rows are the
                folds, and rows of one document may be on both sides.
            tick: Progress.

        Returns:
            With the strengths (``lambda_low``, ``lambda``, their geometric mean, and ``lambda_high``, relative to the
            mean eigenvalue of the source), the folds whose strength is at an ``edge`` of the grid, and the ``folds``.
        """
        used = sorted({i for pair in wanted for i in pair})
        part = 1 / max(len(used) + len(wanted), 1)
        results: dict[tuple[int, int], Result] = {}
        if not used:
            return results
        n = len(layers[used[0]])
        groups = np.arange(n) * FOLDS // max(n, 1) if draws is None else draws.document
        count = len(np.unique(groups))
        if count < _FEWEST:
            what = f"{n} rows" if draws is None else f"{count} documents"
            reason = f"{self.name} of {what}: it takes {_FEWEST}, to fit, to choose the ridge and to score"
            tick(1.0)
            return {pair: Result(math.nan, reason) for pair in wanted}
        fold = dealt(np.unique(groups, return_inverse=True)[1], min(FOLDS, count))
        members = [np.flatnonzero(fold == number) for number in range(min(FOLDS, count))]
        sides = {}
        for i in used:
            sides[i] = _Side.of(layers[i], members)
            tick(part)
        score = _Scorer(self.name, members, self.grid, draws)
        for i in dict.fromkeys(i for i, _ in wanted):
            # One source at a time: its decompositions are what takes memory.
            source = _Source(sides[i], np.array([len(member) for member in members]))
            for pair in wanted:
                if pair[0] == i:
                    results[pair] = score(source, sides[pair[1]])
                    tick(part)
        return results

    def under(
        self, xs: Sequence[NDArray[np.float32]], ys: Sequence[NDArray[np.float32]], partners: Partners, tick: Tick
    ) -> Array:
        """Compare layers under exchanged partners (:class:`align.similarity.measures.base.Measure`).

        Folds are made of the documents of the first side.
        """
        found = np.full((len(partners.index), len(xs), len(ys)), math.nan)
        count = len(np.unique(partners.document))
        if count < _FEWEST:
            return found
        fold = dealt(partners.document, min(FOLDS, count))
        members = [np.flatnonzero(fold == number) for number in range(min(FOLDS, count))]
        score = _Scorer(self.name, members, self.grid, None)
        for i, layer in enumerate(xs):
            source = _Source(_Side.of(layer, members), np.array([len(member) for member in members]))
            for b, line in enumerate(partners.index):
                for j, other in enumerate(ys):
                    found[b, i, j] = score(source, _Side.of(other[line], members)).value
                tick(1 / (len(xs) * len(found)))
        return found


@dataclass(frozen=True, eq=False)
class _Scorer:
    name: str
    members: list[NDArray[np.int64]]
    grid: Array
    draws: Resampling | None

    def __call__(self, source: _Source, target: _Side) -> Result:
        n = sum(map(len, self.members))
        reason = unfit((source.side.constant, target.constant), n, self.name)
        if reason is not None:
            return Result(math.nan, reason)
        scored, chosen = _cross_validated(source, target, self.grid)
        squares = np.empty((n, 2))
        for member, part in zip(self.members, scored, strict=True):
            squares[member] = part
        sse, sst = squares.sum(axis=0)
        facts = {
            "lambda": float(np.exp(np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean())),
            "lambda_low": float(chosen.min()),
            "lambda_high": float(chosen.max()),
            "edge": float(np.isin(chosen, (self.grid.min(), self.grid.max())).sum()),
            "folds": float(len(self.members)),
        }
        drawn = None
        if self.draws is not None:
            sums = drawn_sums(squares, self.draws)
            with np.errstate(divide="ignore", invalid="ignore"):
                drawn = 1.0 - sums[:, 0] / sums[:, 1]
        return Result(float(1 - sse / sst), draws=drawn, facts=facts)
