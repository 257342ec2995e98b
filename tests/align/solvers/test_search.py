"""How a ridge strength is searched for: to the bottom of a valley, with few systems solved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.moments.scatter import Scatter, about, centered, moments_of
from align.solvers import select_every_rank
from align.solvers.low_rank import _descend, _Trials
from align.solvers.spectrum import rotate
from tests.support.planted import rotation, spectrum_rows


@pytest.mark.parametrize("bottom", [0, 1, 7, 20, 39])
@pytest.mark.parametrize("start", [0, 5, 19, 39])
def test_a_valley_is_walked_to_its_bottom(bottom: int, start: int) -> None:
    asked: list[int] = []

    def error(index: int) -> float:
        asked.append(index)
        return float((index - bottom) ** 2)

    assert _descend(error, 40, start) == bottom
    # Doubling steps: a walk of 39 places looks at far fewer.
    assert len(set(asked)) <= 16


def test_equal_neighbours_end_the_walk() -> None:
    assert _descend(lambda _: 1.0, 10, 4) == 4


def scatters(seed: int = 0) -> tuple[Scatter, Scatter]:
    """Few rows of many dimensions: strengths matter, and low ranks want other ones than high ranks."""
    rng = np.random.default_rng(seed)
    x = spectrum_rows(260, 30, seed, decay=1.0)
    y = x @ rotation(30, seed + 1)[:, :4] @ rng.normal(size=(4, 25)) + 2.0 * rng.normal(size=(260, 25))
    origin = np.zeros(30), np.zeros(25)
    train, val = moments_of(x[:160], y[:160], *origin), moments_of(x[160:], y[160:], *origin)
    found = centered(train)
    return found, about(val, found.mean_x, found.mean_y)


def test_forecasts_lead_near_the_best_strength() -> None:
    grid = np.logspace(-6, 3, 60)
    for seed in range(4):
        train, val = scatters(seed)
        trials = _Trials(rotate(train, val), grid, 4, None)
        exact = np.array([trials.error(index, 4) for index in range(60)])
        best = int(np.argmin(exact))
        for start in (best - 6, best, best + 6):
            # What is best if target directions stay as they are lies nearer than where it began, or there.
            assert abs(trials.forecast(start, 4) - best) <= max(abs(start - best), 2)


@pytest.mark.parametrize("seed", range(4))
def test_few_strengths_are_tried_and_the_choice_is_the_bottom_of_a_valley(seed: int) -> None:
    train, val = scatters(seed)
    grid = np.logspace(-6, 3, 60)
    quick = select_every_rank(train, val, [4, 2], grid)
    every = select_every_rank(train, val, [4, 2], grid, search="all")
    for rank in (4, 2):
        errors, at = every[rank].val_mse, int(np.flatnonzero(every[rank].lambdas == quick[rank].lam)[0])
        assert errors[at] == errors[max(at - 1, 0) : at + 2].min()
        # There may be several valleys, of which it takes one that is hardly worse than the deepest.
        assert errors[at] <= 1.01 * errors.min()
        assert len(quick[rank].lambdas) <= 12
        assert len(every[rank].lambdas) == 60


def test_of_equal_errors_the_smallest_strength_wins() -> None:
    train, val = scatters()
    trials: Any = _Trials(rotate(train, val), np.logspace(-3, 0, 5), 4, None)
    trials.errors = {3: np.ones(5), 1: np.ones(5), 2: np.ones(5)}
    assert trials.best(4) == 1
