"""Moments of paired rows re-expressed: about another origin, of one side alone, layers end to end, centred for solvers.

The sums themselves (:class:`Moments`, :func:`moments_of`, :func:`merge`) are made in
:mod:`featstore.store.moments.sums`, where a store keeps them, too. They are taken about a fixed origin; :func:`moved`
re-expresses them about another one without the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from featstore.errors import FitError
from featstore.store.moments.sums import BLOCK_ROWS, Array, Block, Moments, Rows, merge, moments_of, vector

__all__ = [
    "BLOCK_ROWS", "Array", "Moments", "Rows", "Scatter", "about", "as_if_shuffled", "centered", "end_to_end", "means",
    "merge", "moments_of", "moved", "moved_block", "paired_with_itself", "raw",
]  # fmt: skip

#: Rows of a matrix that are moved to another origin at a time.
_SHIFTED_ROWS = 256


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
        gy: (dy, dy) float64, or (dy,) its diagonal: most fits ask for its trace alone.
        c: (dx, dy) float64.
        unit: What a ridge strength of 1 stands for, ``tr(X'X)/dx`` of the source about its *own* mean; None where that
            is the mean eigenvalue of ``gx`` itself. About zero it is not: a column of large mean would make every
            strength a strong one.
    """

    n: int
    mean_x: Array
    mean_y: Array
    gx: Array
    gy: Array
    c: Array
    unit: float | None = None


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
        FitError: Another side was asked for, or one of which only the diagonal was summed.
    """
    if side == "x":
        o, s, g, q, qq, v = m.origin_x, m.sx, m.gx, m.a, m.aa, m.vx
    elif side == "y":
        if m.gy.ndim == 1:
            raise FitError("of the target's Gram matrix only the diagonal was summed; scan with target_gram=True")
        o, s, g, q, qq, v = m.origin_y, m.sy, m.gy, m.b, m.bb, m.vy
    else:
        raise FitError(f"a pair has sides 'x' and 'y', not {side!r}; choose one of them")
    return Moments(
        n=m.n, origin_x=o, origin_y=o, sx=s, sy=s, gx=g, gy=g, c=g,
        a=q, b=q, d=qq, aa=qq, bb=qq, ux=v, uy=v, vx=v, vy=v,
    )  # fmt: skip


def end_to_end(parts: Sequence[Block]) -> Block:
    """The block of several nodes laid end to end with one y, from each one's block with that y.

    Row i of the whole is ``(x_1i, ..., x_Ki)`` and its squared norm ``sum_k a_ki``, so the products and the sums of x
    and of ``X'b`` stand below each other, while ``Y'a``, the sum of a and that of a b are sums over k. Applied twice,
    with :attr:`~featstore.store.moments.sums.Block.swapped` in between, it gives the block of the whole with itself.

    Args:
        parts: Of x_1, ..., x_K with the same y, in the order in which the x stand.

    Raises:
        FitError: There are none, or they are sums over different rows.
    """
    if not parts:
        raise FitError("there are no blocks to lay end to end; name at least one source layer")
    first = parts[0]
    same = all(part.n == first.n and np.array_equal(part.y[0], first.y[0]) for part in parts)
    if not same:
        raise FitError("blocks over different rows, or with different y, cannot be laid end to end; sum them together")
    if len(parts) == 1:
        return first
    a, d = (sum(float(part.totals[i]) for part in parts) for i in (0, 2))
    return Block(
        first.n,
        np.concatenate([part.product for part in parts]),
        np.concatenate([part.x for part in parts], axis=1),
        np.stack([first.y[0], sum((part.y[1] for part in parts[1:]), parts[0].y[1])]),
        np.array([a, float(first.totals[1]), d]),
    )


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
    ox = vector("new_origin_x", new_origin_x, len(m.sx))
    oy = vector("new_origin_y", new_origin_y, len(m.sy))
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


def moved_block(block: Block, dx: Array, dy: Array, *, centred: tuple[bool, bool] = (False, False)) -> Block:
    """A block about other origins, as :func:`moved` has it; its product is changed in place.

    Args:
        block: Of nodes x and y. Its product is that of the result from now on.
        dx: (dx,) float64, the new origin of x less the old one.
        dy: (dy,) the same for y.
        centred: Whether the new origin is the rows' own mean, by side: their sum about it is zero, and not the rounding
            that a subtraction leaves.
    """
    (sx, ux), (sy, uy), n = block.x, block.y, block.n
    a, b, d = (float(total) for total in block.totals)
    dx2, dy2 = float(dx @ dx), float(dy @ dy)
    if block.product.ndim == 1:
        return _moved_diagonal(block, dx, centred=centred[0])
    c_dy, dx_c = block.product @ dy, dx @ block.product
    new_a, new_b = a - 2 * float(dx @ sx) + n * dx2, b - 2 * float(dy @ sy) + n * dy2
    new_d = (
        d
        - 2 * float(dy @ uy)
        + dy2 * a
        - 2 * float(dx @ ux)
        + 4 * float(dx_c @ dy)
        - 2 * dy2 * float(dx @ sx)
        + dx2 * b
        - 2 * dx2 * float(dy @ sy)
        + n * dx2 * dy2
    )
    x = np.stack([np.zeros_like(sx) if centred[0] else sx - n * dx, ux - 2 * c_dy + dy2 * sx - dx * new_b])
    y = np.stack([np.zeros_like(sy) if centred[1] else sy - n * dy, uy - 2 * dx_c + dx2 * sy - dy * new_a])
    _shift(block.product, dx, dy, sx, sy, n)
    return Block(n, block.product, x, y, np.array([new_a, new_b, new_d]))


def _moved_diagonal(block: Block, away: Array, *, centred: bool) -> Block:
    """The block of a node with itself about another origin, of which only the diagonal is known."""
    total, n = block.x[0], block.n
    block.product[:] = _shifted_diagonal(block.product, away, total, n)
    moved = np.zeros_like(total) if centred else total - n * away
    sums = np.stack([moved, np.full_like(total, np.nan)])
    squares = float(block.product.sum())
    return Block(n, block.product, sums, sums.copy(), np.array([squares, squares, np.nan]))


def _shifted_diagonal(diagonal: Array, away: Array, total: Array, n: int) -> Array:
    shifted: Array = diagonal - 2 * away * total + n * away**2
    return shifted


def _shift(product: Array, left: Array, right: Array, sum_left: Array, sum_right: Array, n: int) -> None:
    """Take X'Y to other origins in place, some rows at a time: an outer product of its size would be a copy more."""
    for start in range(0, len(product), _SHIFTED_ROWS):
        rows = slice(start, start + _SHIFTED_ROWS)
        product[rows] -= np.outer(left[rows], sum_right)
        product[rows] -= np.outer(sum_left[rows], right)
        product[rows] += n * np.outer(left[rows], right)


