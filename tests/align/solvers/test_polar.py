"""Polar factors from eigendecompositions against LAPACK's singular value decomposition, hard cases included."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from align.solvers import polar as module
from align.solvers.polar import polar
from tests.support.planted import rotation


def of_range(m: int, n: int, decades: float, seed: int = 0) -> np.ndarray:
    """A matrix whose singular values fall by so many decades."""
    k = min(m, n)
    return (rotation(m, seed, k) * np.logspace(0, -decades, k) * 37.0) @ rotation(n, seed + 1, k).T


def expected(a: np.ndarray) -> tuple[np.ndarray, float]:
    u, s, vt = scipy.linalg.svd(a, full_matrices=False)
    return u @ vt, float(s.sum())


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts singular value decompositions."""
    count: list[int] = []
    real = module.svd
    monkeypatch.setattr(module, "svd", lambda a: count.append(1) or real(a))
    return count


@pytest.mark.parametrize("shape", [(60, 60), (120, 80), (80, 120), (1, 1), (7, 1), (1, 7)])
# LAPACK itself finds small directions of A to no more than their share of the largest.
@pytest.mark.parametrize(("decades", "near"), [(0, 1e-13), (3, 1e-11), (6, 1e-8), (9, 1e-7), (12, 1e-4)])
def test_it_is_the_factor_of_the_svd_without_one(
    shape: tuple[int, int], decades: float, near: float, decomposed: list[int]
) -> None:
    a = of_range(*shape, decades)
    weight, gain = polar(a)
    wanted, total = expected(a)
    assert not decomposed
    np.testing.assert_allclose(weight, wanted, atol=near)
    assert gain == pytest.approx(total, rel=1e-13)
    inner = weight.T @ weight if shape[0] >= shape[1] else weight @ weight.T
    np.testing.assert_allclose(inner, np.eye(min(shape)), atol=1e-14)


@pytest.mark.parametrize("shape", [(60, 60), (90, 50), (50, 90)])
@pytest.mark.parametrize("rank", [0, 1, 30, 49])
def test_directions_without_size_are_left_to_the_svd(shape: tuple[int, int], rank: int, decomposed: list[int]) -> None:
    a = of_range(*shape, 2)
    u, s, vt = scipy.linalg.svd(a, full_matrices=False)
    s[rank:] = 0
    a = (u * s) @ vt
    weight, gain = polar(a)
    assert decomposed
    np.testing.assert_array_equal(weight, expected(a)[0])
    assert gain == pytest.approx(s.sum(), rel=1e-12, abs=1e-12)
    inner = weight.T @ weight if shape[0] >= shape[1] else weight @ weight.T
    np.testing.assert_allclose(inner, np.eye(min(shape)), atol=1e-13)
    np.testing.assert_array_equal(weight, polar(a)[0])


def test_a_wrong_decomposition_is_seen(monkeypatch: pytest.MonkeyPatch, decomposed: list[int]) -> None:
    a = of_range(40, 40, 2)
    turned = rotation(40, 9)

    def eigh(value: np.ndarray, *, overwrite: bool = False) -> tuple[np.ndarray, np.ndarray]:
        del overwrite
        values, vectors = np.linalg.eigh(value)
        return values, vectors @ turned

    monkeypatch.setattr(module, "eigh", eigh)
    weight, _ = polar(a)
    assert decomposed
    np.testing.assert_array_equal(weight, expected(a)[0])


def test_torch_tensors_give_the_same() -> None:
    torch = pytest.importorskip("torch")
    a = of_range(50, 40, 6)
    weight, gain = polar(torch.from_numpy(a))
    assert isinstance(weight, torch.Tensor)
    np.testing.assert_allclose(weight.numpy(), polar(a)[0], atol=1e-9)
    assert gain == pytest.approx(expected(a)[1], rel=1e-12)
