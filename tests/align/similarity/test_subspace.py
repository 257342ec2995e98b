"""Canonical correlations, shape distances and predictability: naive formulas, other libraries, planted truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge

from align.similarity.measures.base import Measure, Resampling, Result, resampling
from align.similarity.measures.influence import linear_draws
from align.similarity.measures.predictability import FOLDS, RidgeR2, dealt
from align.similarity.measures.shape import angular_distance, procrustes_distance
from align.similarity.measures.subspace import principal, pwcca, svcca
from featstore.errors import FitError
from tests.support.planted import rotation, spectrum_rows
from tests.support.tiers import tiered

ALL: list[Measure] = [svcca(), pwcca(), procrustes_distance(), angular_distance(), RidgeR2()]


def named(measure: Measure) -> str:
    return measure.name


def compare(measure: Measure, x: Any, y: Any, draws: Resampling | None = None) -> Result:
    return measure([x.astype(np.float32), y.astype(np.float32)], [(0, 1)], draws, lambda _: None)[0, 1]


def related(n: int, dx: int, dy: int, seed: int, *, noise: float = 0.5, documents: int = 0) -> tuple[Any, Any]:
    """Two layers of one latent state, each with noise of its own; documents may shift the latent state."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, min(dx, dy)))
    if documents:
        latent += rng.normal(size=(documents, min(dx, dy)))[np.arange(n) * documents // n]
    x = latent @ rng.normal(size=(latent.shape[1], dx)) + noise * rng.normal(size=(n, dx))
    y = latent @ rng.normal(size=(latent.shape[1], dy)) + noise * rng.normal(size=(n, dy))
    return x.astype(np.float32), y.astype(np.float32)


def naive_cca(x: Any, y: Any, share: float = 1.0) -> tuple[Any, Any]:
    """Correlations and unit canonical variates of x, by SVD and QR of the rows themselves."""
    bases = []
    for rows in (x, y):
        u, s, _ = np.linalg.svd(rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64), full_matrices=False)
        part = np.cumsum(s**2) / np.sum(s**2)
        bases.append(u[:, : int(np.sum(part < share)) + 1] if share < 1 else u)
    a, rho, _ = np.linalg.svd(bases[0].T @ bases[1], full_matrices=False)
    return rho, bases[0] @ a


@pytest.mark.parametrize("share", [0.99, 0.9, 1.0])
def test_svcca_is_the_mean_canonical_correlation_of_the_leading_components(share: float) -> None:
    x, y = spectrum_rows(800, 24, 1, decay=1.0, mean=5), None
    y = x @ rotation(24, 3)[:, :17] + 0.2 * np.random.default_rng(2).normal(size=(800, 17))
    x, y = x.astype(np.float32), y.astype(np.float32)
    result = compare(svcca(share), x, y)
    rho, _ = naive_cca(x, y, share)
    assert result.value == pytest.approx(rho.mean(), abs=1e-10)
    assert result.facts is not None
    assert min(result.facts["kept_x"], result.facts["kept_y"]) == len(rho)
    assert result.facts["mean_square"] == pytest.approx(np.mean(rho**2), abs=1e-10)
    if share < 1:
        assert result.facts["kept_x"] < 24


def test_canonical_correlations_agree_with_scikit_learn() -> None:
    x, y = related(600, 5, 4, 4)
    model = CCA(n_components=4, tol=1e-13, max_iter=20000).fit(x.astype(np.float64), y.astype(np.float64))
    u, v = model.transform(x.astype(np.float64), y.astype(np.float64))
    theirs = np.mean([np.corrcoef(u[:, k], v[:, k])[0, 1] for k in range(4)])
    assert compare(svcca(1.0), x, y).value == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(("dx", "dy"), [(12, 7), (7, 12)])
