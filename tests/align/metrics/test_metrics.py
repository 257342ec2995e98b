"""Scores against scikit-learn, SciPy, the n x n formula of HSIC_1, and theory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_squared_error, r2_score
from sklearn.metrics.pairwise import paired_cosine_distances

from align.metrics import (
    KEYS,
    DocumentSums,
    ScoreAccumulator,
    Scorer,
    add_intervals,
    biased_cka,
    biased_cka_from_moments,
    debiased_cka,
    debiased_cka_from_moments,
    hsic0_linear,
    hsic1_linear,
    paired_difference,
    r2_interval,
    retrieval,
    score,
)
from align.metrics.scorer import Truth
from align.metrics.similarity import FEW_ROWS
from align.moments.scatter import merge, moments_of, moved, paired_with_itself
from align.solvers import random_orthogonal
from featstore.errors import FitError
from tests.support.planted import plant, rotation, spectrum_rows

seeds = st.integers(0, 2**32 - 1)


def naive_hsic1(x: Any, y: Any) -> float:
    """Song et al. (2012), equation 5, with n x n Gram matrices in float64."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    total -= 2 / (n - 2) * (one @ k @ m @ one)
    return float(total / (n * (n - 3)))


def naive_debiased(x: Any, y: Any) -> float:
    return naive_hsic1(x, y) / math.sqrt(naive_hsic1(x, x) * naive_hsic1(y, y))


def naive_biased(x: Any, y: Any) -> float:
    h = np.eye(len(x)) - 1 / len(x)
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return float(np.sum(k * m) / math.sqrt(np.sum(k * k) * np.sum(m * m)))


def correlated(seed: int, n: int, dx: int = 5, dy: int = 4) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dx)) + 1.0
    return x, x @ rng.standard_normal((dx, dy)) + rng.standard_normal((n, dy)) - 2.0


