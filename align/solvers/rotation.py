"""Orthogonal maps: Procrustes, Procrustes among the principal axes, and rotations that no data has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from align.moments.scatter import Array, Scatter
from align.solvers.linalg import dot, matrix, namespace, trace
from align.solvers.polar import polar
from align.solvers.ridge import mse_of
from align.solvers.spectrum import Spectrum, check_centres, check_validation
from featstore.errors import FitError

#: Reflections that are multiplied at a time.
_REFLECTIONS = 256


def procrustes(
    cxy: ArrayLike, gx: ArrayLike, *, scale: bool = False, turned: tuple[Array, float] | None = None
) -> tuple[Array, float]:
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
        turned: :func:`align.solvers.polar.polar` of ``cxy`` if it is known already; it is nearly all of the work.

    Returns:
        ``(weight, s)``: the semi-orthogonal W (dx, dy) and its factor, apart as in SciPy: the map is
        ``s * weight``. s = 1 without ``scale``. Where C is rank-deficient (n < d) the free
        directions are filled in by the SVD: orthogonal, but arbitrary.

    Raises:
        FitError: An input is empty, not finite or of the wrong shape.
    """
    c = matrix("cxy", cxy)
    rotation, gain = polar(c) if turned is None else turned
    if not scale:
        return rotation, 1.0
    return rotation, _factor(gain, rotated_energy(rotation, matrix("gx", gx, (c.shape[0], c.shape[0]), of=c)))


def rotated_energy(rotation: Array, gx: Array) -> float:
    """tr(W'GW) of a semi-orthogonal W: the squared norm of rows with the Gram matrix G once they are rotated.

    Args:
        rotation: (dx, dy) with orthonormal columns or rows, whichever are fewer.
        gx: (dx, dx).
    """
    # No narrower target: W W' = I, and rows keep their norm.
    return trace(gx) if rotation.shape[0] <= rotation.shape[1] else dot(rotation, gx @ rotation)


def _factor(gain: float, energy: float) -> float:
    # A constant source has no energy: any factor fits equally, so keep the rotation as it is.
    return gain / energy if energy > 0 else 1.0


def _check_components(components: int, dx: int, dy: int) -> None:
    if not 1 <= components <= max(dx, dy):
        raise FitError(f"{components} components do not fit widths {dx} and {dy}: use 1 to {max(dx, dy)}")


def truncated_procrustes(
    cxy: ArrayLike,
    gx: ArrayLike | Spectrum,
    gy: ArrayLike | Spectrum,
    components: int,
    *,
    scale: bool = False,
) -> tuple[Array, float]:
    """Procrustes between the leading principal axes of both sides; what lies outside them is mapped to zero.

    W = V_x R V_y' with V_x (dx, K), V_y (dy, K) the leading eigenvectors of X'X and Y'Y and R the Procrustes solution
    of V_x' C V_y. It is for few rows: the small directions of C are then noise, to which plain Procrustes gives the
    same weight as to the large ones. Not turning them at all costs the little variance they hold and saves the error
    of turning them at random. With ``components`` at the width of both sides it is :func:`procrustes`; a side
    narrower than ``components`` keeps all of its axes.

    Args:
        cxy: (dx, dy) centred cross-moments X'Y.
        gx: (dx, dx) centred X'X, or its :class:`Spectrum`.
        gy: (dy, dy) centred Y'Y, or its :class:`Spectrum`.
        components: K, 1 to max(dx, dy).
        scale: Also fit one factor, the least-squares one for this W.

    Returns:
        ``(weight, s)``: W (dx, dy), of rank min(K, dx, dy) with all singular values 1, and its factor; the map is
        ``s * weight``. s = 1 without ``scale``.

    Raises:
        FitError: K does not fit, or an input is empty, not finite or of the wrong shape.
    """
    c = matrix("cxy", cxy)
    dx, dy = c.shape
    _check_components(components, dx, dy)
    source, target = Spectrum.of(gx), Spectrum.of(gy)
    _check_width("gx", source, dx)
    _check_width("gy", target, dy)
    vx, vy = source.leading(components), target.leading(components)
    # At full width in the basis of C itself: where C leaves directions free, they are filled in as procrustes does.
    rotation, gain = polar(c) if components >= max(dx, dy) else polar(vx.T @ c @ vy)
    if components >= max(dx, dy):
        turned = vx.T @ rotation
        weight = rotation
    else:
        turned = rotation
        weight = vx @ rotation @ vy.T
    if not scale:
        return weight, 1.0
    return weight, _factor(gain, _energy(source, turned))


def _check_width(name: str, spectrum: Spectrum, width: int) -> None:
    if spectrum.values.shape[0] != width:
        raise FitError(f"{name} has width {spectrum.values.shape[0]}; the cross-moments need {width}")


def _energy(source: Spectrum, turned: Array) -> float:
    """tr(W'GW) of W = V_x R, where G is diagonal."""
    values = namespace(turned).flip(source.values[-turned.shape[0] :], axis=0)
    return dot(values[:, None] * turned, turned)


