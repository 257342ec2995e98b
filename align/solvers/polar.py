"""The orthogonal factor of a matrix from eigendecompositions, sooner than from a singular value decomposition.

Of A = U S V' the orthogonal factor is U V'. With A'A = V S^2 V' it is A V S^-1 V' (Higham, Functions of Matrices, 2008,
chapter 8), but squaring loses singular values below the root of the machine precision. So only those within four
decades of the largest are taken from one decomposition; what is left of A in the other directions is a smaller matrix,
of which the same is done. One step of Newton and Schulz then makes the result orthogonal to rounding. Where A has
directions without any size, where the result is not orthogonal, or where its trace with A is not the sum of the
singular values, the singular value decomposition decides as it always did.
"""

from __future__ import annotations

import numpy as np

from align.moments.scatter import Array
from align.solvers.linalg import dot, eigh, namespace, svd

#: Singular values below this part of the largest are taken from a decomposition of their own.
_RANGE = 1e-4
#: Decompositions, at most, of ever fewer directions.
_DEPTH = 4
#: Below this distance of W'W from the identity (Frobenius norm), one step is enough: it squares the distance.
_NEAR = 1e-7
#: How far the trace may be from the sum of the singular values, relative to it.
_TRACE = 1e-11


def polar(value: Array) -> tuple[Array, float]:
    """The semi-orthogonal W of largest tr(W'A), and that trace, the sum of the singular values of A.

    Args:
        value: (m, n) float64, finite.

    Returns:
        W (m, n), with ``W'W = I`` where m >= n and ``W W' = I`` where m <= n, and the trace. Directions in which A has
        no size are filled in by a singular value decomposition: orthogonal, but arbitrary.
    """
    wide = value.shape[0] < value.shape[1]
    found = _factor(value.T if wide else value)
    if found is not None:
        weight = found[0].T if wide else found[0]
        gain = dot(weight, value)
        if abs(gain - found[1]) <= _TRACE * gain:
            return weight, gain
    u, singular, vt = svd(value)
    return u @ vt, float(namespace(singular).sum(singular))


def _factor(a: Array) -> tuple[Array, float] | None:
    """The orthogonal factor of a matrix with no more columns than rows, and the sum of its singular values."""
    turned = _turned(a, 0.0, _DEPTH)
    if turned is None:
        return None
    weight = _orthogonal(turned[0])
    return None if weight is None else (weight, turned[1])


def _turned(a: Array, largest: float, depth: int) -> tuple[Array, float] | None:
    """Nearly the orthogonal factor, and the sum of the singular values; None where some are rounding."""
    xp, n = namespace(a), a.shape[1]
    # One array on both sides: numpy then computes one triangle only.
    values, v = eigh(a.T @ a, overwrite=True)
    b = a @ v
    size = xp.sqrt(xp.sum(b * b, axis=0))
    largest = max(largest, float(xp.max(size)))
    if not (depth and float(xp.min(size)) > n * float(np.finfo(np.float64).eps) * largest):
        return None
    small = int(xp.sum(xp.astype(values < _RANGE**2 * values[-1], xp.int64)))
    rest, b = b[:, :small], b[:, small:]
    b /= size[small:]
    weight = b @ v[:, small:].T
    total = float(xp.sum(size[small:]))
    if small:
        # What these directions have in common with the large ones is rounding.
        inner = _turned(rest - b @ (b.T @ rest), largest, depth - 1)
        if inner is None:
            return None
        weight += inner[0] @ v[:, :small].T
        total += inner[1]
    return weight, total


def _orthogonal(weight: Array) -> Array | None:
    """The same with orthonormal columns to rounding; None where they are far from it."""
    xp, n = namespace(weight), weight.shape[1]
    for _ in range(3):
        away = weight.T @ weight
        away -= xp.eye(n, dtype=xp.float64, device=None if xp.__name__.endswith("numpy") else weight.device)
        distance = float(xp.sqrt(xp.sum(away * away)))
        if distance <= 4 * n * float(np.finfo(np.float64).eps):
            return weight
        if not distance < 0.5:
            return None
        weight = weight - (weight @ away) / 2
        if distance <= _NEAR:
            return weight
    return None
