"""Row effects in closed form against a generic least-squares solver."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.solvers.row_effects import Documents, alone, in_order, one_after_another
from featstore.errors import FitError
from tests.support.residuals import without_row_effects

#: Of two documents, equal and not; one as long as all others, or longer; one row each; many.
SIZES = [(5, 5), (3, 8), (1, 9), (6, 1, 2, 3), (9, 2, 2), (1,) * 7, (4, 1, 6, 2, 3), (20, 1, 1), (2,) * 9]


def kernel(rng: Any, n: int) -> Any:
    x = rng.standard_normal((n, 4)) + 1
    return x @ x.T


def residual(k: Any, documents: Documents) -> Any:
    labels = np.repeat(np.arange(len(documents.sizes)), documents.sizes)
    between = labels[:, None] != labels
    effects = documents.effects(np.where(between, k, 0).sum(axis=1))
    return np.where(between, k - effects[:, None] - effects, 0)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_residual_is_that_of_least_squares(sizes: tuple[int, ...]) -> None:
    documents = Documents(np.array(sizes))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    k = kernel(np.random.default_rng(0), len(labels))
    expected = without_row_effects(k, labels)
    np.testing.assert_allclose(residual(k, documents), expected, atol=1e-11)
    np.testing.assert_allclose(expected.sum(axis=0), 0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 2**20))
def test_the_product_follows_from_sums(sizes: list[int], seed: int) -> None:
    documents = Documents(np.array(sizes))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(seed)
    k, m = (np.where(labels[:, None] != labels, kernel(rng, len(labels)), 0) for _ in range(2))
    rows = np.stack([k.sum(axis=1), m.sum(axis=1)])
    by_document = np.add.reduceat(rows, np.cumsum(sizes) - sizes, axis=1)
    weighted = (rows * np.repeat(documents.weights, sizes)) @ rows.T
    shared = documents.shared(weighted, by_document, by_document)
    expected = np.sum(without_row_effects(k, labels) * without_row_effects(m, labels))
    size = math.sqrt(np.sum(k * k) * np.sum(m * m)) + 1e-9
    assert np.sum(k * m) - 2 * shared[0, 1] == pytest.approx(expected, abs=1e-10 * size)
    assert shared[0, 1] == pytest.approx(shared[1, 0], abs=1e-10 * size)


def test_a_row_each_is_u_centring() -> None:
    n, rng = 12, np.random.default_rng(1)
    k = kernel(rng, n)
    bare = k - np.diag(np.diag(k))
    rows = bare.sum(axis=1) / (n - 2)
    expected = bare - rows[:, None] - rows + bare.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(residual(k, alone(n)), expected, atol=1e-12)
    assert alone(n).freedom == n * (n - 3)
    assert alone(n).effective == n


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((3,), "at least 4 rows, not 3"),
        ((8,), "all 8 are of one"),
        ((1, 1, 1), "at least 4 rows"),
        ((1, 4), "5 rows of 2 documents"),
        ((1, 1, 2), None),
        ((2, 2), None),
        ((1, 1, 1, 1), None),
    ],
)
def test_where_nothing_is_left(sizes: tuple[int, ...], reason: str | None) -> None:
    documents = Documents(np.array(sizes))
    if reason is None:
        assert documents.reason is None
        assert documents.freedom > 0
    else:
        assert reason in (documents.reason or "")
    if len(sizes) > 1:
        labels = np.repeat(np.arange(len(sizes)), sizes)
        design = [np.eye(len(labels))[i] + np.eye(len(labels))[j] for i, j in zip(*pairs_of(labels), strict=True)]
        assert documents.freedom == len(design) - 2 * np.linalg.matrix_rank(design)
        np.testing.assert_allclose(documents.others(np.zeros(len(sizes))), 0)


def pairs_of(labels: Any) -> Any:
    return np.nonzero(labels[:, None] != labels)


def test_labels_of_any_kind_and_order() -> None:
    order, documents = in_order(np.array(["b", "a", "b", "c", "a", "b"]))
    assert order.tolist() == [1, 4, 0, 2, 5, 3]
    assert documents.sizes.tolist() == [2, 3, 1]
    assert documents.effective == pytest.approx(36 / 14)
    with pytest.raises(FitError, match="labels of shape"):
        in_order(np.zeros((3, 2)))
    with pytest.raises(FitError, match="at least one"):
        Documents(np.array([2, 0]))


@pytest.mark.parametrize("piece", [1 << 20, 3])
def test_rows_in_the_order_of_their_documents_need_no_sorting(piece, monkeypatch):
    monkeypatch.setattr("align.solvers.row_effects._PIECE", piece)
    for labels in ([0], [3, 3, 3], [-1, -1, 0, 2, 2, 2, 2, 7], [0, 1, 2, 3], []):
        order, documents = in_order(np.array(labels, np.int32))
        found = one_after_another(np.array(labels, np.int32))
        assert found is not None
        assert found.sizes.tolist() == documents.sizes.tolist()
        assert order.tolist() == list(range(len(labels)))
    for labels in ([1, 0], [0, 0, 1, 0], [0, 1, 2, 1], [5, 6, 7, 3]):
        assert one_after_another(np.array(labels, np.int32)) is None
