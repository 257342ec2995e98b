"""Leading singular vectors from products with few columns, against LAPACK's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from align.solvers import leading as module
from align.solvers.leading import leading_directions


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the way of wide ones, with the restarts that these need."""
    monkeypatch.setattr(module, "_NARROW", 64)
    monkeypatch.setattr(module, "_BESIDE", 4)
    monkeypatch.setattr(module, "_BLOCKS", 8)


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((200, 240))
    return {
        "noise": noise,
        "tall": rng.standard_normal((400, 160)),
        "falling": noise * np.arange(1, 241) ** -1.0,
        "of rank 3": noise[:, :3] @ rng.standard_normal((3, 240)),
        "nothing": np.zeros((200, 240)),
        "all alike": np.eye(240),
    }


def lapack(a: np.ndarray, count: int) -> np.ndarray:
    return scipy.linalg.svd(a)[2][:count].T


@pytest.mark.parametrize("name", ["noise", "tall", "falling", "of rank 3"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_they_are_those_of_lapack(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a = matrices()[name]
    used: list[int] = []
    real = module._lanczos
    monkeypatch.setattr(module, "_lanczos", lambda *given: (used.append(1), real(*given))[1])
    found = leading_directions(a, count)
    assert used
    rank = min(count, 3) if name == "of rank 3" else count
    # Each the same but for its sign; of no size at all, any direction will do.
    np.testing.assert_allclose(np.abs(np.sum(found * lapack(a, count), axis=0))[:rank], 1, rtol=1e-9)
    np.testing.assert_allclose(found.T @ found, np.eye(count), atol=1e-12)
    np.testing.assert_array_equal(found, leading_directions(a, count))


@pytest.mark.parametrize("name", ["nothing", "all alike"])
def test_where_no_direction_leads_any_will_do(name: str) -> None:
    found = leading_directions(matrices()[name], 4)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-12)


def test_near_directions_are_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    a = matrices()["noise"]
    products: list[int] = []
    real = np.linalg.qr
    monkeypatch.setattr(np.linalg, "qr", lambda *given, **how: (products.append(1), real(*given, **how))[1])
    monkeypatch.setattr(module, "_CHECKED", 1)
    cold = leading_directions(a, 6)
    first = len(products)
    warm = leading_directions(a, 6, cold)
    assert len(products) - first < first
    np.testing.assert_allclose(np.abs(np.sum(cold * warm, axis=0)), 1, rtol=1e-10)


def test_what_does_not_converge_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PRODUCTS", 2)
    a = matrices()["noise"]
    np.testing.assert_allclose(np.abs(np.sum(leading_directions(a, 5) * lapack(a, 5), axis=0)), 1, rtol=1e-12)
