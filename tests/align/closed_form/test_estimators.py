"""The scikit-learn estimators against scikit-learn, SciPy and planted maps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import (
    check_global_output_transform_pandas,
    check_global_set_output_transform_polars,
    check_set_output_transform,
    check_set_output_transform_pandas,
    check_set_output_transform_polars,
    check_transformer_get_feature_names_out,
    check_transformer_get_feature_names_out_pandas,
    parametrize_with_checks,
)

from align.closed_form.estimators import AffineAligner, LinearAligner, ProcrustesAligner, ReducedRankAligner
from featstore.errors import FitError
from tests.support import ROOT
from tests.support.planted import rotation, spectrum_rows

NEEDS_POLARS = pytest.mark.skipif(importlib.util.find_spec("polars") is None, reason="needs polars")

DEFAULTS = [ProcrustesAligner(), LinearAligner(), AffineAligner(), ReducedRankAligner()]
#: Every parameter set to something else at least once. `identity` needs as many targets as sources, checks have one.
ALL = [
    *DEFAULTS,
    ProcrustesAligner(scale=False),
    ProcrustesAligner(components=1),
    ProcrustesAligner(scale=False, components="auto"),
    LinearAligner(0.1),
    AffineAligner(0.1),
    ReducedRankAligner(1),
    ReducedRankAligner(1, 0.1, "procrustes"),
    ReducedRankAligner(skip="ridge"),
    ReducedRankAligner(skip="procrustes", scale=False),
]


# No check is excused: one column of targets counts as a map into one dimension.
@parametrize_with_checks(DEFAULTS)
def test_scikit_learn_accepts(estimator: Any, check: Any) -> None:
    check(estimator)


def test_scikit_learn_accepts_all_parameters_and_skips_no_check() -> None:
    # One check is of the array API, which scipy has only if this variable is there when it is imported.
    code = (
        "from sklearn.utils.estimator_checks import check_estimator\n"
        "from tests.align.closed_form.test_estimators import ALL\n"
        "done = [check for each in ALL for check in check_estimator(each, on_fail=None, on_skip=None)]\n"
        "print(len({str(check['estimator']) for check in done}))\n"
        "print(len({check['check_name'] for check in done}) > 40)\n"
        "print([check for check in done if check['status'] != 'passed'])"
    )
    environment = {**os.environ, "SCIPY_ARRAY_API": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.stdout.split("\n")[:3] == [str(len(ALL)), "True", "[]"], done.stdout + done.stderr


# `check_estimator` leaves these out. Some of them fit a frame and map an array, of which scikit-learn warns.
@pytest.mark.filterwarnings("ignore:X .* feature names:UserWarning")
@pytest.mark.parametrize(
    "check",
    [
        check_transformer_get_feature_names_out,
        check_transformer_get_feature_names_out_pandas,
        check_set_output_transform,
        check_set_output_transform_pandas,
        check_global_output_transform_pandas,
        pytest.param(check_set_output_transform_polars, marks=NEEDS_POLARS),
        pytest.param(check_global_set_output_transform_polars, marks=NEEDS_POLARS),
    ],
)
@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_scikit_learn_accepts_frames(estimator: Any, check: Any) -> None:
    check(type(estimator).__name__, estimator)


def noisy(n: int = 400, d: int = 8, sigma: float = 0.0, seed: int = 3) -> tuple[Any, Any]:
    x = spectrum_rows(n, d, seed, decay=0.5, mean=3.0)
    return x, x @ rotation(d, 7) + 2.0 + sigma * np.random.default_rng(seed + 1).normal(size=(n, d))


def test_procrustes_is_that_of_scipy() -> None:
    x, y = noisy(sigma=0.5)
    fit = ProcrustesAligner(scale=False).fit(x, y)
    expected, _ = scipy.linalg.orthogonal_procrustes(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(fit.weight_, expected, atol=1e-9)
    np.testing.assert_allclose(fit.transform(x), (x - x.mean(0)) @ expected + y.mean(0), atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_ridge_is_that_of_sklearn(lam: float) -> None:
    x, y = noisy(sigma=0.5)
    for fit, intercept in ((AffineAligner(lam), True), (LinearAligner(lam), False)):
        # Strengths are relative to the variance, with and without an intercept.
        alpha = lam * float(((x - x.mean(0)) ** 2).sum()) / x.shape[1]
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
    fit = ProcrustesAligner().fit(x, 2.5 * y)
    assert fit.scale_ == pytest.approx(2.5)
    np.testing.assert_allclose(fit.weight_, 2.5 * rotation(8, 7), atol=1e-8)
    bare = ProcrustesAligner(scale=False).fit(x, 2.5 * y)
    assert bare.scale_ == 1
    np.testing.assert_allclose(bare.weight_, rotation(8, 7), atol=1e-8)
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
    assert ProcrustesAligner().fit(x[:400], y[:400]).score(x[400:], y[400:]) < 0.6


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
    assert copy.get_params() == {"rank": 3, "lam": 0.1, "skip": "procrustes", "scale": True}
    assert copy.set_params(rank=2).fit(x, y).factors_[0].shape == (8, 2)


@pytest.mark.parametrize(("dx", "dy", "rank"), [(3, 5, 3), (50, 5, 5), (40, 36, 32), (6, None, 1)])
def test_the_default_rank_fits_any_width(dx: int, dy: int | None, rank: int) -> None:
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(120, dx)), rng.normal(size=(120, dy or 1))
    fit = ReducedRankAligner().fit(x, y if dy else y[:, 0])
    assert (fit.rank, fit.rank_) == (None, rank)
    assert [factor.shape for factor in fit.factors_] == [(dx, rank), (rank, dy or 1)]
    np.testing.assert_array_equal(fit.weight_, ReducedRankAligner(rank).fit(x, y).weight_)


@pytest.mark.parametrize("estimator", DEFAULTS, ids=str)
def test_frames_in_and_out(estimator: Any) -> None:
    x, y = noisy(sigma=0.3)
    frame = pd.DataFrame(x, columns=[f"s{k}" for k in range(8)], index=np.arange(len(x)) + 1000)
    fit = clone(estimator).fit(frame[:300], pd.DataFrame(y[:300]))
    rows = frame.to_numpy()
    plain = clone(estimator).fit(rows[:300], y[:300]).transform(rows[300:])
    names = [f"{type(estimator).__name__.lower()}{k}" for k in range(8)]
    assert fit.get_feature_names_out().tolist() == names
    mapped = fit.set_output(transform="pandas").transform(frame[300:])
    assert mapped.columns.tolist() == names
    assert mapped.index.tolist() == frame.index[300:].tolist()
    np.testing.assert_allclose(mapped.to_numpy(), plain, atol=1e-12)
    # What scores and predicts is the same, whatever container is asked for.
    assert isinstance(fit.predict(frame[300:]), np.ndarray)
    assert fit.score(frame[300:], y[300:]) == pytest.approx(estimator.fit(x[:300], y[:300]).score(x[300:], y[300:]))
    with pytest.raises(ValueError, match="feature names"):
        fit.transform(frame.rename(columns={"s0": "other"}))


def test_a_chain_with_frames() -> None:
    x, y = noisy(sigma=0.3)
    halve = FunctionTransformer(lambda rows: rows / 2, feature_names_out="one-to-one")
    chain = make_pipeline(StandardScaler(), halve, AffineAligner(0.1), FunctionTransformer(np.abs)).set_output(
        transform="pandas"
    )
    chain[-1].set_params(feature_names_out="one-to-one")
    mapped = chain.fit(x[:300], y[:300]).transform(x[300:])
    assert mapped.columns.tolist() == [f"affinealigner{k}" for k in range(8)]
    scaled = (x - x[:300].mean(0)) / x[:300].std(0) / 2
    expected = np.abs(AffineAligner(0.1).fit(scaled[:300], y[:300]).transform(scaled[300:]))
    np.testing.assert_allclose(mapped.to_numpy(), expected, atol=1e-10)
    search = GridSearchCV(make_pipeline(halve, AffineAligner()).set_output(transform="pandas"),
                          {"affinealigner__lam": [0.0, 1e-3, 1e3]}, cv=3).fit(x, y)  # fmt: skip
    assert search.best_params_["affinealigner__lam"] < 1e3


def test_bad_parameters_are_named() -> None:
    x, y = noisy()
    with pytest.raises(FitError, match="skip 'twice'"):
        ReducedRankAligner(2, skip="twice").fit(x, y)
    with pytest.raises(FitError, match="equal widths, not 8 and 3"):
        ReducedRankAligner(2, skip="identity").fit(x, y[:, :3])
    with pytest.raises(FitError, match="rank 32 does not fit widths 8 and 8"):
        ReducedRankAligner(32).fit(x, y)
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
