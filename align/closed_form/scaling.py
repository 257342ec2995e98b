"""The factor of a rotation: least squares on the train rows, shrunk as far as the validation rows ask for it.

A rotation W keeps norms, so between models of other norms it needs one factor more. With W fixed, the least squared
error has it at ``s = tr(W'C) / tr(W'GW)``. W was turned towards the noise of the train rows, too, so with few rows per
dimension that s is too large for any others: it is multiplied by the share between 0 and 1 that has the least squared
error on the validation rows, as ridge regression takes its strength from them.
"""

from __future__ import annotations

from dataclasses import dataclass

from align import solvers
from align.moments.scan import Scan
from align.moments.scatter import Array, Scatter, about, centered
from align.solvers.linalg import dot, trace
from align.solvers.ridge import mse_of
from align.solvers.rotation import rotated_energy

#: The least share that is kept of a factor: a map of nothing at all has no direction left to be judged.
LEAST_SHARE = 1e-3


def rotation(
    train: Scatter, val: Scatter, *, scale: bool, turned: tuple[Array, float] | None = None
) -> tuple[Array, float]:
    """Procrustes, with the factor that rotations of a run have.

    Args:
        train: Centred train moments.
        val: Validation moments about the train means.
        scale: Whether it has a factor.
        turned: Of ``train.c``, as :func:`align.solvers.procrustes` takes it.

    Returns:
        ``(weight, s)`` as :func:`align.solvers.procrustes`; the map is ``s * weight``.

    Raises:
        FitError: The moments are empty, not finite or of the wrong shape.
    """
    weight, factor = solvers.procrustes(train.c, train.gx, scale=scale, turned=turned)
    return weight, shrunken(factor, weight, val, rotation=True) if scale else 1.0


def least_squares(weight: Array, rows: Scatter, *, rotation: bool = False) -> float | None:
    """The factor with which a map has the least squared error on some rows.

    Args:
        weight: (d_source, d_target).
        rows: About the means that the map subtracts and adds.
        rotation: Whether the map is semi-orthogonal to rounding, which spares a product where it narrows nothing.

    Returns:
        ``tr(W'C) / tr(W'GW)``; None where the mapped rows do not vary, so that every factor fits alike.
    """
    energy = rotated_energy(weight, rows.gx) if rotation else dot(weight, rows.gx @ weight)
    return dot(weight, rows.c) / energy if energy > 0 else None


def shrunken(factor: float, weight: Array, val: Scatter, *, rotation: bool = False) -> float:
    """A factor times the share of it that the validation rows confirm.

    Args:
        factor: Least squares on the train rows.
        weight: (d_source, d_target) the map without it.
        val: Validation moments about the train means.
        rotation: As for :func:`least_squares`.

    Returns:
        The factor times a share from :data:`LEAST_SHARE` to 1; the factor itself where validation cannot tell.
    """
    held_out = least_squares(weight, val, rotation=rotation)
    if held_out is None or factor == 0:
        return factor
    return factor * min(max(held_out / factor, LEAST_SHARE), 1.0)


@dataclass(frozen=True)
class Unscaled:
    """A rotation without a factor, and what one would do to it.

    Attributes:
        factor: The one that it would have by default.
        before: R2 of the rotation on the validation rows about the train means; None where these do not vary.
        after: R2 with the factor.
    """

    factor: float
    before: float | None
    after: float | None


def unscaled(weight: Array, moments: Scan) -> Unscaled:
    """What a factor would do to a rotation.

    Args:
        weight: float64 ``(d_source, d_target)`` on the host.
        moments: Of its layer pair.

    Raises:
        FitError: The widths differ.
    """
    train, val = centered(moments.train), about(moments.val, *moments.means)
    own = least_squares(weight, train)
    factor = 1.0 if own is None else shrunken(own, weight, val)
    spread = trace(val.gy) / (val.n * val.gy.shape[0])
    before, after = (1 - mse_of(s * weight, val) / spread if spread > 0 else None for s in (1.0, factor))
    return Unscaled(factor, before, after)
