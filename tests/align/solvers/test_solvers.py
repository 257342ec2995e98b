"""Solvers against independent libraries and against maps that were planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from align.moments.scatter import Scatter, about, centered, moments_of, raw
from align.solvers import (
    ReducedRank,
    RidgePath,
    Spectrum,
    component_grid,
    lambda_grid,
    linalg,
    mse_of,
    procrustes,
    random_orthogonal,
    reduced_rank,
    rotate,
    select_every_rank,
    select_reduced_rank,
    select_ridge,
    select_truncated_procrustes,
    to_device,
    to_numpy,
    truncated_procrustes,
    whitening,
)
from featstore.errors import FitError

seeds = st.integers(0, 2**32 - 1)


def rng_of(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def states(rng: np.random.Generator, n: int, d: int) -> Any:
    """Anisotropic rows with a mean, as hidden states have."""
    return rng.standard_normal((n, d)) * np.logspace(0, 1, d) + rng.standard_normal(d)


def scatters(x: Any, y: Any, split: int) -> tuple[Scatter, Scatter]:
    """Train moments about their means and validation moments about the same."""
    origin = np.zeros(x.shape[1]), np.zeros(y.shape[1])
    train = centered(moments_of(x[:split], y[:split], *origin))
    val = about(moments_of(x[split:], y[split:], *origin), train.mean_x, train.mean_y)
    return train, val


def centred_moments(x: Any, y: Any) -> tuple[Any, Any, Any, Any]:
    xc, yc = x - x.mean(0), y - y.mean(0)
    return xc, yc, xc.T @ xc, xc.T @ yc


def r2(y: Any, y_hat: Any, mean: Any) -> float:
    return 1 - float(((y - y_hat) ** 2).sum() / ((y - mean) ** 2).sum())


class TestProcrustes:
    def test_equals_scipy(self) -> None:
        rng = rng_of()
        xc, yc, g, c = centred_moments(states(rng, 80, 7), states(rng, 80, 7))
        expected, _ = scipy.linalg.orthogonal_procrustes(xc, yc)
        weight, scale = procrustes(c, g)
        np.testing.assert_allclose(weight, expected, atol=1e-10)
        assert scale == 1.0

    @settings(max_examples=20, deadline=None)
    @given(seeds, st.integers(2, 8), st.integers(0, 4), st.floats(0.1, 10))
    def test_recovers_a_planted_rotation_scale_and_shift(self, seed: int, dx: int, wider: int, scale: float) -> None:
        rng = rng_of(seed)
        planted = random_orthogonal(dx, dx + wider, rng)
        x = states(rng, 60, dx)
        y = scale * x @ planted + rng.standard_normal(dx + wider)
        _, _, g, c = centred_moments(x, y)
        weight, found = procrustes(c, g, scale=True)
        assert found == pytest.approx(scale, rel=1e-9)
        np.testing.assert_allclose(weight, planted, atol=1e-8)
        bare, one = procrustes(c, g)
        assert one == 1.0
        np.testing.assert_array_equal(bare, weight)

    def test_least_squares_when_the_target_is_wider(self) -> None:
        rng = rng_of(1)
        xc, yc, g, c = centred_moments(states(rng, 60, 4), states(rng, 60, 6))
        best = ((yc - xc @ procrustes(c, g)[0]) ** 2).sum()
        for _ in range(200):
            other = random_orthogonal(4, 6, rng)
            assert ((yc - xc @ other) ** 2).sum() > best

    def test_largest_trace_but_not_least_squares_when_the_target_is_narrower(self) -> None:
        # The first dimension of x is loud and useless; tr(W'C) does not see its energy.
        rng = rng_of(2)
        x = rng.standard_normal((4000, 3)) * [30.0, 1.0, 1.0]
        y = 0.05 * x[:, :1] + 0.5 * x[:, 1:2]
        xc, yc, g, c = centred_moments(x, y)
        weight, _ = procrustes(c, g)
        np.testing.assert_allclose(weight.T @ weight, np.eye(1), atol=1e-12)
        quieter = np.array([[0.0], [1.0], [0.0]])
        assert np.sum(weight * c) > np.sum(quieter * c)
        assert ((yc - xc @ weight) ** 2).sum() > ((yc - xc @ quieter) ** 2).sum()

    def test_scale_is_the_least_squares_one_for_its_rotation(self) -> None:
        rng = rng_of(3)
        xc, yc, g, c = centred_moments(states(rng, 50, 6), states(rng, 50, 4))
        weight, scale = procrustes(c, g, scale=True)
        flat = (xc @ weight).ravel()
        assert scale == pytest.approx(flat @ yc.ravel() / (flat @ flat))

    def test_few_rows_still_give_a_rotation(self) -> None:
        rng = rng_of(4)
        _, _, g, c = centred_moments(states(rng, 3, 9), states(rng, 3, 9))
        weight, _ = procrustes(c, g)
        np.testing.assert_allclose(weight.T @ weight, np.eye(9), atol=1e-10)

    def test_constant_source(self) -> None:
        weight, scale = procrustes(np.zeros((3, 3)), np.zeros((3, 3)), scale=True)
        assert scale == 1.0
        np.testing.assert_allclose(weight @ weight.T, np.eye(3), atol=1e-12)


class TestRidge:
    @pytest.mark.parametrize("lam", [1e-6, 1e-3, 0.3, 10.0])
    def test_equals_sklearn(self, lam: float) -> None:
        rng = rng_of(5)
        x, y = states(rng, 90, 8), states(rng, 90, 5)
        _, _, g, c = centred_moments(x, y)
        reference = Ridge(alpha=lam * np.trace(g) / 8, solver="svd").fit(x, y)
        np.testing.assert_allclose(RidgePath(g, c).weight(lam), reference.coef_.T, atol=1e-9)

    @pytest.mark.parametrize("lam", [1e-4, 1.0])
    def test_fewer_rows_than_dimensions_equals_the_kernel_form(self, lam: float) -> None:
        rng = rng_of(6)
        xc, yc, g, c = centred_moments(states(rng, 12, 40), states(rng, 12, 5))
        reference = KernelRidge(alpha=lam * np.trace(g) / 40, kernel="linear").fit(xc, yc)
        new = rng.standard_normal((7, 40))
        np.testing.assert_allclose(new @ RidgePath(g, c).weight(lam), reference.predict(new), atol=1e-8)

    def test_strength_zero_is_the_least_norm_solution(self) -> None:
        rng = rng_of(7)
        xc, yc, g, c = centred_moments(states(rng, 12, 20), states(rng, 12, 3))
        expected = np.linalg.lstsq(xc, yc, rcond=None)[0]
        np.testing.assert_allclose(RidgePath(g, c).weight(0.0), expected, atol=1e-8)

    def test_units_of_the_source_do_not_change_the_prediction(self) -> None:
        rng = rng_of(8)
        xc, _, g, c = centred_moments(states(rng, 30, 6), states(rng, 30, 4))
        small = RidgePath(g * 1e-6, c * 1e-3).weight(0.1)
        np.testing.assert_allclose(1e-3 * xc @ small, xc @ RidgePath(g, c).weight(0.1), atol=1e-10)

    def test_constant_source_gives_zero(self) -> None:
        assert not RidgePath(np.zeros((3, 3)), np.zeros((3, 2))).weight(0.1).any()

    def test_grid(self) -> None:
        grid = lambda_grid()
        assert len(grid) == 15
        assert grid[0] == pytest.approx(1e-6)
        assert grid[-1] == pytest.approx(10)

    def test_path_of_errors_is_that_of_the_rows(self) -> None:
        rng = rng_of(9)
        x, noise = states(rng, 120, 10), rng.standard_normal((120, 4))
        y = x @ rng.standard_normal((10, 4)) + 9 * noise + 5
        # Validation rows with a mean of their own: only the train means may be subtracted.
        x[80:] += 2.0
        train, val = scatters(x, y, 80)
        choice = select_ridge(train, val)
        for lam, error in zip(choice.lambdas, choice.val_mse, strict=True):
            model = Ridge(alpha=lam * np.trace(train.gx) / 10, solver="svd").fit(x[:80], y[:80])
            expected = np.mean((y[80:] - model.predict(x[80:])) ** 2)
            assert error == pytest.approx(expected, rel=1e-9)
            weight = RidgePath(train.gx, train.c).weight(lam)
            assert mse_of(weight, val) == pytest.approx(expected, rel=1e-9)
        assert choice.lam == choice.lambdas[np.argmin(choice.val_mse)]
        assert mse_of(choice.weight, val) == pytest.approx(choice.val_mse.min())
        shared = select_ridge(train, val, spectrum=Spectrum.of(train.gx))
        np.testing.assert_array_equal(shared.weight, choice.weight)

    def test_without_intercept(self) -> None:
        rng = rng_of(10)
        x = states(rng, 100, 5) + 4
        y = x @ rng.standard_normal((5, 3)) + 0.1 * rng.standard_normal((100, 3))
        zero = np.zeros(5), np.zeros(3)
        choice = select_ridge(raw(moments_of(x[:70], y[:70], *zero)), raw(moments_of(x[70:], y[70:], *zero)))
        expected = np.linalg.lstsq(x[:70], y[:70], rcond=None)[0]
        np.testing.assert_allclose(choice.weight, expected, atol=0.02)

    def test_other_centre_is_refused(self) -> None:
        rng = rng_of(11)
        x, y = states(rng, 60, 4), states(rng, 60, 3)
        zero = np.zeros(4), np.zeros(3)
        train, _ = scatters(x, y, 40)
        with pytest.raises(FitError, match="train centre"):
            select_ridge(train, centered(moments_of(x[40:], y[40:], *zero)))
        with pytest.raises(FitError, match="no validation pairs"):
            select_ridge(train, about(moments_of(x[:0], y[:0], *zero), train.mean_x, train.mean_y))

    def test_noise_of_known_variance_gives_the_r2_of_theory(self) -> None:
        rng = rng_of(12)
        x = rng.standard_normal((6000, 12))
        signal = x @ random_orthogonal(12, 12, rng)
        y = signal + 0.5 * rng.standard_normal((6000, 12)) + 3.0
        train, val = scatters(x[:4000], y[:4000], 3000)
        weight = select_ridge(train, val).weight
        y_hat = (x[4000:] - train.mean_x) @ weight + train.mean_y
        assert r2(y[4000:], y_hat, train.mean_y) == pytest.approx(1 / 1.25, abs=0.01)
        assert r2_score(y[4000:], y_hat) == pytest.approx(1 / 1.25, abs=0.01)

    def test_independent_data_learn_nothing(self) -> None:
        rng = rng_of(13)
        x, y = rng.standard_normal((900, 30)), rng.standard_normal((900, 20))
        train, val = scatters(x[:600], y[:600], 400)
        choice = select_ridge(train, val, np.logspace(-6, 3, 19))
        y_hat = (x[600:] - train.mean_x) @ choice.weight + train.mean_y
        assert choice.lam >= 1
        assert r2(y[600:], y_hat, train.mean_y) < 0.01


def planted_low_rank(seed: int, n: int = 400) -> tuple[Any, Any, Any]:
    rng = rng_of(seed)
    x = states(rng, n, 10)
    planted = rng.standard_normal((10, 3)) @ rng.standard_normal((3, 8))
    return x, x @ planted + 2.0, planted


class TestReducedRank:
    def test_reaches_a_planted_rank_that_procrustes_does_not(self) -> None:
        x, y, planted = planted_low_rank(14)
        train, val = scatters(x, y, 300)
        a, b = reduced_rank(train.gx, train.c, 3, 0.0)
        assert a.shape == (10, 3)
        assert b.shape == (3, 8)
        np.testing.assert_allclose(a @ b, planted, atol=1e-8)
        variance = np.trace(val.gy) / (val.n * 8)
        assert mse_of(a @ b, val) < 1e-12 * variance
        rotation, scale = procrustes(train.c, train.gx, scale=True)
        assert mse_of(scale * rotation, val) > 0.1 * variance
        lower, _ = reduced_rank(train.gx, train.c, 2, 0.0)
        assert mse_of(lower @ b[:2], val) > 1e-3 * variance

    @pytest.mark.parametrize("lam", [0.0, 0.2])
    @pytest.mark.parametrize("with_skip", [False, True])
    def test_equals_truncating_the_fitted_values(self, lam: float, *, with_skip: bool) -> None:
        # Ridge is least squares with sqrt(lam') I appended to X and zeros to Y; the best rank-r
        # map then projects the fitted values on their leading right singular vectors.
        rng = rng_of(15)
        xc, yc, g, c = centred_moments(states(rng, 60, 7), states(rng, 60, 9))
        skip = 0.3 * rng.standard_normal((7, 9)) if with_skip else np.zeros((7, 9))
        rows = np.vstack([xc, np.sqrt(lam * np.trace(g) / 7) * np.eye(7)])
        wanted = np.vstack([yc - xc @ skip, np.zeros((7, 9))])
        full = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        _, _, vt = np.linalg.svd(rows @ full, full_matrices=False)
        for rank in (1, 4, 7):
            a, b = reduced_rank(g, c, rank, lam, skip if with_skip else None)
            np.testing.assert_allclose(a @ b, full @ vt[:rank].T @ vt[:rank], atol=1e-8)
            np.testing.assert_allclose(b @ b.T, np.eye(rank), atol=1e-10)

    def test_full_rank_is_ridge_of_the_residual(self) -> None:
        rng = rng_of(16)
        xc, yc, g, c = centred_moments(states(rng, 60, 6), states(rng, 60, 6))
        skip, _ = procrustes(c, g)
        a, b = reduced_rank(g, c, 6, 0.05, skip)
        expected = RidgePath(g, xc.T @ (yc - xc @ skip)).weight(0.05)
        np.testing.assert_allclose(a @ b, expected, atol=1e-9)

    @pytest.mark.parametrize("skip_kind", ["none", "procrustes"])
    def test_errors_of_all_ranks_are_those_of_the_rows(self, skip_kind: str) -> None:
        rng = rng_of(17)
        x = states(rng, 100, 6)
        y = x @ rng.standard_normal((6, 8)) + 3 * rng.standard_normal((100, 8))
        train, val = scatters(x, y, 70)
        skip = np.zeros((6, 8)) if skip_kind == "none" else procrustes(train.c, train.gx)[0]
        fit = ReducedRank(train.gx, train.c, 0.01, max_rank=5, skip=None if skip_kind == "none" else skip)
        errors = fit.mse(val)
        assert errors.shape == (6,)
        for rank in range(6):
            weight = skip if rank == 0 else skip + np.matmul(*fit.factors(rank))
            y_hat = (x[70:] - train.mean_x) @ weight + train.mean_y
            assert errors[rank] == pytest.approx(np.mean((y[70:] - y_hat) ** 2), rel=1e-9)

    def test_strength_for_a_rank_is_chosen_by_validation(self) -> None:
        rng = rng_of(18)
        x, y, _ = planted_low_rank(18, 90)
        y = y + 30 * rng.standard_normal(y.shape)
        train, val = scatters(x, y, 45)
        choice = select_reduced_rank(train, val, 3)
        assert len(choice.factors) == 2
        assert choice.factors[0].shape == (10, 3)
        assert mse_of(choice.weight, val) == pytest.approx(choice.val_mse.min())
        assert choice.lam == choice.lambdas[np.argmin(choice.val_mse)]
        for lam, error in zip(choice.lambdas, choice.val_mse, strict=True):
            a, b = reduced_rank(train.gx, train.c, 3, lam)
            assert mse_of(a @ b, val) == pytest.approx(error)

    def test_lower_ranks_of_one_fit_are_the_best_of_their_rank(self) -> None:
        rng = rng_of(21)
        _, _, g, c = centred_moments(states(rng, 60, 7), states(rng, 60, 6))
        fit = ReducedRank(g, c, 0.1, max_rank=6)
        for rank in (1, 2, 5):
            alone = np.matmul(*reduced_rank(g, c, rank, 0.1))
            np.testing.assert_allclose(np.matmul(*fit.factors(rank)), alone, atol=1e-9)

    @pytest.mark.parametrize("rank", [0, 7, -1])
    def test_rank_must_fit(self, rank: int) -> None:
        with pytest.raises(FitError, match=rf"rank {rank} .* use 1 to 6"):
            reduced_rank(np.eye(8), np.ones((8, 6)), rank, 0.1)

    def test_rank_must_be_prepared(self) -> None:
        with pytest.raises(FitError, match="rank 3 was not prepared"):
            ReducedRank(np.eye(4), np.ones((4, 4)), 0.1, max_rank=2).factors(3)


class TestRandomOrthogonal:
    @pytest.mark.parametrize(("dx", "dy"), [(5, 5), (7, 3), (3, 7)])
    def test_semi_orthogonal(self, dx: int, dy: int) -> None:
        q = random_orthogonal(dx, dy, rng_of())
        assert q.shape == (dx, dy)
        small = q.T @ q if dx >= dy else q @ q.T
        np.testing.assert_allclose(small, np.eye(min(dx, dy)), atol=1e-12)

    @pytest.mark.parametrize(("dx", "dy"), [(5, 5), (7, 3), (3, 7), (1, 1), (300, 290)])
    def test_it_is_the_product_of_reflections_and_signs(self, dx: int, dy: int) -> None:
        rows, columns = max(dx, dy), min(dx, dy)
        drawn = rng_of(3).standard_normal((columns, rows))
        expected, signs = np.eye(rows), []
        for k in range(columns):
            # A reflection takes x to the other end of the first axis; seen from there, R's diagonal has that sign.
            x = drawn[k, k:]
            v = x + np.copysign(np.linalg.norm(x), x[0]) * np.eye(rows - k)[0]
            signs.append(-np.sign(x[0]))
            expected[:, k:] @= np.eye(rows - k) - 2 * np.outer(v, v) / (v @ v)
        expected = expected[:, :columns] * signs
        np.testing.assert_allclose(
            random_orthogonal(dx, dy, rng_of(3)), expected if dx >= dy else expected.T, atol=1e-14
        )

    def test_all_of_it_is_haar(self) -> None:
        # The last column of a square one is left over, and the trace of a Haar matrix has mean 0 and variance 1.
        rng = rng_of(23)
        drawn = np.stack([random_orthogonal(3, 3, rng) for _ in range(2000)])
        for row, column in [(2, 2), (0, 2), (2, 0)]:
            assert scipy.stats.kstest(drawn[:, row, column], "uniform", args=(-1, 2)).pvalue > 0.01
        traces = np.trace(drawn, axis1=1, axis2=2)
        assert abs(traces.mean()) < 0.1
        assert traces.var() == pytest.approx(1, abs=0.1)
        assert np.linalg.det(drawn).mean() == pytest.approx(0, abs=0.1)

    def test_haar(self) -> None:
        # LAPACK's Q alone has a fixed sign in its corner; under Haar measure in 3 dimensions every
        # element is uniform on (-1, 1).
        rng = rng_of(19)
        corner = [random_orthogonal(3, 3, rng)[0, 0] for _ in range(2000)]
        assert scipy.stats.kstest(corner, "uniform", args=(-1, 2)).pvalue > 0.01

    def test_seeded(self) -> None:
        np.testing.assert_array_equal(random_orthogonal(4, 4, rng_of(1)), random_orthogonal(4, 4, rng_of(1)))

    def test_width(self) -> None:
        with pytest.raises(FitError, match="0 and 3"):
            random_orthogonal(0, 3, rng_of())


def test_whitening_makes_the_variance_round() -> None:
    xc, _, g, _ = centred_moments(states(rng_of(20), 300, 6), np.ones((300, 1)))
    p = whitening(g, 300, eps=1e-9)
    np.testing.assert_allclose(np.cov(xc @ p, rowvar=False, ddof=0), np.eye(6), atol=1e-6)
    np.testing.assert_allclose(p, p.T, atol=1e-12)
    expected = scipy.linalg.inv(scipy.linalg.sqrtm(g / 300 + 0.1 * np.trace(g) / 1800 * np.eye(6)))
    np.testing.assert_allclose(whitening(g, 300, eps=0.1), expected, atol=1e-10)
    with pytest.raises(FitError, match="do not vary"):
        whitening(np.zeros((2, 2)), 5)
    with pytest.raises(FitError, match="do not vary"):
        whitening(np.eye(2), 0)


NAN = np.full((2, 2), np.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: procrustes(NAN, np.eye(2)), "cxy holds NaN"),
        (lambda: procrustes(np.eye(2), NAN, scale=True), "gx holds NaN"),
        (lambda: procrustes(np.eye(2), np.eye(3), scale=True), r"gx has shape \(3, 3\)"),
        (lambda: procrustes(np.zeros((0, 2)), np.zeros((0, 0))), "empty"),
        (lambda: procrustes(np.zeros(3), np.eye(3)), "shape"),
        (lambda: RidgePath(NAN, np.eye(2)), "gx holds NaN"),
        (lambda: RidgePath(np.eye(2), NAN), "cxy holds NaN"),
        (lambda: RidgePath(np.ones((2, 3)), np.eye(2)), "square"),
        (lambda: RidgePath(np.eye(2), np.eye(2)).weight(-1.0), "not -1"),
        (lambda: RidgePath(np.eye(2), np.eye(2)).weight(np.nan), "nan"),
        (lambda: reduced_rank(np.eye(2), np.eye(2), 1, 0.1, np.eye(3)), "skip has shape"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(FitError, match=message):
        call()


def test_bad_scatter_is_named() -> None:
    train, val = scatters(states(rng_of(), 20, 3), states(rng_of(1), 20, 2), 10)
    damaged = Scatter(val.n, val.mean_x, val.mean_y, val.gx, val.gy, val.c * np.nan)
    with pytest.raises(FitError, match="validation moments hold NaN"):
        select_ridge(train, damaged)
    with pytest.raises(FitError, match="nothing to fit"):
        select_ridge(train, val, [])
    with pytest.raises(FitError, match="widths"):
        RidgePath(np.eye(4), np.ones((4, 2))).mse(val, [0.1])
    with pytest.raises(FitError, match="weight has shape"):
        mse_of(np.eye(5), val)


def planted_scatters(seed: int = 30, dx: int = 9, dy: int = 7, n: int = 120) -> tuple[Scatter, Scatter]:
    rng = rng_of(seed)
    x = states(rng, n, dx)
    y = x @ rng.standard_normal((dx, dy)) + 8 * rng.standard_normal((n, dy))
    return scatters(x, y, n * 2 // 3)


class TestTruncated:
    @pytest.mark.parametrize(("dx", "dy"), [(7, 7), (9, 5), (5, 9)])
    @pytest.mark.parametrize("scale", [False, True])
    def test_full_width_is_procrustes(self, dx: int, dy: int, *, scale: bool) -> None:
        train, _ = planted_scatters(31, dx, dy)
        weight, factor = truncated_procrustes(train.c, train.gx, train.gy, max(dx, dy), scale=scale)
        expected, wanted = procrustes(train.c, train.gx, scale=scale)
        np.testing.assert_allclose(weight, expected, atol=1e-12)
        assert factor == pytest.approx(wanted, rel=1e-9)

    def test_is_the_rotation_of_the_principal_scores(self) -> None:
        rng = rng_of(32)
        xc, yc, gx, c = centred_moments(states(rng, 80, 7), states(rng, 80, 6))
        vx, vy = np.linalg.svd(xc)[2][:3].T, np.linalg.svd(yc)[2][:3].T
        inner, _ = scipy.linalg.orthogonal_procrustes(xc @ vx, yc @ vy)
        weight, factor = truncated_procrustes(c, gx, yc.T @ yc, 3, scale=True)
        np.testing.assert_allclose(weight, vx @ inner @ vy.T, atol=1e-9)
        flat = (xc @ weight).ravel()
        assert factor == pytest.approx(flat @ yc.ravel() / (flat @ flat))

    @pytest.mark.parametrize("scale", [False, True])
    def test_path_of_errors_is_that_of_the_maps(self, *, scale: bool) -> None:
        train, val = planted_scatters(33)
        choice = select_truncated_procrustes(train, val, scale=scale)
        assert choice.grid.tolist() == component_grid(9, 7) == [1, 2, 4, 9]
        for k, error in zip(choice.grid, choice.val_mse, strict=True):
            weight, factor = truncated_procrustes(train.c, train.gx, train.gy, int(k), scale=scale)
            assert mse_of(factor * weight, val) == pytest.approx(error, rel=1e-9)
        assert choice.components == choice.grid[np.argmin(choice.val_mse)]
        assert mse_of(choice.scale * choice.weight, val) == pytest.approx(choice.val_mse.min(), rel=1e-9)

    def test_few_rows_choose_few_axes(self) -> None:
        rng = rng_of(34)
        turn = random_orthogonal(32, 32, rng)
        x = rng.standard_normal((60, 32)) * np.r_[np.full(4, 10.0), np.full(28, 1.0)]
        # Only the loud directions mean anything; to turn the others adds their energy to the error.
        y = x[:, :4] @ turn[:4] + 0.5 * rng.standard_normal((60, 32))
        train, val = scatters(x, y, 30)
        choice = select_truncated_procrustes(train, val)
        assert choice.components == 4
        assert choice.val_mse.min() < choice.val_mse[-1]

    def test_components_must_fit(self) -> None:
        train, val = planted_scatters()
        for k in (0, 10):
            with pytest.raises(FitError, match=f"{k} components .* use 1 to 9"):
                truncated_procrustes(train.c, train.gx, train.gy, k)
        with pytest.raises(FitError, match="no number of components"):
            select_truncated_procrustes(train, val, [])
        with pytest.raises(FitError, match="gy has width 9"):
            truncated_procrustes(train.c, train.gx, train.gx, 2)


class TestEveryRank:
    @pytest.mark.parametrize("with_skip", [False, True])
    def test_finds_what_trying_everything_finds(self, *, with_skip: bool) -> None:
        train, val = planted_scatters(40)
        skip = procrustes(train.c, train.gx)[0] if with_skip else None
        few = select_every_rank(train, val, [2, 7, 4], skip=skip)
        every = select_every_rank(train, val, [2, 7, 4], skip=skip, search="all")
        assert list(few) == [2, 7, 4]
        for rank, choice in few.items():
            assert len(every[rank].lambdas) == 15
            assert choice.lam == every[rank].lam == every[rank].lambdas[np.argmin(every[rank].val_mse)]
            for lam, error in zip(choice.lambdas, choice.val_mse, strict=True):
                a, b = reduced_rank(train.gx, train.c, rank, lam, skip)
                assert mse_of(a @ b if skip is None else skip + a @ b, val) == pytest.approx(error, rel=1e-9)
            alone = reduced_rank(train.gx, train.c, rank, choice.lam, skip)
            np.testing.assert_allclose(choice.weight, alone[0] @ alone[1], atol=1e-8)

    @pytest.mark.parametrize(("dx", "dy"), [(9, 9), (7, 9), (9, 7)])
    def test_a_rotation_and_its_factor_may_stay_apart(self, dx: int, dy: int) -> None:
        train, val = planted_scatters(43, dx, dy)
        weight, factor = procrustes(train.c, train.gx, scale=True)
        whole = select_reduced_rank(train, val, 3, skip=factor * weight)
        apart = select_reduced_rank(train, val, 3, skip=weight, skip_scale=factor, rotation=True)
        assert apart.lam == whole.lam
        np.testing.assert_allclose(apart.val_mse, whole.val_mse, rtol=1e-11)
        np.testing.assert_allclose(apart.weight, whole.weight, atol=1e-9)

    def test_tries_few_strengths(self) -> None:
        train, val = planted_scatters(41, 40, 40, 3000)
        assert len(select_reduced_rank(train, val, 8).lambdas) <= 7

    def test_shared_rotation_gives_the_same(self) -> None:
        train, val = planted_scatters(42)
        pair = rotate(train, val)
        np.testing.assert_array_equal(select_ridge(train, val, rotated=pair).weight, select_ridge(train, val).weight)
        other = Scatter(train.n, train.mean_x, train.mean_y, train.gx, train.gy, 2 * train.c)
        again = rotate(other, val, like=pair)
        np.testing.assert_allclose(again.c, 2 * pair.c)
        assert again.spectrum is pair.spectrum
        with pytest.raises(FitError, match="other moments"):
            select_ridge(other, val, rotated=pair)
        strange = Scatter(train.n, train.mean_x, train.mean_y, 2 * train.gx, train.gy, train.c)
        with pytest.raises(FitError, match="other source rows"):
            rotate(strange, val, like=pair)

    def test_refuses(self) -> None:
        train, val = planted_scatters()
        with pytest.raises(FitError, match="no ranks"):
            select_every_rank(train, val, [])
        with pytest.raises(FitError, match="rank 8 does not fit"):
            select_every_rank(train, val, [2, 8])
        with pytest.raises(FitError, match="'guess'"):
            select_every_rank(train, val, [2], search="guess")  # type: ignore[arg-type]


def on(scatter: Scatter, device: str) -> Scatter:
    torch = pytest.importorskip("torch")
    parts = (scatter.mean_x, scatter.mean_y, scatter.gx, scatter.gy, scatter.c)
    return Scatter(scatter.n, *(torch.tensor(part, dtype=torch.float64, device=device) for part in parts))


def has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not has_cuda(), reason="no CUDA device here")])


def attributes(choice: Any, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(choice, name) for name in names)


ACROSS: dict[str, Any] = {
    "procrustes": lambda t, v: procrustes(t.c, t.gx, scale=True),
    "truncated": lambda t, v: truncated_procrustes(t.c, t.gx, t.gy, 3, scale=True),
    "select_truncated": lambda t, v: attributes(select_truncated_procrustes(t, v), "weight", "scale", "val_mse"),
    "spectrum": lambda t, v: (Spectrum.of(t.gx).values, Spectrum.of(t.gx).mean, Spectrum.of(t.gx).damped(0.1)),
    "ridge": lambda t, v: (RidgePath(t.gx, t.c).weight(0.1), RidgePath(t.gx, t.c).mse(v, [0.0, 0.1])),
    "select_ridge": lambda t, v: attributes(select_ridge(t, v), "weight", "lam", "val_mse"),
    "reduced_rank": lambda t, v: np.matmul(*map(to_numpy, reduced_rank(t.gx, t.c, 3, 0.1))),
    "reduced_rank_errors": lambda t, v: ReducedRank(t.gx, t.c, 0.1, max_rank=4, skip=t.c / 100).mse(v),
    "select_reduced_rank": lambda t, v: attributes(select_reduced_rank(t, v, 3), "weight", "lam", "val_mse"),
    "whitening": lambda t, v: whitening(t.gx, t.n),
    "mse_of": lambda t, v: mse_of(t.c / 100, v),
}


@pytest.mark.parametrize("name", ACROSS)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_torch_gives_what_numpy_gives(name: str, device: str) -> None:
    import torch

    train, val = planted_scatters(50)
    expected = ACROSS[name](train, val)
    found = ACROSS[name](on(train, device), on(val, device))
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    for want, have in pairs:
        assert not isinstance(have, torch.Tensor) or have.device.type == device
        np.testing.assert_allclose(to_numpy(have), want, rtol=1e-8, atol=1e-10)


def test_matrices_come_back_as_they_went_in() -> None:
    import torch

    train, val = (on(s, "cpu") for s in planted_scatters(51))
    for matrix in (procrustes(train.c, train.gx)[0], *select_reduced_rank(train, val, 2).factors,
                   select_ridge(train, val).weight, select_truncated_procrustes(train, val).weight):  # fmt: skip
        assert isinstance(matrix, torch.Tensor)
        assert matrix.dtype == torch.float64
    assert isinstance(select_ridge(train, val).val_mse, np.ndarray)


def test_devices() -> None:
    train, _ = planted_scatters(52)
    same = to_device(train, "cpu")
    assert same.gx is train.gx
    back = to_device(on(train, "cpu"), "cpu")
    assert isinstance(back.c, np.ndarray)
    np.testing.assert_array_equal(back.c, train.c)
    with pytest.raises(FitError, match="'warp'"):
        to_device(train, "warp")
    with pytest.raises(FitError, match="bring both to one device"):
        procrustes(on(train, "cpu").c, train.gx, scale=True)


@pytest.mark.parametrize("panel", [1, 3, 1024])
def test_congruent_makes_half_of_a_symmetric_product(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_PANEL", panel)
    rng = rng_of(50)
    v, x = rng.standard_normal((8, 7)), rng.standard_normal((20, 8))
    found = linalg.congruent(v, x.T @ x)
    np.testing.assert_allclose(found, v.T @ x.T @ x @ v, rtol=1e-12)
    np.testing.assert_allclose(found, found.T, rtol=1e-12)
