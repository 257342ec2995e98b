"""Checked matrices and the few decompositions that are worth a faster path for one kind of array.

The solvers are written against the array API standard, which `array_api_compat` gives numpy and torch alike. What the
standard cannot say (which LAPACK driver, only the leading eigenvectors) is said here, and nowhere else.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy
import numpy as np
import scipy.linalg
from array_api_compat import array_namespace, device, is_array_api_obj, is_numpy_namespace
from numpy.typing import ArrayLike

from align.moments.scatter import Array
from featstore.errors import FitError

#: LAPACK finds the leading k of d eigenvectors (evr) sooner than all of them (evd) while k is below this part of d.
SUBSET_SHARE = 1 / 8
#: Columns of one product of :func:`congruent`.
_PANEL = 1024


def namespace(value: object) -> Any:
    """The array API namespace of an array; numpy's for lists and numbers.

    Args:
        value: Anything.
    """
    return array_namespace(value) if is_array_api_obj(value) else array_api_compat.numpy


def like(name: str, value: ArrayLike, reference: ArrayLike) -> Array:
    """A float64 array of the same kind and on the same device as another.

    Args:
        name: What it is, for the message.
        value: Array, or nested lists.
        reference: The array that decides.

    Raises:
        FitError: It is an array of another library or lies on another device.
    """
    xp = namespace(reference)
    if not is_array_api_obj(value):
        there = device(reference) if is_array_api_obj(reference) else None
        result: Array = xp.asarray(value, dtype=xp.float64, device=there)
        return result
    given, wanted = (f"{type(a).__module__.partition('.')[0]} on {device(a)}" for a in (value, xp.asarray(reference)))
    if given != wanted:
        raise FitError(f"{name} is {given} and belongs to arrays of {wanted}: bring both to one device with to_device")
    return _float64(value, xp)


def _float64(value: Any, xp: Any) -> Array:
    result: Array = xp.asarray(value, dtype=xp.float64)
    return result


def matrix(
    name: str, value: ArrayLike, shape: tuple[int | None, int | None] = (None, None), of: ArrayLike | None = None
) -> Array:
    """A finite float64 matrix of a given shape.

    Args:
        name: What it is, for the message.
        value: What was given.
        shape: Rows and columns; None for any.
        of: Another array whose kind and device it must have.

    Raises:
        FitError: Another shape, empty, not finite, or another kind of array.
    """
    result = like(name, value, value if of is None else of)
    if result.ndim != 2 or any(w is not None and w != s for w, s in zip(shape, result.shape, strict=False)):
        raise FitError(f"{name} has shape {tuple(result.shape)}; expected {tuple(w or 'any' for w in shape)}")
    if 0 in result.shape:
        raise FitError(f"{name} is empty: shape {tuple(result.shape)}; give at least one row and one column")
    if not finite(result):
        raise FitError(f"{name} holds NaN or infinity; look for damaged or unmasked rows")
    return result


def square(name: str, value: ArrayLike) -> Array:
    """A finite float64 square matrix.

    Args:
        name: What it is, for the message.
        value: What was given.

    Raises:
        FitError: As :func:`matrix`, or not square.
    """
    result = matrix(name, value)
    if result.shape[0] != result.shape[1]:
        raise FitError(f"{name} has shape {tuple(result.shape)}; expected a square matrix")
    return result


def finite(value: Array) -> bool:
    """Whether every element is a number.

    Args:
        value: Any array.
    """
    xp = namespace(value)
    return bool(xp.all(xp.isfinite(value)))


def equal(a: Array, b: Array) -> bool:
    """Whether two arrays have the same shape and elements.

    Args:
        a: Any array.
        b: One of the same kind.
    """
    return tuple(a.shape) == tuple(b.shape) and bool(namespace(a).all(a == b))


def host(value: Array) -> Array:
    """A float64 numpy array of the same elements: for the few figures that are compared and written.

    Args:
        value: Any array, on any device.
    """
    if is_numpy_namespace(namespace(value)):
        return np.asarray(value, dtype=np.float64)
    return np.asarray(np.from_dlpack(array_api_compat.to_device(value, "cpu")), dtype=np.float64)


def trace(value: Array) -> float:
    """The sum of the diagonal.

    Args:
        value: (d, d), or (d,) the diagonal itself.
    """
    xp = namespace(value)
    return float(xp.sum(value) if value.ndim == 1 else xp.linalg.trace(value))


def diagonal(value: Array) -> Array:
    """(d,) the diagonal.

    Args:
        value: (d, d), or (d,) the diagonal itself.
    """
    found: Array = value if value.ndim == 1 else namespace(value).linalg.diagonal(value)
    return found


def dot(a: Array, b: Array) -> float:
    """The sum of the elementwise product: tr(A'B).

    Args:
        a: Any array with an axis.
        b: One of the same shape.
    """
    xp = namespace(a)
    # Row by row: the products of all elements would be an array as large as both.
    return float(xp.sum(xp.vecdot(a, b)))


def congruent(v: Array, g: Array) -> Array:
    """V'GV of a symmetric G: of the second product only the panels on the diagonal and above are made.

    Args:
        v: (d, k).
        g: (d, d), symmetric.
    """
    half = g @ v
    result: Array = namespace(v).empty_like(half[: v.shape[1]])
    for at in range(0, v.shape[1], _PANEL):
        end = at + _PANEL
        result[at:end, at:] = v[:, at:end].T @ half[:, at:]
        result[end:, at:end] = result[at:end, end:].T
    return result


def svd(value: Array) -> tuple[Array, Array, Array]:
    """The thin singular value decomposition ``U, S, V'``.

    Args:
        value: (m, n) float64, finite.
    """
    xp = namespace(value)
    if is_numpy_namespace(xp):
        u, s, vt = scipy.linalg.svd(value, full_matrices=False, check_finite=False)
    else:
        u, s, vt = xp.linalg.svd(value, full_matrices=False)
    return u, s, vt


def eigh(value: Array, *, overwrite: bool = False) -> tuple[Array, Array]:
    """All eigenvalues, ascending, and the eigenvectors in columns.

    Args:
        value: (d, d) float64, symmetric, finite.
        overwrite: Whether the eigenvectors may take the place of the matrix, which saves a copy of it.
    """
    xp = namespace(value)
    if is_numpy_namespace(xp):
        # Divide and conquer is twice as fast as the default where all vectors are wanted. A symmetric matrix is its
        # own transpose, and LAPACK works in place on columns that follow each other.
        values, vectors = scipy.linalg.eigh(value.T, check_finite=False, driver="evd", overwrite_a=overwrite)
    else:
        values, vectors = xp.linalg.eigh(value)
    return values, vectors


def leading_eigenvectors(value: Array, count: int) -> Array:
    """The eigenvectors (d, count) of the largest eigenvalues, the largest first.

    Args:
        value: (d, d) float64, symmetric, finite.
        count: 1 to d.
    """
    xp, d = namespace(value), value.shape[0]
    if is_numpy_namespace(xp) and count <= SUBSET_SHARE * d:
        _, vectors = scipy.linalg.eigh(value, subset_by_index=[d - count, d - 1], check_finite=False)
    else:
        _, vectors = eigh(value)
    leading: Array = xp.flip(vectors[:, -count:], axis=1)
    return np.ascontiguousarray(leading) if is_numpy_namespace(xp) else leading
