"""One map for the layer pairs of two models, and what each pair adds to it.

Layers differ in norm, so each side is taken in its own unit first: u_k, the root of the mean variance of a layer's
dimensions over the train pairs. With G_k = X_k'X_k and C_k = X_k'Y_k about the means, the layers' rows laid one below
the other have the moments G = sum_k G_k / u_xk^2 and C = sum_k C_k / (u_xk u_yk), from which the shared map W is solved
for as ever. A pair's own map is f_k W + A_k B_k: a factor, and a projection of small rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from align import solvers
from align.closed_form.scaling import least_squares, shrunken
from align.moments.scan import Scan
from align.moments.scatter import Array, Scatter, about, centered
from align.solvers.linalg import trace
from featstore.errors import FitError


@dataclass(frozen=True, eq=False)
class Shared:
    """A map that several layer pairs share.

    Attributes:
        weight: float64 ``(d_source, d_target)``, between states in the units of their layers.
        factors: By pair key, what the map is multiplied by for that pair.
        lam: Ridge strength, None for a rotation.
    """

    weight: Array
    factors: dict[str, float]
    lam: float | None

    def of(self, key: str) -> Array:
        """The shared map as one pair uses it, between states as they are.

        Args:
            key: Of the pair.
        """
        return self.factors[key] * self.weight


def fit_shared(scans: Mapping[str, Scan], base: str, *, scale: bool = True) -> Shared:
    """Solve for the shared map.

    Args:
        scans: Of every layer pair, all of two models in one direction.
        base: ``procrustes`` or ``ridge``.
        scale: Procrustes: each pair's own factor (:mod:`align.closed_form.scaling`) instead of 1. A ridge map always
            goes between the layers' units, u_yk / u_xk.

    Raises:
        FitError: Another base, nothing to fit, or a layer that does not vary.
    """
    if not scans:
        raise FitError("there are no layer pairs to share a map; name some with --layers")
    train = {key: centered(scan.train) for key, scan in scans.items()}
    val = {key: about(scan.val, *scan.means) for key, scan in scans.items()}
    units = {key: (_unit(rows.gx, rows.n, key), _unit(rows.gy, rows.n, key)) for key, rows in train.items()}
    pooled = _pooled(train, units)
    if base == "procrustes":
        weight, _ = solvers.procrustes(pooled.c, pooled.gx)
        factors = {key: _factor(weight, rows, val[key]) if scale else 1.0 for key, rows in train.items()}
        return Shared(weight, factors, None)
    if base != "ridge":
        raise FitError(f"layers can share a map of kind procrustes or ridge, not {base!r}; choose one of these")
    choice = solvers.select_ridge(pooled, _pooled(val, units))
    return Shared(choice.weight, {key: y / x for key, (x, y) in units.items()}, choice.lam)


def _unit(gram: Array, n: int, key: str) -> float:
    unit = math.sqrt(trace(gram) / (n * len(gram)))
    if not unit > 0:
        raise FitError(f"{key}: a layer does not vary over the train pairs; leave it out with --layers")
    return unit


def _pooled(parts: Mapping[str, Scatter], units: Mapping[str, tuple[float, float]]) -> Scatter:
    """Moments of the layers' rows, each about its centre and in its unit, one below the other."""
    first = next(iter(parts.values()))
    total = replace(
        first, n=0, mean_x=np.zeros_like(first.mean_x), mean_y=np.zeros_like(first.mean_y),
        gx=np.zeros_like(first.gx), gy=np.zeros_like(first.gy), c=np.zeros_like(first.c),
    )  # fmt: skip
    for key, rows in parts.items():
        x, y = units[key]
        total = replace(
            total,
            n=total.n + rows.n,
            gx=total.gx + rows.gx / x**2,
            gy=total.gy + rows.gy / y**2,
            c=total.c + rows.c / (x * y),
        )
    return total


def _factor(weight: Array, train: Scatter, val: Scatter) -> float:
    own = least_squares(weight, train, rotation=True)
    return 1.0 if own is None else shrunken(own, weight, val, rotation=True)
