"""The scikit-learn estimators against scikit-learn, SciPy and planted maps."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from align.closed_form.estimators import AffineAligner, LinearAligner, ProcrustesAligner, ReducedRankAligner
from featstore.errors import FitError
from tests.support.planted import rotation, spectrum_rows

ALL = [ProcrustesAligner(), LinearAligner(), AffineAligner(), ReducedRankAligner(rank=1)]


# No check is excused: one column of targets counts as a map into one dimension.
@parametrize_with_checks(ALL)
def test_scikit_learn_accepts(estimator: Any, check: Any) -> None:
    check(estimator)


def noisy(n: int = 400, d: int = 8, sigma: float = 0.0, seed: int = 3) -> tuple[Any, Any]:
    x = spectrum_rows(n, d, seed, decay=0.5, mean=3.0)
    return x, x @ rotation(d, 7) + 2.0 + sigma * np.random.default_rng(seed + 1).normal(size=(n, d))


def test_procrustes_is_that_of_scipy() -> None:
    x, y = noisy(sigma=0.5)
    fit = ProcrustesAligner().fit(x, y)
    expected, _ = scipy.linalg.orthogonal_procrustes(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(fit.weight_, expected, atol=1e-9)
    np.testing.assert_allclose(fit.transform(x), (x - x.mean(0)) @ expected + y.mean(0), atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_ridge_is_that_of_sklearn(lam: float) -> None:
    x, y = noisy(sigma=0.5)
    for fit, about, intercept in ((AffineAligner(lam), x.mean(0), True), (LinearAligner(lam), 0.0, False)):
        alpha = lam * float(((x - about) ** 2).sum()) / x.shape[1]
        reference = Ridge(alpha, fit_intercept=intercept) if lam else LinearRegression(fit_intercept=intercept)
        np.testing.assert_allclose(fit.fit(x, y).predict(x), reference.fit(x, y).predict(x), atol=1e-8)
        assert fit.lam_ == lam


@pytest.mark.parametrize("fit", [ProcrustesAligner(), AffineAligner(0.0), ReducedRankAligner(8, 0.0)])
def test_a_rotation_with_a_shift_is_found(fit: Any) -> None:
    x, y = noisy()
    fit.fit(x[:300], y[:300])
    np.testing.assert_allclose(fit.weight_, rotation(8, 7), atol=1e-8)
    assert fit.score(x[300:], y[300:]) == pytest.approx(1.0)


def test_scale_and_components() -> None:
    x, y = noisy()
    fit = ProcrustesAligner(scale=True).fit(x, 2.5 * y)
    assert fit.scale_ == pytest.approx(2.5)
    np.testing.assert_allclose(fit.weight_, 2.5 * rotation(8, 7), atol=1e-8)
    assert ProcrustesAligner(components=3).fit(x, y).components_ == 3
    assert np.linalg.matrix_rank(ProcrustesAligner(components=3).fit(x, y).weight_) == 3
    assert ProcrustesAligner(components="auto").fit(x, y).components_ == 8
    with pytest.raises(FitError, match="'some': use a number"):
        ProcrustesAligner(components="some").fit(x, y)


@pytest.mark.parametrize(("dx", "dy"), [(5, 9), (9, 5)])
def test_rectangular_both_ways(dx: int, dy: int) -> None:
    x = np.random.default_rng(1).normal(size=(3000, dx))
    y = x @ rotation(dx, 2, dy)
    np.testing.assert_allclose(AffineAligner(0.0).fit(x, y).weight_, rotation(dx, 2, dy), atol=1e-8)
    # To a narrower space the empirical covariance leaves a small error; to a wider one there is none.
    np.testing.assert_allclose(
        ProcrustesAligner().fit(x, y).weight_, rotation(dx, 2, dy), atol=1e-8 if dx < dy else 0.1
    )


def test_low_rank_is_reached_by_reduced_rank_and_not_by_procrustes() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(600, 10))
    y = x @ rng.normal(size=(10, 2)) @ rng.normal(size=(2, 10))
    assert ReducedRankAligner(2).fit(x[:400], y[:400]).score(x[400:], y[400:]) > 1 - 1e-6
    assert ProcrustesAligner(scale=True).fit(x[:400], y[:400]).score(x[400:], y[400:]) < 0.6


@pytest.mark.parametrize("skip", ["procrustes", "ridge", "identity"])
def test_a_skip_carries_what_the_rank_does_not(skip: str) -> None:
    x = np.random.default_rng(5).normal(size=(800, 8))
    y = x @ (np.eye(8) + 3 * np.outer(rotation(8, 1)[0], rotation(8, 2)[0]))
    fit = ReducedRankAligner(1, skip=skip).fit(x[:600], y[:600])
    alone = ReducedRankAligner(1).fit(x[:600], y[:600])
    assert fit.score(x[600:], y[600:]) > alone.score(x[600:], y[600:]) + 0.1
    if skip != "procrustes":
        assert fit.score(x[600:], y[600:]) > 1 - 1e-4


def test_noise_of_known_variance_gives_the_r2_of_theory() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(6000, 10))
    y = x @ rotation(10, 3) + 0.5 * rng.normal(size=x.shape)
    for fit in (ProcrustesAligner(), LinearAligner(), AffineAligner(), ReducedRankAligner(10)):
        assert fit.fit(x[:4000], y[:4000]).score(x[4000:], y[4000:]) == pytest.approx(0.8, abs=0.01)


def test_independent_data_learn_nothing() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(900, 20)), rng.normal(size=(900, 20))
    for fit in (ProcrustesAligner(), LinearAligner(), AffineAligner(), ReducedRankAligner(5)):
        assert fit.fit(x[:600], y[:600]).score(x[600:], y[600:]) <= 0.01


def test_score_is_pooled_about_the_train_mean() -> None:
    x, y = noisy(sigma=0.5)
    y = y * np.logspace(0, 2, 8)
    fit = AffineAligner(0.01).fit(x[:300], y[:300])
    error = ((y[300:] - fit.predict(x[300:])) ** 2).sum()
    expected = 1 - error / ((y[300:] - y[:300].mean(0)) ** 2).sum()
    assert fit.score(x[300:], y[300:]) == pytest.approx(expected)
    assert abs(expected - r2_score(y[300:], fit.predict(x[300:]))) > 1e-3
    assert np.isnan(fit.score(x[:2], np.tile(fit.center_target_, (2, 1))))
    with pytest.raises(FitError, match="width 3"):
        fit.score(x, y[:, :3])


def test_the_strength_is_chosen_on_whole_groups() -> None:
    # The last rows repeat train rows of noise: chosen on them, no damping looks best.
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(60, 40)), rng.normal(size=(60, 4))
    x, y = np.vstack([x, x[:6]]), np.vstack([y, y[:6]])
    groups = np.r_[np.arange(60) // 6, np.zeros(6, dtype=int)]
    leaking, honest = AffineAligner().fit(x, y), AffineAligner().fit(x, y, groups=groups)
    assert leaking.lam_ < honest.lam_ / 10
    # The choice is on a part, the fit on everything.
    np.testing.assert_allclose(honest.weight_, AffineAligner(honest.lam_).fit(x, y).weight_, atol=1e-10)
    with pytest.raises(FitError, match="one group"):
        AffineAligner().fit(x, y, groups=np.zeros(66))
    with pytest.raises(FitError, match=r"shape \(3,\)"):
        AffineAligner().fit(x, y, groups=[1, 2, 3])


def test_pipeline_grid_search_and_clone() -> None:
    x, y = noisy(sigma=0.3)
    x = x * np.logspace(0, 3, 8)
    pipe = make_pipeline(StandardScaler(), AffineAligner()).fit(x[:300], y[:300])
    assert pipe.score(x[300:], y[300:]) > 0.5
    search = GridSearchCV(make_pipeline(StandardScaler(), ReducedRankAligner(lam=0.01)),
                          {"reducedrankaligner__rank": [1, 4, 8]}, cv=3).fit(x, y)  # fmt: skip
    assert search.best_params_ == {"reducedrankaligner__rank": 8}
    copy = clone(ReducedRankAligner(3, 0.1, "procrustes"))
    assert copy.get_params() == {"rank": 3, "lam": 0.1, "skip": "procrustes"}
    assert copy.set_params(rank=2).fit(x, y).factors_[0].shape == (8, 2)


def test_bad_parameters_are_named() -> None:
    x, y = noisy()
    with pytest.raises(FitError, match="skip 'twice'"):
        ReducedRankAligner(2, skip="twice").fit(x, y)
    with pytest.raises(FitError, match="equal widths, not 8 and 3"):
        ReducedRankAligner(2, skip="identity").fit(x, y[:, :3])
    with pytest.raises(FitError, match="rank 32"):
        ReducedRankAligner().fit(x, y)
    with pytest.raises(FitError, match="sample_weight"):
        AffineAligner(0.1).fit(x, y).score(x, y, sample_weight=np.ones(len(x)))  # type: ignore[arg-type]


def test_a_fit_needs_no_torch() -> None:
    code = (
        "import sys, numpy as np; from align.closed_form.estimators import AffineAligner, ReducedRankAligner; "
        "x = np.random.default_rng(0).normal(size=(40, 4)); AffineAligner().fit(x, x); "
        "ReducedRankAligner(2).fit(x, x); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
