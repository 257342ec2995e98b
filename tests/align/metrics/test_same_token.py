"""Retrieval among rows of one token: who is asked, what a token alone scores, and what perfect states score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.metrics import Scorer, retrieval, retrieval_same_token
from align.metrics.same_token import same_token_rows
from featstore.errors import FitError


def texts(seed: int, n: int, vocabulary: int = 40) -> Any:
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, vocabulary + 1)
    return rng.choice(vocabulary, size=n, p=chance / chance.sum())


@pytest.mark.parametrize(("n", "rows", "group"), [(3000, 2048, 32), (3000, 100, 7), (3000, 3, 2), (50, 2048, 32)])
def test_rows_are_of_tokens_that_occur_twice_and_no_more_than_asked_for(n: int, rows: int, group: int) -> None:
    tokens = texts(n, n)
    chosen = same_token_rows(tokens, np.random.default_rng(1), rows=rows, group=group)
    assert (np.diff(chosen) > 0).all()
    _, counts = np.unique(tokens[chosen], return_counts=True)
    assert len(chosen) <= rows
    assert counts.min() >= 2
    assert counts.max() <= group
    full = sum(min(int((tokens == token).sum()), group) for token in set(tokens) if (tokens == token).sum() > 1)
    assert len(chosen) >= min(rows - 1, full)


def test_frequent_tokens_come_first_and_the_seed_decides() -> None:
    tokens = np.repeat(np.arange(500), 4)
    tokens[:1000] = 0
    met = [0 in tokens[same_token_rows(tokens, np.random.default_rng(seed), rows=8, group=4)] for seed in range(60)]
    assert np.mean(met) > 0.5
    one, same, other = (same_token_rows(tokens, np.random.default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("tokens", [[], [1, 2, 3]])
def test_without_repeated_tokens_there_are_no_rows(tokens: list[int]) -> None:
    assert same_token_rows(np.array(tokens, dtype=int), np.random.default_rng(0)).size == 0


def test_it_is_retrieval_within_each_token() -> None:
    rng = np.random.default_rng(0)
    tokens, y = texts(1, 300), rng.normal(size=(300, 6))
    y_hat = y + 0.8 * rng.normal(size=y.shape)
    found, reason = retrieval_same_token(y, y_hat, tokens)
    assert reason is None
    hits = chances = rows = 0.0
    for token in np.unique(tokens):
        own = tokens == token
        if own.sum() < 2:
            continue
        # What is subtracted from either side is its own.
        mean, shift = y[own].mean(axis=0), y_hat[own].mean(axis=0) - y[own].mean(axis=0)
        hits += own.sum() * float(retrieval(y[own], y_hat[own] - shift, centre=mean)["retrieval_top1"] or 0)
        chances, rows = chances + 1, rows + own.sum()
    assert found["retrieval_same_token_top1"] == pytest.approx(hits / rows)
    assert found["retrieval_same_token_chance"] == pytest.approx(chances / rows)
    assert found["retrieval_same_token_gallery"] == rows
    assert found["retrieval_same_token_tokens"] == chances
    assert found["retrieval_same_token_ceiling"] == 1


def test_the_token_alone_scores_exactly_chance_and_the_truth_the_ceiling() -> None:
    rng = np.random.default_rng(2)
    tokens, table = texts(3, 400), rng.normal(size=(40, 6))
    y = rng.normal(size=(400, 6))
    found, _ = retrieval_same_token(y, table[tokens], tokens)
    assert found["retrieval_same_token_top1"] == pytest.approx(found["retrieval_same_token_chance"], abs=1e-12)
    # A layer where equal tokens have equal states: nobody can do better than chance among them.
    found, _ = retrieval_same_token(table[tokens], table[tokens], tokens)
    assert found["retrieval_same_token_top1"] == found["retrieval_same_token_ceiling"]
    assert found["retrieval_same_token_ceiling"] == pytest.approx(found["retrieval_same_token_chance"], abs=1e-12)


def test_what_the_token_says_does_not_hide_what_the_context_says() -> None:
    """A token ten times as loud as its context, and a map that knows a quarter of the context."""
    rng = np.random.default_rng(8)
    tokens, table, context = texts(9, 600), 10 * rng.normal(size=(40, 12)), rng.normal(size=(600, 12))
    y_hat = 0.9 * table[tokens] + 0.5 * context + 0.9 * rng.normal(size=context.shape)
    found, _ = retrieval_same_token(table[tokens] + context, y_hat, tokens)
    top, chance = (float(found[f"retrieval_same_token_{name}"] or 0) for name in ("top1", "chance"))
    assert top > 3 * chance


def test_the_ceiling_is_what_a_perfect_map_scores() -> None:
    rng = np.random.default_rng(4)
    table = rng.normal(size=(30, 8)).astype(np.float32)
    y = table[texts(5, 512, 30)]
    perfect = retrieval(y, y.copy(), centre=np.zeros(8))
    assert perfect["retrieval_top1"] == perfect["retrieval_ceiling"]
    _, counts = np.unique(y, axis=0, return_counts=True)
    assert perfect["retrieval_ceiling"] == pytest.approx(len(counts) / 512)
    assert retrieval(rng.normal(size=(99, 8)), y[:99], centre=np.zeros(8))["retrieval_ceiling"] == 1


def test_nothing_to_retrieve_has_a_reason() -> None:
    y = np.random.default_rng(0).normal(size=(3, 2))
    found, reason = retrieval_same_token(y, y, [1, 2, 3])
    assert found["retrieval_same_token_top1"] is None
    assert found["retrieval_same_token_gallery"] == 0
    assert reason == "no source token occurs twice among the rows"
    _, reason = retrieval_same_token(y, y * np.nan, [1, 1, 1])
    assert "not finite" in (reason or "")
    with pytest.raises(FitError, match="tokens 2"):
        retrieval_same_token(y, y, [1, 2])


@pytest.mark.parametrize("cuts", [[], [1, 2, 1500], [700, 1400, 2100]])
def test_a_stream_keeps_the_rows_that_were_chosen(cuts: list[int]) -> None:
    rng = np.random.default_rng(6)
    tokens, y = texts(7, 2500), rng.normal(size=(2500, 5))
    y_hat = y + rng.normal(size=y.shape)
    scorer = Scorer(np.zeros(5), 2500, tokens=tokens)
    for start, stop in zip([0, *cuts], [*cuts, 2500], strict=True):
        scorer.update(y[start:stop], y_hat[start:stop])
    found, reasons = scorer.result()
    rows = same_token_rows(tokens, np.random.default_rng(0).spawn(3)[2])
    expected, _ = retrieval_same_token(y[rows], y_hat[rows], tokens[rows])
    assert reasons == {}
    assert {key: found[key] for key in expected} == expected


def test_a_stream_without_tokens_says_so() -> None:
    scorer = Scorer(np.zeros(2), 10)
    scorer.update(np.random.default_rng(0).normal(size=(10, 2)), np.ones((10, 2)))
    found, reasons = scorer.result()
    assert found["retrieval_same_token_top1"] is None
    assert "source tokens" in reasons["retrieval_same_token_top1"]
    with pytest.raises(FitError, match="10 rows were announced with 9 tokens"):
        Scorer(np.zeros(2), 10, tokens=np.zeros(9))
