"""Closed-form linear maps from second moments: arrays in, arrays out, float64 throughout.

Notation: rows X (n, dx) and Y (n, dy) about their centres, G = X'X (dx, dx), C = X'Y (dx, dy); the
map is ``y_hat = x @ W``. Every solver needs only G and C, so a fit costs the same for a million
rows as for a thousand. The ridge strength is *relative*: lambda = 1 adds the mean eigenvalue
tr(G)/dx to every eigenvalue of G, so one grid serves layers whose norms differ a hundredfold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from align.moments import Array, Scatter
from featstore.errors import FitError


def _matrix(name: str, value: ArrayLike, shape: tuple[int | None, int | None]) -> Array:
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.ndim != 2 or any(w is not None and w != s for w, s in zip(shape, matrix.shape, strict=False)):
        raise FitError(f"{name} has shape {matrix.shape}; expected {tuple(w or 'any' for w in shape)}")
    if matrix.size == 0:
        raise FitError(f"{name} is empty: shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise FitError(f"{name} holds NaN or infinity; look for damaged or unmasked rows")
    return matrix


def _square(name: str, value: ArrayLike) -> Array:
    matrix = _matrix(name, value, (None, None))
    if matrix.shape[0] != matrix.shape[1]:
        raise FitError(f"{name} has shape {matrix.shape}; expected a square matrix")
    return matrix


def _strength(lam: float) -> float:
    if not (np.isfinite(lam) and lam >= 0):
        raise FitError(f"ridge strength must be finite and not negative, not {lam}")
    return float(lam)


def procrustes(cxy: ArrayLike, gx: ArrayLike, *, scale: bool = False) -> tuple[Array, float]:
    """Orthogonal Procrustes: the rotation (reflections allowed) that aligns X with Y best.

    With the thin SVD C = U S V', W = U V' (Schoenemann 1966). It maximises tr(W'C) over
    semi-orthogonal W: W'W = I when dx >= dy, W W' = I when dx <= dy. For dx <= dy that is also the
    least squared error, since |xW| = |x|. For dx > dy it is *not*: |XW|^2 then depends on W, and
    only tr(W'C) is maximal.

    Args:
        cxy: (dx, dy) centred cross-moments X'Y.
        gx: (dx, dx) centred X'X; read only when ``scale`` is set.
        scale: Also fit one factor s = tr(W'C) / tr(W'GW), the least-squares one for this W. For dx
            <= dy the pair is the joint optimum.

    Returns:
        ``(weight, s)``: the semi-orthogonal W (dx, dy) and its factor, apart as in SciPy: the map is
        ``s * weight``. s = 1 without ``scale``. Where C is rank-deficient (n < d) the free
        directions are filled in by the SVD: orthogonal, but arbitrary.

    Raises:
        FitError: An input is empty, not finite or of the wrong shape.
    """
    c = _matrix("cxy", cxy, (None, None))
    u, singular, vt = scipy.linalg.svd(c, full_matrices=False, check_finite=False)
    rotation: Array = u @ vt
    if not scale:
        return rotation, 1.0
    g = _matrix("gx", gx, (c.shape[0], c.shape[0]))
    energy = float(np.sum(rotation * (g @ rotation)))
    # A constant source has no energy: any factor fits equally, so keep the rotation as it is.
    factor = float(singular.sum()) / energy if energy > 0 else 1.0
    return rotation, factor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One eigendecomposition of G, shared by all strengths, targets and ranks.

    Attributes:
        values: (dx,) eigenvalues, ascending; rounding below zero is clipped.
        vectors: (dx, dx) the eigenvectors in columns.
        mean: tr(G)/dx, the unit of the ridge strength.
    """

    values: Array
    vectors: Array
    mean: float

    @classmethod
    def of(cls, gx: ArrayLike | Spectrum) -> Spectrum:
        """Decompose G, or pass a decomposition through.

        Args:
            gx: (dx, dx) symmetric, or what this method returned before.

        Raises:
            FitError: G is empty, not square or not finite.
        """
        if isinstance(gx, Spectrum):
            return gx
        g = _square("gx", gx)
        values, vectors = scipy.linalg.eigh(g, check_finite=False, driver="evd")
        values = np.maximum(values, 0.0)
        return cls(values, vectors, float(values.mean()))

    def damped(self, lam: float) -> Array:
        """1 / (eigenvalue + lam * mean), zero in directions without any variance.

        Args:
            lam: Relative strength, >= 0; at 0 this is the pseudo-inverse.

        Raises:
            FitError: The strength is negative or not finite.
        """
        total = self.values + _strength(lam) * self.mean
        floor = float(self.values[-1]) * len(total) * np.finfo(np.float64).eps
        alive = total > floor
        return np.where(alive, 1.0 / np.where(alive, total, 1.0), 0.0)


def lambda_grid() -> Array:
    """The default relative ridge strengths: 15 of them, 1e-6 to 10, half a decade apart."""
    return np.logspace(-6, 1, 15)


class RidgePath:
    """Ridge regression for any strength: W = (G + lam tr(G)/dx I)^-1 C from one decomposition.

    Args:
        gx: (dx, dx) X'X, or its :class:`Spectrum` when several targets share a source.
        cxy: (dx, dy) X'Y.

    Raises:
        FitError: An input is empty, not finite or of the wrong shape.
    """

    def __init__(self, gx: ArrayLike | Spectrum, cxy: ArrayLike) -> None:
        self.spectrum = Spectrum.of(gx)
        c = _matrix("cxy", cxy, (len(self.spectrum.values), None))
        self._projected: Array = self.spectrum.vectors.T @ c

    def weight(self, lam: float) -> Array:
        """The map (dx, dy) at one strength.

        Args:
            lam: Relative strength, >= 0. At 0 the least-norm solution.

        Raises:
            FitError: The strength is negative or not finite.
        """
        inverse = self.spectrum.damped(lam)
        weight: Array = self.spectrum.vectors @ (inverse[:, None] * self._projected)
        return weight

    def mse(self, val: Scatter, lambdas: Sequence[float] | Array) -> Array:
        """Mean squared error per element on other rows, exactly, at O(dx^2) per strength.

        In the eigenbasis W = V S P with S diagonal, so tr(W'GW) is the quadratic form s'(PP' *
        V'GV)s.

        Args:
            val: Moments of those rows **about the centre the map subtracts**
                (:func:`align.moments.about`).
            lambdas: Relative strengths.

        Returns:
            (len(lambdas),) squared error per row and dimension.

        Raises:
            FitError: ``val`` is empty or of other widths.
        """
        p, v = self._projected, self.spectrum.vectors
        _check_fits(val, *p.shape)
        linear = np.einsum("ij,ij->i", p, v.T @ val.c)
        quadratic = (p @ p.T) * (v.T @ val.gx @ v)
        total = float(np.trace(val.gy))
        damped = [self.spectrum.damped(lam) for lam in lambdas]
        sse = np.array([total - 2 * float(s @ linear) + float(s @ quadratic @ s) for s in damped])
        per_element: Array = np.maximum(sse, 0.0) / (val.n * p.shape[1])
        return per_element


def _check_fits(val: Scatter, dx: int, dy: int) -> None:
    if val.n < 1:
        raise FitError("there are no validation pairs to choose by; use more documents")
    if val.c.shape != (dx, dy):
        raise FitError(f"validation moments have widths {val.c.shape}, the fit has {(dx, dy)}")
    if not all(np.isfinite(m).all() for m in (val.gx, val.gy, val.c)):
        raise FitError("validation moments hold NaN or infinity")


def _checked_grid(train: Scatter, val: Scatter, lambdas: Sequence[float] | Array | None) -> Array:
    same = np.array_equal(train.mean_x, val.mean_x) and np.array_equal(train.mean_y, val.mean_y)
    if not same:
        raise FitError(
            "validation moments must be taken about the train centre: use about(moments, train.mean_x, train.mean_y)"
        )
    grid = np.asarray(lambda_grid() if lambdas is None else lambdas, dtype=np.float64)
    if train.n < 1 or grid.size == 0:
        raise FitError("there is nothing to fit: no train pairs or no ridge strengths")
    return grid


def mse_of(weight: ArrayLike, rows: Scatter) -> float:
    """Mean squared error per element of any linear map, from moments about the map's own centre.

    Args:
        weight: (dx, dy).
        rows: The rows to score, about the means that the map subtracts and adds.

    Raises:
        FitError: No rows, other widths, or a weight that is not finite.
    """
    w = _matrix("weight", weight, (len(rows.mean_x), len(rows.mean_y)))
    _check_fits(rows, *w.shape)
    sse = float(np.trace(rows.gy)) + float(np.sum(w * (rows.gx @ w - 2 * rows.c)))
    return float(max(sse, 0.0) / (rows.n * w.shape[1]))


@dataclass(frozen=True, eq=False)
class Choice:
    """A fit and how its strength was chosen.

    Attributes:
        factors: The fitted map as matrices whose product it is: ``(weight,)`` for ridge, ``(a, b)``
            for reduced rank.
        lam: The chosen relative strength; at an end of ``lambdas`` the grid was too narrow.
        lambdas: The strengths tried.
        val_mse: (len(lambdas),) validation error per element at each.
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


def select_ridge(
    train: Scatter,
    val: Scatter,
    lambdas: Sequence[float] | Array | None = None,
    *,
    spectrum: Spectrum | None = None,
) -> Choice:
    """Choose the ridge strength with the least validation error; no row is read again.

    With an intercept: ``train = centered(m)`` and ``val = about(m_val, train.mean_x,
    train.mean_y)``. Without one: ``raw`` of both.

    Args:
        train: Second moments of the train rows.
        val: Those of the validation rows about the *same* centre.
        lambdas: Relative strengths; :func:`lambda_grid` when not given.
        spectrum: ``Spectrum.of(train.gx)`` if it is known already.

    Returns:
        The map and the whole path of errors. Equal errors: the first strength given wins.

    Raises:
        FitError: The centres differ, either side is empty, or numbers are not finite.
    """
    grid = _checked_grid(train, val, lambdas)
    path = RidgePath(train.gx if spectrum is None else spectrum, train.c)
    errors = path.mse(val, grid)
    best = int(np.argmin(errors))
    return Choice((path.weight(float(grid[best])),), float(grid[best]), grid, errors)


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
        dx = len(spectrum.values)
        c = _matrix("cxy", cxy, (dx, None))
        dy = c.shape[1]
        if not 1 <= max_rank <= min(dx, dy):
            raise FitError(f"rank {max_rank} does not fit widths {dx} and {dy}: use 1 to {min(dx, dy)}")
        self.skip = None if skip is None else _matrix("skip", skip, (dx, dy))
        v, inverse = spectrum.vectors, spectrum.damped(lam)
        residual: Array = v.T @ c
        if self.skip is not None:
            residual -= spectrum.values[:, None] * (v.T @ self.skip)
        half = np.sqrt(inverse)[:, None] * residual
        _, leading = scipy.linalg.eigh(half.T @ half, subset_by_index=[dy - max_rank, dy - 1], check_finite=False)
        self._v = np.ascontiguousarray(leading[:, ::-1])
        self._a: Array = v @ (inverse[:, None] * (residual @ self._v))

    def factors(self, rank: int) -> tuple[Array, Array]:
        """A (dx, rank) and B (rank, dy) with orthonormal rows; the map is ``skip + A @ B``.

        Args:
            rank: 1 to ``max_rank``.

        Raises:
            FitError: The rank is out of that range.
        """
        if not 1 <= rank <= self._v.shape[1]:
            raise FitError(f"rank {rank} was not prepared: use 1 to {self._v.shape[1]}")
        return self._a[:, :rank].copy(), self._v[:, :rank].T.copy()

    def mse(self, val: Scatter) -> Array:
        """Mean squared error per element on other rows for every rank from 0 (skip alone) up.

        B has orthonormal rows, so each further rank adds its own term to the squared error.

        Args:
            val: Moments of those rows about the centre the map subtracts.

        Returns:
            (max_rank + 1,) squared error per row and dimension.

        Raises:
            FitError: ``val`` is empty or of other widths.
        """
        dx, dy = self._a.shape[0], self._v.shape[0]
        _check_fits(val, dx, dy)
        start, residual = float(np.trace(val.gy)), val.c
        if self.skip is not None:
            predicted = val.gx @ self.skip
            start += float(np.sum(self.skip * (predicted - 2 * val.c)))
            residual = val.c - predicted
        gain = 2 * np.einsum("ir,ij,jr->r", self._a, residual, self._v, optimize=True)
        cost = np.einsum("ir,ij,jr->r", self._a, val.gx, self._a, optimize=True)
        sse = start + np.concatenate([[0.0], np.cumsum(cost - gain)])
        per_element: Array = np.maximum(sse, 0.0) / (val.n * dy)
        return per_element


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


def select_reduced_rank(
    train: Scatter,
    val: Scatter,
    rank: int,
    lambdas: Sequence[float] | Array | None = None,
    *,
    skip: ArrayLike | None = None,
    spectrum: Spectrum | None = None,
) -> Choice:
    """Choose the ridge strength for one rank by validation error.

    The best strength at a low rank is smaller than at full rank, since the rank already
    regularises; so this is the fair opponent for a trained map of that rank. Costs one (dy, dy)
    eigenproblem per strength.

    Args:
        train: Second moments of the train rows.
        val: Those of the validation rows about the same centre.
        rank: 1 to min(dx, dy).
        lambdas: Relative strengths; :func:`lambda_grid` when not given.
        skip: (dx, dy), or none for zero.
        spectrum: ``Spectrum.of(train.gx)`` if it is known already.

    Raises:
        FitError: The centres differ, a side is empty, the rank does not fit.
    """
    grid = _checked_grid(train, val, lambdas)
    shared = Spectrum.of(train.gx) if spectrum is None else spectrum
    errors = np.empty(len(grid))
    factors: tuple[Array, ...] = ()
    for i, lam in enumerate(grid):
        fit = ReducedRank(shared, train.c, float(lam), max_rank=rank, skip=skip)
        errors[i] = fit.mse(val)[rank]
        if i == 0 or errors[i] < errors[:i].min():
            factors = fit.factors(rank)
    return Choice(factors, float(grid[np.argmin(errors)]), grid, errors)


def random_orthogonal(dx: int, dy: int, rng: np.random.Generator) -> Array:
    """A Haar-distributed semi-orthogonal matrix (dx, dy): a rotation no data has seen.

    QR of a Gaussian with the signs of R's diagonal moved into Q (Mezzadri 2007); without that step
    the result is orthogonal but not uniform.

    Args:
        dx: Source width.
        dy: Target width.
        rng: Source of randomness.

    Raises:
        FitError: A width is below one.
    """
    if min(dx, dy) < 1:
        raise FitError(f"widths must be at least 1, not {dx} and {dy}")
    q, r = np.linalg.qr(rng.standard_normal((max(dx, dy), min(dx, dy))))
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return q if dx >= dy else q.T.copy()


def whitening(gx: ArrayLike | Spectrum, n: int, *, eps: float = 1e-3) -> Array:
    """The symmetric P (dx, dx) for which rows ``x @ P`` have variance near 1 in every direction.

    P = (G/n + eps tr(G)/(n dx) I)^(-1/2). Hidden states are very anisotropic; gradient descent on
    ``x @ P`` needs far fewer steps than on x. ``eps`` keeps directions without variance from being
    blown up.

    Args:
        gx: (dx, dx) centred X'X of ``n`` rows, or its :class:`Spectrum`.
        n: Number of rows.
        eps: Ridge relative to the mean variance.

    Raises:
        FitError: No rows, or nothing varies.
    """
    spectrum = Spectrum.of(gx)
    if n < 1 or spectrum.mean <= 0:
        raise FitError("the source states do not vary, so there is nothing to whiten")
    root = np.sqrt(n * spectrum.damped(eps))
    whitener: Array = (spectrum.vectors * root) @ spectrum.vectors.T
    return whitener
