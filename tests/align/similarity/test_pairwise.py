"""Debiased CKA over pairs of rows and RSA: naive n x n formulas, SciPy, rows really drawn, and planted truth."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from align.similarity.measures import panels
from align.similarity.measures.base import Resampling, Result, resampling
from align.similarity.measures.kernel_cka import Cka, RbfCka
from align.similarity.measures.rsa import Rsa
from align.solvers import random_orthogonal
from featstore.errors import FitError
from tests.support.residuals import unequal_documents, with_topics, without_row_effects

MEASURES = [Cka(), RbfCka(), Rsa()]
each_measure = pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)


def tick(share: float) -> None:
    pass


def compared(measure: Any, x: Any, y: Any, draws: Resampling | None = None) -> Result:
    return measure([x, y], [(0, 1)], draws, tick)[0, 1]


def correlated(seed: int, n: int, dx: int = 6, dy: int = 5) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dx))
    return x, x @ rng.standard_normal((dx, dy)) / 2 + rng.standard_normal((n, dy))


def in_documents(rng: Any, document: Any, d: int, rho: float) -> Any:
    """Standard normal rows, those of one document correlated by rho."""
    shared = rng.standard_normal((document.max() + 1, d))[document]
    return math.sqrt(rho) * shared + math.sqrt(1 - rho) * rng.standard_normal((len(document), d))


def gram(x: Any) -> Any:
    x = x - x.mean(axis=0)
    return x @ x.T


def gaussian(x: Any, fraction: float = 1.0) -> Any:
    sigma = fraction * math.sqrt(np.median(pdist(x, "sqeuclidean")))
    return np.exp(-squareform(pdist(x, "sqeuclidean")) / (2 * sigma**2))


def naive_hsic1(k: Any, m: Any) -> float:
    """Song et al. (2012), equation 5."""
    n, k, m = len(k), k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    total = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
    return float(total / (n * (n - 3)))


def naive_cka(k: Any, m: Any) -> float:
    return naive_hsic1(k, m) / math.sqrt(naive_hsic1(k, k) * naive_hsic1(m, m))


def correlation_distance(x: Any) -> Any:
    return squareform(pdist(x - x.mean(axis=0), "correlation"))


def drawn_rows(document: Any, counts: Any) -> tuple[Any, Any]:
    """The rows of a draw, one after another, and which pairs count: no row with itself, no copies of one document."""
    rows, copies, owners = [], [], []
    for d, count in enumerate(counts):
        for copy in range(int(count)):
            here = np.flatnonzero(document == d)
            rows.extend(here)
            copies.extend([copy] * len(here))
            owners.extend([d] * len(here))
    rows, copies, owners = np.array(rows), np.array(copies), np.array(owners)
    allowed = (owners[:, None] != owners) | (copies[:, None] == copies)
    return rows, allowed & ~np.eye(len(rows), dtype=bool)


def residual(name: str, x: Any, document: Any) -> Any:
    return without_row_effects(gram(x) if name == "cka" else gaussian(x), document)


def naive_draw(name: str, x: Any, y: Any, document: Any, counts: Any) -> float:
    rows, allowed = drawn_rows(document, counts)
    pick = np.ix_(rows, rows)
    if name == "rsa":
        return float(np.corrcoef(*(correlation_distance(z)[pick][allowed] for z in (x, y)))[0, 1])
    # Within a document, and within its copies, everything is zero.
    a, b = (residual(name, z, document)[pick][allowed] for z in (x, y))
    size = math.sqrt((a @ a) * (b @ b))
    # One of two documents, drawn twice: no pairs of different documents.
    return float(a @ b / size) if size else math.nan


class TestAgainstNaiveFormulas:
    @pytest.fixture(autouse=True)
    def _several_panels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(panels, "PANEL_BYTES", 1)
        assert panels.panel_rows(100, 3) == 16

    @pytest.mark.parametrize("n", [4, 5, 33, 100])
    def test_cka_is_the_ratio_of_unbiased_hsic(self, n: int) -> None:
        x, y = correlated(n, n)
        assert compared(Cka(), x + 3, y).value == pytest.approx(naive_cka(gram(x), gram(y)), abs=1e-10)

    @pytest.mark.parametrize("fraction", [0.5, 1.0, 2.0])
    def test_gaussian_cka_and_its_bandwidth(self, fraction: float) -> None:
        x, y = correlated(1, 70)
        found = compared(RbfCka(fraction), x, 10 * y - 2)
        assert found.value == pytest.approx(naive_cka(gaussian(x, fraction), gaussian(y, fraction)), abs=1e-10)
        assert found.facts is not None
        assert found.facts["fraction"] == fraction
        assert found.facts["sigma_first"] == pytest.approx(fraction * math.sqrt(np.median(pdist(x) ** 2)), rel=1e-12)
        assert found.facts["sigma_second"] == pytest.approx(
            10 * fraction * math.sqrt(np.median(pdist(y) ** 2)), rel=1e-12
        )

    @pytest.mark.parametrize("n", [3, 40])
    def test_rsa_is_scipys(self, n: int) -> None:
        x, y = correlated(2, n)
        expected = np.corrcoef(*(pdist(z - z.mean(axis=0), "correlation") for z in (x, y)))[0, 1]
        assert compared(Rsa(), x - 5, 3 * y).value == pytest.approx(expected, abs=1e-10)

    @each_measure
    @pytest.mark.parametrize("sizes", [(1,) * 12, (1, 7, 2, 12, 3), (17, 20)])
    def test_a_draw_is_that_of_the_rows_drawn(self, measure: Any, sizes: tuple[int, ...]) -> None:
        rng = np.random.default_rng(3)
        document = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        x, y = correlated(3, len(document))
        draws = resampling(document, draws=25, seed=1)
        assert draws is not None
        found = compared(measure, x, y, draws)
        assert found.draws is not None
        expected = [naive_draw(measure.name, x, y, document, counts) for counts in draws.counts]
        np.testing.assert_allclose(found.draws, expected, atol=1e-9)
        assert found.facts is not None
        assert found.facts["documents"] == found.facts["groups"] == len(sizes)
        if measure.name == "rsa":
            expected_value = compared(measure, x, y).value
        else:
            a, b = (residual(measure.name, z, document) for z in (x, y))
            expected_value = np.sum(a * b) / math.sqrt(np.sum(a * a) * np.sum(b * b))
            assert found.facts["effective_documents"] == pytest.approx(1 / np.sum((np.array(sizes) / len(x)) ** 2))
        assert found.value == pytest.approx(expected_value, abs=1e-10)
        without_draws = compared(measure, x, y, Resampling(draws.document, np.zeros((0, len(sizes)))))
        assert without_draws.value == found.value
        assert without_draws.interval(Resampling(draws.document, np.zeros((0, len(sizes))))) is None

    @each_measure
    def test_a_draw_of_every_document_once_is_the_value(self, measure: Any) -> None:
        document = np.arange(60) % 9
        x, y = correlated(4, 60)
        found = compared(measure, x, y, Resampling(document, np.ones((1, 9))))
        assert found.draws is not None
        assert found.draws[0] == pytest.approx(found.value, abs=1e-12)

    @each_measure
    def test_all_layers_at_once_are_the_pairs_one_by_one(self, measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = correlated(5, 50)
        layers = [x, y, x[:, :3] ** 2]
        draws = resampling(np.arange(50) // 5, draws=10)
        made = []
        monkeypatch.setattr("align.similarity.measures.kernel_cka.tile", lambda a, b: made.append(a) or a @ b.T)
        monkeypatch.setattr("align.similarity.measures.rsa.tile", lambda a, b: made.append(a) or a @ b.T)
        together = measure(layers, [(0, 1), (0, 2), (1, 2), (1, 1)], draws, tick)
        every = len(made)
        measure(layers, [(0, 1), (2, 2)], draws, tick)
        assert len(made) == 2 * every, "products belong to layers, not to pairs"
        assert list(together) == [(0, 1), (0, 2), (1, 2), (1, 1)]
        for (i, j), found in together.items():
            alone = compared(measure, layers[i], layers[j], draws)
            assert found.value == pytest.approx(alone.value, abs=1e-12)
            np.testing.assert_allclose(found.draws, alone.draws, atol=1e-10)
        assert together[1, 1].value == pytest.approx(1, abs=1e-12)


class TestFloat32:
    @each_measure
    @pytest.mark.parametrize("case", ["benign", "mean of 10 sigma", "one dim at 1000 +- 5", "sinks"])
    def test_digits(self, measure: Any, case: str) -> None:
        rng = np.random.default_rng(6)
        x = rng.standard_normal((500, 24))
        y = x @ rng.standard_normal((24, 24)) / 5 + rng.standard_normal((500, 24))
        if case == "mean of 10 sigma":
            x, y = x + 10, y + 10
        elif case == "one dim at 1000 +- 5":
            x[:, 3] = 1000 + 5 * x[:, 3]
        elif case == "sinks":
            x[:4] *= 300
        x, y = x.astype(np.float32), y.astype(np.float32)
        found, exact = compared(measure, x, y), compared(measure, x.astype(np.float64), y.astype(np.float64))
        assert found.value == pytest.approx(exact.value, abs=5e-6 if measure.name == "rbf-cka" else 1e-6)

    @each_measure
    def test_the_unit_and_the_origin_do_not_matter(self, measure: Any) -> None:
        x, y = (z.astype(np.float32) for z in correlated(7, 80))
        value = compared(measure, x, y).value
        for factor in (1e-25, 1e25):
            assert compared(measure, x * np.float32(factor), y).value == pytest.approx(value, abs=1e-6)
        assert compared(measure, x + 2, y).value == pytest.approx(value, abs=1e-6)

    @each_measure
    def test_again_the_same_bits(self, measure: Any) -> None:
        x, y = (z.astype(np.float32) for z in correlated(8, 300))
        draws = resampling(np.arange(300) // 10, draws=20)
        one, other = compared(measure, x, y, draws), compared(measure, x.copy(), y.copy(), draws)
        assert one.value == other.value
        np.testing.assert_array_equal(one.draws, other.draws)

    @each_measure
    def test_no_square_of_the_rows_is_kept(self, measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(panels, "PANEL_BYTES", 2**20)
        monkeypatch.setattr("align.similarity.measures.kernel_cka.BANDWIDTH_ROWS", 256)
        x, y = (z.astype(np.float32) for z in correlated(9, 3000))
        draws = resampling(np.arange(3000) // 100, draws=10)
        tracemalloc.start()
        try:
            compared(measure, x, y, draws)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3000 * 3000 * 4 / 4


class TestPlanted:
    @pytest.mark.parametrize("measure", [Cka(), RbfCka()], ids=["cka", "rbf-cka"])
    def test_a_rotation_is_the_same_layer(self, measure: Any) -> None:
        x, _ = correlated(10, 200)
        q = random_orthogonal(6, 6, np.random.default_rng(10))
        found = compared(measure, x, 3 * x @ q + 7, resampling(np.arange(200) // 10, draws=20))
        assert found.value == pytest.approx(1, abs=1e-10)
        np.testing.assert_allclose(found.draws, 1, atol=1e-10)

    def test_rsa_keeps_scale_and_shift_and_rotations_that_keep_the_mean_entry(self) -> None:
        x, _ = correlated(10, 200)
        assert compared(Rsa(), x, 3 * x + 7).value == pytest.approx(1, abs=1e-10)
        # A Householder reflection that keeps the direction of ones.
        v = np.array([1.0, -1, 1, -1, 1, -1]) / math.sqrt(6)
        assert compared(Rsa(), x, x - 2 * np.outer(x @ v, v)).value == pytest.approx(1, abs=1e-10)

    @each_measure
    def test_independent_wide_layers(self, measure: Any) -> None:
        rng = np.random.default_rng(11)
        found = np.array([compared(measure, *rng.standard_normal((2, 40, 300))).value for _ in range(40)])
        assert abs(found.mean()) < 0.02
        assert found.min() < 0, "a clamped estimator is biased"

    @pytest.mark.parametrize("measure", [Cka(), RbfCka()], ids=["cka", "rbf-cka"])
    def test_layers_that_share_their_documents_alone(self, measure: Any) -> None:
        rng = np.random.default_rng(21)
        found, rows = [], []
        for _ in range(60):
            labels = unequal_documents(rng, 6, median=12)
            x, y = (with_topics(rng, labels, 32, 0.3).astype(np.float32) for _ in range(2))
            found.append(compared(measure, x, y, resampling(labels, draws=1)).value)
            rows.append(compared(measure, x, y).value)
        assert abs(np.mean(found)) < 2.5 * np.std(found) / math.sqrt(len(found)) < 0.02
        # With every row its own document it is far from 0.
        assert np.mean(rows) > 0.05

    @pytest.mark.parametrize("measure", [Cka(), RbfCka()], ids=["cka", "rbf-cka"])
    def test_a_single_document_says_nothing(self, measure: Any) -> None:
        x, y = correlated(2, 20)
        draws = resampling(np.zeros(20, int), draws=5)
        assert draws.counts.shape == (0, 1)
        found = compared(measure, x, y, draws)
        assert math.isnan(found.value)
        assert "all 20 are of one" in (found.reason or "")
        assert found.interval(draws) is None
        assert math.isfinite(compared(Rsa(), x, y, draws).value)

    @pytest.mark.parametrize(("a", "noise"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.5)])
    def test_population_cka_of_gaussians(self, a: float, noise: float) -> None:
        # |Cov(x, y)|^2 / (|Cov(x)| |Cov(y)|) with Cov(x) = I, Cov(x, y) = a I, Cov(y) = (a^2 + noise^2) I.
        rng = np.random.default_rng(12)
        x = rng.standard_normal((3000, 8))
        y = a * x + noise * rng.standard_normal(x.shape)
        assert compared(Cka(), x, y).value == pytest.approx(a**2 / (a**2 + noise**2), abs=0.02)

    def test_a_few_sinks_decide_linear_cka(self) -> None:
        rng = np.random.default_rng(13)
        x, y = rng.standard_normal((2, 1000, 20))
        assert abs(compared(Cka(), x, y).value) < 0.02
        x[:3], y[:3] = 100 * x[0], 100 * y[0]
        assert compared(Cka(), x, y).value > 0.9
        assert abs(compared(Rsa(), x, y).value) < 0.05

    @each_measure
    @pytest.mark.parametrize("slope", [1.0, pytest.param(0.0, marks=pytest.mark.thorough)])
    def test_intervals_cover_the_population(self, measure: Any, slope: float) -> None:
        rng = np.random.default_rng(14)
        document = np.repeat(np.arange(40), 3)
        scale = 1 / np.sqrt(np.arange(1, 6))

        def planted(of: Any) -> tuple[Any, Any]:
            x = in_documents(rng, of, 5, 0.4) * scale
            return x, slope * x + in_documents(rng, of, 5, 0.4) * scale

        # The population: one row a document, so many that what is left of chance does not matter.
        population = float(np.mean([compared(measure, *planted(np.arange(1500))).value for _ in range(4)]))
        if measure.name == "cka":
            assert population == pytest.approx(slope**2 / (slope**2 + 1), abs=0.03)
        draws = resampling(document, draws=150)
        covered, offsets = [], []
        for _ in range(200):
            found = compared(measure, *planted(document), draws)
            interval = found.interval(draws)
            assert interval is not None
            covered.append(interval[0] <= population <= interval[1])
            offsets.append(np.mean(found.draws) - found.value)
        assert 0.85 <= np.mean(covered) <= 1
        assert abs(np.mean(offsets)) < 0.01, "draws surround the value"


class TestGroups:
    def test_many_documents_are_drawn_in_groups_of_neighbours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(panels, "GROUPS", 8)
        document = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 2))
        draws = resampling(document, draws=50, seed=3)
        assert draws is not None
        made = panels.grouping(draws, 60)
        assert made.facts() == {"documents": 30, "effective_documents": 30.0, "groups": 8}
        assert made.counts is not None
        assert made.counts.shape == (50, 8)
        np.testing.assert_array_equal(made.counts.sum(axis=1), 8)
        assert len({tuple(row) for row in made.counts}) > 30
        in_order = document[made.order]
        for group, (start, size) in enumerate(zip(made.starts, made.sizes, strict=True)):
            assert set(in_order[start : start + size] * 8 // 30) == {group}
        np.testing.assert_array_equal(made.counts, panels.grouping(draws, 60).counts)
        other = resampling(document, draws=50, seed=4)
        assert other is not None
        again = panels.grouping(other, 60).counts
        assert again is not None
        assert (made.counts != again).any()

    @each_measure
    def test_groups_leave_the_value_and_give_draws(self, measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = correlated(15, 90)
        draws = resampling(np.arange(90) // 3, draws=40)
        whole = compared(measure, x, y, draws)
        monkeypatch.setattr(panels, "GROUPS", 10)
        found = compared(measure, x, y, draws)
        assert found.value == pytest.approx(whole.value, abs=1e-12)
        assert found.facts is not None
        assert found.facts["documents"] == 30
        assert found.facts["groups"] == 10
        assert found.draws is not None
        assert whole.draws is not None
        assert 0.5 < found.draws.std() / whole.draws.std() < 2

    def test_many_pairs_of_layers_leave_fewer_groups(self) -> None:
        draws = resampling(np.arange(600), draws=3)
        assert len(panels.grouping(draws, 600, pairs=55).sizes) == panels.GROUPS
        assert len(panels.grouping(draws, 600, pairs=1155).sizes) == 170


class TestUndefined:
    @each_measure
    @pytest.mark.parametrize("resampled", [False, True])
    def test_reasons(self, measure: Any, resampled: bool) -> None:
        x, y = (z.astype(np.float32) for z in correlated(16, 30))
        flat = np.full((30, 4), 0.1, np.float32)
        corners = np.eye(30, dtype=np.float32)
        few = 2 if measure.name == "rsa" else 3
        cases = [
            (x[:few], y[:few], f"needs at least {few + 1} rows, not {few}"),
            (flat, y, "the first set of states does not vary"),
            (x, flat, "the second set of states does not vary"),
            (corners, y, "the first set of states has"),
            (x, corners, "the second set of states has"),
        ]
        if measure.name == "rsa":
            cases.append((x, y[:, :1], "30 of 30 rows without variation across their entries"))
            # One row that is the mean but for a constant.
            level = y.copy()
            level[4] = np.delete(y, 4, axis=0).mean(axis=0) + 0.7
            cases.append((x, level, "1 of 30 rows without variation across their entries"))
        if measure.name == "rbf-cka":
            mostly = np.concatenate([np.zeros((26, 4), np.float32), y[:4, :4]])
            cases.append((x, mostly, "has no median distance: at least half"))
        for one, other, reason in cases:
            draws = resampling(np.arange(len(one)) // 2, draws=5) if resampled else None
            found = compared(measure, one, other, draws)
            assert math.isnan(found.value)
            assert found.reason is not None
            assert reason in found.reason
            assert found.interval(draws) is None
            if draws is not None:
                assert np.isnan(found.draws).all()

    @each_measure
    def test_one_bad_layer_leaves_the_others(self, measure: Any) -> None:
        x, y = correlated(17, 30)
        found = measure([x, np.ones((30, 2)), y], [(0, 1), (0, 2), (1, 1)], None, tick)
        assert found[0, 2].value == pytest.approx(compared(measure, x, y).value, abs=1e-12)
        assert math.isnan(found[0, 1].value)
        assert math.isnan(found[1, 1].value)

    @each_measure
    def test_a_draw_without_pairs_is_undefined(self, measure: Any) -> None:
        x, y = correlated(18, 8)
        found = compared(measure, x, y, Resampling(np.arange(8), np.array([[8.0] + [0.0] * 7, [1.0] * 8])))
        assert found.draws is not None
        np.testing.assert_array_equal(np.isnan(found.draws), [True, False])

    @each_measure
    def test_progress_adds_up(self, measure: Any) -> None:
        x, y = correlated(19, 600)
        for n in (2, 600):
            shares: list[float] = []
            measure([x[:n], y[:n]], [(0, 1)], None, shares.append)
            assert sum(shares) == pytest.approx(1)

    @each_measure
    def test_what_does_not_belong_together(self, measure: Any) -> None:
        x, y = correlated(20, 12)
        for layers, wanted, draws, message in (
            ([x, y[:-1]], [(0, 1)], None, "with the same rows"),
            ([x, y[:, 0]], [(0, 1)], None, "with the same rows"),
            ([], [], None, "with the same rows"),
            ([x, y], [(1, 0)], None, "the first at most the second"),
            ([x, y], [(0, 2)], None, r"\(0, 2\) of 2 layers"),
            ([x, y], [(0, 1)], resampling(np.arange(11), draws=2), "the documents of 11"),
            ([x, y], [(0, 1)], Resampling(np.zeros(12, np.int64), np.ones((2, 3))), "draws of shape"),
            ([x, y], [(0, 1)], Resampling(np.full(12, 1), np.ones((2, 2))), "1 documents with rows"),
        ):
            with pytest.raises(FitError, match=message):
                measure(layers, wanted, draws, tick)
