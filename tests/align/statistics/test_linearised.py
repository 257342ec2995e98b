"""Intervals of sums over documents: against regression, against their own definition, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from align.metrics import r2_of
from align.statistics import Linearised, mean, quotient, ratio
from featstore.errors import FitError
from tests.support.simulated_documents import LENGTHS, documents


def cr2_of_regression(a: np.ndarray, b: np.ndarray) -> float:
    """Variance of the slope of a on b through the origin with weights 1 / b, corrected for leverage, by matrices."""
    x, w = b[:, None], np.diag(1 / b)
    bread = np.linalg.inv(x.T @ w @ x)
    hat = x @ bread @ x.T @ w
    residual = a - hat @ a
    # CR2 with one observation a cluster and a working variance proportional to b.
    meat = sum((x[d, 0] * w[d, d] * residual[d]) ** 2 / (1 - hat[d, d]) for d in range(len(a)))
    return float((bread @ np.array([[meat]]) @ bread)[0, 0])


class TestRatio:
    def test_the_variance_is_that_of_a_weighted_regression_corrected_for_leverage(self) -> None:
        rng = np.random.default_rng(1)
        b = rng.lognormal(3, 1, 9)
        a = 0.4 * b + rng.normal(0, 1, 9) * np.sqrt(b)
        found = ratio(a, b).estimate()
        assert found.value == pytest.approx(a.sum() / b.sum())
        assert found.standard_error is not None
        assert found.standard_error**2 == pytest.approx(cr2_of_regression(a, b), rel=1e-12)

    def test_the_mean_of_equal_documents_has_the_interval_of_a_t_test(self) -> None:
        values = np.random.default_rng(2).normal(3, 1, 8)
        found = mean(values).estimate(null=3.0)
        half = student.ppf(0.975, 7) * values.std(ddof=1) / math.sqrt(8)
        assert found.interval == pytest.approx((values.mean() - half, values.mean() + half))
        statistic = abs(values.mean() - 3) / (values.std(ddof=1) / math.sqrt(8))
        assert found.p == pytest.approx(2 * student.sf(statistic, 7))
        assert (found.documents, found.effective, found.freedom) == (8, pytest.approx(8), pytest.approx(7))

    def test_unequal_documents_say_as_much_as_fewer_equal_ones(self) -> None:
        found = ratio([1.0, 1, 2, 9], [1.0, 2, 3, 10]).estimate()
        assert found.effective == pytest.approx(16**2 / (1 + 4 + 9 + 100))

    @pytest.mark.parametrize(
        ("a", "b", "words"),
        [
            ([], [], "not 0"),
            ([1.0, 2.0], [1.0, 2.0], "at least 3 test documents, not 2"),
            ([1.0, 2.0, 100.0], [1.0, 1.0, 300.0], "holds nearly everything"),
            ([1.0, 2.0, math.nan], [1.0, 1.0, 1.0], "not finite"),
            ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], "not finite"),
        ],
    )
    def test_what_has_no_interval_has_a_reason(self, a: list[float], b: list[float], words: str) -> None:
        found = ratio(a, b).estimate()
        assert found.interval is None
        assert found.p is None
        assert not found.above
        assert not found.below
        assert words in str(found.reason)

    def test_what_cannot_be_a_ratio_is_refused(self) -> None:
        with pytest.raises(FitError, match="one number a document"):
            ratio([1.0, 2.0], [1.0])
        with pytest.raises(FitError, match=r"negative \(-1\); take `quotient`"):
            ratio([1.0, 2.0], [1.0, -1.0])


class TestArithmetic:
    def test_a_difference_leaves_out_what_both_have_in_common(self) -> None:
        rng = np.random.default_rng(3)
        b, hard = rng.lognormal(4, 0.5, 20), rng.gamma(4, 1, 20)
        first, second = ratio((hard + 0.1) * b, b), ratio(hard * b, b)
        found = (first - second).estimate()
        assert found.interval == pytest.approx((0.1, 0.1))
        assert found.p == pytest.approx(0, abs=1e-12)
        assert first.estimate().interval[0] < second.estimate().value  # type: ignore[index]

    def test_equal_figures_do_not_differ(self) -> None:
        figure = ratio([1.0, 2.0, 4.0], [2.0, 3.0, 5.0])
        found = (figure - figure).estimate()
        assert (found.value, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)

    def test_a_mean_of_figures_is_narrower_where_they_are_independent_alone(self) -> None:
        rng = np.random.default_rng(4)
        parts = [mean(rng.normal(size=50)) for _ in range(4)]
        pooled = 0.25 * (parts[0] + parts[1] + parts[2] + parts[3])
        alone = float(np.mean([part.estimate().standard_error for part in parts]))  # type: ignore[arg-type]
        assert pooled.estimate().standard_error == pytest.approx(alone / 2, rel=0.25)
        same = 0.5 * (parts[0] + parts[0])
        assert same.estimate().standard_error == pytest.approx(parts[0].estimate().standard_error)

    def test_figures_of_different_documents_do_not_add(self) -> None:
        with pytest.raises(FitError, match="3 and 4 documents"):
            mean([1.0, 2.0, 3.0]) + mean([1.0, 2.0, 3.0, 4.0])

    def test_a_constant_moves_a_figure_and_not_its_width(self) -> None:
        figure = mean([1.0, 2.0, 4.0])
        moved = (-figure).plus(1.0)
        assert moved.value == pytest.approx(1 - 7 / 3)
        assert moved.estimate().standard_error == pytest.approx(figure.estimate().standard_error)


class TestQuotient:
    def figures(self, seed: int, gap: float = 1.0) -> tuple[Linearised, Linearised]:
        rng = np.random.default_rng(seed)
        n = rng.lognormal(4, 0.6, 12).round()
        hard = rng.normal(1, 0.3, 12)
        return ratio(n * (0.8 * gap * hard + rng.normal(0, 0.1, 12)), n), ratio(n * gap * hard, n) * 1.0

    def test_its_ends_are_where_the_difference_is_just_not_zero(self) -> None:
        above, below = self.figures(5)
        found = quotient(above, below)
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.value < found.high
        for end in (found.low, found.high):
            assert (above - end * below).estimate().p == pytest.approx(0.05, abs=1e-9)

    def test_it_has_no_interval_where_the_denominator_may_be_zero(self) -> None:
        above, below = self.figures(6)
        weak = below.plus(-below.value + 0.01)
        found = quotient(above, weak)
        assert found.interval is None
        assert "not clearly positive" in str(found.reason)
        assert math.isnan(quotient(above, -below).value)

    def test_it_passes_on_why_a_part_has_none(self) -> None:
        found = quotient(mean([1.0, 2.0]), mean([2.0, 3.0]))
        assert found.value == pytest.approx(0.6)
        assert "at least 3 test documents" in str(found.reason)


def coverage(count: int, lengths: str, repetitions: int) -> dict[str, float]:
    """How often intervals hold the truth: of R2, of a difference of two, of a quotient of two."""
    rng = np.random.default_rng(count * 7 + len(lengths))
    hits: dict[str, list[bool]] = {"r2": [], "difference": [], "quotient": []}
    for _ in range(repetitions):
        drawn = documents(count, rng, truth=(0.5, 0.6), lengths=lengths)
        first, second = (r2_of(sse, drawn.sst) for sse in drawn.sse)
        for name, found, truth in (
            ("r2", first.estimate(), 0.5),
            ("difference", (second - first).estimate(), 0.1),
            ("quotient", quotient(first, second), 5 / 6),
        ):
            if found.low is not None and found.high is not None:
                hits[name].append(found.low <= truth <= found.high)
    return {name: float(np.mean(held)) for name, held in hits.items()}


def test_intervals_cover_the_truth_at_three_documents_and_at_thirty() -> None:
    for count in (3, 30):
        for name, share in coverage(count, "unequal", 500).items():
            assert 0.915 <= share <= 0.98, (count, name)


@pytest.mark.thorough
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("count", [3, 4, 6, 10, 30, 100])
def test_intervals_cover_the_truth(count: int, lengths: str) -> None:
    for name, share in coverage(count, lengths, 4000).items():
        assert 0.92 <= share <= 0.97, (count, lengths, name)