class TestHsicAndCka:
    @settings(max_examples=30, deadline=None)
    @given(seeds, st.integers(4, 30), st.integers(1, 8), st.integers(1, 8))
    def test_hsic1_is_the_naive_one_about_any_origin(self, seed: int, n: int, dx: int, dy: int) -> None:
        x, y = correlated(seed, n, dx, dy)
        rng = np.random.default_rng(seed)
        m = moments_of(x, y, rng.standard_normal(dx), rng.standard_normal(dy))
        size = math.sqrt(naive_hsic1(x, x) * naive_hsic1(y, y)) + 1e-3
        assert hsic1_linear(m) == pytest.approx(naive_hsic1(x, y), abs=1e-8 * size)
        elsewhere = moved(m, rng.standard_normal(dx), rng.standard_normal(dy))
        assert hsic1_linear(elsewhere) == pytest.approx(hsic1_linear(m), abs=1e-8 * size)
        own = hsic1_linear(paired_with_itself(m, "y"))
        assert own == pytest.approx(naive_hsic1(y, y), rel=1e-7, abs=1e-8)

    @settings(max_examples=20, deadline=None)
    @given(seeds, st.integers(8, 40))
    def test_cka_is_the_naive_one(self, seed: int, n: int) -> None:
        x, y = correlated(seed, n)
        value, reason = debiased_cka(x, y)
        assert reason is None
        assert value == pytest.approx(naive_debiased(x, y), abs=1e-9)
        from_moments, reason = debiased_cka_from_moments(moments_of(x, y, x.mean(0), y.mean(0)))
        assert reason is None
        assert from_moments == pytest.approx(value, abs=1e-9)
        value, reason = biased_cka(x, y)
        assert reason is None
        assert value == pytest.approx(naive_biased(x, y), abs=1e-9)

    def test_merged_parts_give_the_same_cka(self) -> None:
        x, y = correlated(0, 60)
        origin = np.zeros(5), np.zeros(4)
        parts = [moments_of(x[i : i + 20], y[i : i + 20], *origin) for i in (0, 20, 40)]
        value, _ = debiased_cka_from_moments(merge(*parts))
        assert value == pytest.approx(naive_debiased(x, y), abs=1e-10)
        value, _ = biased_cka_from_moments(merge(*parts))
        assert value == pytest.approx(naive_biased(x, y), abs=1e-10)
        xc, yc = x - x.mean(0), y - y.mean(0)
        expected = np.sum((xc.T @ yc) ** 2) / 59**2
        assert hsic0_linear(merge(*parts)) == pytest.approx(expected)

    def test_rotation_scale_and_shift_do_not_matter(self) -> None:
        x, y = correlated(1, 50)
        q = random_orthogonal(5, 5, np.random.default_rng(1))
        assert debiased_cka(3 * x @ q + 7, y)[0] == pytest.approx(debiased_cka(x, y)[0])
        assert debiased_cka(x, 3 * x @ q + 7)[0] == pytest.approx(1.0)

    def test_independent_wide_data(self) -> None:
        rng = np.random.default_rng(2)
        found = [
            (debiased_cka(x, y)[0], biased_cka(x, y)[0])
            for x, y in (rng.standard_normal((2, 30, 600)) for _ in range(20))
        ]
        debiased, biased = np.array(found).T
        assert abs(debiased.mean()) < 0.02
        assert debiased.min() < 0, "a clamped estimator is biased"
        assert biased.min() > 0.9

    @pytest.mark.parametrize("case", ["benign", "mean of 10 sigma", "one dim at 1000 +- 5"])
    def test_float32_rows_keep_the_digits(self, case: str) -> None:
        rng = np.random.default_rng(3)
        x = rng.standard_normal((600, 24))
        y = x @ rng.standard_normal((24, 24)) / 5 + rng.standard_normal((600, 24))
        if case == "mean of 10 sigma":
            x, y = x + 10, y + 10
        elif case != "benign":
            x[:, 3] = 1000 + 5 * x[:, 3]
        x32, y32 = x.astype(np.float32), y.astype(np.float32)
        xc, yc = (r.astype(np.float64) - r.mean(0, dtype=np.float64) for r in (x32, y32))
        from_moments, _ = debiased_cka_from_moments(moments_of(x32, y32, x32.mean(0), y32.mean(0)))
        assert from_moments == pytest.approx(naive_debiased(xc, yc), abs=1e-6)

    @pytest.mark.parametrize("n", [4, 23, 24, 40])
    @pytest.mark.parametrize("case", ["benign", "mean of 10 sigma", "one dim at 1000 +- 5", "sink"])
    def test_rows_and_their_moments_give_the_same(self, case: str, n: int) -> None:
        rng = np.random.default_rng(n)
        x = rng.standard_normal((n, 24))
        y = x @ rng.standard_normal((24, 30)) / 5 + rng.standard_normal((n, 30))
        if case == "mean of 10 sigma":
            x, y = x + 10, y + 10
        elif case == "one dim at 1000 +- 5":
            x[:, 3] = 1000 + 5 * x[:, 3]
        elif case == "sink":
            x[0], y[0] = 100 * x[0], 100 * y[0]
        x32, y32 = x.astype(np.float32), y.astype(np.float32)
        xc, yc = (r.astype(np.float64) - r.mean(0, dtype=np.float64) for r in (x32, y32))
        value, reason = debiased_cka(x32, y32)
        from_moments, why = debiased_cka_from_moments(moments_of(x32, y32, x32.mean(0), y32.mean(0)))
        assert reason == why
        if reason is None:
            assert value == pytest.approx(naive_debiased(xc, yc), abs=1e-9)
            # Moments are sums of float32 products, of which a sink takes the digits.
            if case != "sink":
                assert value == pytest.approx(from_moments, abs=1e-6)

    @pytest.mark.parametrize("n", [24, 40, 300, FEW_ROWS])
    def test_few_float32_rows_are_centred_and_multiplied_in_float64(self, n: int) -> None:
        rng = np.random.default_rng(n)
        x = rng.standard_normal((n, 24))
        y = x @ rng.standard_normal((24, 30)) / 5 + rng.standard_normal((n, 30))
        # Rows centred in float32, or multiplied in it, are off by 4e-9 to 1e-6 here, and their moments by 1e-4 to 1e-2.
        x[0], y[0] = 1000 * x[0], 1000 * y[0]
        x32, y32 = (x + 10).astype(np.float32), (y - 10).astype(np.float32)
        xc, yc = (r.astype(np.float64) - r.mean(0, dtype=np.float64) for r in (x32, y32))
        assert debiased_cka(x32, y32)[0] == pytest.approx(naive_debiased(xc, yc), abs=1e-10)
        assert biased_cka(x32, y32)[0] == pytest.approx(naive_biased(xc, yc), abs=1e-12)

    @pytest.mark.parametrize("n", [FEW_ROWS - 1, FEW_ROWS, FEW_ROWS + 1])
    def test_more_rows_go_on_where_few_end(self, n: int) -> None:
        rng = np.random.default_rng(5)
        x = rng.standard_normal((n, 24)) + 10
        y = x @ rng.standard_normal((24, 30)) / 5 + rng.standard_normal((n, 30))
        x32, y32 = x.astype(np.float32), y.astype(np.float32)
        xc, yc = (r.astype(np.float64) - r.mean(0, dtype=np.float64) for r in (x32, y32))
        assert debiased_cka(x32, y32)[0] == pytest.approx(naive_debiased(xc, yc), abs=1e-6)
        assert biased_cka(x32, y32)[0] == pytest.approx(naive_biased(xc, yc), abs=1e-6)

    def test_no_value_comes_with_a_reason(self) -> None:
        x, y = correlated(4, 30)
        flat = np.full((30, 3), 0.1, dtype=np.float32)
        # Rows of the identity have no off-diagonal similarity: self-HSIC is exactly zero.
        corners = np.eye(30)
        for value, reason, wanted in (
            (*debiased_cka(x[:3], y[:3]), "at least 4 rows, not 3"),
            (*debiased_cka(x, flat), "second set of states does not vary"),
            (*debiased_cka(flat, y), "first set of states does not vary"),
            (*debiased_cka(corners, y), "self-HSIC of the first"),
            (*debiased_cka(x, corners), "self-HSIC of the second"),
            (*biased_cka(x[:1], y[:1]), "at least 2 rows"),
            (*biased_cka(x, flat), "second set of states does not vary"),
        ):
            assert math.isnan(value)
            assert reason is not None
            assert wanted in reason
        # Rounding makes it slightly positive for some sizes; that is no similarity either.
        for n in range(5, 40):
            assert math.isnan(debiased_cka(np.eye(n) + 0.3, np.eye(n)[::-1] * 0.7)[0])
        empty = moments_of(x[:0], y[:0], np.zeros(5), np.zeros(4))
        assert math.isnan(hsic1_linear(empty))
        assert math.isnan(hsic0_linear(empty))
        assert math.isnan(debiased_cka_from_moments(empty)[0])
        assert math.isnan(biased_cka_from_moments(empty)[0])
        x[3, 0] = np.inf
        with pytest.raises(FitError, match="not finite"):
            debiased_cka(x, y)
        with pytest.raises(FitError, match="not finite"):
            debiased_cka(x[1:5], y[1:5])
        with pytest.raises(FitError, match="rows"):
            debiased_cka(y[:5], y[:4])


