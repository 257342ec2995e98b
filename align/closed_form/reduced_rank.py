"""Matrices of low rank, alone or on top of a fixed map."""

from __future__ import annotations

from align import solvers
from align.closed_form.fit import Fit
from align.closed_form.problem import Problem, Solution
from align.closed_form.skip import factor_of, skip_weight
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
    skip = skip_weight(fit.skip, train, val, scale=fit.scale, rotated=rotated, turned=problem.turned)
    choice = solvers.select_reduced_rank(train, val, fit.rank, skip=skip, rotated=rotated)
    weight = choice.weight if skip is None else skip + choice.weight
    options: dict[str, float | int | str] = {"lambda": choice.lam, "rank": fit.rank, "skip": fit.skip}
    if skip is not None and fit.skip == "procrustes":
        options["skip_scale"] = factor_of(skip) if fit.scale else 1.0
    return Solution(solvers.to_numpy(weight), options, fit.rank * sum(problem.widths))
