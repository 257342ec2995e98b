"""Many tests at once, and tests against permutations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from align.statistics import holm, permutation_p
from featstore.errors import FitError


def closed_testing(p: list[float]) -> list[float]:
    """Holm's values by definition: the largest Bonferroni p value of any set of tests that holds the test."""
    places = range(len(p))
    adjusted = []
    for place in places:
        sets = [s for size in range(1, len(p) + 1) for s in combinations(places, size) if place in s]
        adjusted.append(max(min(1.0, len(s) * min(p[i] for i in s)) for s in sets))
    return adjusted


class TestHolm:
    def test_it_is_closed_testing_with_bonferroni(self) -> None:
        rng = np.random.default_rng(1)
        for _ in range(20):
            p = (rng.random(5) ** 3).tolist()
            assert holm(p) == pytest.approx(closed_testing(p))

    def test_tests_that_were_not_made_do_not_count(self) -> None:
        assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]
        assert holm([]) == []

    def test_true_hypotheses_are_rejected_in_five_tables_of_a_hundred(self) -> None:
        rng = np.random.default_rng(2)
        wrong = sum(min(holm(rng.random(14).tolist())) <= 0.05 for _ in range(2000))  # type: ignore[type-var]
        assert 60 <= wrong <= 140

    def test_a_probability_is_one(self) -> None:
        with pytest.raises(FitError, match=r"0 and 1, not 1\.5"):
            holm([0.2, 1.5])


class TestPermutationP:
    def test_it_counts_the_statistic_itself(self) -> None:
        null = np.arange(39.0)
        assert permutation_p(100.0, null) == pytest.approx(1 / 40)
        assert permutation_p(37.0, null) == pytest.approx(3 / 40)
        assert permutation_p(-1.0, null) == 1.0
        assert permutation_p(0.0, null, closer="lower") == pytest.approx(2 / 40)

    def test_it_takes_tables_and_leaves_out_what_is_undefined(self) -> None:
        null = np.array([[0.0, 1.0], [np.nan, 2.0], [3.0, 3.0]])
        found = permutation_p(np.array([2.0, np.nan]), null)
        assert found[0] == pytest.approx(2 / 3)
        assert np.isnan(found[1])
        assert np.isnan(permutation_p(1.0, np.array([np.nan, np.nan])))

    def test_values_and_draws_have_one_shape(self) -> None:
        with pytest.raises(FitError, match="give draws first"):
            permutation_p(np.zeros(3), np.zeros((39, 2)))
