"""Reduced-rank regression for all ranks at once, and the strength that validation rows choose for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from align.moments.scatter import Array, Scatter
from align.solvers.leading import leading_directions
from align.solvers.linalg import dot, host, matrix, namespace, trace
from align.solvers.ridge import Choice, known, path_errors, path_of, strengths
from align.solvers.spectrum import Rotated, Spectrum, check_centres, check_validation
from featstore.errors import FitError

#: ``descend``: few strengths, downhill to a valley. ``all``: every strength.
Search = Literal["descend", "all"]


def _check_rank(rank: int, dx: int, dy: int) -> None:
    if not 1 <= rank <= min(dx, dy):
        raise FitError(f"rank {rank} does not fit widths {dx} and {dy}: use 1 to {min(dx, dy)}")


def _solve(
    spectrum: Spectrum, residual: Array, lam: float, max_rank: int, near: Array | None = None
) -> tuple[Array, Array]:
    """A (dx, max_rank) in the source's eigenbasis and V (dy, max_rank), from the residual V'(C - GS).

    ``near`` are the directions V at another strength.
    """
    inverse = spectrum.damped(lam)[:, None]
    v = leading_directions(namespace(inverse).sqrt(inverse) * residual, max_rank, near)
    return inverse * (residual @ v), v


def _errors(a: Array, v: Array, gx: Array, residual: Array, start: float, n: int) -> Array:
    """Squared error per element for every rank from 0 up; ``a``, ``gx`` and the residual times v in one basis, any."""
    xp = namespace(a)
    terms = host(xp.sum(a * (gx @ a - 2 * residual), axis=0))
    sse = start + np.concatenate([[0.0], np.cumsum(terms)])
    per_element: Array = np.maximum(sse, 0.0) / (n * v.shape[0])
    return per_element


class ReducedRank:
    """Reduced-rank ridge regression of what a skip map leaves over, for all ranks at once.

    Minimises ||Y - XS - XAB||^2 + lam' ||AB||^2 over A (dx, r), B (r, dy), lam' = lam tr(G)/dx.
    With M = G + lam' I and R = C - GS the error of any map T is const + ||M^(1/2) (M^-1 R - T)||^2,
    so by Eckart-Young the best rank-r T is M^-1 R V V' with V (dy, r) the leading eigenvectors of
    R' M^-1 R (Izenman 1975; Velu and Reinsel 1998; the ridge form Mukherjee and Zhu 2011). Rank by
    rank the solutions are nested: A = M^-1 R V, B = V'.

    Args:
        gx: (dx, dx) X'X or its :class:`Spectrum`.
        cxy: (dx, dy) X'Y.
        lam: Relative ridge strength.
        max_rank: The largest rank that will be asked for; at most min(dx, dy).
        skip: (dx, dy) the fixed map S; none means zero.

    Raises:
        FitError: The rank does not fit the widths, or an input is empty, not finite or of the wrong
            shape.
    """

    def __init__(
        self,
        gx: ArrayLike | Spectrum,
        cxy: ArrayLike,
        lam: float,
        *,
        max_rank: int,
        skip: ArrayLike | None = None,
    ) -> None:
        spectrum = Spectrum.of(gx)
        vectors = spectrum.vectors
        c = matrix("cxy", cxy, (vectors.shape[0], None), of=vectors)
        _check_rank(max_rank, *c.shape)
        self.skip = None if skip is None else matrix("skip", skip, c.shape, of=vectors)
        residual: Array = vectors.T @ c
        if self.skip is not None:
            residual = residual - spectrum.values[:, None] * (vectors.T @ self.skip)
        a, self._v = _solve(spectrum, residual, lam, max_rank)
        self._a: Array = vectors @ a

    def factors(self, rank: int) -> tuple[Array, Array]:
        """A (dx, rank) and B (rank, dy) with orthonormal rows; the map is ``skip + A @ B``.

        Args:
            rank: 1 to ``max_rank``.

        Raises:
            FitError: The rank is out of that range.
        """
        if not 1 <= rank <= self._v.shape[1]:
            raise FitError(f"rank {rank} was not prepared: use 1 to {self._v.shape[1]}")
        xp = namespace(self._a)
        return xp.asarray(self._a[:, :rank], copy=True), xp.asarray(self._v[:, :rank].T, copy=True)

    def mse(self, val: Scatter) -> Array:
        """Mean squared error per element on other rows for every rank from 0 (skip alone) up.

        B has orthonormal rows, so each further rank adds its own term to the squared error.

        Args:
            val: Moments of those rows about the centre the map subtracts.

        Returns:
            numpy (max_rank + 1,), squared error per row and dimension.

        Raises:
            FitError: ``val`` is empty or of other widths.
        """
        check_validation(val, (self._a.shape[0], self._v.shape[0]), of=self._a)
        start, residual = trace(val.gy), val.c
        if self.skip is not None:
            predicted = val.gx @ self.skip
            start += dot(self.skip, predicted) - 2 * dot(self.skip, val.c)
            residual = val.c - predicted
        return _errors(self._a, self._v, val.gx, residual @ self._v, start, val.n)


def reduced_rank(
    gx: ArrayLike | Spectrum,
    cxy: ArrayLike,
    rank: int,
    lam: float,
    skip: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """The best map of one rank on top of a skip map; see :class:`ReducedRank`.

    Args:
        gx: (dx, dx) X'X or its :class:`Spectrum`.
        cxy: (dx, dy) X'Y.
        rank: 1 to min(dx, dy).
        lam: Relative ridge strength.
        skip: (dx, dy), or none for zero.

    Returns:
        A (dx, rank) and B (rank, dy), rows of B orthonormal.

    Raises:
        FitError: As :class:`ReducedRank`.
    """
    return ReducedRank(gx, cxy, lam, max_rank=rank, skip=skip).factors(rank)


@dataclass(eq=False)
class _Trials:
    """Fits at the strengths tried so far, each solved once for the largest rank; all in the source's eigenbasis."""

    pair: Rotated
    grid: Array
    max_rank: int
    skip: Array | None
    skip_scale: float = 1.0
    rotation: bool = False

    def __post_init__(self) -> None:
        pair = self.pair
        self.train_residual, self.start = pair.c, trace(pair.val.gy)
        self.turned: Array | None = None
        if self.skip is not None:
            self.turned = turned = pair.spectrum.vectors.T @ self.skip
            turned *= self.skip_scale
            isometric = self.rotation and turned.shape[0] <= turned.shape[1]
            energy = self.skip_scale**2 * trace(pair.val.gx) if isometric else dot(turned, pair.val_gx @ turned)
            self.start += energy - 2 * dot(turned, pair.val_c)
            self.train_residual = pair.spectrum.values[:, None] * turned
            # In place, since matrices of this size are few at a time.
            self.train_residual *= -1.0
            self.train_residual += pair.c
        self.errors: dict[int, Array] = {}
        self.fits: dict[int, tuple[Array, Array]] = {}

    def val_residual(self, v: Array) -> Array:
        """What the skip leaves of the validation rows' cross-moments in some target directions."""
        residual: Array = self.pair.val_c @ v
        if self.turned is not None:
            residual = residual - self.pair.val_gx @ (self.turned @ v)
        return residual

    def error(self, index: int, rank: int) -> float:
        """The validation error at one strength and rank."""
        if index not in self.errors:
            # The nearest strength tried so far: its directions are nearly those of this one.
            near = min(self.fits, key=lambda tried: (abs(tried - index), tried), default=None)
            start = None if near is None else self.fits[near][1]
            a, v = _solve(self.pair.spectrum, self.train_residual, float(self.grid[index]), self.max_rank, start)
            self.errors[index] = _errors(a, v, self.pair.val_gx, self.val_residual(v), self.start, self.pair.val.n)
            self.fits[index] = a, v
        return float(self.errors[index][rank])

    def forecast(self, index: int, rank: int) -> int:
        """The strength that would be best if the target directions stayed those of the fit at ``index``.

        They turn little from one strength to the next, and with V fixed the rest is a ridge path, cheap at all
        strengths together.
        """
        self.error(index, rank)
        v, pair = self.fits[index][1][:, :rank], self.pair
        residual, left = self.train_residual @ v, self.val_residual(v)
        errors = path_errors(pair.spectrum, residual, pair.val_gx, left, self.start, pair.val.n, self.grid)
        return int(np.argmin(errors))

    def best(self, rank: int) -> int:
        """The strength tried with the least error at a rank; of equals the smallest."""
        return min(sorted(self.errors), key=lambda index: self.error(index, rank))

    def choice(self, index: int, rank: int) -> Choice:
        """The fit of a rank at the strength chosen for it, beside all strengths tried."""
        a, v = self.fits[index]
        xp = namespace(a)
        factors = self.pair.spectrum.vectors @ a[:, :rank], xp.asarray(v[:, :rank].T, copy=True)
        tried = sorted(self.errors)
        errors = np.array([self.errors[i][rank] for i in tried])
        return Choice(factors, float(self.grid[index]), self.grid[tried], errors)


