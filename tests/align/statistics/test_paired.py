"""Differences between paired accuracies: against binomial tests, against likelihood, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from align.statistics import paired_proportions
from align.statistics.paired import sign_flip_p, tango
from featstore.errors import FitError


def answers(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    one = np.repeat([True, True, False, False], [both, first, second, neither])
    other = np.repeat([True, False, True, False], [both, first, second, neither])
    return one, other


def score_by_likelihood(b: int, c: int, n: int, delta: float) -> float:
    """The score statistic with the nuisance share found by maximising the likelihood numerically."""

    def minus(q: float) -> float:
        rest = 1 - 2 * q - delta
        if min(q, q + delta, rest) <= 0:
            return 1e9
        return -(b * np.log(q + delta) + c * np.log(q) + (n - b - c) * np.log(rest))

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = minimize_scalar(minus, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    return float((b - c - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta))))


class TestTango:
    @pytest.mark.parametrize(("b", "c", "n"), [(12, 3, 50), (1, 9, 40), (7, 7, 30), (20, 5, 200)])
    def test_its_ends_are_where_the_score_is_the_quantile(self, b: int, c: int, n: int) -> None:
        low, high = tango(b, c, n, 1.959964)
        assert low < (b - c) / n < high
        assert score_by_likelihood(b, c, n, low) == pytest.approx(1.959964, abs=1e-4)
        assert score_by_likelihood(b, c, n, high) == pytest.approx(-1.959964, abs=1e-4)

    def test_it_turns_round_with_the_answers(self) -> None:
        low, high = tango(9, 2, 40, 1.96)
        assert tango(2, 9, 40, 1.96) == pytest.approx((-high, -low))

    @pytest.mark.parametrize(("b", "c", "n"), [(0, 0, 20), (20, 0, 20), (0, 20, 20), (1, 0, 1)])
    def test_it_has_width_where_a_mean_of_differences_has_none(self, b: int, c: int, n: int) -> None:
        low, high = tango(b, c, n, 1.96)
        assert -1 <= low <= (b - c) / n <= high <= 1
        assert high - low > 0.05


class TestPaired:
    def test_four_to_nothing_of_forty_is_not_above(self) -> None:
        found = paired_proportions(*answers(10, 4, 0, 26))
        assert (found.first_alone, found.second_alone, found.n, found.clusters) == (4, 0, 40, 40)
        assert found.p == pytest.approx(0.125)
        assert found.low > 0
        assert not found.above
        assert paired_proportions(*answers(10, 6, 0, 24)).above
        assert not paired_proportions(*answers(10, 0, 6, 24)).above

    @pytest.mark.parametrize(("b", "c"), [(4, 0), (9, 3), (0, 0), (5, 5), (1, 14)])
    def test_single_questions_get_mcnemars_exact_p(self, b: int, c: int) -> None:
        expected = 1.0 if b + c == 0 else binomtest(b, b + c).pvalue
        assert paired_proportions(*answers(3, b, c, 7)).p == pytest.approx(expected)

    def test_flips_of_clusters_are_those_of_all_patterns(self) -> None:
        sums = np.array([3, -1, 2, 2, 0, 1])
        signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
        every = np.abs(signs.T @ np.abs(sums))
        assert sign_flip_p(sums) == pytest.approx((every >= abs(sums.sum())).mean())

    def test_questions_that_go_together_count_once(self) -> None:
        first, second = answers(10, 6, 0, 24)
        owner = np.arange(40)
        owner[10:16] = 10
        found = paired_proportions(first, second, owner)
        assert found.clusters == 35
        assert found.p == 1.0
        assert not found.above
        assert found.low < paired_proportions(first, second).low

    def test_answers_to_other_questions_are_refused(self) -> None:
        with pytest.raises(FitError, match="one answer a question"):
            paired_proportions([True], [True, False])
        with pytest.raises(FitError, match="give one a question"):
            paired_proportions([True, True], [True, False], [1])
        with pytest.raises(FitError, match="one answer a question"):
            paired_proportions([], [])

    @pytest.mark.parametrize(("n", "per"), [(40, 1), (60, 3)])
    def test_it_covers_the_truth_and_rarely_claims_what_is_not(self, n: int, per: int) -> None:
        rng = np.random.default_rng(n)
        covered = claimed = 0
        for _ in range(600):
            # Questions of one cluster are easy together for the first, or for the second.
            lean = np.repeat(rng.normal(0, 0.25, n // per), per)
            first = rng.random(n) < np.clip(0.5 + lean, 0.02, 0.98)
            second = rng.random(n) < np.clip(0.5 - lean, 0.02, 0.98)
            found = paired_proportions(first, second, np.repeat(np.arange(n // per), per))
            covered += found.low <= 0 <= found.high
            claimed += found.above
        assert 0.92 <= covered / 600 <= 0.985
        assert claimed / 600 <= 0.04
