"""Sums over paired rows: all that closed-form fits and linear CKA need, merged by addition.

Rows ``x_i`` (dx,) and ``y_i`` (dy,) are taken about one fixed origin, so sums over disjoint rows add up, in any tree.
With ``a_i = |x_i|^2`` and ``b_i = |y_i|^2`` (about the origin) the terms are first moments (``sx``, ``sy``), second
moments (``gx = X'X``, ``gy = Y'Y``, ``c = X'Y``) and, for the unbiased HSIC of Song et al. (2012), the third- and
fourth-order terms ``d = sum a_i b_i``, ``ux = X'b``, ``uy = Y'a`` with their self versions (``aa``, ``bb``, ``vx``,
``vy``: the same with Y = X or X = Y).

Many layers of two models share most of that: what a pair of layers adds is one *block* (:class:`Block`), and the block
of a layer with itself holds its self terms. Five layers of two models are 55 blocks, from which :func:`assemble` makes
the :class:`Moments` of any two.

The origin should lie near the mean: sums of squares about a far origin lose the variance in rounding. float32 rows are
multiplied in float32, a bounded number at a time, and added up in float64; float64 rows stay float64 throughout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featstore.errors import FitError
from featstore.store.read.threads import in_threads

#: float64 arrays: everything that is summed, moved or solved.
Array = NDArray[np.float64]
#: Rows as they come from a store: any real type numpy can cast.
Rows = NDArray[Any]

#: Rows of one float32 product. Longer float32 sums lose digits that the float64 total cannot bring back.
BLOCK_ROWS = 16_384

#: Columns of one product of a wide block: the same on every machine, since they decide its last bits.
PANEL = 1024

#: What names one side of a block: ``(model, layer)`` in a store.
Node = TypeVar("Node", bound=Hashable)


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
        gy: (dy, dy) Y'Y, or (dy,) its diagonal, where nobody asked for more; ``bb`` and ``vy`` are then NaN.
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
class Block:
    """What the rows of two nodes x and y sum to; y may be x itself.

    Attributes:
        n: Rows.
        product: (dx, dy) float64, X'Y; of a node with itself perhaps (dx,), the diagonal alone.
        x: (2, dx) float64: the sum of x, and X'b.
        y: (2, dy) float64: the sum of y, and Y'a.
        totals: (3,) float64: the sums of a_i, of b_i and of a_i b_i.
    """

    n: int
    product: Array
    x: Array
    y: Array
    totals: Array

    @property
    def swapped(self) -> Block:
        """The same block with x and y in each other's place."""
        return Block(self.n, self.product.T, self.y, self.x, self.totals[[1, 0, 2]])


def assemble(origin_x: Array, origin_y: Array, cross: Block, own_x: Block, own_y: Block) -> Moments:
    """The moments of two nodes from their block and each one's block with itself.

    Args:
        origin_x: (dx,) float64, about which all three were summed.
        origin_y: (dy,) float64.
        cross: Of x and y.
        own_x: Of x and x.
        own_y: Of y and y.

    Raises:
        FitError: The blocks are sums over different numbers of rows.
    """
    if not cross.n == own_x.n == own_y.n:
        raise FitError(
            f"blocks over {cross.n}, {own_x.n} and {own_y.n} rows do not belong together; add the blocks of one scan"
        )
    a, b, d = (float(total) for total in cross.totals)
    return Moments(
        n=cross.n, origin_x=origin_x, origin_y=origin_y, sx=cross.x[0], sy=cross.y[0],
        gx=own_x.product, gy=own_y.product, c=cross.product, a=a, b=b, d=d,
        aa=float(own_x.totals[2]), bb=float(own_y.totals[2]),
        ux=cross.x[1], uy=cross.y[1], vx=own_x.x[1], vy=own_y.x[1],
    )  # fmt: skip


def merge(first: Moments, *rest: Moments) -> Moments:
    """Add moments of disjoint sets of rows, in the order given.

    Args:
        first: One part.
        *rest: The others, about exactly the same origin.

    Raises:
        FitError: The origins differ (use :func:`align.moments.scatter.moved` first) or the widths do, or of one part's
            ``gy`` only the diagonal was summed.
    """
    for part in rest:
        if part.gy.shape != first.gy.shape:
            raise FitError(
                f"moments whose gy have shapes {first.gy.shape} and {part.gy.shape} do not add; sum both with, or both "
                "without the target's Gram matrix"
            )
        same = np.array_equal(first.origin_x, part.origin_x) and np.array_equal(first.origin_y, part.origin_y)
        if not same:
            raise FitError("moments about different origins do not add; move them to one origin")
    total = {k: sum((getattr(p, k) for p in rest), getattr(first, k)) for k in _SUMMED}
    return Moments(origin_x=first.origin_x, origin_y=first.origin_y, **total)


def vector(name: str, value: ArrayLike, width: int) -> Array:
    """A finite float64 vector of a given width.

    Args:
        name: What it is, for the message.
        value: What was given.
        width: What the rows need.

    Raises:
        FitError: Another shape, or not finite.
    """
    result = np.asarray(value, dtype=np.float64)
    if result.shape != (width,):
        raise FitError(f"{name} has shape {result.shape}; the rows need ({width},)")
    if not np.isfinite(result).all():
        raise FitError(f"{name} is not finite; look for damaged rows with `featstore verify`")
    return result