def means(m: Moments) -> tuple[Array, Array]:
    """The mean rows (dx,) and (dy,) in the units of the rows.

    Args:
        m: Moments of at least one pair.

    Raises:
        FitError: There are no pairs.
    """
    if m.n < 1:
        raise FitError("there are no pairs, so there is no mean; add rows first")
    return m.origin_x + m.sx / m.n, m.origin_y + m.sy / m.n


def about(m: Moments, centre_x: ArrayLike, centre_y: ArrayLike) -> Scatter:
    """Second moments about any centre; validation rows go about the train means.

    Args:
        m: Moments about any origin.
        centre_x: (dx,) in the units of the rows.
        centre_y: (dy,) the same for y.

    Returns:
        Second moments; where the moments are about this very centre, their own arrays.

    Raises:
        FitError: A centre has the wrong width or is not finite.
    """
    cx = vector("centre_x", centre_x, len(m.sx))
    cy = vector("centre_y", centre_y, len(m.sy))
    dx, dy = cx - m.origin_x, cy - m.origin_y

    def shift(g: Array, left: Array, right: Array, sum_left: Array, sum_right: Array) -> Array:
        if not left.any() and not right.any():
            # They are about this centre already. Nobody writes into moments, so there is no need for a copy.
            return g
        if g.ndim == 1:
            return _shifted_diagonal(g, left, sum_left, m.n)
        out = g.copy()
        _shift(out, left, right, sum_left, sum_right, m.n)
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

    Returns:
        The moments, with the source's variance as the unit of ridge strengths.
    """
    # From the sums about the origin, which lies near the mean: about zero the variance would be lost in rounding.
    spread = float(np.trace(m.gx)) - float(m.sx @ m.sx) / max(m.n, 1)
    return replace(about(m, np.zeros_like(m.sx), np.zeros_like(m.sy)), unit=max(spread, 0.0) / len(m.sx))


def as_if_shuffled(m: Moments, rng: np.random.Generator) -> Moments:
    """Moments as permuting the targets would leave them, drawn without the rows.

    Over all permutations P of n rows the centred cross term ``X'PY`` has mean zero and covariance
    ``kron(X'X, Y'Y) / (n - 1)`` exactly, and many rows make it normal (Hoeffding, A combinatorial central limit
    theorem, 1951). So with ``X'X = L L'`` and ``Y'Y = M M'`` a draw is ``L Z M' / sqrt(n - 1)``, Z standard normal.

    Args:
        m: Moments of at least two pairs.
        rng: Source of the draw.

    Raises:
        FitError: Of the target only the diagonal was summed.
    """
    if m.gy.ndim == 1:
        raise FitError("of the target's Gram matrix only the diagonal was summed; scan with target_gram=True")
    whole = centered(m)
    noise = rng.standard_normal(m.c.shape)
    cross = _root(whole.gx) @ noise @ _root(whole.gy).T / np.sqrt(max(m.n - 1, 1))
    # Back about the origin, like the other terms.
    return replace(m, c=cross + np.outer(m.sx, m.sy) / m.n)


def _root(gram: Array) -> Array:
    """A matrix L with ``L L'`` the given one."""
    try:
        root: Array = np.linalg.cholesky(gram).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        # Fewer rows than dimensions: semidefinite, with rounding on either side of zero.
        values, vectors = np.linalg.eigh(gram)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
    return root
