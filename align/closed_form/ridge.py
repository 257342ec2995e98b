"""Any matrix: ridge regression with the strength that is best on validation."""

from __future__ import annotations

from dataclasses import replace

from align import solvers
from align.closed_form.fit import Fit
from align.closed_form.problem import Problem, Solution


def linear(fit: Fit, problem: Problem) -> Solution:
    """The W that minimises ``|X W - Y|_F^2 + lambda |W|_F^2``.

    Args:
        fit: Has no option that counts here.
        problem: Moments of the layer pair.
    """
    del fit
    choice = solvers.select_ridge(problem.train, problem.val, rotated=problem.rotated())
    weight = solvers.to_numpy(choice.weight)
    return Solution(weight, {"lambda": choice.lam}, weight.size)


def affine(fit: Fit, problem: Problem) -> Solution:
    """The same between centred states; the intercept is fitted, too.

    Args:
        fit: Has no option that counts here.
        problem: Moments of the layer pair, about their means.
    """
    solution = linear(fit, problem)
    return replace(solution, trainable=solution.trainable + problem.widths[1])
