"""What is said of a whole table: equal runs have no winner, and a planted difference is found."""

from __future__ import annotations

import numpy as np
import pytest

from align.statistics import Estimate
from align.sweeps.differences import MAP, Sums, difference, verdicts
from tests.support.tiers import tiered

PAIRS, RUNS = 14, 6


def table(rng: np.random.Generator, documents: int, gain: float = 0.0) -> list[list[Sums]]:
    """Sums of six runs at fourteen layer pairs, the same documents everywhere; the last run is better by the gain.

    Documents are unequally long; how hard one is is common to all runs of a layer pair, and mostly to all layer pairs;
    what a run makes of it beside that has its own share at every layer pair, and is common to them in part.
    """
    n = rng.integers(20, 400, documents)
    sst = n * rng.uniform(0.6, 1.4, documents)
    hard = rng.uniform(0.4, 0.9, documents)
    own = rng.normal(0, 0.03, (RUNS, documents))
    found = []
    for _ in range(PAIRS):
        here = np.clip(hard + rng.normal(0, 0.05, documents), 0.05, None)
        runs = []
        for run in range(RUNS):
            share = here + own[run] + rng.normal(0, 0.03, documents) - gain * (run == RUNS - 1)
            ids = tuple(range(documents))
            runs.append(Sums(ids, tuple(n.tolist()), sst, {MAP: np.maximum(share, 0.0) * sst}))
        found.append(runs)
    return found


def said(rng: np.random.Generator, documents: int, gain: float = 0.0) -> np.ndarray:
    """The verdicts of a table, all compared with the first run: text ``(pairs, runs - 1)``.

    Of three unequal documents one may hold nearly everything; such a table has no estimates, and says so everywhere.
    """
    found: list[Estimate | None] = []
    for runs in table(rng, documents, gain):
        for other in runs[1:]:
            estimate = difference(other, runs[0], MAP, "first")
            assert not isinstance(estimate, str) or "holds nearly everything" in estimate
            found.append(None if isinstance(estimate, str) else estimate)
    return np.array([each.verdict for each in verdicts(found)]).reshape(PAIRS, RUNS - 1)


@pytest.mark.parametrize(("documents", "tables"), tiered([(6, 60), (30, 60)], [(6, 3000), (30, 3000), (3, 1000)]))
def test_equal_runs_have_no_winner(documents: int, tables: int) -> None:
    """At most one table in twenty has a "better" in it. A bootstrap of each difference alone had one in 92 of 100."""
    rng = np.random.default_rng(documents)
    with_one = sum(bool((said(rng, documents) == "better").any()) for _ in range(tables))
    # Three standard errors of the simulation.
    assert with_one / tables <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / tables)


@pytest.mark.parametrize(("documents", "gain"), [(6, 0.35), (30, 0.08)])
def test_a_run_that_is_better_is_found(documents: int, gain: float) -> None:
    rng = np.random.default_rng(1)
    found = np.stack([said(rng, documents, gain) for _ in range(10)])
    assert (found[:, :, -1] == "better").mean() > 0.6
    assert (found[:, :, :-1] == "better").mean() < 0.02


def test_what_cannot_be_tested_is_unknown_and_counts_for_nothing() -> None:
    rng = np.random.default_rng(2)
    [first, second, *_] = table(rng, 10, 0.0)[0]
    estimate = difference(second, first, MAP, "x")
    assert not isinstance(estimate, str)
    [alone] = verdicts([estimate])
    among = verdicts([None, estimate, None])
    assert among[1] == alone
    assert (among[0].p_adjusted, among[0].verdict) == (None, "unknown")
    assert difference("no sums", first, MAP, "x") == "no sums"
    assert (
        difference(second, first, "token", "x")
        == "documents.json has no sums of token: the run did not score it by document"
    )
    few = Sums((0, 1), (5, 5), np.ones(2), {MAP: np.ones(2)})
    assert "at least 3 test documents" in str(difference(few, few, MAP, "x"))
