"""Matrices of low rank, alone or on top of a fixed map."""

from __future__ import annotations

from align import solvers
from align.closed_form.fit import Fit
from align.closed_form.problem import Problem, Solution
from align.closed_form.skip import skip_of
from align.maps.low_rank import check_low_rank


def solve(fit: Fit, problem: Problem) -> Solution:
    """The best ``skip + W`` with W of a given rank: reduced-rank ridge regression of what the skip leaves over.

    Args:
        fit: Its ``rank``, ``skip`` and, of a rotation as skip, ``scale`` count.
        problem: Moments of the layer pair.

    Raises:
        FitError: The rank or the skip does not fit the widths.
    """
    check_low_rank(fit.rank, fit.skip, *problem.widths)
    train, val, rotated = problem.train, problem.val, problem.rotated()
    found = skip_of(fit.skip, train, val, scale=fit.scale, rotated=rotated, turned=problem.turned)
    skip, factor = (None, 1.0) if found is None else found
    choice = solvers.select_reduced_rank(
        train, val, fit.rank, skip=skip, skip_scale=factor, rotation=fit.skip == "procrustes", rotated=rotated
    )
    weight = choice.weight if skip is None else factor * skip + choice.weight
    options: dict[str, float | int | str] = {"lambda": choice.lam, "rank": fit.rank, "skip": fit.skip}
    if fit.skip == "procrustes":
        options["skip_scale"] = factor
    return Solution(solvers.to_numpy(weight), options, fit.rank * sum(problem.widths))
