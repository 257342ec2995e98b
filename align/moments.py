"""Mergeable sufficient statistics of paired rows: all that closed-form fits and linear CKA need.

Rows ``x_i`` (dx,) and ``y_i`` (dy,) are taken about one fixed origin, so partial results over
disjoint rows merge by addition, in any tree. With ``a_i = |x_i|^2`` and ``b_i = |y_i|^2`` (about
the origin) the terms are first moments (``sx``, ``sy``), second moments (``gx = X'X``, ``gy =
Y'Y``, ``c = X'Y``) and, for the unbiased HSIC of Song et al. (2012), the third- and fourth-order
terms ``d = sum a_i b_i``, ``ux = X'b``, ``uy = Y'a`` with their self versions (``aa``, ``bb``,
``vx``, ``vy``: the same with Y = X or X = Y). :func:`moved` re-expresses them about another origin
without the rows.

The origin should lie near the mean: sums of squares about a far origin lose the variance in
rounding. Blocks of float32 rows are multiplied in float32 and added in float64; float64 rows stay
float64 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featstore.errors import FitError

#: float64 arrays: everything that is summed, moved or solved.
Array = NDArray[np.float64]
#: Rows as they come from a store: any real type numpy can cast.
Rows = NDArray[Any]

#: Rows of one float32 product. Longer float32 sums lose digits that the float64 total cannot bring
#: back.
BLOCK_ROWS = 16_384


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over ``n`` paired rows about a fixed origin; every array float64.

    Attributes:
        n: Number of pairs.
        origin_x: (dx,) subtracted from every source row before summing.
        origin_y: (dy,) the same for target rows.
        sx: (dx,) sum of x.
        sy: (dy,) sum of y.
        gx: (dx, dx) X'X.
        gy: (dy, dy) Y'Y.
        c: (dx, dy) X'Y.
        a: sum of a_i = |x_i|^2.
        b: sum of b_i = |y_i|^2.
        d: sum of a_i b_i.
        aa: sum of a_i^2 (``d`` of x with itself).
        bb: sum of b_i^2 (``d`` of y with itself).
        ux: (dx,) X'b.
        uy: (dy,) Y'a.
        vx: (dx,) X'a (``ux`` of x with itself).
        vy: (dy,) Y'b (``uy`` of y with itself).
    """

    n: int
    origin_x: Array
    origin_y: Array
    sx: Array
    sy: Array
    gx: Array
    gy: Array
    c: Array
    a: float
    b: float
    d: float
    aa: float
    bb: float
    ux: Array
    uy: Array
    vx: Array
    vy: Array


#: The fields that add up when disjoint sets of rows are merged.
_SUMMED = (
    *("n", "sx", "sy", "gx", "gy", "c"),
    *("a", "b", "d", "aa", "bb", "ux", "uy", "vx", "vy"),
)


@dataclass(frozen=True, eq=False)
class Scatter:
    """Second moments of paired rows about a chosen centre: what the solvers take.

    ``gx = (X - mean_x)'(X - mean_x)`` and so on: sums over rows, not divided by ``n``. The centre
    need not be the mean of these very rows: validation rows are taken about the *train* means,
    because that is what a fitted map subtracts.

    Attributes:
        n: Number of pairs.
        mean_x: (dx,) float64, the centre of the source rows in their own units (zeros for
            :func:`raw`).
        mean_y: (dy,) the same for target rows.
        gx: (dx, dx) float64.
        gy: (dy, dy) float64.
        c: (dx, dy) float64.
    """

    n: int
    mean_x: Array
    mean_y: Array
    gx: Array
    gy: Array
    c: Array


def _vector(name: str, value: ArrayLike, width: int) -> Array:
    vector = np.asarray(value, dtype=np.float64)
    if vector.shape != (width,):
        raise FitError(f"{name} has shape {vector.shape}; the rows need ({width},)")
    if not np.isfinite(vector).all():
        raise FitError(f"{name} is not finite")
    return vector


