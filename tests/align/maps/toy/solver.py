"""Each dimension times a number of its own: the least-squares solution."""

from __future__ import annotations

import numpy as np

from align.closed_form.fit import Fit
from align.closed_form.problem import Problem, Solution


def solve(fit: Fit, problem: Problem) -> Solution:
    """Dimension by dimension ``sum x y / sum x^2``; states of the same width alone."""
    del fit
    numbers = np.diag(problem.train.c) / np.diag(problem.train.gx)
    return Solution(np.diag(numbers), {"numbers": len(numbers)}, 2 * len(numbers))