def about(rows: Rows, origin: Array, dtype: type[np.floating[Any]]) -> Rows:
    """Return ``rows - origin`` rounded once to ``dtype``: the subtraction itself runs in float64.

    A float32 origin would differ from the recorded one by up to 6e-8 of a mean that can be 1000 times the spread.
    """
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(dtype)
    out = np.empty(rows.shape, dtype=dtype)
    np.subtract(rows, origin, out=out, casting="same_kind")
    return out


#: Takes centred rows by node and the blocks wanted; gives the products X'Y in that order. A device that multiplies
#: faster than the host plugs in here.
Multiply = Callable[[Mapping[Any, Rows], Sequence[tuple[Any, Any]]], Iterable[Rows]]


def products(rows: Mapping[Any, Rows], blocks: Sequence[tuple[Any, Any]]) -> Iterator[Rows]:
    """X'Y of every block, one after the other, on as many threads as BLAS likes.

    Args:
        rows: Centred rows ``(n, width)`` by node.
        blocks: Pairs of nodes.
    """
    for x, y in blocks:
        yield rows[x].T @ rows[y]


def product_threads() -> int:
    """Products that :func:`steady_products` makes at a time; each is held in memory."""
    return min(len(os.sched_getaffinity(0)), 16)


def steady_products(rows: Mapping[Any, Rows], blocks: Sequence[tuple[Any, Any]]) -> Iterator[Rows]:
    """X'Y of every block with the same bits however many cores there are.

    BLAS cuts a product in pieces by its number of threads, which moves the last bits. So each product keeps to one
    thread, and several run at a time: those of several blocks, and of a wide block its :data:`PANEL` columns at a time.

    Args:
        rows: Centred rows ``(n, width)`` by node.
        blocks: Pairs of nodes.
    """
    from threadpoolctl import threadpool_limits

    workers = product_threads()
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        # A few at a time: all products at once could be as large as the totals they are added to.
        for start in range(0, len(blocks), workers):
            made = [_Product(rows[x], rows[y]) for x, y in blocks[start : start + workers]]
            for panel in [pool.submit(product.panel, at) for product in made for at in product.panels]:
                panel.result()
            yield from (product.result for product in made)


class _Product:
    """X'Y in panels that several threads can make at a time; of a block with itself one triangle."""

    def __init__(self, x: Rows, y: Rows) -> None:
        self._x, self._y, self._own = x, y, x is y
        self.result: Rows = np.empty((x.shape[1], y.shape[1]), np.result_type(x, y))
        self.panels = range(0, x.shape[1], PANEL)

    def panel(self, at: int) -> None:
        """Make the rows of the result from one on.

        Args:
            at: The first of them.
        """
        result, end = self.result, at + PANEL
        part = self._x[:, at:end]
        if not self._own:
            np.matmul(part.T, self._y, out=result[at:end])
            return
        # One array on both sides: numpy then computes one triangle only.
        result[at:end, at:end] = part.T @ part
        if end < len(result):
            result[at:end, end:] = part.T @ self._x[:, end:]
            result[end:, at:end] = result[at:end, end:].T