def noisy(seed: int, n: int = 300, d: int = 12) -> tuple[Any, Any]:
    """Targets with unequal variances and a mean, and predictions with noise."""
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((n, d)) * np.logspace(0, 1, d) + 2.0
    return y, y + rng.standard_normal((n, d))


class TestRowFigures:
    def test_equals_sklearn(self) -> None:
        y, y_hat = noisy(0)
        accumulator = ScoreAccumulator(y.mean(0))
        accumulator.update(y, y_hat)
        got = accumulator.result()
        per_dim = r2_score(y, y_hat, multioutput="raw_values")
        top = np.argsort(y.var(0))[-1:]
        rest = [np.delete(a, top, axis=1) for a in (y, y_hat)]
        want = {
            "r2": r2_score(y, y_hat, multioutput="variance_weighted"),
            "r2_median_dim": np.median(per_dim),
            "r2_without_top_dims": r2_score(*rest, multioutput="variance_weighted"),
            "mse": mean_squared_error(y, y_hat),
            "cosine": 1 - paired_cosine_distances(y, y_hat).mean(),
            "cosine_centered": 1 - paired_cosine_distances(y - y.mean(0), y_hat - y.mean(0)).mean(),
            "n": 300,
        }
        assert got == pytest.approx(want, rel=1e-10)
        assert accumulator.reasons() == {}

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, 299), max_size=4))
    def test_blocks_do_not_matter(self, cuts: list[int]) -> None:
        y, y_hat = (a.astype(np.float32) for a in noisy(1))
        whole, parts = ScoreAccumulator(np.ones(12)), ScoreAccumulator(np.ones(12))
        whole.update(y, y_hat)
        for p, q in zip(np.split(y, sorted(cuts)), np.split(y_hat, sorted(cuts)), strict=True):
            parts.update(p, q)
        assert parts.result() == pytest.approx(whole.result(), rel=1e-9)

    def test_the_train_mean_is_the_zero_of_r2(self) -> None:
        # On a split with another mean, R2 about the split's own mean would call this negative.
        y, _ = noisy(2)
        mean = np.full(12, 1.3)
        figures, reasons = score(y, np.tile(mean, (300, 1)), mean)
        assert figures["r2"] == pytest.approx(0, abs=1e-12)
        assert figures["r2_median_dim"] == pytest.approx(0, abs=1e-12)
        assert figures["cosine_centered"] is None
        assert "direction" in reasons["cosine_centered"]
        own, _ = score(y, np.tile(y.mean(0), (300, 1)), mean)
        assert own["r2"] is not None
        assert own["r2"] > 0.01

    def test_noise_of_known_variance(self) -> None:
        rng = np.random.default_rng(3)
        y = rng.standard_normal((20_000, 6)).astype(np.float32)
        y_hat = y + 0.5 * rng.standard_normal(y.shape).astype(np.float32)
        figures, _ = score(y, y_hat, np.zeros(6))
        assert figures["r2"] == pytest.approx(0.75, abs=0.01)
        assert figures["mse"] == pytest.approx(0.25, abs=0.005)

    def test_one_massive_dimension_carries_the_pooled_r2_only(self) -> None:
        rng = np.random.default_rng(4)
        y = rng.standard_normal((500, 150))
        y[:, 7] *= 1000
        y_hat = rng.standard_normal((500, 150))
        y_hat[:, 7] = y[:, 7]
        figures, _ = score(y, y_hat, np.zeros(150))
        assert figures["r2"] is not None
        assert figures["r2"] > 0.99
        assert figures["r2_without_top_dims"] == pytest.approx(-1, abs=0.1)
        assert figures["r2_median_dim"] == pytest.approx(-1, abs=0.1)

    def test_raw_cosine_is_inflated_by_a_common_mean(self) -> None:
        rng = np.random.default_rng(5)
        y, y_hat = rng.standard_normal((2, 400, 20)) + 10
        figures, _ = score(y, y_hat, np.full(20, 10.0))
        assert figures["cosine"] == pytest.approx(1, abs=0.02)
        assert figures["cosine_centered"] == pytest.approx(0, abs=0.05)

    def test_a_prediction_without_direction_counts_as_zero(self) -> None:
        y, _ = noisy(6, n=4)
        y_hat = y.copy()
        y_hat[:2] = 0.0
        accumulator = ScoreAccumulator(np.zeros(12))
        accumulator.update(y, y_hat)
        assert accumulator.result()["cosine"] == pytest.approx(0.5)
        assert accumulator.result()["cosine_centered"] == pytest.approx(0.5)

    def test_shapes_are_checked(self) -> None:
        with pytest.raises(FitError, match="finite vector"):
            ScoreAccumulator(np.array([np.nan]))
        with pytest.raises(FitError, match="finite vector"):
            ScoreAccumulator(np.zeros((2, 2)))
        accumulator = ScoreAccumulator(np.zeros(3))
        with pytest.raises(FitError, match=r"y_hat has shape \(2, 4\)"):
            accumulator.update(np.zeros((2, 3)), np.zeros((2, 4)))
        with pytest.raises(FitError, match="2 rows and y_hat 1"):
            accumulator.update(np.zeros((2, 3)), np.zeros((1, 3)))


