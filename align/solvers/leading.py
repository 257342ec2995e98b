"""The leading right singular vectors of a matrix from products with few columns: no decomposition of the whole.

Block Lanczos on A'A with full reorthogonalisation, restarted with the best directions so far (Golub and Van Loan,
Matrix Computations, 4th edition, 10.3; Wu and Simon, SIAM Journal on Matrix Analysis 22, 2000). A product of A with
some columns reads A once for all of them, so that a few hundred columns cost less than the half of a decomposition that
cannot be made of matrix products. A matrix that is small, or of which many directions are wanted, is decomposed.
"""

from __future__ import annotations

import numpy as np
from array_api_compat import device, is_numpy_namespace

from align.moments.scatter import Array
from align.solvers.linalg import eigh, leading_eigenvectors, namespace

#: Narrower matrices are decomposed: there it takes no longer.
_NARROW = 1536
#: Directions wanted, at most, as a part of the width.
_SHARE = 1 / 16
#: Columns beside the wanted ones that a block holds; the more of them, the sooner the last wanted ones are found.
_BESIDE = 16
#: Blocks of one basis.
_BLOCKS = 12
#: Blocks' worth of directions that it is begun anew with.
_KEPT = 4
#: After every so many blocks it is seen whether this is enough.
_CHECKED = 4
#: Of a new block's directions, that are no larger than this part of its largest.
_ROUNDING = 1e-6
#: Products with a block before a decomposition takes over.
_PRODUCTS = 64
#: What may be left of A'A v - v t, relative to the largest t.
_LEFT = 1e-10


def leading_directions(a: Array, count: int, start: Array | None = None) -> Array:
    """The right singular vectors (n, count) of the largest singular values, the largest first.

    Args:
        a: (m, n) float64, finite.
        count: 1 to n.
        start: (n, k) near them, such as those of a matrix that differs little; None for directions at random, always
            the same ones.
    """
    n = a.shape[1]
    if n >= _NARROW and count <= _SHARE * n:
        found = _lanczos(a, count, start)
        if found is not None:
            return found
    # One array on both sides: numpy then computes one triangle only.
    return leading_eigenvectors(a.T @ a, count)


def _lanczos(a: Array, count: int, start: Array | None) -> Array | None:
    xp, n, width = namespace(a), a.shape[1], count + _BESIDE
    noise = np.random.default_rng(0).standard_normal((n, width))
    first: Array = noise if is_numpy_namespace(xp) else xp.asarray(noise, device=device(a))
    if start is not None:
        first[:, : min(start.shape[1], width)] = start[:, :width]
    block, _ = xp.linalg.qr(first)
    place = device(a)
    most = width * _BLOCKS
    basis, inner = (xp.zeros((rows, most), dtype=xp.float64, device=place) for rows in (n, most))
    held = 0
    for product in range(1, _PRODUCTS + 1):
        end = held + width
        basis[:, held:end] = block
        known = basis[:, :end]
        image = a.T @ (a @ block)
        across = known.T @ image
        inner[:end, held:end] = across
        inner[held:end, :end] = across.T
        rest = image - known @ across
        # Once more: the first time leaves as much as was lost to cancellation.
        rest -= known @ (known.T @ rest)
        block, size = xp.linalg.qr(rest)
        if float(xp.min(xp.abs(xp.linalg.diagonal(size)))) <= _ROUNDING * float(xp.max(xp.abs(size))):
            # Where the matrix has nothing more to give, what is left is rounding, in directions that are known.
            for _ in range(2):
                block, _ = xp.linalg.qr(block - known @ (known.T @ block))
        held = end
        full = held + width > most
        if not full and product % _CHECKED:
            continue
        values, vectors = eigh(xp.asarray(inner[:held, :held], copy=True))
        left = xp.sqrt(xp.sum((size @ vectors[-width:, -count:]) ** 2, axis=0))
        if float(xp.max(left)) <= _LEFT * float(values[-1]):
            leading: Array = xp.flip(known @ vectors[:, -count:], axis=1)
            return np.ascontiguousarray(leading) if is_numpy_namespace(xp) else leading
        if full:
            # Restarted with the best directions so far, in which the matrix is diagonal.
            held = _KEPT * width
            basis[:, :held] = known @ vectors[:, -held:]
            inner[:held, :held] = xp.eye(held, dtype=xp.float64, device=place) * values[-held:]
    return None