class BlockSums(Generic[Node]):
    """Sums of one set of paired rows, for many nodes at once.

    Rows may come in pieces of any length; they are cut anew every ``block_rows`` rows, so that the sums have the same
    bits however the pieces were cut. Which other blocks are summed beside a block makes no difference to it either.

    Args:
        origins: float64 ``(width,)`` of every node.
        blocks: The pairs of nodes wanted.
        block_rows: Rows of one product.
        diagonal: Nodes of whose block with itself the diagonal is enough: it takes no product. What could not be moved
            to another origin without the others, ``X'b`` and the sum of a_i b_i, is NaN.
        dtype: float32, or float64 for rows that have more digits.
        multiply: What makes the products.

    Raises:
        FitError: An origin is not a finite vector.
    """

    def __init__(
        self,
        origins: Mapping[Node, ArrayLike],
        blocks: Sequence[tuple[Node, Node]],
        *,
        block_rows: int = BLOCK_ROWS,
        diagonal: Collection[Node] = (),
        dtype: type[np.floating[Any]] = np.float32,
        multiply: Multiply = steady_products,
    ) -> None:
        self.nodes: tuple[Node, ...] = tuple(dict.fromkeys(node for block in blocks for node in block))
        self.origins = {node: vector(f"origin_{node}", origins[node], np.size(origins[node])) for node in self.nodes}
        self.n = 0
        self._block_rows, self._dtype, self._multiply = block_rows, dtype, multiply
        # No product can overflow while every squared norm is below this.
        self._limit = min(float(np.finfo(dtype).max), 1e150) / block_rows
        self._pending: list[dict[Node, Rows]] = []
        self._held = 0
        width = {node: len(origin) for node, origin in self.origins.items()}
        self._diagonal = {(node, node) for node in diagonal}
        self._totals = {
            (x, y): Block(
                0,
                np.zeros(width[x] if (x, y) in self._diagonal else (width[x], width[y])),
                np.zeros((2, width[x])),
                np.zeros((2, width[y])),
                np.zeros(3),
            )
            for x, y in blocks
        }

    def add(self, states: Mapping[Node, Rows]) -> None:
        """Add the next rows.

        Args:
            states: ``(m, width)`` of every node of the blocks, the i-th rows belonging together; not about the origin.

        Raises:
            FitError: Shapes do not fit, or a row is not finite.
        """
        rows = {node: np.asarray(states[node]) for node in self.nodes}
        if len({value.shape[:1] for value in rows.values()}) > 1 or any(value.ndim != 2 for value in rows.values()):
            shapes = " and ".join(str(value.shape) for value in rows.values())
            raise FitError(
                f"paired rows need shapes (n, dx) and (n, dy), not {shapes}; give a row of each side for every pair"
            )
        for node, value in rows.items():
            vector(f"origin_{node}", self.origins[node], value.shape[1])
        at, count = 0, len(next(iter(rows.values()), ()))
        while at < count:
            end = min(at + self._block_rows - self._held, count)
            self._pending.append(
                {node: about(value[at:end], self.origins[node], self._dtype) for node, value in rows.items()}
            )
            self._held += end - at
            if self._held == self._block_rows:
                self._sum_pending()
            at = end

    def blocks(self) -> dict[tuple[Node, Node], Block]:
        """The sums so far, by pair of nodes. Adding more rows afterwards would cut them elsewhere: call it last."""
        self._sum_pending()
        return {
            pair: Block(self.n, total.product, total.x, total.y, total.totals) for pair, total in self._totals.items()
        }

    def _sum_pending(self) -> None:
        if not self._held:
            return
        pieces, self._pending = self._pending, []
        rows = {
            node: pieces[0][node] if len(pieces) == 1 else np.concatenate([piece[node] for piece in pieces])
            for node in self.nodes
        }
        # The norms come from the rounded rows that the products see, or the terms would not cancel.
        norms = {node: np.einsum("ij,ij->i", x, x, dtype=np.float64) for node, x in rows.items()}
        sums = {node: x.sum(axis=0, dtype=np.float64) for node, x in rows.items()}
        for squared in norms.values():
            # Written so that NaN fails it too.
            if not squared.max() <= self._limit:
                bad = self.n + int(np.flatnonzero(~(squared <= self._limit))[0])
                raise FitError(
                    f"row {bad} holds NaN, infinity or a value too large to square; look for damaged or unmasked rows"
                )
        for node, _ in self._diagonal & self._totals.keys():
            total, a = self._totals[node, node], norms[node]
            total.product[:] += np.einsum("ij,ij->j", rows[node], rows[node], dtype=np.float64)
            for side in (total.x, total.y):
                side[0] += sums[node]
                side[1] = np.nan
            total.totals[:] += a.sum(), a.sum(), np.nan
        blocks = [pair for pair in self._totals if pair not in self._diagonal]
        for (x, y), product in zip(blocks, self._multiply(rows, blocks), strict=True):
            total, a, b = self._totals[x, y], norms[x], norms[y]
            _add(total.product, product)
            total.x[0] += sums[x]
            total.y[0] += sums[y]
            # Not a BLAS product: its bits would depend on the number of threads.
            total.x[1] += np.einsum("ij,i->j", rows[x], b, dtype=np.float64)
            total.y[1] += np.einsum("ij,i->j", rows[y], a, dtype=np.float64)
            total.totals[:] += a.sum(), b.sum(), (a * b).sum()
        self.n += self._held
        self._held = 0


def _add(total: Array, product: Rows) -> None:
    """Add a product to its total, of wide ones a panel on every core: float32 to float64 takes as long as a read."""

    def panel(at: int) -> None:
        part = slice(at, at + PANEL)
        np.add(total[part], product[part], out=total[part])

    in_threads(panel, range(0, len(total), PANEL))


def moments_of(x: Rows, y: Rows, origin_x: ArrayLike, origin_y: ArrayLike) -> Moments:
    """Sum the moments of paired rows.

    Args:
        x: (n, dx) source rows. float32 and shorter types are multiplied in float32 per block of at most 16,384 rows and
            summed in float64; float64 and integers stay float64.
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
        raise FitError(
            f"paired rows need shapes (n, dx) and (n, dy), not {x.shape} and {y.shape}"
            "; give a row of each side for every pair"
        )
    origins = {"x": vector("origin_x", origin_x, x.shape[1]), "y": vector("origin_y", origin_y, y.shape[1])}
    exact = any(side.dtype == np.float64 or side.dtype.kind in "iu" for side in (x, y))
    sums = BlockSums(
        origins,
        [("x", "x"), ("y", "y"), ("x", "y")],
        block_rows=BLOCK_ROWS,
        dtype=np.float64 if exact else np.float32,
        multiply=products,
    )
    sums.add({"x": x, "y": y})
    found = sums.blocks()
    return assemble(origins["x"], origins["y"], found["x", "y"], found["x", "x"], found["y", "y"])