class TestRetrieval:
    def test_equals_ranking_by_scipy(self) -> None:
        y, y_hat = noisy(7, n=60)
        y_hat += 8 * np.random.default_rng(77).standard_normal(y.shape)
        centre = np.full(12, 2.0)
        similarity = np.array([[1 - scipy.spatial.distance.cosine(q, g) for g in y - centre] for q in y_hat - centre])
        rank = np.array([scipy.stats.rankdata(-row)[i] for i, row in enumerate(similarity)])
        got = retrieval(y, y_hat, centre=centre)
        assert 1 < np.median(rank) < 30, "the case should be neither easy nor hopeless"
        assert got == pytest.approx(
            {
                "retrieval_top1": np.mean(rank <= 1),
                "retrieval_top5": np.mean(rank <= 5),
                "retrieval_mrr": np.mean(1 / rank),
                "retrieval_median_rank": np.median(rank),
                "retrieval_chance": 1 / 60,
                "retrieval_ceiling": 1.0,
                "retrieval_gallery": 60,
            }
        )

    def test_a_prediction_that_ignores_its_input_scores_chance(self) -> None:
        y, _ = noisy(8, n=101)
        for constant in (np.full(12, 2.0), np.arange(12.0)):
            got = retrieval(y, np.tile(constant, (101, 1)), centre=np.full(12, 2.0))
            assert got["retrieval_top1"] == pytest.approx(1 / 101)
            assert got["retrieval_top5"] == pytest.approx(5 / 101)
            assert got["retrieval_median_rank"] == pytest.approx(51)
            harmonic = sum(1 / k for k in range(1, 102)) / 101
            assert got["retrieval_mrr"] == pytest.approx(harmonic)

    def test_independent_predictions_score_chance(self) -> None:
        rng = np.random.default_rng(9)
        y, y_hat = rng.standard_normal((2, 512, 16))
        got = retrieval(y, y_hat, centre=np.zeros(16))
        assert got["retrieval_top1"] == pytest.approx(1 / 512, abs=0.01)
        assert got["retrieval_top5"] == pytest.approx(5 / 512, abs=0.02)
        assert got["retrieval_median_rank"] == pytest.approx(256.5, abs=30)

    def test_equal_rows_share_their_rank(self) -> None:
        # Layer 0 holds the same row for the same token: a perfect map cannot tell them apart.
        y, _ = noisy(10, n=20)
        twice = np.vstack([y, y]).astype(np.float32)
        got = retrieval(twice, twice, centre=np.zeros(12))
        assert got["retrieval_top1"] == pytest.approx(0.5)
        assert got["retrieval_top5"] == pytest.approx(1.0)
        assert got["retrieval_median_rank"] == pytest.approx(1.5)
        assert got["retrieval_mrr"] == pytest.approx(0.75)

    def test_the_common_mean_is_taken_out(self) -> None:
        rng = np.random.default_rng(11)
        y = rng.standard_normal((200, 16))
        far = y + 100
        got = retrieval(far, 0.5 * (far - 100) + 100, centre=np.full(16, 100.0))
        assert got["retrieval_top1"] == 1.0


