"""Linear CKA from moments or rows: unbiased HSIC_1 (Song et al. 2012) by default, biased HSIC_0 beside it."""

from __future__ import annotations

import math

import numpy as np

from align.moments.scatter import Array, Moments, Rows, means, moments_of, moved, paired_with_itself
from featstore.errors import FitError

#: A self-HSIC this small against the terms it is the difference of is rounding.
_ROUNDING = 1e-12

#: Up to so many rows in memory are compared in float64 throughout, which takes next to no time. HSIC_1 subtracts what
#: a row has in common with itself. Where one row is a hundred times as long as the others, the difference of float32
#: products is off by 1e-4 in CKA, by how much depends on the order in which the kernels of a BLAS add up. The more rows
#: there are, the less one of them weighs, and the longer float64 takes.
FEW_ROWS = 1024


def _centred(m: Moments) -> Moments:
    return moved(m, *means(m))


def _hsic1_centred(m: Moments) -> tuple[float, float]:
    """HSIC_1 of moments about the mean, and the size of the terms it is the difference of."""
    n = m.n
    fro, diagonal = float(np.sum(m.c * m.c)), n / (n - 2) * m.d
    product = m.a * m.b / ((n - 1) * (n - 2))
    return (fro - diagonal + product) / (n * (n - 3)), (fro + diagonal + product) / (n * (n - 3))


def hsic1_linear(m: Moments) -> float:
    """Unbiased HSIC_1 (Song et al. 2012) with linear kernels, from moments about any origin.

    [ |C|_F^2 - n/(n-2) D + AB/((n-1)(n-2)) ] / (n(n-3)) about the mean. May be negative. NaN below
    4 rows.

    Args:
        m: Moments of the pairs; ``paired_with_itself(m, "x")`` for a self term.
    """
    return _hsic1_centred(_centred(m))[0] if m.n >= 4 else math.nan


def hsic0_linear(m: Moments) -> float:
    """Biased HSIC_0 = |Xc'Yc|_F^2 / (n-1)^2 with linear kernels; NaN below 2 rows.

    Args:
        m: Moments of the pairs about any origin.
    """
    return float(np.sum(_centred(m).c ** 2)) / (m.n - 1) ** 2 if m.n >= 2 else math.nan


def _constant_side(m: Moments) -> str | None:
    """Name the side whose rows are equal to the float32 rounding of their mean."""
    return _constant("first", m.a, m.n, m.origin_x) or _constant("second", m.b, m.n, m.origin_y)


def _constant(name: str, spread: float, n: int, mean: Array) -> str | None:
    eps = float(np.finfo(np.float32).eps)
    return f"the {name} set of states does not vary" if spread <= n * eps * eps * float(mean @ mean) else None


def debiased_cka_from_moments(m: Moments) -> tuple[float, str | None]:
    """CKA with unbiased HSIC_1 and linear kernels; about 0 for independent data of any width.

    Never clamped: it may be negative. HSIC_1 is a product of U-centred kernels, so it lies within [-1, 1] to rounding.

    Args:
        m: Moments of the pairs about any origin.

    Returns:
        ``(value, None)``, or ``(nan, reason)`` below 4 rows or where a side has no similarity
        structure (self-HSIC zero or below, to rounding).
    """
    if m.n < 4:
        return math.nan, f"debiased CKA needs at least 4 rows, not {m.n}"
    m = _centred(m)
    if reason := _constant_side(m):
        return math.nan, reason
    selves = []
    for name, side in (("first", "x"), ("second", "y")):
        value, size = _hsic1_centred(paired_with_itself(m, side))
        # A self-HSIC is never negative in exact arithmetic; at this size only rounding is left.
        if not value > _ROUNDING * size:
            return math.nan, f"self-HSIC of the {name} set of states is not positive"
        selves.append(value)
    return _hsic1_centred(m)[0] / math.sqrt(selves[0] * selves[1]), None