def _search(trials: _Trials, rank: int, start: int) -> int:
    """A strength no worse than its neighbours on the grid: where forecasts lead, then downhill."""
    trials.error(start, rank)
    while (following := trials.forecast(trials.best(rank), rank)) not in trials.errors:
        trials.error(following, rank)
    return _descend(lambda index: trials.error(index, rank), len(trials.grid), trials.best(rank))


def _descend(error: Callable[[int], float], size: int, start: int) -> int:
    """From ``start`` downhill in doubling steps until neither neighbour has a smaller error."""
    best, step = start, 1
    while True:
        around = [i for i in (best - step, best + step) if 0 <= i < size]
        found = min(around, key=error, default=best)
        if error(found) < error(best):
            best, step = found, 2 * step
        elif step > 1:
            step //= 2
        else:
            return best


def select_every_rank(
    train: Scatter,
    val: Scatter,
    ranks: Sequence[int],
    lambdas: Sequence[float] | Array | None = None,
    *,
    skip: ArrayLike | None = None,
    skip_scale: float = 1.0,
    rotation: bool = False,
    spectrum: Spectrum | None = None,
    rotated: Rotated | None = None,
    search: Search = "descend",
) -> dict[int, Choice]:
    """Choose a ridge strength for each of several ranks; all ranks share the eigenproblems.

    One eigenproblem of (dy, dy) gives the exact validation error of every rank at one strength. ``descend`` solves few
    of them: the largest rank starts at the strength that is best for a ridge map of any rank without a skip, each lower
    rank where the one above ended. The path of errors with the target directions held fixed then says where to go next,
    and from there it goes downhill until no neighbouring strength of the grid is better. All errors reported are exact.
    Where the error has several valleys over the strengths it may miss the deepest; ``all`` tries every strength.

    Args:
        train: Second moments of the train rows.
        val: Those of the validation rows about the same centre.
        ranks: Each 1 to min(dx, dy), in any order.
        lambdas: Relative strengths; :func:`lambda_grid` when not given.
        skip: (dx, dy), or none for zero.
        skip_scale: What it is multiplied by: a rotation has its factor apart, and the product is as large as it.
        rotation: Whether the skip, without its factor, is semi-orthogonal to rounding, which spares a product where it
            narrows nothing.
        spectrum: ``Spectrum.of(train.gx)`` if it is known already.
        rotated: ``rotate(train, val)`` if it is known already.
        search: ``descend`` or ``all``.

    Returns:
        By rank, in the order given: the factors, the strength, and the errors of that rank at all strengths that were
        tried for any rank, ascending. Equal errors: the smallest strength wins.

    Raises:
        FitError: The centres differ, a side is empty, a rank does not fit, there are no ranks, or ``search`` is
            unknown.
    """
    check_centres(train, val)
    grid = np.unique(strengths(lambdas))
    if search not in ("descend", "all"):
        raise FitError(f"search {search!r}: choose 'descend' or 'all'")
    if not ranks:
        raise FitError("there is nothing to fit: no ranks; give at least one")
    for rank in ranks:
        _check_rank(rank, *train.c.shape)
    pair = known(train, val, spectrum, rotated)
    fixed = None if skip is None else matrix("skip", skip, train.c.shape, of=pair.c)
    trials = _Trials(pair, grid, max(ranks), fixed, skip_scale, rotation)
    if search == "all":
        for index in range(len(grid)):
            trials.error(index, max(ranks))
    else:
        at = int(np.argmin(path_of(pair, grid)))
        for rank in sorted(set(ranks), reverse=True):
            at = _search(trials, rank, at)
    return {rank: trials.choice(trials.best(rank), rank) for rank in ranks}


