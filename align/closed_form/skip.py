"""The fixed map that a low-rank map or a hidden layer is added to."""

from __future__ import annotations

from array_api_compat import device as device_of

from align import solvers
from align.maps.low_rank import check_low_rank
from align.moments.scatter import Array, Scatter
from align.solvers.linalg import namespace


def skip_weight(name: str, train: Scatter, val: Scatter, *, rotated: solvers.Rotated | None = None) -> Array | None:
    """The fixed map itself.

    Args:
        name: ``procrustes``, ``ridge``, ``identity`` or ``none``.
        train: Centred train moments.
        val: Validation moments about the train means.
        rotated: ``solvers.rotate(train, val)`` if it is known already.

    Returns:
        float64 ``(d_source, d_target)``, of the kind and on the device of the moments, or None.

    Raises:
        FitError: Unknown, or identity between different widths.
    """
    check_low_rank(1, name, *train.c.shape)
    if name == "none":
        return None
    if name == "procrustes":
        return solvers.procrustes(train.c, train.gx)[0]
    if name == "ridge":
        return solvers.select_ridge(train, val, rotated=rotated).weight
    xp = namespace(train.c)
    eye: Array = xp.eye(len(train.c), dtype=xp.float64, device=device_of(train.c))
    return eye
