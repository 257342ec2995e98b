"""The width of the Gaussian kernel: which rows it is taken from, and rows that have none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from align.similarity.measures.base import Resampling, Result, resampling
from align.similarity.measures.kernel_cka import RbfCka, _kernel_panel, _norms, median_bandwidth
from align.solvers.row_effects import alone
from featstore.errors import FitError


def compared(measure: Any, x: Any, y: Any, draws: Resampling | None = None) -> Result:
    return measure([x, y], [(0, 1)], draws, lambda share: None)[0, 1]


class TestBandwidth:
    def test_at_most_so_many_rows_evenly_spread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("align.similarity.measures.kernel_cka.BANDWIDTH_ROWS", 10)
        x = np.random.default_rng(21).standard_normal((45, 6))
        some = x[np.arange(10) * 45 // 10]
        assert median_bandwidth(x, fraction=2.0) == pytest.approx(2 * math.sqrt(np.median(pdist(some) ** 2)))
        document = np.random.default_rng(0).permutation(45) % 5
        with_draws = compared(RbfCka(), x, x, resampling(document, draws=3))
        assert with_draws.facts is not None
        assert with_draws.facts["sigma_first"] == pytest.approx(median_bandwidth(x))

    @pytest.mark.parametrize("fraction", [0.0, -1.0, math.nan, math.inf])
    def test_impossible_fractions(self, fraction: float) -> None:
        with pytest.raises(FitError, match="bandwidth fraction"):
            RbfCka(fraction)
        with pytest.raises(FitError, match="bandwidth fraction"):
            median_bandwidth(np.eye(3), fraction=fraction)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("d", [3, 50, 111])
    def test_most_rows_equal_away_from_the_origin(self, d: int, dtype: Any) -> None:
        rng = np.random.default_rng(22)
        x = np.concatenate([np.tile(rng.standard_normal(d), (80, 1)), rng.standard_normal((20, d))]).astype(dtype)
        assert median_bandwidth(x) == 0
        assert median_bandwidth(x[60:]) > 0.1
        assert "at least half of its rows are equal" in (compared(RbfCka(), x, x).reason or "")

    def test_no_row_is_nearer_than_itself(self) -> None:
        # Rows far out and close together: rounding takes squared distances below 0, by far more than sigma.
        rng = np.random.default_rng(23)
        rows = (100 * rng.standard_normal(64) * (1 + 1e-6 * rng.standard_normal((40, 1)))).astype(np.float32)
        assert _kernel_panel(rows, _norms(rows), 0.01, alone(40), 0, 40).max() <= 1

    def test_one_row(self) -> None:
        with pytest.raises(FitError, match="at least 2 rows, not 1"):
            median_bandwidth(np.ones((1, 3)))