def select_reduced_rank(
    train: Scatter,
    val: Scatter,
    rank: int,
    lambdas: Sequence[float] | Array | None = None,
    *,
    skip: ArrayLike | None = None,
    skip_scale: float = 1.0,
    rotation: bool = False,
    spectrum: Spectrum | None = None,
    rotated: Rotated | None = None,
    search: Search = "descend",
) -> Choice:
    """Choose the ridge strength for one rank by validation error.

    The best strength at a low rank is another than at full rank, so this is the fair opponent for a
    trained map of that rank. Costs one (dy, dy) eigenproblem per strength tried, typically three to
    five of them; :func:`select_every_rank` says how it searches.

    Args:
        train: Second moments of the train rows.
        val: Those of the validation rows about the same centre.
        rank: 1 to min(dx, dy).
        lambdas: Relative strengths; :func:`lambda_grid` when not given.
        skip: (dx, dy), or none for zero.
        skip_scale: What it is multiplied by.
        rotation: Whether it is semi-orthogonal to rounding.
        spectrum: ``Spectrum.of(train.gx)`` if it is known already.
        rotated: ``rotate(train, val)`` if it is known already.
        search: ``descend``, or ``all`` for every strength.

    Returns:
        The factors, and the errors at the strengths that were tried, ascending.

    Raises:
        FitError: The centres differ, a side is empty, the rank does not fit.
    """
    found = select_every_rank(
        train,
        val,
        [rank],
        lambdas,
        skip=skip,
        skip_scale=skip_scale,
        rotation=rotation,
        spectrum=spectrum,
        rotated=rotated,
        search=search,
    )
    return found[rank]
