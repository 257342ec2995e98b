"""The orthogonal factor of a matrix from eigendecompositions, sooner than from a singular value decomposition.

Of A = U S V' the orthogonal factor is U V'. With A'A = V S^2 V' it is A V S^-1 V' (Higham, Functions of Matrices, 2008,
chapter 8), but squaring loses singular values below the root of the machine precision. So only those within four
decades of the largest are taken from one decomposition; what is left of A in the other directions is a smaller matrix,
of which the same is done. One step of Newton and Schulz then makes the result orthogonal to rounding. Where A has
directions without any size, where the result is not orthogonal, or where its trace with A is not the sum of the
singular values, the singular value decomposition decides as it always did.
"""

from __future__ import annotations

import math

import numpy as np
from array_api_compat import is_numpy_namespace

from align.moments.scatter import Array
from align.solvers.linalg import dot, eigh, namespace, svd

#: Singular values below this part of the largest are taken from a decomposition of their own.
_RANGE = 1e-4
#: Decompositions, at most, of ever fewer directions.
_DEPTH = 4
#: Below this distance of W'W from the identity (Frobenius norm), one step is enough: it squares the distance.
_NEAR = 1e-7
#: Rows of a product that are held at a time beside what they are added to: matrices of wide layers are large.
_ROWS = 512
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
    size = xp.sqrt(_column_squares(b))
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
        for at in range(0, a.shape[0], _ROWS):
            weight[at : at + _ROWS] += inner[0][at : at + _ROWS] @ v[:, :small].T
        total += inner[1]
    return weight, total


def _column_squares(b: Array) -> Array:
    """The squared length of every column; some rows at a time, since squares of all are an array as large as it."""
    xp = namespace(b)
    parts = [xp.sum(b[at : at + _ROWS] ** 2, axis=0) for at in range(0, b.shape[0], _ROWS)]
    total: Array = xp.sum(xp.stack(parts), axis=0)
    return total


def _orthogonal(weight: Array) -> Array | None:
    """The same with orthonormal columns to rounding; None where they are far from it."""
    xp, n = namespace(weight), weight.shape[1]
    eye = xp.eye(n, dtype=xp.float64, device=None if is_numpy_namespace(xp) else weight.device)
    for _ in range(3):
        away = weight.T @ weight
        away -= eye
        distance = math.sqrt(dot(away, away))
        if distance <= 4 * n * float(np.finfo(np.float64).eps):
            return weight
        if not distance < 0.5:
            return None
        if distance <= _NEAR and is_numpy_namespace(xp):
            # What float32 loses of so small a step is rounding of the result; on a GPU it may lose more.
            half = xp.astype(away, xp.float32) / 2
            for at in range(0, weight.shape[0], _ROWS):
                rows = weight[at : at + _ROWS]
                rows -= xp.astype(xp.astype(rows, xp.float32) @ half, xp.float64)
            return weight
        weight = weight - (weight @ away) / 2
        if distance <= _NEAR:
            return weight
    return None
