"""Mutual nearest neighbours and CKNNA: scikit-learn, the paper's formula term by term, ties, and planted truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from align.similarity.measures import neighbours, panels
from align.similarity.measures.base import Resampling, Result, resampling
from align.similarity.measures.neighbours import Cknna, MutualKnn, nearest
from align.solvers import random_orthogonal
from featstore.errors import FitError

each_measure = pytest.mark.parametrize("kind", [MutualKnn, Cknna], ids=["mutual-knn", "cknna"])


def tick(share: float) -> None:
    pass


def compared(measure: Any, x: Any, y: Any, draws: Resampling | None = None) -> Result:
    return measure([x, y], [(0, 1)], draws, tick)[0, 1]


def correlated(seed: int, n: int, dx: int = 6, dy: int = 5) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dx))
    return x, x @ rng.standard_normal((dx, dy)) / 2 + rng.standard_normal((n, dy)) / 2


def unit(x: Any) -> Any:
    x = x - x.mean(axis=0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sklearn_neighbours(x: Any, k: int) -> Any:
    """Indices of the k nearest by cosine, without the row itself."""
    return NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(x).kneighbors(return_distance=False)


def naive_align(f: Any, g: Any, k: int, pairs: Any) -> float:
    """Huh et al. (2024), appendix A, term by term, over the ordered pairs given."""
    n, total = len(f), 0.0
    kernel, other = f @ f.T, g @ g.T
    for i, j in pairs:
        near = sorted((j for j in range(n) if j != i), key=lambda j: -kernel[i, j])[:k]
        near_other = sorted((j for j in range(n) if j != i), key=lambda j: -other[i, j])[:k]
        if j in near and j in near_other:
            total += (kernel[i, j] - kernel[i].mean()) * (other[i, j] - other[i].mean())
    return total


def naive_cknna(x: Any, y: Any, k: int, pairs: Any) -> float:
    f, g = unit(x), unit(y)
    return naive_align(f, g, k, pairs) / math.sqrt(naive_align(f, f, k, pairs) * naive_align(g, g, k, pairs))


def naive_mutual(x: Any, y: Any, k: int) -> float:
    one, other = sklearn_neighbours(unit(x), k), sklearn_neighbours(unit(y), k)
    return float(np.mean([len(set(one[i]) & set(other[i])) / k for i in range(len(x))]))


def naive_mutual_of_pairs(x: Any, y: Any, k: int, pairs: Any) -> float:
    """Agreed neighbourships over the geometric mean of those that each layer names."""
    one, other = (sklearn_neighbours(unit(z), k) for z in (x, y))
    named = np.array([(j in one[i], j in other[i]) for i, j in pairs], dtype=float)
    return float(named[:, 0] @ named[:, 1] / math.sqrt(named[:, 0].sum() * named[:, 1].sum()))


def all_pairs(n: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(n) for j in range(n)]


def drawn_pairs(document: Any, counts: Any) -> list[tuple[int, int]]:
    """Pairs of the rows of a draw, without a row and itself and without two copies of one document."""
    copies = [(int(d), copy) for d, count in enumerate(counts) for copy in range(int(count))]
    rows = [(i, copy) for copy in copies for i in np.flatnonzero(document == copy[0])]
    return [(int(i), int(j)) for i, one in rows for j, other in rows if (one == other and i != j) or one[0] != other[0]]


@pytest.fixture(autouse=True)
def _several_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "PANEL_BYTES", 1)
    monkeypatch.setattr(neighbours, "GATHERED", 100)


class TestNearest:
    @pytest.mark.parametrize("k", [1, 7, 39])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_scikit_learns(self, k: int, dtype: Any) -> None:
        rows = unit(correlated(0, 40)[0]).astype(dtype)
        found = nearest(rows, k)
        np.testing.assert_array_equal(found.index, sklearn_neighbours(rows.astype(np.float64), k))
        products = np.einsum("id,ikd->ik", rows, rows[found.index], dtype=np.float64)
        np.testing.assert_allclose(found.product, products, atol=1e-7)
        assert not found.tied.any()

    @pytest.mark.parametrize("d", [3, 37, 130])
    def test_ties_go_to_the_lower_row(self, d: int) -> None:
        rng = np.random.default_rng(1)
        distinct = unit(rng.standard_normal((9, d))).astype(np.float32)
        # Every row four times, so that a row has 3 equal ones and then ties in fours.
        rows = np.tile(distinct, (4, 1))
        found = nearest(rows, 5)
        product = distinct.astype(np.float64) @ distinct.T.astype(np.float64)
        for i in range(36):
            same = [j for j in range(i % 9, 36, 9) if j != i]
            following = int(np.argsort(-product[i % 9])[1])
            assert list(found.index[i]) == [*same, following, following + 9]
        assert found.tied.all()
        assert not nearest(rows, 3).tied.any()

    def test_no_neighbour_is_lost_to_rounding(self) -> None:
        # Rows so close that products in float32 cannot tell them apart.
        rng = np.random.default_rng(2)
        rows = np.concatenate([[1.0], np.zeros(19)]) + 1e-4 * rng.standard_normal((60, 20))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        wide = rows.astype(np.float64)
        product = wide @ wide.T
        np.fill_diagonal(product, -1)
        found = nearest(rows, 6)
        np.testing.assert_array_equal(found.index, np.argsort(-product, axis=1)[:, :6])

    @pytest.mark.parametrize("k", [0, 5, 6])
    def test_impossible_numbers(self, k: int) -> None:
        with pytest.raises(FitError, match=f"{k} nearest neighbours among 5 rows: ask for 1 to 4"):
            nearest(np.eye(5), k)


class TestAgainstTheDefinitions:
    @pytest.mark.parametrize(("n", "k"), [(12, 3), (40, 10), (11, 10), (30, 1)])
    def test_values(self, n: int, k: int) -> None:
        x, y = correlated(n, n)
        found = compared(MutualKnn(k), x + 4, 3 * y)
        assert found.value == pytest.approx(naive_mutual(x, y, k), abs=1e-12)
        assert found.facts == {"k": k, "tied_rows": 0, "chance": k / (n - 1)}
        found = compared(Cknna(k), x + 4, 3 * y)
        assert found.value == pytest.approx(naive_cknna(x, y, k, all_pairs(n)), abs=1e-10)
        assert found.facts == {"k": k, "tied_rows": 0}

    def test_ten_neighbours_unless_told(self) -> None:
        assert MutualKnn().k == Cknna().k == 10

    def test_draws_weigh_pairs_and_keep_the_neighbours(self) -> None:
        document = np.random.default_rng(3).permutation(np.repeat(np.arange(5), (1, 6, 3, 9, 7)))
        x, y = correlated(3, 26)
        draws = resampling(document, draws=12, seed=1)
        assert draws is not None
        mutual, cknna = compared(MutualKnn(4), x, y, draws), compared(Cknna(4), x, y, draws)
        assert mutual.draws is not None
        assert cknna.draws is not None
        assert mutual.facts is not None
        assert mutual.facts["documents"] == mutual.facts["groups"] == 5
        for t, counts in enumerate(draws.counts):
            pairs = drawn_pairs(document, counts)
            assert mutual.draws[t] == pytest.approx(naive_mutual_of_pairs(x, y, 4, pairs), abs=1e-12)
            assert cknna.draws[t] == pytest.approx(naive_cknna(x, y, 4, pairs), abs=1e-10)
        assert mutual.value == pytest.approx(compared(MutualKnn(4), x, y).value, abs=1e-12)
        assert compared(MutualKnn(4), x, y).draws is None

    @each_measure
    def test_all_layers_at_once_are_the_pairs_one_by_one(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = correlated(4, 40)
        layers = [x, y, x[:, :3] ** 2]
        asked = []
        find = neighbours.nearest
        monkeypatch.setattr(neighbours, "nearest", lambda rows, k: asked.append(k) or find(rows, k))
        found = kind(5)(layers, [(0, 2), (0, 1), (1, 2)], None, tick)
        assert asked == [5, 5, 5]
        assert list(found) == [(0, 2), (0, 1), (1, 2)]
        for (i, j), result in found.items():
            assert result.value == compared(kind(5), layers[i], layers[j]).value
            assert result.value == pytest.approx(compared(kind(5), layers[j], layers[i]).value, abs=1e-12)


class TestPlanted:
    @each_measure
    def test_a_rotation_is_the_same_layer(self, kind: Any) -> None:
        x, _ = correlated(5, 120)
        q = random_orthogonal(6, 6, np.random.default_rng(5))
        found = compared(kind(), x, 1e-3 * x @ q + 7, resampling(np.arange(120) // 10, draws=20))
        assert found.value == pytest.approx(1, abs=1e-10)
        np.testing.assert_allclose(found.draws, 1, atol=1e-10)

    @each_measure
    def test_the_unit_does_not_matter(self, kind: Any) -> None:
        x, y = (z.astype(np.float32) for z in correlated(6, 60))
        for factor in (1e-25, 1e25):
            found = compared(kind(), x * np.float32(factor), y).value
            assert found == pytest.approx(compared(kind(), x, y).value, abs=1e-6)

    def test_independent_layers_agree_by_chance(self) -> None:
        rng = np.random.default_rng(7)
        found = [compared(MutualKnn(), *rng.standard_normal((2, 101, 20))) for _ in range(20)]
        assert np.mean([one.value for one in found]) == pytest.approx(0.1, abs=0.01)
        assert found[0].facts is not None
        assert found[0].facts["chance"] == 0.1
        assert abs(np.mean([compared(Cknna(), *rng.standard_normal((2, 101, 20))).value for _ in range(20)])) < 0.15

    def test_a_few_sinks_decide_nothing(self) -> None:
        rng = np.random.default_rng(8)
        x, y = rng.standard_normal((2, 400, 20))
        before = compared(MutualKnn(), x, y).value
        x[:3], y[:3] = 100 * x[0], 100 * y[0]
        assert compared(MutualKnn(), x, y).value == pytest.approx(before, abs=0.03)

    def test_equal_rows_are_counted(self) -> None:
        x, y = correlated(9, 40)
        x[:20], y[30:] = x[0], y[39]
        found = compared(MutualKnn(5), x.astype(np.float32), y.astype(np.float32))
        assert found.facts is not None
        assert found.facts["tied_rows"] >= 30

    @each_measure
    def test_again_the_same_bits(self, kind: Any) -> None:
        x, y = (z.astype(np.float32) for z in correlated(10, 90))
        draws = resampling(np.arange(90) // 10, draws=20)
        one, other = compared(kind(), x, y, draws), compared(kind(), x.copy(), y.copy(), draws)
        assert one.value == other.value
        np.testing.assert_array_equal(one.draws, other.draws)

    @each_measure
    def test_intervals_cover_the_value_of_other_samples(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        # A neighbourhood of k rows shrinks as rows are added, so the truth is the mean over samples of this size.
        monkeypatch.undo()
        rng = np.random.default_rng(11)
        document = np.repeat(np.arange(40), 3)
        draws = resampling(document, draws=200)
        values, intervals = [], []
        for _ in range(200):
            shared = rng.standard_normal((2, 40, 5))[:, document]
            x = shared[0] + rng.standard_normal((120, 5))
            found = compared(kind(), x, x + shared[1] + rng.standard_normal((120, 5)), draws)
            values.append(found.value)
            intervals.append(found.interval(draws))
        truth = float(np.mean(values))
        assert 0.85 <= np.mean([low <= truth <= high for low, high in intervals]) <= 1


class TestUndefined:
    @each_measure
    @pytest.mark.parametrize("resampled", [False, True])
    def test_reasons(self, kind: Any, resampled: bool) -> None:
        x, y = (z.astype(np.float32) for z in correlated(12, 30))
        flat = np.full((30, 4), 0.1, np.float32)
        at_mean = y - y.mean(axis=0, dtype=np.float64).astype(np.float32)
        at_mean[:15], at_mean[7] = -at_mean[15:], 0
        at_mean[22] = 0
        cases = [
            (x[:10], y[:10], "10 nearest neighbours need at least 11 rows, not 10"),
            (flat, y, "the first set of states does not vary"),
            (x, flat, "the second set of states does not vary"),
            (x, at_mean, "the second set of states has 2 of 30 rows at its mean, which have no direction"),
        ]
        for one, other, reason in cases:
            draws = resampling(np.arange(len(one)) // 2, draws=5) if resampled else None
            found = compared(kind(), one, other, draws)
            assert math.isnan(found.value)
            assert found.reason == reason
            assert found.interval(draws) is None
            if draws is not None:
                assert np.isnan(found.draws).all()

    def test_neighbours_no_nearer_than_other_rows(self) -> None:
        # Every corner of a cross-polytope is at right angles to its neighbours, once rotated only to rounding.
        q = random_orthogonal(4, 4, np.random.default_rng(13))
        corners = np.concatenate([q, -q]).astype(np.float32)
        x = correlated(13, 8)[0].astype(np.float32)
        found = compared(Cknna(3), x, corners)
        assert math.isnan(found.value)
        assert found.reason == "the second set of states has neighbours no nearer than the mean of all rows"

    @each_measure
    def test_progress_adds_up(self, kind: Any) -> None:
        x, y = correlated(14, 50)
        for n in (5, 50):
            shares: list[float] = []
            kind()([x[:n], y[:n]], [(0, 1)], None, shares.append)
            assert sum(shares) == pytest.approx(1)

    @each_measure
    def test_impossible_settings(self, kind: Any) -> None:
        with pytest.raises(FitError, match="0 nearest neighbours"):
            kind(0)
        with pytest.raises(FitError, match="the first at most the second"):
            kind()([np.eye(20)] * 2, [(1, 0)], None, tick)
