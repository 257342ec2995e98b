"""Verdicts on claims: what an interval allows to say, and how many documents would say more."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.metrics import r2_of
from align.statistics import CONTRADICTED, SUPPORTED, UNDECIDED, judge, mean
from tests.support.simulated_documents import documents


def around(value: float, spread: float, count: int = 12) -> np.ndarray:
    steps = np.linspace(-1, 1, count)
    return value + spread * steps / steps.std(ddof=1)


class TestJudge:
    def test_inside_outside_and_across(self) -> None:
        found = mean(around(0.92, 0.01)).estimate()
        assert judge(found, 0.90, 0.95).state == SUPPORTED
        assert judge(found, 0.95, 0.99).state == CONTRADICTED
        assert judge(found, 0.5, 0.8).state == CONTRADICTED
        assert judge(found, 0.92, 0.95).state == UNDECIDED
        assert judge(found, low=0.9).state == SUPPORTED
        assert judge(found, high=0.9).state == CONTRADICTED

    def test_an_interval_that_holds_a_range_supports_nothing(self) -> None:
        assert judge(mean(around(0.92, 0.2)).estimate(), 0.90, 0.95).state == UNDECIDED

    def test_without_an_interval_nothing_is_decided(self) -> None:
        found = judge(mean([1.0, 1.0]).estimate(), 0.5, 2.0)
        assert (found.state, found.documents) == (UNDECIDED, None)

    def test_it_says_how_many_documents_would_decide(self) -> None:
        values = around(0.92, 0.06, 12)
        found = judge(mean(values).estimate(), 0.90, 0.95)
        assert found.state == UNDECIDED
        assert found.documents is not None
        assert found.documents > 12
        enough, fewer = (around(0.92, 0.06, count) for count in (found.documents, int(0.9 * found.documents)))
        assert judge(mean(enough).estimate(), 0.90, 0.95).state == SUPPORTED
        assert judge(mean(fewer).estimate(), 0.90, 0.95).state == UNDECIDED

    def test_a_figure_on_the_edge_is_never_decided(self) -> None:
        values = np.array([-1.0, -0.5, 0.5, 1.0])
        assert judge(mean(values).estimate(), 0.0, math.inf).documents is None

    @pytest.mark.parametrize("count", [6, 30])
    def test_what_is_not_so_is_rarely_supported(self, count: int) -> None:
        rng, states = np.random.default_rng(count), []
        for _ in range(500):
            drawn = documents(count, rng, truth=(0.85,))
            states.append(judge(r2_of(drawn.sse[0], drawn.sst).estimate(), 0.90, 0.95).state)
        assert states.count(SUPPORTED) <= 0.03 * 500
        # 85 % is false, and with more documents the verdict comes.
        assert states.count(CONTRADICTED) >= (0.3 if count == 6 else 0.9) * 500
