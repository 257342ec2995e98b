"""Ridge regression for every strength from one decomposition, and the strength that validation rows choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from align.moments.scatter import Array, Scatter
from align.solvers.linalg import dot, host, matrix, namespace, trace
from align.solvers.spectrum import Rotated, Spectrum, check_centres, check_validation, rotate
from featstore.errors import FitError


def lambda_grid() -> Array:
    """The default relative ridge strengths: 15 of them, 1e-6 to 10, half a decade apart."""
    return np.logspace(-6, 1, 15)


def strengths(lambdas: Sequence[float] | Array | None) -> Array:
    """The relative strengths to choose among.

    Args:
        lambdas: Given ones; :func:`lambda_grid` when None.

    Raises:
        FitError: There are none.
    """
    grid = np.asarray(lambda_grid() if lambdas is None else lambdas, dtype=np.float64)
    if grid.size == 0:
        raise FitError("there is nothing to fit: no ridge strengths; give at least one")
    return grid


@dataclass(frozen=True, eq=False)
class Choice:
    """A fit and how its strength was chosen.

    Attributes:
        factors: The fitted map as matrices whose product it is: ``(weight,)`` for ridge, ``(a, b)``
            for reduced rank.
        lam: The chosen relative strength; at an end of ``lambdas`` the grid was too narrow.
        lambdas: numpy, the strengths tried; a search that stops early has not tried all of its grid.
        val_mse: numpy (len(lambdas),), validation error per element at each.
    """

    factors: tuple[Array, ...]
    lam: float
    lambdas: Array
    val_mse: Array

    @property
    def weight(self) -> Array:
        """The map as one matrix (dx, dy), without any skip."""
        weight = self.factors[0]
        for factor in self.factors[1:]:
            weight = weight @ factor
        return weight


class RidgePath:
    """Ridge regression for any strength: W = (G + lam u I)^-1 C from one decomposition, u the spectrum's unit.

    The unit is tr(G)/dx, unless the given spectrum has another.

    Args:
        gx: (dx, dx) X'X, or its :class:`Spectrum` when several targets share a source.
        cxy: (dx, dy) X'Y.

    Raises:
        FitError: An input is empty, not finite or of the wrong shape.
    """

    def __init__(self, gx: ArrayLike | Spectrum, cxy: ArrayLike) -> None:
        self.spectrum = Spectrum.of(gx)
        v = self.spectrum.vectors
        self._projected: Array = v.T @ matrix("cxy", cxy, (v.shape[0], None), of=v)

    def weight(self, lam: float) -> Array:
        """The map (dx, dy) at one strength.

        Args:
            lam: Relative strength, >= 0. At 0 the least-norm solution.

        Raises:
            FitError: The strength is negative or not finite.
        """
        return ridge_weight(self.spectrum, self._projected, lam)

    def mse(self, val: Scatter, lambdas: Sequence[float] | Array) -> Array:
        """Mean squared error per element on other rows, exactly, at O(dx^2) per strength.

        In the eigenbasis W = V S P with S diagonal, so tr(W'GW) is the quadratic form s'(PP' *
        V'GV)s.

        Args:
            val: Moments of those rows **about the centre the map subtracts**
                (:func:`align.moments.scatter.about`).
            lambdas: Relative strengths.

        Returns:
            numpy (len(lambdas),), squared error per row and dimension.

        Raises:
            FitError: ``val`` is empty or of other widths.
        """
        v = self.spectrum.vectors
        check_validation(val, self._projected.shape, of=v)
        return path_errors(self.spectrum, self._projected, v.T @ val.gx @ v, v.T @ val.c, trace(val.gy), val.n, lambdas)


def ridge_weight(spectrum: Spectrum, projected: Array, lam: float) -> Array:
    """The ridge map (dx, dy) from the cross-moments in the eigenbasis.

    Args:
        spectrum: Of the source.
        projected: (dx, dy) V'C.
        lam: Relative strength.

    Raises:
        FitError: The strength is negative or not finite.
    """
    weight: Array = spectrum.vectors @ (spectrum.damped(lam)[:, None] * projected)
    return weight


def path_errors(
    spectrum: Spectrum,
    projected: Array,
    val_gx: Array,
    val_c: Array,
    total: float,
    n: int,
    lambdas: Sequence[float] | Array,
) -> Array:
    """Validation error per element of the ridge map at each strength, all moments in the source's eigenbasis.

    Args:
        spectrum: Of the source.
        projected: (dx, dy) V'C of the train rows.
        val_gx: (dx, dx) V'GV of the validation rows.
        val_c: (dx, dy) V'C of the validation rows.
        total: tr(Y'Y) of the validation rows.
        n: Number of validation rows.
        lambdas: Relative strengths.

    Returns:
        numpy (len(lambdas),).
    """
    xp = namespace(projected)
    damped = xp.stack([spectrum.damped(float(lam)) for lam in lambdas])
    linear = xp.sum(projected * val_c, axis=1)
    # One array on both sides: numpy then computes one triangle only.
    quadratic = projected @ projected.T
    quadratic *= val_gx
    # All strengths at once: a device answers one question sooner than fifteen.
    sse = total + host(xp.sum(damped * (damped @ quadratic - 2 * linear), axis=1))
    per_element: Array = np.maximum(sse, 0.0) / (n * projected.shape[1])
    return per_element


def path_of(pair: Rotated, lambdas: Array) -> Array:
    """:func:`path_errors` of a layer pair, computed once for a grid of strengths.

    Args:
        pair: The pair in its source's eigenbasis.
        lambdas: numpy, relative strengths.

    Returns:
        numpy (len(lambdas),).
    """
    key = lambdas.tobytes()
    if key not in pair.paths:
        pair.paths[key] = path_errors(
            pair.spectrum, pair.c, pair.val_gx, pair.val_c, trace(pair.val.gy), pair.val.n, lambdas
        )
    return pair.paths[key]


def mse_of(weight: ArrayLike, rows: Scatter) -> float:
    """Mean squared error per element of any linear map, from moments about the map's own centre.

    Args:
        weight: (dx, dy).
        rows: The rows to score, about the means that the map subtracts and adds.

    Raises:
        FitError: No rows, other widths, or a weight that is not finite.
    """
    w = matrix("weight", weight, (rows.mean_x.shape[0], rows.mean_y.shape[0]), of=rows.c)
    check_validation(rows, w.shape, of=w)
    sse = trace(rows.gy) + dot(w, rows.gx @ w) - 2 * dot(w, rows.c)
    return float(max(sse, 0.0) / (rows.n * w.shape[1]))


def select_ridge(
    train: Scatter,
    val: Scatter,
    lambdas: Sequence[float] | Array | None = None,
    *,
    spectrum: Spectrum | None = None,
    rotated: Rotated | None = None,
) -> Choice:
    """Choose the ridge strength with the least validation error; no row is read again.

    With an intercept: ``train = centered(m)`` and ``val = about(m_val, train.mean_x,
    train.mean_y)``. Without one: ``raw`` of both.

    Args:
        train: Second moments of the train rows.
        val: Those of the validation rows about the *same* centre.
        lambdas: Relative strengths; :func:`lambda_grid` when not given.
        spectrum: ``Spectrum.of(train.gx, train.unit)`` if it is known already.
        rotated: ``rotate(train, val)`` if it is known already; most of the work is then done.

    Returns:
        The map and the whole path of errors. Equal errors: the first strength given wins.

    Raises:
        FitError: The centres differ, either side is empty, or numbers are not finite.
    """
    check_centres(train, val)
    grid = strengths(lambdas)
    pair = known(train, val, spectrum, rotated)
    errors = path_of(pair, grid)
    lam = float(grid[np.argmin(errors)])
    return Choice((ridge_weight(pair.spectrum, pair.c, lam),), lam, grid, errors)


def known(train: Scatter, val: Scatter, spectrum: Spectrum | None, rotated: Rotated | None) -> Rotated:
    """The pair in the source's eigenbasis, made now unless it was given.

    Args:
        train: Second moments of the train rows.
        val: Those of the validation rows.
        spectrum: Of ``train.gx``, if known.
        rotated: The answer, if known.

    Raises:
        FitError: ``rotated`` is of other moments, or as :func:`align.solvers.rotate`.
    """
    if rotated is None:
        return rotate(train, val, spectrum=spectrum)
    if rotated.train is not train or rotated.val is not val:
        raise FitError("`rotated` is of other moments: make it with rotate(train, val) of these very two")
    return rotated