@dataclass(frozen=True, eq=False)
class Truncation:
    """A truncated Procrustes fit and how its number of axes was chosen.

    Attributes:
        weight: (dx, dy), the map without its factor.
        scale: The factor; 1 if none was fitted.
        components: The chosen number of principal axes.
        grid: numpy, the numbers tried, ascending.
        val_mse: numpy (len(grid),), validation error per element at each.
    """

    weight: Array
    scale: float
    components: int
    grid: Array
    val_mse: Array


def component_grid(dx: int, dy: int) -> list[int]:
    """The default numbers of axes: powers of two up to the smaller width, and the full width.

    Args:
        dx: Source width.
        dy: Target width.
    """
    return sorted({2**i for i in range(min(dx, dy).bit_length())} | {max(dx, dy)})


def select_truncated_procrustes(
    train: Scatter,
    val: Scatter,
    grid: Sequence[int] | None = None,
    *,
    scale: bool = False,
    spectra: tuple[Spectrum, Spectrum] | None = None,
) -> Truncation:
    """Choose how many principal axes to rotate by validation error, from one decomposition of each side.

    Args:
        train: Second moments of the train rows.
        val: Those of the validation rows about the *same* centre.
        grid: Numbers of axes, each 1 to max(dx, dy); :func:`component_grid` when not given.
        scale: Also fit one factor.
        spectra: ``Spectrum.of`` of ``train.gx`` and ``train.gy`` if they are known already.

    Returns:
        The map and the whole path of errors. Equal errors: the fewest axes win.

    Raises:
        FitError: The centres differ, a side is empty, a number of axes does not fit, or there are none.
    """
    check_centres(train, val)
    c = matrix("cxy", train.c)
    dx, dy = c.shape
    check_validation(val, (dx, dy), of=c)
    tried = component_grid(dx, dy) if grid is None else sorted(set(grid))
    if not tried:
        raise FitError("there is nothing to fit: no number of components; give at least one")
    for components in tried:
        _check_components(components, dx, dy)
    source, target = spectra or (Spectrum.of(train.gx), Spectrum.of(train.gy))
    _check_width("gx", source, dx)
    _check_width("gy", target, dy)
    # Everything once in the principal axes; K axes are then the leading block.
    vx, vy = source.leading(dx), target.leading(dy)
    inside, val_gx, val_c = vx.T @ c @ vy, vx.T @ val.gx @ vx, vx.T @ val.c @ vy
    total = trace(val.gy)
    errors = np.empty(len(tried))
    fits: list[tuple[Array, float]] = []
    for i, k in enumerate(tried):
        if k >= max(dx, dy):
            fits.append(truncated_procrustes(c, source, target, k, scale=scale))
            weight, factor = fits[i]
            errors[i] = mse_of(factor * weight, val)
            continue
        turned, gain = polar(inside[:k, :k])
        factor = _factor(gain, _energy(source, turned)) if scale else 1.0
        fits.append((turned, factor))
        sse = total + dot(factor * turned, val_gx[:k, :k] @ (factor * turned) - 2 * val_c[:k, :k])
        errors[i] = max(sse, 0.0) / (val.n * dy)
    best = int(np.argmin(errors))
    weight, factor = fits[best]
    if tried[best] < max(dx, dy):
        weight = source.leading(tried[best]) @ weight @ target.leading(tried[best]).T
    return Truncation(weight, factor, tried[best], np.array(tried, dtype=np.float64), errors)


def random_orthogonal(dx: int, dy: int, rng: np.random.Generator) -> Array:
    """A Haar-distributed semi-orthogonal matrix (dx, dy): a rotation no data has seen.

    The QR decomposition of a Gaussian matrix, with the signs of R's diagonal moved into Q, gives one (Mezzadri 2007).
    What a reflection makes of the columns to its right is Gaussian again and independent of it, so that the next
    reflections are drawn instead of computed (Stewart, SIAM Journal on Numerical Analysis 17, 1980), and multiplied.

    Args:
        dx: Source width.
        dy: Target width.
        rng: Source of randomness.

    Returns:
        numpy float64, whatever the fits run on: the bits of a control must not depend on the device.

    Raises:
        FitError: A width is below one.
    """
    if min(dx, dy) < 1:
        raise FitError(f"widths must be at least 1, not {dx} and {dy}; give the widths of the two models")
    rows, columns = max(dx, dy), min(dx, dy)
    # A row for each reflection, which takes it to the first axis of what is left, whichever end is further away.
    v = np.triu(rng.standard_normal((columns, rows)))
    at = np.arange(columns)
    signs = -np.copysign(1.0, v[at, at])
    v[at, at] -= signs * np.linalg.norm(v, axis=1)
    q = np.eye(rows, columns)
    for start in reversed(range(0, columns, _REFLECTIONS)):
        # Their product is I - V T V', and the inverse of T the upper triangle of V'V with half its diagonal.
        own, part = v[start : start + _REFLECTIONS, start:], q[start:, start:]
        inverse = np.triu(own @ own.T)
        np.fill_diagonal(inverse, inverse.diagonal() / 2)
        turned = scipy.linalg.solve_triangular(inverse, own @ part, check_finite=False)
        # Some rows at a time: new memory for all of them would take as long as the product.
        for row in range(0, len(part), _REFLECTIONS):
            part[row : row + _REFLECTIONS] -= own[:, row : row + _REFLECTIONS].T @ turned
    q *= signs
    return q if dx >= dy else q.T.copy()