@pytest.mark.parametrize("share", [0.95, 1.0])
def test_pwcca_weighs_by_the_first_layer_in_either_order(dx: int, dy: int, share: float) -> None:
    x, y = related(500, dx, dy, 5, noise=1.0)
    x *= np.float32(1) + np.arange(dx, dtype=np.float32)
    found = pwcca(share)([x, y], [(0, 1), (1, 0)], None, lambda _: None)
    assert list(found) == [(0, 1), (1, 0)]
    for pair, first, second in (((0, 1), x, y), ((1, 0), y, x)):
        rho, variates = naive_cca(first, second, share)
        alpha = np.abs(variates.T @ (first - first.mean(axis=0, dtype=np.float64))).sum(axis=1)
        assert found[pair].value == pytest.approx(float(alpha @ rho / alpha.sum()), abs=1e-9)
    assert abs(found[0, 1].value - found[1, 0].value) > 1e-4


def test_few_rows_of_many_dimensions_go_through_the_small_gram_matrix() -> None:
    x, y = related(200, 3, 3, 6, noise=0.0)
    x, y = x @ np.random.default_rng(0).normal(size=(3, 250)), y @ np.random.default_rng(1).normal(size=(3, 250))
    x[:, :3] += 0.5 * np.random.default_rng(2).normal(size=(200, 3))
    for measure, weighted in ((svcca(), False), (pwcca(), True)):
        rho, variates = naive_cca(x.astype(np.float32), y.astype(np.float32), 0.99)
        alpha = np.abs(variates.T @ (x - x.mean(axis=0))).sum(axis=1) if weighted else np.ones_like(rho)
        assert compare(measure, x, y).value == pytest.approx(float(alpha @ rho / alpha.sum()), abs=1e-6)


def test_scores_stay_orthonormal_where_directions_differ_by_ten_thousand() -> None:
    x = np.random.default_rng(0).normal(size=(400, 12)) * np.logspace(0, -4.5, 12)
    found = principal((x @ rotation(12, 1)).astype(np.float32), 1.0)
    assert found.scores is not None
    assert found.loadings is not None
    assert found.kept == 12
    assert np.abs(found.scores.T @ found.scores - np.eye(12)).max() < 1e-12
    assert compare(svcca(1.0), x, x @ rotation(12, 2)).value == pytest.approx(1, abs=1e-3)


def test_rows_must_be_ten_for_each_kept_component() -> None:
    x, y = related(400, 30, 41, 7, noise=2.0)
    for measure in (svcca(1.0), pwcca(1.0)):
        result = compare(measure, x, y)
        assert math.isnan(result.value)
        for number in ("400 rows", "widths 30 and 41", "need 410 rows"):
            assert number in str(result.reason)
    x, y = related(410, 30, 41, 7, noise=2.0)
    assert math.isnan(compare(svcca(1.0), x[:-1], y[:-1]).value)
    enough = compare(svcca(1.0), x, y)
    assert 0 < enough.value < 1
    assert enough.facts is not None
    assert enough.facts["chance"] == pytest.approx(math.sqrt(41 / 409))


def test_unrelated_rows_reach_the_stated_chance_and_no_more() -> None:
    squares, values = [], []
    for seed in range(20):
        x, y = np.random.default_rng(seed).normal(size=(2, 400, 20))
        result = compare(svcca(1.0), x, y)
        assert result.facts is not None
        squares.append(result.facts["mean_square"])
        values.append(result.value)
        chance = result.facts["chance"]
    assert np.mean(squares) == pytest.approx(chance**2, rel=0.03)
    assert 0.8 * chance < np.mean(values) < chance


