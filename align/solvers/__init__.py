"""Closed-form linear maps from second moments: arrays in, arrays of the same kind out, float64 throughout.

Notation: rows X (n, dx) and Y (n, dy) about their centres, G = X'X (dx, dx), C = X'Y (dx, dy); the
map is ``y_hat = x @ W``. Every solver needs only G and C, so a fit costs the same for a million
rows as for a thousand. The ridge strength is *relative*: lambda = 1 adds the mean eigenvalue
tr(G)/dx to every eigenvalue of G, so one grid serves layers whose norms differ a hundredfold.

Types are written as numpy's. Where they are, an array of another library that follows the array API
standard may come as well, above all a torch tensor on a GPU (:func:`to_device`): all arrays of a call must
then be of that kind and on that device, and matrices come back so. Errors and strengths, a few numbers each,
always come back as numpy.
"""

from align.solvers.devices import to_device, to_numpy
from align.solvers.low_rank import ReducedRank, reduced_rank, select_every_rank, select_reduced_rank
from align.solvers.ridge import Choice, RidgePath, lambda_grid, mse_of, select_ridge
from align.solvers.rotation import (
    Truncation,
    component_grid,
    procrustes,
    random_orthogonal,
    select_truncated_procrustes,
    truncated_procrustes,
)
from align.solvers.spectrum import Rotated, Spectrum, rotate, whitening

__all__ = [
    "Choice", "ReducedRank", "RidgePath", "Rotated", "Spectrum", "Truncation", "component_grid", "lambda_grid",
    "mse_of", "procrustes", "random_orthogonal", "reduced_rank", "rotate", "select_every_rank", "select_reduced_rank",
    "select_ridge", "select_truncated_procrustes", "to_device", "to_numpy", "truncated_procrustes", "whitening",
]  # fmt: skip