#: What comes in at the edges; every figure is either a number or null with a reason.
_GOOD = noisy(12, n=40)
EDGES = {
    "no rows": (_GOOD[0][:0], _GOOD[1][:0]),
    "one row": (_GOOD[0][:1], _GOOD[1][:1]),
    "three rows": (_GOOD[0][:3], _GOOD[1][:3]),
    "constant target": (np.full((40, 12), 5.0), _GOOD[1]),
    "target equals the mean": (np.full((40, 12), 2.0), _GOOD[1]),
    "constant prediction": (_GOOD[0], np.full((40, 12), 5.0)),
    "zero prediction": (_GOOD[0], np.zeros((40, 12))),
    "infinite prediction": (_GOOD[0], np.full((40, 12), np.inf)),
    "nan target": (np.full((40, 12), np.nan), _GOOD[1]),
    "huge prediction": (_GOOD[0], _GOOD[1] * 1e30),
    "one dimension": (_GOOD[0][:, :1], _GOOD[1][:, :1]),
    "good": _GOOD,
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", EDGES)
def test_nothing_raises_and_each_null_has_a_reason(case: str, dtype: type) -> None:
    y, y_hat = (a.astype(dtype) for a in EDGES[case])
    figures, reasons = score(y, y_hat, np.full(y.shape[1], 2.0), tokens=np.arange(len(y)) // 4)
    assert tuple(figures) == KEYS
    assert set(reasons) == {key for key, value in figures.items() if value is None}
    json.dumps(figures, allow_nan=False)
    assert figures["n"] == len(y)
    assert figures["retrieval_gallery"] == len(y)
    expected_nulls = {
        "no rows": 17,
        "good": 0,
        "infinite prediction": 17,
        "nan target": 17,
        "constant prediction": 2,
        "zero prediction": 3,
        "three rows": 2,
        "one row": 11,
    }
    if case in expected_nulls:
        assert len(reasons) == expected_nulls[case], reasons


class TestScorer:
    def test_blocks_and_reused_buffers_do_not_matter(self) -> None:
        y, y_hat = (a.astype(np.float32) for a in noisy(13, n=900))
        tokens = np.arange(900) % 50
        whole, _ = score(y, y_hat, np.zeros(12), gallery=50, cka_rows=200, tokens=tokens)
        scorer = Scorer(np.zeros(12), 900, gallery=50, cka_rows=200, tokens=tokens)
        buffers = np.empty((2, 100, 12), dtype=np.float32)
        for start in range(0, 900, 100):
            buffers[0], buffers[1] = y[start : start + 100], y_hat[start : start + 100]
            scorer.update(buffers[0], buffers[1])
        parts, reasons = scorer.result()
        assert not reasons
        assert parts == pytest.approx(whole, rel=1e-9)
        assert parts["retrieval_gallery"] == 50
        assert parts["cka_debiased"] == whole["cka_debiased"]

    def test_subsets_have_the_size_asked_for_and_follow_the_seed(self) -> None:
        y, y_hat = noisy(14, n=400)
        y_hat += 4 * np.random.default_rng(77).standard_normal(y.shape)
        figures = [score(y, y_hat, np.zeros(12), gallery=30, cka_rows=60, seed=s)[0] for s in (0, 0, 1)]
        assert figures[0] == figures[1]
        assert figures[0]["cka_debiased"] != figures[2]["cka_debiased"]
        assert figures[0]["retrieval_mrr"] != figures[2]["retrieval_mrr"]
        all_rows, _ = score(y, y_hat, np.zeros(12))
        assert all_rows["cka_debiased"] == pytest.approx(naive_debiased(y, y_hat))
        assert all_rows["retrieval_gallery"] == 400

    def test_a_subset_of_cka_rows_estimates_the_same_figure(self) -> None:
        y, y_hat = noisy(15, n=4000)
        some, _ = score(y, y_hat, np.zeros(12), cka_rows=1500)
        all_rows, _ = score(y, y_hat, np.zeros(12))
        assert some["cka_debiased"] == pytest.approx(all_rows["cka_debiased"], abs=0.01)

    def test_more_rows_than_announced(self) -> None:
        scorer = Scorer(np.zeros(2), 3)
        with pytest.raises(FitError, match="4 rows came, 3 were announced"):
            scorer.update(np.zeros((4, 2)), np.zeros((4, 2)))
        with pytest.raises(FitError, match="negative"):
            Scorer(np.zeros(2), -1)


class TestDocumentSums:
    def rows(self) -> tuple[Any, Any, Any]:
        y, y_hat = (rows.astype(np.float32) for rows in noisy(20, n=300))
        return y, y_hat, np.random.default_rng(21).integers(3, 9, 300)

    def filled(self, cuts: list[int]) -> DocumentSums:
        y, y_hat, document = self.rows()
        sums = DocumentSums()
        for p, q, owner in zip(*(np.split(a, sorted(cuts)) for a in (y, y_hat, document)), strict=True):
            sums.add_targets(owner, p, np.full(12, 1.5))
            sums.add("map", owner, p, q)
            sums.add("mean", owner, p, np.full(q.shape, 1.5))
        return sums

    def test_sums_are_those_of_each_documents_rows(self) -> None:
        y, y_hat, document = self.rows()
        sums = self.filled([])
        assert sums.documents == [3, 4, 5, 6, 7, 8]
        for place, number in enumerate(sums.documents):
            own = document == number
            assert sums.n[place] == own.sum()
            assert sums.sst[place] == pytest.approx(((y[own].astype(float) - 1.5) ** 2).sum())
            assert sums.sse["map"][place] == pytest.approx(((y[own] - y_hat[own]).astype(float) ** 2).sum())
        np.testing.assert_allclose(sums.sse["mean"], sums.sst, rtol=1e-6)

    def test_they_add_up_to_the_scorers_r2(self) -> None:
        y, y_hat, _ = self.rows()
        sums = self.filled([100])
        want = score(y, y_hat, np.full(12, 1.5))[0]["r2"]
        assert 1 - sums.sse["map"].sum() / sums.sst.sum() == pytest.approx(want, rel=1e-12)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, 300), max_size=4))
    def test_blocks_do_not_matter(self, cuts: list[int]) -> None:
        whole, parts = self.filled([]).block(), self.filled(cuts).block()
        assert (parts["documents"], parts["n"]) == (whole["documents"], whole["n"])
        assert parts["sst"] == pytest.approx(whole["sst"])
        assert parts["sse"]["map"] == pytest.approx(whole["sse"]["map"])

    def test_a_block_is_json(self) -> None:
        block = self.filled([]).block()
        assert json.loads(json.dumps(block, allow_nan=False)) == block
        assert set(block) == {"documents", "n", "sst", "sse"}
        assert set(block["sse"]) == {"map", "mean"}
        assert DocumentSums().block() == {"documents": [], "n": [], "sst": [], "sse": {}}

    def test_maps_may_get_other_names(self) -> None:
        sums = self.filled([])
        other = sums.renamed({"map": "ours"}).block()
        assert other["sse"] == {"ours": sums.block()["sse"]["map"], "mean": sums.block()["sse"]["mean"]}
        assert (other["documents"], other["sst"]) == (sums.documents, sums.sst.tolist())
        assert set(sums.sse) == {"map", "mean"}

    def test_what_does_not_fit_is_refused(self) -> None:
        sums, y = DocumentSums(), np.zeros((4, 3))
        with pytest.raises(FitError, match=r"y has shape \(4, 3\); expected \(n, 2\)"):
            sums.add_targets(np.zeros(4), y, np.zeros(2))
        with pytest.raises(FitError, match=r"4 rows came with documents of shape \(3,\)"):
            sums.add_targets(np.zeros(3), y, np.zeros(3))
        with pytest.raises(FitError, match="states of map 'map'"):
            sums.add("map", np.zeros(4), y, y[:3])
        for missing in (sums, self.filled([])):
            missing.add("stranger", np.full(4, 77), y, y)
            with pytest.raises(FitError, match="not scored on the documents of the targets"):
                missing.block()

    def test_every_map_that_is_scored_is_summed_by_the_stores_documents(self, tmp_path: Any) -> None:
        from align.closed_form.fit import Fit, baselines, fit_closed
        from align.layers import layer_pairs
        from align.moments.scan import scan
        from align.scoring.rows import batches_of, score_all

        x = spectrum_rows(1500, 8, 1)
        planted = plant(tmp_path / "s.zarr", x, x @ rotation(8, 2) + 0.3 * spectrum_rows(1500, 8, 3), documents=30)
        pairs = planted.store.pairs("a", "b").select()
        [pair] = layer_pairs(planted.store, "a", "b")
        [moments] = scan(planted.store, pairs, [pair]).values()
        fit = Fit("affine")
        maps = {"map": fit_closed(fit, pair, moments), **baselines(fit, pair, moments, 0), "none": "no such map"}
        rows = batches_of(planted.store, pair, pairs.where(pairs.split == 2))
        sums = DocumentSums()
        scored = score_all(rows, maps, documents=sums)
        assert scored == score_all(rows, maps)
        # What the true rows give is measured once for all maps, and is what each measures alone.
        for name, one in maps.items():
            assert score_all(rows, {name: one})[name] == scored[name]
        # Of every ten documents the first is a test document; the rows of each, from what was planted.
        assert sums.documents == [0, 10, 20]
        assert sums.n.tolist() == [50, 50, 50]
        mean = planted.y[1][planted.split == 0].mean(axis=0)
        assert sums.sst[1] == pytest.approx(((planted.y[1][planted.document == 10] - mean) ** 2).sum(), rel=1e-4)
        assert set(sums.sse) == {"map", "mean", "identity", "random_rotation", "shuffled"}
        for name, sse in sums.sse.items():
            figures, _ = scored[name]
            assert figures is not None
            assert 1 - sse.sum() / sums.sst.sum() == pytest.approx(figures["r2"], rel=1e-9, abs=1e-12)
        other = replace(maps["map"], tensors={**maps["map"].tensors, "control_mean": np.ones(8, dtype=np.float32)})
        with pytest.raises(FitError, match="map 'other' has another train mean than 'map'"):
            score_all(rows, {"map": maps["map"], "other": other}, documents=DocumentSums())
        assert score_all(rows, {"none": "no such map"}, documents=DocumentSums())["none"][0] is None


