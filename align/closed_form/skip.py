"""The fixed map that a low-rank map or a hidden layer is added to."""

from __future__ import annotations

import math
from collections.abc import Callable

from array_api_compat import device as device_of

from align import solvers
from align.closed_form.scaling import rotation
from align.maps.low_rank import check_low_rank
from align.moments.scatter import Array, Scatter
from align.solvers.linalg import dot, namespace


def skip_weight(name: str, train: Scatter, val: Scatter, *, scale: bool = True) -> Array | None:
    """The fixed map as one matrix, its factor in it; see :func:`skip_of`.

    Args:
        name: ``procrustes``, ``ridge``, ``identity`` or ``none``.
        train: Centred train moments.
        val: Validation moments about the train means.
        scale: Whether ``procrustes`` has its factor.

    Raises:
        FitError: Unknown, or identity between different widths.
    """
    found = skip_of(name, train, val, scale=scale)
    return None if found is None else found[1] * found[0]


def skip_of(
    name: str,
    train: Scatter,
    val: Scatter,
    *,
    scale: bool = True,
    rotated: solvers.Rotated | None = None,
    turned: Callable[[], tuple[Array, float]] | None = None,
) -> tuple[Array, float] | None:
    """The fixed map and what it is multiplied by, 1 but for a rotation.

    Args:
        name: ``procrustes``, ``ridge``, ``identity`` or ``none``.
        train: Centred train moments.
        val: Validation moments about the train means.
        scale: Whether ``procrustes`` has its factor.
        rotated: ``solvers.rotate(train, val)`` if it is known already.
        turned: Gives what :func:`align.solvers.procrustes` takes, where somebody keeps it.

    Returns:
        float64 ``(d_source, d_target)``, of the kind and on the device of the moments, and its factor; or None.

    Raises:
        FitError: Unknown, or identity between different widths.
    """
    check_low_rank(1, name, *train.c.shape)
    if name == "none":
        return None
    if name == "procrustes":
        weight, factor = rotation(train, val, scale=scale, turned=None if turned is None else turned())
        return weight, factor
    if name == "ridge":
        return solvers.select_ridge(train, val, rotated=rotated).weight, 1.0
    xp = namespace(train.c)
    eye: Array = xp.eye(len(train.c), dtype=xp.float64, device=device_of(train.c))
    return eye, 1.0


def factor_of(rotation_map: Array) -> float:
    """The factor of a scaled rotation, from its elements: of a semi-orthogonal W ``|W|_F^2`` is the smaller width.

    Args:
        rotation_map: (d_source, d_target).
    """
    return math.sqrt(dot(rotation_map, rotation_map) / min(rotation_map.shape))
