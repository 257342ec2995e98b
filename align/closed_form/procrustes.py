"""Scaled rotations: all dimensions, or within some principal components of either side."""

from __future__ import annotations

from align import solvers
from align.closed_form.fit import Fit
from align.closed_form.problem import Problem, Solution
from align.closed_form.scaling import rotation, shrunken
from featstore.errors import FitError


def solve(fit: Fit, problem: Problem) -> Solution:
    """The semi-orthogonal W that makes ``tr(W'X'Y)`` largest, times its factor unless the fit has none.

    Args:
        fit: Its ``scale`` and ``components`` count.
        problem: Moments of the layer pair.

    Raises:
        FitError: Components that are neither a number nor ``auto``, or above a width, or without the target's Gram
            matrix.
    """
    train, size = problem.train, problem.widths[0] * problem.widths[1]
    if fit.components is None:
        weight, scale = rotation(train, problem.val, scale=fit.scale, turned=problem.turned())
        return Solution(scale * solvers.to_numpy(weight), {"scale": scale}, size)
    if train.gy.ndim == 1:
        raise FitError(f"components {fit.components!r} need the target's Gram matrix; scan with target_gram=True")
    spectra = problem.spectrum(), solvers.Spectrum.of(train.gy)
    if fit.components == "auto":
        found = solvers.select_truncated_procrustes(train, problem.val, scale=fit.scale, spectra=spectra)
        weight, scale, components = found.weight, found.scale, found.components
    elif isinstance(fit.components, int):
        components = fit.components
        weight, scale = solvers.truncated_procrustes(train.c, *spectra, components, scale=fit.scale)
    else:
        raise FitError(f"components {fit.components!r}: give a number of principal components, or 'auto'")
    scale = shrunken(scale, weight, problem.val) if fit.scale else scale
    return Solution(scale * solvers.to_numpy(weight), {"scale": scale, "components": components}, size)