class TestIntervals:
    def test_an_interval_of_r2_covers_the_truth_about_95_times_in_100(self) -> None:
        covered = 0
        for seed in range(200):
            rng = np.random.default_rng(seed)
            # The share unexplained is 0.3 on average, whatever there is to explain.
            sst = rng.uniform(50, 150, 60)
            interval, reason = r2_interval(sst * rng.uniform(0.1, 0.5, 60), sst)
            assert interval is not None
            assert reason is None
            covered += interval[0] <= 0.7 <= interval[1]
        assert 182 <= covered <= 199

    def test_a_difference_is_of_the_same_documents(self) -> None:
        rng = np.random.default_rng(22)
        sst, share = rng.uniform(50, 150, 40), rng.uniform(0.1, 0.9, 40)
        found = paired_difference((share * sst, sst), ((share + 0.02) * sst, sst))
        assert found.interval == pytest.approx((0.02, 0.02))
        assert found.p == pytest.approx(0, abs=1e-12)
        # Taken apart, the same two would not be told from each other.
        apart = share[rng.permutation(40)]
        found = paired_difference((share * sst, sst), ((apart + 0.02) * sst, sst))
        assert found.low is not None
        assert found.high is not None
        assert found.low < 0 < found.high
        assert found.p is not None
        assert found.p > 0.05
        with pytest.raises(FitError, match="40 and 39 documents"):
            paired_difference((sst, sst), (sst[1:], sst[1:]))

    @pytest.mark.parametrize(
        ("sse", "sst", "words"),
        [
            ([1.0, 1.0], [2.0, 2.0], "at least 3 test documents, not 2"),
            ([], [], "not 0"),
            ([1.0, np.nan], [2.0, 2.0], "not finite"),
            ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], "equals the train mean"),
            ([1.0, 0.1, 0.1], [99.0, 0.5, 0.5], "holds nearly everything"),
        ],
    )
    def test_what_has_no_interval_has_a_reason(self, sse: list[float], sst: list[float], words: str) -> None:
        interval, reason = r2_interval(np.array(sse), np.array(sst))
        assert interval is None
        assert reason is not None
        assert words in reason

    def entry(self) -> dict[str, Any]:
        base = {"mean": {"r2": 0.0}, "identity": None, "shuffled": {"r2": None}, "closed_form": {"r2": 0.5}}
        return {"test": {"r2": 0.7}, "baselines": base, "reasons": {"baselines.shuffled.r2": "it is spoiled"}}

    def test_every_r2_of_the_test_split_gets_one(self) -> None:
        rng, sums, entry = np.random.default_rng(23), DocumentSums(), self.entry()
        y = rng.normal(size=(200, 3))
        owner = np.arange(200) // 20
        sums.add_targets(owner, y, np.zeros(3))
        for name, far in (("map", 0.5), ("mean", 1.0), ("shuffled", 2.0)):
            sums.add(name, owner, y, (1 - far) * y + rng.normal(size=y.shape) / 9)
        add_intervals(entry, sums)
        low, high = entry["test"]["r2_ci95"]
        assert low < 0.75 - 1 / 81 < high
        assert (low, high) == r2_interval(sums.sse["map"], sums.sst)[0]
        assert len(entry["baselines"]["mean"]["r2_ci95"]) == 2
        assert entry["baselines"]["shuffled"]["r2_ci95"] is None
        assert entry["baselines"]["closed_form"]["r2_ci95"] is None
        assert entry["baselines"]["identity"] is None
        assert entry["reasons"] == {
            "baselines.shuffled.r2": "it is spoiled",
            "baselines.shuffled.r2_ci95": "it is spoiled",
            "baselines.closed_form.r2_ci95": "no sums over documents were made of this map",
        }
        json.dumps(entry, allow_nan=False)

    def test_without_sums_the_reason_stands_everywhere(self) -> None:
        entry = self.entry()
        add_intervals(entry, "no rows here")
        assert entry["test"]["r2_ci95"] is None
        places = ("test", "baselines.mean", "baselines.shuffled", "baselines.closed_form")
        assert [entry["reasons"][f"{place}.r2_ci95"] for place in places] == ["no rows here"] * 4


