"""What findings are made of: plain facts of a run, gathered where they are known.

They hold numbers and names alone, so that :mod:`align.runs.findings` stays a set of pure functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from featstore.errors import FitError

#: Eigenvalues below this part of the largest are rounding: Gram matrices are summed from float32 products.
EIGENVALUE_FLOOR = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Gram:
    """What matters of the centred Gram matrix of the source's train rows.

    Attributes:
        n: Rows.
        width: Dimensions.
        condition: Largest over smallest eigenvalue; infinite where the smallest is not positive.
        below: Share of the eigenvalues below :data:`EIGENVALUE_FLOOR` times the largest.
    """

    n: int
    width: int
    condition: float
    below: float


@dataclass(frozen=True)
class Site:
    """A layer a map reads or writes.

    Attributes:
        model: Model name.
        layer: Layer.
        depth: Number of the model's blocks.
        convention: The store's attribute ``site_convention``; None where it has none.
    """

    model: str
    layer: int
    depth: int
    convention: str | None


@dataclass(frozen=True)
class Training:
    """How gradient training ended.

    Attributes:
        best_epoch: The epoch whose map is kept.
        last_epoch: The last one that was run.
        epochs: The most that were allowed.
    """

    best_epoch: int
    last_epoch: int
    epochs: int


@dataclass(frozen=True)
class Intercept:
    """What an intercept would do to a map without one.

    Attributes:
        without: R2 of the map on the validation rows; NaN where these do not vary.
        with_one: R2 of the best affine map.
    """

    without: float
    with_one: float


def gram_facts(gram: ArrayLike, n: int) -> Gram:
    """The facts of a Gram matrix, from its eigenvalues.

    Args:
        gram: float64 ``(d, d)``, centred: ``align.moments.scatter.centered(m).gx``; or its ``(d,)`` eigenvalues.
        n: Rows it sums over.

    Raises:
        FitError: It is empty, not square, or not finite.
    """
    values = np.asarray(gram, dtype=np.float64)
    if not values.size or values.ndim > 2 or values.shape != values.shape[::-1] or not np.isfinite(values).all():
        raise FitError(f"a Gram matrix of shape {values.shape}; expected finite numbers, square or its eigenvalues")
    eigenvalues = np.linalg.eigvalsh(values) if values.ndim == 2 else np.sort(values)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    condition = largest / smallest if smallest > 0 else math.inf
    return Gram(n, len(eigenvalues), condition, float(np.mean(eigenvalues <= EIGENVALUE_FLOOR * largest)))
