"""Partial R2 from sums over documents, and where it is null."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.metrics import DocumentSums, add_partial, partial_r2
from align.statistics import ratio


def sums(documents: int = 12, seed: int = 0, *, token: float = 1.0) -> DocumentSums:
    rng = np.random.default_rng(seed)
    found, owner = DocumentSums(), np.repeat(np.arange(documents), 20)
    y = rng.normal(size=(len(owner), 4))
    found.add_targets(owner, y, np.zeros(4))
    found.add("map", owner, y, y + 0.5 * rng.normal(size=y.shape))
    found.add("token", owner, y, y + token * rng.normal(size=y.shape))
    found.add("mean", owner, y, np.zeros_like(y))
    return found


def entry() -> dict[str, Any]:
    baselines = {"token": {"r2": 0.0}, "mean": {"r2": 0.0}, "pca": {"r2": 0.1}, "identity": None}
    return {"test": {"r2": 0.75}, "baselines": baselines, "reasons": {}}


def test_it_is_one_less_the_ratio_of_errors_with_the_interval_of_that_ratio() -> None:
    own = sums()
    sse, token = own.sse["map"], own.sse["token"]
    value, interval, reason = partial_r2(sse, token, own.sst)
    assert value == pytest.approx(1 - sse.sum() / token.sum())
    other = ratio(sse, token).estimate().interval
    assert interval == pytest.approx((1 - other[1], 1 - other[0]))
    assert reason is None


def test_every_map_of_the_test_split_gets_one() -> None:
    found = entry()
    add_partial(found, sums())
    assert found["test"]["partial_r2"] == pytest.approx(0.75, abs=0.03)
    assert found["test"]["partial_r2_ci95"][0] < 0.75 < found["test"]["partial_r2_ci95"][1]
    assert found["baselines"]["token"]["partial_r2"] == 0
    assert found["baselines"]["token"]["partial_r2_ci95"] == [0, 0]
    assert found["baselines"]["mean"]["partial_r2"] == pytest.approx(0, abs=0.2)
    assert found["baselines"]["pca"]["partial_r2"] is None
    assert set(found["reasons"]) == {"baselines.pca.partial_r2", "baselines.pca.partial_r2_ci95"}


def test_few_documents_have_a_figure_and_no_interval() -> None:
    found = entry()
    add_partial(found, sums(2))
    assert found["test"]["partial_r2"] == pytest.approx(0.75, abs=0.1)
    assert found["test"]["partial_r2_ci95"] is None
    assert "at least 3 test documents" in found["reasons"]["test.partial_r2_ci95"]
    assert "test.partial_r2" not in found["reasons"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("needs rows", "needs rows"),
        (sums(token=0.0), "the token alone leaves no error"),
        (sums(token=np.nan), "not finite"),
        (sums().renamed({"token": "other"}), "why there is none"),
    ],
)
def test_what_is_undefined_has_a_reason(given: Any, reason: str) -> None:
    found = entry()
    found["reasons"]["baselines.token"] = "why there is none"
    add_partial(found, given)
    assert found["test"]["partial_r2"] is None
    assert reason in found["reasons"]["test.partial_r2"]
    assert reason in found["reasons"]["test.partial_r2_ci95"]