@pytest.mark.parametrize(("dx", "dy"), [(8, 8), (6, 11), (11, 6)])
def test_shape_distances_are_scipys_procrustes_of_zero_padded_rows(dx: int, dy: int) -> None:
    x, y = related(150, dx, dy, 8)
    d = max(dx, dy)
    padded = [np.pad(r - r.mean(axis=0, dtype=np.float64), ((0, 0), (0, d - r.shape[1]))) for r in (x, y)]
    turn, nuclear = scipy.linalg.orthogonal_procrustes(*padded)
    size = np.linalg.norm(padded[0]) * np.linalg.norm(padded[1])
    distance = compare(procrustes_distance(), x, y)
    assert distance.value == pytest.approx(np.linalg.norm(padded[0] @ turn - padded[1]) / math.sqrt(150), abs=1e-12)
    assert distance.facts == pytest.approx({"rms_x": padded[0].std() * d**0.5, "rms_y": padded[1].std() * d**0.5})
    angle = compare(angular_distance(), x, y)
    assert angle.value == pytest.approx(math.acos(nuclear / size), abs=1e-12)
    disparity = scipy.spatial.procrustes(*padded)[2]
    assert math.sin(angle.value) ** 2 == pytest.approx(disparity, abs=1e-12)
    assert angle.facts == pytest.approx({"cosine": math.cos(angle.value)})