def _about(rows: Rows, origin: Array, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Return ``rows - origin`` rounded once to ``dtype``: the subtraction itself runs in float64.

    A float32 origin would differ from the recorded one by up to 6e-8 of a mean that can be 1000
    times the spread.
    """
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(dtype)
    out = np.empty(rows.shape, dtype=dtype)
    np.subtract(rows, origin, out=out, casting="same_kind")
    return out


def _work_dtype(x: Rows, y: Rows) -> type[np.floating[Any]]:
    exact = any(r.dtype == np.float64 or r.dtype.kind in "iu" for r in (x, y))
    return np.float64 if exact else np.float32


def moments_of(x: Rows, y: Rows, origin_x: ArrayLike, origin_y: ArrayLike) -> Moments:
    """Sum the moments of paired rows.

    Args:
        x: (n, dx) source rows. float32 and shorter types are multiplied in float32 per block of at
            most 16,384 rows and summed in float64; float64 and integers stay float64.
        y: (n, dy) target rows, the i-th paired with the i-th of ``x``.
        origin_x: (dx,) the fixed origin, near the mean; the same for all parts that will be merged.
        origin_y: (dy,) the same for ``y``.

    Returns:
        The moments; with no rows, zeros that merge like any other part.

    Raises:
        FitError: Shapes do not fit, or a row is not finite.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise FitError(f"paired rows need shapes (n, dx) and (n, dy), not {x.shape} and {y.shape}")
    dx, dy = x.shape[1], y.shape[1]
    ox, oy = _vector("origin_x", origin_x, dx), _vector("origin_y", origin_y, dy)
    dtype = _work_dtype(x, y)
    # No block product can overflow while every squared norm is below this.
    limit = min(float(np.finfo(dtype).max), 1e150) / BLOCK_ROWS
    sx, ux, vx = np.zeros(dx), np.zeros(dx), np.zeros(dx)
    sy, uy, vy = np.zeros(dy), np.zeros(dy), np.zeros(dy)
    gx, gy, c = np.zeros((dx, dx)), np.zeros((dy, dy)), np.zeros((dx, dy))
    a = b = d = aa = bb = 0.0
    for start in range(0, len(x), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(x))
        xb, yb = _about(x[start:stop], ox, dtype), _about(y[start:stop], oy, dtype)
        # The norms come from the rounded rows that the products see, or the terms would not cancel.
        ai = np.einsum("ij,ij->i", xb, xb, dtype=np.float64)
        bi = np.einsum("ij,ij->i", yb, yb, dtype=np.float64)
        # Written so that NaN fails it too.
        if not (ai.max() <= limit and bi.max() <= limit):
            bad = start + int(np.flatnonzero(~((ai <= limit) & (bi <= limit)))[0])
            raise FitError(f"row {bad} holds NaN, infinity or a value too large to square")
        a, b = a + float(ai.sum()), b + float(bi.sum())
        d, aa, bb = d + float(ai @ bi), aa + float(ai @ ai), bb + float(bi @ bi)
        sx += xb.sum(axis=0, dtype=np.float64)
        sy += yb.sum(axis=0, dtype=np.float64)
        ux += np.einsum("ij,i->j", xb, bi, dtype=np.float64)
        vx += np.einsum("ij,i->j", xb, ai, dtype=np.float64)
        uy += np.einsum("ij,i->j", yb, ai, dtype=np.float64)
        vy += np.einsum("ij,i->j", yb, bi, dtype=np.float64)
        gx += xb.T @ xb
        gy += yb.T @ yb
        c += xb.T @ yb
    return Moments(
        n=len(x), origin_x=ox, origin_y=oy, sx=sx, sy=sy, gx=gx, gy=gy, c=c,
        a=a, b=b, d=d, aa=aa, bb=bb, ux=ux, uy=uy, vx=vx, vy=vy,
    )  # fmt: skip


def merge(first: Moments, *rest: Moments) -> Moments:
    """Add moments of disjoint sets of rows, in the order given.

    Args:
        first: One part.
        *rest: The others, about exactly the same origin.

    Raises:
        FitError: The origins differ (use :func:`moved` first) or the widths do.
    """
    for part in rest:
        same = np.array_equal(first.origin_x, part.origin_x) and np.array_equal(first.origin_y, part.origin_y)
        if not same:
            raise FitError("moments about different origins do not add; move them to one origin")
    total = {k: sum((getattr(p, k) for p in rest), getattr(first, k)) for k in _SUMMED}
    return Moments(origin_x=first.origin_x, origin_y=first.origin_y, **total)


def _cross(m: Moments, dx: Array, dy: Array, a: float, b: float) -> tuple[Array, float, Array, Array]:
    """The moved terms that mix x and y: c, d, ux, uy. ``a`` and ``b`` are the moved square sums."""
    dx2, dy2 = float(dx @ dx), float(dy @ dy)
    c_dy, dx_c = m.c @ dy, dx @ m.c
    c = m.c - np.outer(dx, m.sy) - np.outer(m.sx, dy) + m.n * np.outer(dx, dy)
    ux = m.ux - 2 * c_dy + dy2 * m.sx - dx * b
    uy = m.uy - 2 * dx_c + dx2 * m.sy - dy * a
    d = (
        m.d
        - 2 * float(dy @ m.uy)
        + dy2 * m.a
        - 2 * float(dx @ m.ux)
        + 4 * float(dx_c @ dy)
        - 2 * dy2 * float(dx @ m.sx)
        + dx2 * m.b
        - 2 * dx2 * float(dy @ m.sy)
        + m.n * dx2 * dy2
    )
    return c, d, ux, uy


def paired_with_itself(m: Moments, side: str) -> Moments:
    """The moments of one side paired with itself: every term of HSIC(K, K).

    Args:
        m: Moments of pairs.
        side: ``"x"`` or ``"y"``.

    Raises:
        FitError: Another side was asked for.
    """
    if side == "x":
        o, s, g, q, qq, v = m.origin_x, m.sx, m.gx, m.a, m.aa, m.vx
    elif side == "y":
        o, s, g, q, qq, v = m.origin_y, m.sy, m.gy, m.b, m.bb, m.vy
    else:
        raise FitError(f"a pair has sides 'x' and 'y', not {side!r}")
    return Moments(
        n=m.n, origin_x=o, origin_y=o, sx=s, sy=s, gx=g, gy=g, c=g,
        a=q, b=q, d=qq, aa=qq, bb=qq, ux=v, uy=v, vx=v, vy=v,
    )  # fmt: skip


def moved(m: Moments, new_origin_x: ArrayLike, new_origin_y: ArrayLike) -> Moments:
    """Re-express moments about another origin, without the rows.

    With d = new - old for x and e for y::

        C'  = C - d sy' - sx e' + n d e'
        A'  = A - 2 d.sx + n|d|^2
        ux' = ux - 2 C e + |e|^2 sx - d B'
        uy' = uy - 2 (transpose of C) d + |d|^2 sy - e A'
        D'  = D - 2 e.uy + |e|^2 A - 2 d.ux + 4 d'Ce - 2|e|^2 d.sx + |d|^2 B - 2|d|^2 e.sy
              + n|d|^2|e|^2

    and the self terms by the same lines with y = x.

    Args:
        m: Moments about any origin.
        new_origin_x: (dx,) in the units of the rows: absolute, not relative to the old origin.
        new_origin_y: (dy,) the same for y.

    Raises:
        FitError: An origin has the wrong width or is not finite.
    """
    ox = _vector("new_origin_x", new_origin_x, len(m.sx))
    oy = _vector("new_origin_y", new_origin_y, len(m.sy))
    dx, dy = ox - m.origin_x, oy - m.origin_y
    a = m.a - 2 * float(dx @ m.sx) + m.n * float(dx @ dx)
    b = m.b - 2 * float(dy @ m.sy) + m.n * float(dy @ dy)
    c, d, ux, uy = _cross(m, dx, dy, a, b)
    gx, aa, vx, _ = _cross(paired_with_itself(m, "x"), dx, dx, a, a)
    gy, bb, vy, _ = _cross(paired_with_itself(m, "y"), dy, dy, b, b)
    return Moments(
        n=m.n, origin_x=ox, origin_y=oy, sx=m.sx - m.n * dx, sy=m.sy - m.n * dy, gx=gx, gy=gy, c=c,
        a=a, b=b, d=d, aa=aa, bb=bb, ux=ux, uy=uy, vx=vx, vy=vy,
    )  # fmt: skip


def means(m: Moments) -> tuple[Array, Array]:
    """The mean rows (dx,) and (dy,) in the units of the rows.

    Args:
        m: Moments of at least one pair.

    Raises:
        FitError: There are no pairs.
    """
    if m.n < 1:
        raise FitError("there are no pairs, so there is no mean")
    return m.origin_x + m.sx / m.n, m.origin_y + m.sy / m.n


def about(m: Moments, centre_x: ArrayLike, centre_y: ArrayLike) -> Scatter:
    """Second moments about any centre; validation rows go about the train means.

    Args:
        m: Moments about any origin.
        centre_x: (dx,) in the units of the rows.
        centre_y: (dy,) the same for y.

    Raises:
        FitError: A centre has the wrong width or is not finite.
    """
    cx = _vector("centre_x", centre_x, len(m.sx))
    cy = _vector("centre_y", centre_y, len(m.sy))
    dx, dy = cx - m.origin_x, cy - m.origin_y

    def shift(g: Array, left: Array, right: Array, sum_left: Array, sum_right: Array) -> Array:
        out = g - np.outer(left, sum_right)
        out -= np.outer(sum_left, right)
        out += m.n * np.outer(left, right)
        return out

    return Scatter(
        n=m.n,
        mean_x=cx,
        mean_y=cy,
        gx=shift(m.gx, dx, dx, m.sx, m.sx),
        gy=shift(m.gy, dy, dy, m.sy, m.sy),
        c=shift(m.c, dx, dy, m.sx, m.sy),
    )


def centered(m: Moments) -> Scatter:
    """Second moments about the rows' own means: for maps with an intercept.

    Args:
        m: Moments of at least one pair.

    Raises:
        FitError: There are no pairs.
    """
    return about(m, *means(m))


def raw(m: Moments) -> Scatter:
    """Second moments about zero: for maps without an intercept (``linear``).

    Args:
        m: Moments about any origin.
    """
    return about(m, np.zeros_like(m.sx), np.zeros_like(m.sy))