class TestSharedTruth:
    """Several scorers of the same rows, which keep the true ones once."""

    def rows(self) -> tuple[Any, Any, Any]:
        rng = np.random.default_rng(8)
        y = rng.standard_normal((400, 6)).astype(np.float32)
        return y, *(y + scale * rng.standard_normal(y.shape).astype(np.float32) for scale in (0.5, 2.0))

    def alone(self, y: Any, guess: Any) -> Any:
        return score(y, guess, np.zeros(6), gallery=50, cka_rows=200, tokens=np.arange(400) % 30)

    def scorer(self, truth: Truth) -> Scorer:
        return Scorer(np.zeros(6), 400, gallery=50, cka_rows=200, tokens=np.arange(400) % 30, truth=truth)

    @pytest.mark.parametrize("cuts", [[0, 400], [0, 37, 150, 400], [0, 5, 10, 15, 390, 400]])
    def test_each_scores_as_it_does_alone_however_rows_are_cut(self, cuts: list[int]) -> None:
        y, *guesses = self.rows()
        truth = Truth()
        scorers = [self.scorer(truth) for _ in guesses]
        for start, end in pairwise(cuts):
            for scorer, guess in zip(scorers, guesses, strict=True):
                scorer.update(y[start:end].copy(), guess[start:end])
        # CKA centres the rows that were kept in place: whoever comes later gets the same.
        late = self.scorer(truth)
        for scorer, guess in zip(scorers, guesses, strict=True):
            assert scorer.result()[0] == pytest.approx(self.alone(y, guess)[0], rel=1e-6)
        late.update(y, guesses[0])
        assert late.result()[0] == pytest.approx(self.alone(y, guesses[0])[0], rel=1e-6)

    def test_one_that_stops_leaves_the_others(self) -> None:
        y, guess, _ = self.rows()
        truth = Truth()
        self.scorer(truth).update(y[:20], guess[:20])
        whole = self.scorer(truth)
        for start, end in ((0, 50), (50, 400)):
            whole.update(y[start:end], guess[start:end])
        assert whole.result()[0] == pytest.approx(self.alone(y, guess)[0], rel=1e-6)

    def test_types_may_change_from_block_to_block(self) -> None:
        y, guess, _ = self.rows()
        scorer = self.scorer(Truth())
        scorer.update(y[:100].astype(np.float64), guess[:100].astype(np.float64))
        scorer.update(y[100:], guess[100:])
        assert scorer.result()[0] == pytest.approx(self.alone(y, guess)[0], rel=1e-6)