@pytest.mark.parametrize("dims", [(9, 9), (9, 14), (14, 9)])
def test_a_planted_rotation_leaves_nothing(dims: tuple[int, int]) -> None:
    x = spectrum_rows(600, dims[0], 9, decay=0.5, mean=3)
    y = x @ rotation(dims[0], 10, dims[1]) if dims[0] < dims[1] else None
    if y is None:
        y = spectrum_rows(600, dims[1], 9, decay=0.5, mean=3)
        x = y @ rotation(dims[1], 10, dims[0])
    y = y + 7.0
    # What float32 moves the rows of both sides by: the planted rotation leaves no more, and so does the best one.
    rounding = sum(np.sqrt(np.mean(np.sum((rows.astype(np.float32) - rows) ** 2, axis=1))) for rows in (x, y))
    draws = resampling(np.arange(600) // 20, draws=50)
    for measure in ALL:
        result = compare(measure, x, y, draws)
        assert result.draws is not None
        zero = result.value if measure.closer == "lower" else 1 - result.value
        spread = result.draws if measure.closer == "lower" else 1 - result.draws
        # float32 rows turned and rounded again, and the smallest ridge. The distance is in the units of the rows.
        most = {"procrustes-distance": rounding, "ridge-r2": 2e-5}.get(measure.name, 2e-6)
        assert abs(zero) < most
        assert np.abs(spread).max() < 1e-4
        assert np.isfinite(result.draws).all()
        low, high = measure.bounds
        assert low is None or result.value >= low
        assert high is None or result.value <= high + 1e-12


def test_a_layer_and_itself_are_at_no_distance_and_small_ones_keep_their_digits() -> None:
    x = spectrum_rows(500, 40, 11, decay=0.3).astype(np.float32)
    assert compare(angular_distance(), x, x).value < 1e-13
    assert compare(procrustes_distance(), x, x).value < 1e-13
    y = x + 1e-5 * np.random.default_rng(0).normal(size=x.shape)
    a, b = (r - r.mean(axis=0) for r in (x.astype(np.float64), y.astype(np.float32).astype(np.float64)))
    residual = np.linalg.norm(a @ scipy.linalg.orthogonal_procrustes(a, b)[0] - b)
    assert compare(procrustes_distance(), x, y).value == pytest.approx(residual / math.sqrt(500), rel=1e-9)
    chord = residual / np.sqrt(np.linalg.norm(a) * np.linalg.norm(b))
    assert compare(angular_distance(), x, y).value == pytest.approx(chord, rel=1e-4)


def test_scale_matters_to_the_procrustes_distance_alone() -> None:
    x, y = related(600, 8, 8, 12, documents=30)
    draws = resampling(np.arange(600) // 20, draws=20)
    for measure in ALL:
        first, scaled, shifted = (compare(measure, x, r, draws) for r in (y, 8 * y, y + np.float32(64)))
        moved = measure.name == "procrustes-distance"
        assert (abs(first.value - scaled.value) > 0.1) == moved
        assert shifted.value == pytest.approx(first.value, rel=1e-4)
        assert first.draws is not None
        assert scaled.draws is not None
        assert (np.abs(first.draws - scaled.draws).max() > 0.1) == moved


def naive_ridge(x: Any, y: Any, fold: Any, grid: Any) -> tuple[float, list[float], Any]:
    """The same cross-validation with scikit-learn's Ridge: R2, strengths, and squares by row."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares, strengths = np.zeros((len(x), 2)), []
    folds = int(fold.max()) + 1

    def fit(rows: Any, lam: float) -> Ridge:
        around = x[rows] - x[rows].mean(axis=0)
        return Ridge(alpha=lam * np.sum(around**2) / x.shape[1], solver="cholesky").fit(x[rows], y[rows])

    for k in range(folds):
        partner = {0: 1, 1: 0, 2: 3, 3: 2, 4: 0}[k] if folds == 5 else {0: 1, 1: 0, 2: 0}[k]
        inner, val = (fold != k) & (fold != partner), fold == partner
        errors = [np.sum((fit(inner, lam).predict(x[val]) - y[val]) ** 2) for lam in grid]
        strengths.append(float(grid[int(np.argmin(errors))]))
        model, held = fit(fold != k, strengths[-1]), fold == k
        squares[held, 0] = np.sum((model.predict(x[held]) - y[held]) ** 2, axis=1)
        squares[held, 1] = np.sum((y[held] - y[fold != k].mean(axis=0)) ** 2, axis=1)
    return float(1 - squares[:, 0].sum() / squares[:, 1].sum()), strengths, squares


@pytest.mark.parametrize("documents", [0, 3, 23])
def test_ridge_is_that_of_scikit_learn_over_documents(documents: int) -> None:
    rng = np.random.default_rng(13)
    x, y = related(230, 30, 9, 13, noise=2.0)
    labels = rng.integers(documents, size=230) if documents else np.arange(230) * 5 // 230
    draws = resampling(labels, draws=30) if documents else None
    found = RidgeR2()([x, y], [(0, 1), (1, 0)], draws, lambda _: None)
    fold = dealt(labels, min(5, len(np.unique(labels))))
    for pair, a, b in (((0, 1), x, y), ((1, 0), y, x)):
        value, strengths, squares = naive_ridge(a, b, fold, RidgeR2().grid)
        result = found[pair]
        assert result.value == pytest.approx(value, abs=1e-9)
        assert result.facts is not None
        assert result.facts["lambda_low"] == min(strengths)
        assert result.facts["lambda_high"] == max(strengths)
        assert result.facts["lambda"] == pytest.approx(np.exp(np.mean(np.log(strengths))))
        assert result.facts["folds"] == min(5, documents or 5)
        if draws is not None:
            assert result.draws is not None
            weights = draws.counts[:, draws.document]
            assert np.allclose(result.draws, 1 - (weights @ squares[:, 0]) / (weights @ squares[:, 1]), atol=1e-9)
    assert abs(found[0, 1].value - found[1, 0].value) > 0.01


def test_ridge_says_where_its_grid_was_too_narrow() -> None:
    x, y = related(300, 10, 10, 14, noise=3.0)
    facts = compare(RidgeR2([1e-9, 1e-8]), x, y).facts
    assert facts is not None
    assert facts["edge"] == FOLDS
    assert compare(RidgeR2(), x, y).facts["edge"] == 0  # type: ignore[index]
    with pytest.raises(FitError, match="no ridge strengths"):
        RidgeR2([])


def test_unrelated_rows_cannot_be_predicted() -> None:
    x, y = np.random.default_rng(15).normal(size=(2, 300, 60))
    assert -0.05 < compare(RidgeR2(), x, y).value < 0.01


def test_whole_documents_are_dealt_to_folds_of_about_equal_rows() -> None:
    document = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 30, size=40))
    fold = dealt(document, 5)
    assert all(len(np.unique(fold[document == d])) == 1 for d in range(40))
    assert np.ptp(np.bincount(fold)) <= 3


@pytest.mark.parametrize("measure", ALL, ids=named)
def test_what_is_undefined_has_a_reason_and_no_exception(measure: Measure) -> None:
    x, y = related(300, 6, 6, 16)
    still = np.full((300, 6), 123.456, dtype=np.float32)
    still[::2] = np.nextafter(still[0, 0], np.float32(0))
    draws = resampling(np.arange(300) // 10, draws=5)
    done: list[float] = []
    found = measure(
        [x, y, still], [(0, 1), (0, 2), (2, 2), *([] if measure.symmetric else [(2, 0)])], draws, done.append
    )
    assert sum(done) == pytest.approx(1)
    assert math.isfinite(found[0, 1].value)
    assert found[0, 1].reason is None
    assert "second set of states does not vary" in str(found[0, 2].reason)
    assert "first set of states does not vary" in str(found[2, 2].reason)
    assert all(math.isnan(found[pair].value) and found[pair].interval(draws) is None for pair in ((0, 2), (2, 2)))
    for n in (0, 1, 2):
        result = compare(measure, x[:n], y[:n])
        assert math.isfinite(result.value) == (n == 2 and "distance" in measure.name)
        assert (result.reason is None) == math.isfinite(result.value)
    assert measure([x], [], None, lambda _: None) == {}


@pytest.mark.parametrize("measure", ALL, ids=named)
def test_columns_without_variation_and_missing_directions_change_nothing(measure: Measure) -> None:
    x, y = related(400, 6, 6, 17)
    draws = resampling(np.arange(400) // 10, draws=10)
    plain = compare(measure, x, y, draws)
    flat = np.column_stack([x, np.full(400, 9.0), np.zeros(400)])
    result = compare(measure, flat, y, draws)
    # The ridge is relative to the mean eigenvalue over all dimensions, so its grid moves.
    tolerance = 5e-3 if measure.name == "ridge-r2" else 1e-7
    assert result.value == pytest.approx(plain.value, abs=tolerance)
    assert result.draws == pytest.approx(plain.draws, abs=tolerance)
    low_rank = compare(measure, x @ rotation(6, 1, 15), y, draws)
    assert low_rank.value == pytest.approx(plain.value, abs=0.02 if measure.name == "pwcca" else 2e-3)


def test_a_share_of_one_keeps_what_float32_can_tell_apart() -> None:
    x, _ = related(300, 4, 4, 18)
    facts = compare(svcca(1.0), x @ rotation(4, 1, 20), x).facts
    assert facts is not None
    assert (facts["kept_x"], facts["kept_y"]) == (4, 4)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(FitError, match="share of the variance"):
            svcca(share)


# Intervals ----------------------------------------------------------------------------------------------------------


def unequal(n: int, documents: int, seed: int) -> Any:
    """Document of each row, of lengths that differ sixfold."""
    lengths = np.random.default_rng(seed).integers(1, 7, size=documents)
    return np.sort(np.repeat(np.arange(documents), -(-n * lengths // lengths.sum()))[:n])


def test_a_mean_over_rows_is_drawn_exactly() -> None:
    rows = np.random.default_rng(20).normal(size=300)
    draws = resampling(unequal(300, 20, 1), draws=40)
    assert draws is not None
    weights = draws.counts[:, draws.document]
    exact = (weights @ rows) / weights.sum(axis=1)
    assert linear_draws(rows.mean(), rows - rows.mean(), draws) == pytest.approx(exact, abs=1e-12)
    assert linear_draws(1.0, rows, None) is None


@pytest.mark.parametrize("dims", [(6, 6), (5, 8), (8, 5)])
def test_shape_draws_are_exact_for_the_rotation_found(dims: tuple[int, int]) -> None:
    x, y = related(400, *dims, 24, noise=1.0)
    draws = resampling(unequal(400, 20, 5), draws=30)
    assert draws is not None
    # Documents that are loud on one side only.
    y *= np.exp(np.random.default_rng(0).normal(size=20)).astype(np.float32)[draws.document, None]
    d = max(dims)
    a, b = (np.pad(r - r.mean(axis=0, dtype=np.float64), ((0, 0), (0, d - r.shape[1]))) for r in (x, y))
    a = a @ scipy.linalg.orthogonal_procrustes(a, b)[0]
    weights = draws.counts[:, draws.document]
    xx, yy, xy = (weights @ np.sum(p * q, axis=1) for p, q in ((a, a), (b, b), (a, b)))
    angle, distance = (compare(measure, x, y, draws).draws for measure in (angular_distance(), procrustes_distance()))
    assert angle == pytest.approx(np.arccos(xy / np.sqrt(xx * yy)), abs=1e-9)
    assert distance == pytest.approx(np.sqrt((xx + yy - 2 * xy) / weights.sum(axis=1)), abs=1e-9)


@pytest.mark.parametrize(
    "measure", [svcca(1.0), pwcca(1.0), procrustes_distance(), angular_distance(), RidgeR2()], ids=named
)
def test_draws_follow_the_bootstrap_that_computes_everything_again(measure: Measure) -> None:
    n, documents = 3000, 60
    x, y = related(n, 5, 4, 21, noise=1.0, documents=documents)
    draws = resampling(unequal(n, documents, 2), draws=150, seed=3)
    assert draws is not None
    result = compare(measure, x, y, draws)
    honest = []
    for counts in draws.counts:
        rows = np.repeat(np.arange(n), counts[draws.document].astype(int))
        labels = np.unique(draws.document[rows], return_inverse=True)[1]
        folds = Resampling(labels, np.zeros((0, labels.max() + 1)))
        honest.append(compare(measure, x[rows], y[rows], folds).value)
    assert result.draws is not None
    assert np.corrcoef(result.draws, honest)[0, 1] > 0.97
    low, high = np.quantile(honest, [0.025, 0.975])
    # Each end of theirs within a sixth of the honest interval's width.
    ours = tuple(np.quantile(result.draws, [0.025, 0.975]))
    assert ours == pytest.approx((low, high), abs=(high - low) / 6)


@pytest.mark.parametrize(
    "measure", tiered([svcca(1.0)], [pwcca(1.0), procrustes_distance(), angular_distance()]), ids=named
)
def test_intervals_cover_the_truth(measure: Measure) -> None:
    # One fixed pair of maps; a very long corpus stands for the truth.
    mixing = np.random.default_rng(22).normal(size=(2, 3, 3))

    def corpus(n: int, documents: int, seed: int) -> tuple[Any, Any, Any]:
        rng = np.random.default_rng(seed)
        document = np.arange(n) * documents // n
        latent = rng.normal(size=(n, 3)) + rng.normal(size=(documents, 3))[document]
        x, y = (latent @ m + rng.normal(size=(n, 3)) for m in mixing)
        return x.astype(np.float32), y.astype(np.float32), document

    long_x, long_y, _ = corpus(400_000, 40_000, 0)
    truth = compare(measure, long_x, long_y).value
    inside = []
    for seed in range(1, 101):
        x, y, document = corpus(1000, 100, seed)
        draws = resampling(document, draws=300)
        interval = compare(measure, x, y, draws).interval(draws)
        assert interval is not None
        inside.append(interval[0] <= truth <= interval[1])
    # 95 of 100 expected; a standard deviation is 2.2, and percentile intervals are a little short.
    assert 88 <= np.sum(inside) <= 100


def test_documents_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(23)
    document = np.arange(1500) // 50
    latent = rng.normal(size=(1500, 3))
    noise = np.exp(rng.normal(size=30))[document, None]
    x, y = latent + 0.1 * rng.normal(size=(1500, 3)), latent + noise * rng.normal(size=(1500, 3))
    for measure in ALL:
        both = [resampling(of, draws=300) for of in (document, np.arange(1500))]
        by_document, by_row = (compare(measure, x, y, draws).interval(draws) for draws in both)
        assert by_document is not None
        assert by_row is not None
        assert np.ptp(by_document) > 1.4 * np.ptp(by_row)