def biased_cka_from_moments(m: Moments) -> tuple[float, str | None]:
    """CKA with the biased HSIC_0 and linear kernels: near 1 for *any* data when n is below d.

    Args:
        m: Moments of the pairs about any origin.

    Returns:
        ``(value, None)``, or ``(nan, reason)`` below 2 rows or where a side does not vary.
    """
    if m.n < 2:
        return math.nan, f"CKA needs at least 2 rows, not {m.n}"
    m = _centred(m)
    if reason := _constant_side(m):
        return math.nan, reason
    norms = float(np.linalg.norm(m.gx)) * float(np.linalg.norm(m.gy))
    return float(np.sum(m.c * m.c)) / norms, None


def _check_finite(x: Rows, y: Rows) -> None:
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise FitError("a true or predicted state is not finite")


def _moments_near_mean(x: Rows, y: Rows) -> Moments:
    _check_finite(x, y)
    if len(x) <= FEW_ROWS:
        x, y = (np.asarray(rows, dtype=np.float64) for rows in (x, y))
    return moments_of(x, y, *(np.mean(r, axis=0, dtype=np.float64) for r in (x, y)))


def debiased_cka(x: Rows, y: Rows) -> tuple[float, str | None]:
    """:func:`debiased_cka_from_moments` of rows in memory.

    Few rows (:data:`FEW_ROWS`), and fewer rows than dimensions, are compared by their Gram matrices in float64; more by
    their moments, of which float32 rows are multiplied in float32.

    Args:
        x: (n, dx).
        y: (n, dy), the i-th row paired with the i-th of ``x``.

    Raises:
        FitError: Shapes do not fit or a row is not finite.
    """
    if len(x) < 4:
        return math.nan, f"debiased CKA needs at least 4 rows, not {len(x)}"
    if len(x) == len(y) and x.ndim == y.ndim == 2 and len(x) <= max(FEW_ROWS, min(x.shape[1], y.shape[1])):
        return _debiased_cka_from_grams(x, y)
    return debiased_cka_from_moments(_moments_near_mean(x, y))


def _debiased_cka_from_grams(x: Rows, y: Rows) -> tuple[float, str | None]:
    """CKA of HSIC_1 over (n, n) Gram matrices with a zero diagonal (Song et al. 2012, equation 5)."""
    _check_finite(x, y)
    grams: list[tuple[Array, Array]] = []
    n = len(x)
    for name, rows in (("first", x), ("second", y)):
        mean: Array = np.mean(rows, axis=0, dtype=np.float64)
        centred = np.subtract(rows, mean, dtype=np.float64)
        gram = centred @ centred.T
        if reason := _constant(name, float(np.trace(gram)), n, mean):
            return math.nan, reason
        np.fill_diagonal(gram, 0.0)
        grams.append((gram, gram.sum(axis=0)))

    def hsic1(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[float, float]:
        (k, by_row), (m, by_row_m) = one, other
        product = float(by_row.sum()) * float(by_row_m.sum()) / ((n - 1) * (n - 2))
        fro, rows = float(np.vdot(k, m)), 2 / (n - 2) * float(by_row @ by_row_m)
        return (fro + product - rows) / (n * (n - 3)), (abs(fro) + abs(product) + abs(rows)) / (n * (n - 3))

    selves = []
    for name, own in zip(("first", "second"), grams, strict=True):
        value, size = hsic1(own, own)
        if not value > _ROUNDING * size:
            return math.nan, f"self-HSIC of the {name} set of states is not positive"
        selves.append(value)
    return hsic1(*grams)[0] / math.sqrt(selves[0] * selves[1]), None


def biased_cka(x: Rows, y: Rows) -> tuple[float, str | None]:
    """:func:`biased_cka_from_moments` of rows in memory.

    Args:
        x: (n, dx).
        y: (n, dy), the i-th row paired with the i-th of ``x``.

    Raises:
        FitError: Shapes do not fit or a row is not finite.
    """
    if len(x) < 2:
        return math.nan, f"CKA needs at least 2 rows, not {len(x)}"
    return biased_cka_from_moments(_moments_near_mean(x, y))
