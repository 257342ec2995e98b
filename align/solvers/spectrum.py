"""One eigendecomposition of the source, shared by all strengths, targets and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from align.moments.scatter import Array, Scatter
from align.solvers.linalg import congruent, eigh, equal, finite, matrix, namespace, square
from featstore.errors import FitError


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One eigendecomposition of G, shared by all strengths, targets and ranks.

    Attributes:
        values: (dx,) eigenvalues, ascending; rounding below zero is clipped.
        vectors: (dx, dx) the eigenvectors in columns.
        mean: tr(G)/dx of the rows about their own mean, the unit of the ridge strength.
    """

    values: Array
    vectors: Array
    mean: float

    @classmethod
    def of(cls, gx: ArrayLike | Spectrum, unit: float | None = None) -> Spectrum:
        """Decompose G, or pass a decomposition through.

        Args:
            gx: (dx, dx) symmetric, or what this method returned before.
            unit: Of the ridge strength, where G is not about the rows' mean: ``Scatter.unit``. None for tr(G)/dx.

        Raises:
            FitError: G is empty, not square or not finite.
        """
        if isinstance(gx, Spectrum):
            return gx
        values, vectors = eigh(square("gx", gx))
        xp = namespace(values)
        values = xp.where(values > 0, values, xp.zeros_like(values))
        return cls(values, vectors, float(xp.mean(values)) if unit is None else unit)

    def damped(self, lam: float) -> Array:
        """1 / (eigenvalue + lam * mean), zero in directions without any variance.

        Args:
            lam: Relative strength, >= 0; at 0 this is the pseudo-inverse.

        Raises:
            FitError: The strength is negative or not finite.
        """
        xp, total = namespace(self.values), self.values + _strength(lam) * self.mean
        floor = self.values[-1] * (total.shape[0] * float(np.finfo(np.float64).eps))
        alive = total > floor
        inverse: Array = xp.where(alive, 1.0 / xp.where(alive, total, xp.ones_like(total)), xp.zeros_like(total))
        return inverse

    def leading(self, count: int) -> Array:
        """The principal axes (dx, count) with most variance, the largest first; all of them when ``count`` is larger.

        Args:
            count: At least 1.
        """
        axes: Array = namespace(self.vectors).flip(self.vectors[:, -min(count, self.vectors.shape[1]) :], axis=1)
        return axes


def _strength(lam: float) -> float:
    if not (math.isfinite(lam) and lam >= 0):
        raise FitError(f"ridge strength must be finite and not negative, not {lam}; give one such as 1e-3")
    return float(lam)


@dataclass(frozen=True, eq=False)
class Rotated:
    """A layer pair in the eigenbasis V of its source: what every strength and every rank needs, computed once.

    Make it with :func:`rotate`.

    Attributes:
        train: The train moments.
        val: The validation moments.
        spectrum: Of ``train.gx``.
        c: (dx, dy) V'C of the train rows.
        val_gx: (dx, dx) V'GV of the validation rows.
        val_c: (dx, dy) V'C of the validation rows.
        paths: Validation errors of the ridge map that were computed already, by the strengths' bytes.
    """

    train: Scatter
    val: Scatter
    spectrum: Spectrum
    c: Array
    val_gx: Array
    val_c: Array
    paths: dict[bytes, Array] = field(default_factory=dict)


def rotate(train: Scatter, val: Scatter, *, spectrum: Spectrum | None = None, like: Rotated | None = None) -> Rotated:
    """Express a pair in the eigenbasis of its source.

    Of the four products of width cubed that this costs, two (and the decomposition) belong to the source alone: give
    ``like`` when several targets share one. One more is spared where the validation rows are the same to the target.

    Args:
        train: Second moments of the train rows.
        val: Those of the validation rows about the *same* centre.
        spectrum: ``Spectrum.of(train.gx, train.unit)`` if it is known already.
        like: Another pair with the same source rows.

    Raises:
        FitError: The centres differ, either side is empty, widths or kinds of array differ, numbers are not finite, or
            ``like`` has other source rows.
    """
    check_centres(train, val)
    if like is not None:
        if not (_same(like.train.gx, train.gx) and _same(like.val.gx, val.gx)):
            raise FitError("`like` is of other source rows: give a pair with the same source, or none")
        spectrum = like.spectrum
    shared = Spectrum.of(train.gx if spectrum is None else spectrum, train.unit)
    v = shared.vectors
    c = matrix("cxy", train.c, (v.shape[0], None), of=v)
    check_validation(val, c.shape, of=v)
    val_gx = congruent(v, val.gx) if like is None else like.val_gx
    val_c = like.val_c if like is not None and like.val.c is val.c else v.T @ val.c
    return Rotated(train, val, shared, v.T @ c, val_gx, val_c)


def _same(a: Array, b: Array) -> bool:
    # Sums over the same rows may differ in the last bits when they were made in other company.
    if a is b:
        return True
    if tuple(a.shape) != tuple(b.shape):
        return False
    xp = namespace(a)
    return bool(xp.max(xp.abs(a - b)) <= 1e-9 * xp.max(xp.abs(a)))


def check_centres(train: Scatter, val: Scatter) -> None:
    """Refuse a choice on rows taken about a centre that the map does not subtract, and a fit to nothing.

    Args:
        train: Second moments of the train rows.
        val: Those of the validation rows.

    Raises:
        FitError: The centres differ, or there are no train pairs.
    """
    if not (equal(train.mean_x, val.mean_x) and equal(train.mean_y, val.mean_y)):
        raise FitError(
            "validation moments must be taken about the train centre: use about(moments, train.mean_x, train.mean_y)"
        )
    if train.n < 1:
        raise FitError("there is nothing to fit: no train pairs; choose a split with more documents, or more text")


def check_validation(val: Scatter, shape: tuple[int, ...], of: ArrayLike | None = None) -> None:
    """Refuse validation moments that do not fit a map.

    Args:
        val: Of the validation rows.
        shape: (dx, dy) of the map.
        of: An array whose kind and device they must have.

    Raises:
        FitError: No rows, other widths, not finite, or another kind of array.
    """
    if val.n < 1:
        raise FitError("there are no validation pairs to choose by; use more documents")
    if tuple(val.c.shape) != tuple(shape):
        raise FitError(
            f"validation moments have widths {tuple(val.c.shape)}, the fit has {tuple(shape)}"
            "; take both from the same layers"
        )
    if not all(finite(part) for part in (val.gx, val.gy, val.c)):
        raise FitError("validation moments hold NaN or infinity; look for damaged or unmasked rows")
    if of is not None:
        matrix("the cross-moments of the validation rows", val.c, of=of)


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
    if n < 1 or float(spectrum.values[-1]) <= 0:
        raise FitError("the source states do not vary, so there is nothing to whiten; choose another layer")
    root = namespace(spectrum.values).sqrt(n * spectrum.damped(eps))
    whitener: Array = (spectrum.vectors * root) @ spectrum.vectors.T
    return whitener
