"""Debiased CKA without each document, recomputed from the rows that are left, and the jackknife's interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from align.metrics import debiased_cka
from align.similarity.measures.left_out import half_widths, left_out

SIZES = [5, 9, 70, 3, 20, 11, 8]


def planted(sizes: list[int], seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Three layers that share some directions, documents of unequal length in mixed order."""
    rng = np.random.default_rng(seed)
    document = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    shared = rng.normal(size=(len(document), 6)) + rng.normal(size=(len(sizes), 6))[document]
    layers = [shared @ rng.normal(size=(6, d)) + 0.7 * rng.normal(size=(len(document), d)) for d in (12, 30, 17)]
    return [(layer + 3.0).astype(np.float32) for layer in layers], document


@pytest.mark.parametrize("sizes", [SIZES, [1] * 9, [6, 4, 5]])
def test_the_rows_without_a_document_say_the_same(sizes: list[int]) -> None:
    layers, document = planted(sizes)
    found = left_out(layers, document)
    assert found.shape == (len(sizes), 3, 3)
    for d in range(len(sizes)):
        rest = document != d
        for i, x in enumerate(layers):
            for j, y in enumerate(layers):
                want, reason = debiased_cka(x[rest], y[rest], document[rest])
                assert reason is None
                assert found[d, i, j] == pytest.approx(want, abs=1e-5), "float32 panels"
    # Leaving nothing out would be seen.
    assert np.abs(found[:, 0, 1] - debiased_cka(layers[0], layers[1], document)[0]).min() > 1e-4


def test_a_gaussian_kernel_keeps_the_bandwidth_of_all_rows() -> None:
    layers, document = planted(SIZES)
    found = left_out(layers, document, fraction=1.0)
    kernels = []
    for layer in layers:
        wide = layer.astype(np.float64)
        squared = np.square(wide[:, None] - wide[None]).sum(axis=2)
        median = np.median(squared[np.triu_indices(len(wide), 1)])
        kernels.append(np.exp(-squared / (2 * median)))
    for d in range(len(SIZES)):
        rest = document != d
        apart = document[rest][:, None] != document[rest]
        left = [_without_row_effects(k[np.ix_(rest, rest)], apart) for k in kernels]
        want = (left[0] * left[1]).sum() / np.sqrt((left[0] ** 2).sum() * (left[1] ** 2).sum())
        assert found[d, 0, 1] == pytest.approx(want, abs=2e-5)


def _without_row_effects(kernel: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Least squares of a_i + a_j over the pairs that count, by a dense solve."""
    normal = np.diag(apart.sum(axis=1).astype(float)) + apart
    effects = np.linalg.lstsq(normal, (kernel * apart).sum(axis=1), rcond=None)[0]
    left: np.ndarray = np.where(apart, kernel - effects[:, None] - effects, 0.0)
    return left


def test_what_is_undefined_without_a_document_is_not_a_number() -> None:
    layers, document = planted([6, 7])
    assert np.isnan(left_out(layers, document)).all(), "a single document is left"
    layers, document = planted(SIZES)
    layers[1] = np.ones_like(layers[1])
    found = left_out(layers, document)
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[:, 0, 2]).all()


def test_half_the_width_is_the_jackknife_s() -> None:
    values = np.random.default_rng(1).normal(size=(7, 2, 2))
    spread = 6 / np.sqrt(7) * values.std(axis=0, ddof=1)
    np.testing.assert_allclose(half_widths(values, 4.5), stats.t(3.5).ppf(0.975) * spread, rtol=1e-12)
    # Of means the jackknife is the usual interval, which is what these values are.
    sample = np.random.default_rng(2).normal(size=9)
    means = (sample.sum() - sample) / 8
    low, high = stats.t.interval(0.95, 8, loc=sample.mean(), scale=stats.sem(sample))
    assert half_widths(means, 9.0) == pytest.approx((high - low) / 2)


def test_few_documents_have_no_interval() -> None:
    assert np.isnan(half_widths(np.zeros((2, 1)), 2.0)).all()
    assert np.isnan(half_widths(np.zeros((5, 1)), 1.9)).all()
