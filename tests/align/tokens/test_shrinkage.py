"""A shrunken table of tokens against the same table made row by row, and what is left of it in little memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.solvers import lambda_grid
from align.tokens.shrinkage import SHRINKAGE, Shrunken, fit_shrunken
from align.tokens.sums import TRAIN, VALIDATION, TokenSums, Vocabulary
from featstore.errors import FitError


def made(seed: int = 0, *, tokens: int = 60, n: int = 900, dx: int = 5, dy: int = 7, share: float = 0.5) -> Any:
    """Train and validation tokens by a power law, their states, and features that say part of them."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(10_000, tokens, replace=False))
    features = rng.normal(size=(tokens, dx)) + 3.0
    own = rng.normal(size=(tokens, dy)) + share * features @ rng.normal(size=(dx, dy)) + 100.0
    chance = np.arange(1, tokens + 1) ** -1.4
    drawn = rng.choice(tokens, size=n, p=chance / chance.sum())
    y = own[drawn] + 2.0 * rng.normal(size=(n, dy))
    cut = 2 * n // 3
    table = {int(token): x for token, x in zip(ids, features, strict=True)}
    return ids[drawn][:cut], y[:cut], ids[drawn][cut:], y[cut:], table


def lookup(table: dict[int, np.ndarray]) -> Any:
    return lambda ids: np.stack([table[int(token)] for token in ids])


def sums_of(
    train: Any, y: Any, val: Any, y_val: Any, features: Any = None, *, memory: int = 1 << 30, cut: int = 128
) -> TokenSums:
    vocabulary = Vocabulary.of(train, val, entry_bytes=8 * y.shape[1], memory=memory)
    sums = TokenSums(vocabulary, y[:50].mean(axis=0), features)
    for split, tokens, states in ((TRAIN, train, y), (VALIDATION, val, y_val)):
        for start in range(0, len(tokens), cut):
            sums.add(split, tokens[start : start + cut], states[start : start + cut])
    return sums


def by_row(
    train: Any, y: Any, table: dict[int, np.ndarray] | None, k: float, ridge: float, ids: Any, own: Any = None
) -> np.ndarray:
    """The same prediction written out: ridge over rows, means by token, one after the other."""
    mean = y.mean(axis=0)
    if table is None:
        back = {int(token): mean for token in ids}
    else:
        x = np.stack([table[int(token)] for token in train])
        centred = x - x.mean(axis=0)
        gram = centred.T @ centred
        weight = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), centred.T @ (y - mean))
        back = {int(token): mean + (table[int(token)] - x.mean(axis=0)) @ weight for token in ids}
    found = []
    for token in ids:
        rows = y[train == token] if own is None or token in own else y[:0]
        prior = back[int(token)]
        found.append(prior if not len(rows) else prior + len(rows) / (len(rows) + k) * (rows.mean(axis=0) - prior))
    return np.stack(found)


def error_of(fitted: Shrunken, val: Any, y_val: Any) -> float:
    ids, place = np.unique(val, return_inverse=True)
    return float(((y_val - fitted.of(ids)[place]) ** 2).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("known", [True, False])
def test_it_is_the_table_made_row_by_row(seed: int, known: bool) -> None:
    train, y, val, y_val, table = made(seed)
    features = lookup(table) if known else None
    fitted = fit_shrunken(sums_of(train, y, val, y_val, features), features)
    ids = np.array(sorted(table))
    expected = by_row(train, y, table if known else None, fitted.k, fitted.ridge or 0.0, ids)
    assert not set(ids) <= set(train.tolist()), "some tokens must be new"
    np.testing.assert_allclose(fitted.of(ids), expected, rtol=1e-9)
    assert fitted.val_error == pytest.approx(error_of(fitted, val, y_val), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_both_strengths_are_the_best_of_all_on_validation_rows(seed: int) -> None:
    train, y, val, y_val, table = made(seed)
    fitted = fit_shrunken(sums_of(train, y, val, y_val, lookup(table)), lookup(table))
    ids, place = np.unique(val, return_inverse=True)
    errors = {
        (k, float(ridge)): float(((y_val - by_row(train, y, table, k, float(ridge), ids)[place]) ** 2).sum())
        for k in SHRINKAGE
        for ridge in lambda_grid()
    }
    assert min(errors, key=lambda both: errors[both]) == (fitted.k, fitted.ridge)
    assert 0 < fitted.k < SHRINKAGE[-1]


def test_cuts_do_not_matter() -> None:
    train, y, val, y_val, table = made(1)
    first, second = (
        fit_shrunken(sums_of(train, y, val, y_val, lookup(table), cut=cut), lookup(table)) for cut in (7, 100_000)
    )
    ids = np.array(sorted(table))
    np.testing.assert_allclose(first.of(ids), second.of(ids), rtol=1e-12)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("entries", [0, 1, 12, 40])
def test_little_memory_leaves_the_most_frequent_tokens_their_sums(entries: int, known: bool) -> None:
    train, y, val, y_val, table = made(2)
    features = lookup(table) if known else None
    sums = sums_of(train, y, val, y_val, features, memory=entries * 8 * y.shape[1])
    held = sum(len(part) for part in sums._sums)
    assert held <= entries
    own = sums.vocabulary.ids[sums.vocabulary.own]
    counts = {int(token): int((train == token).sum()) for token in sums.vocabulary.ids}
    assert not own.size or min(counts[int(t)] for t in own) >= max(counts[t] for t in counts if t not in own)
    fitted = fit_shrunken(sums, features)
    ids = np.array(sorted(table))
    expected = by_row(train, y, table if known else None, fitted.k, fitted.ridge or 0.0, ids, set(own.tolist()))
    # The ridge is that of all rows, whoever has sums of its own.
    np.testing.assert_allclose(fitted.of(ids), expected, rtol=1e-8)
    assert fitted.val_error == pytest.approx(error_of(fitted, val, y_val), rel=1e-9)


def test_what_tokens_decide_alone_is_read_off_the_table() -> None:
    train, _, val, _, table = made(3)
    rng = np.random.default_rng(0)
    own = {token: rng.normal(size=7) for token in table}
    y, y_val = (np.stack([own[int(t)] for t in side]) for side in (train, val))
    fitted = fit_shrunken(sums_of(train, y, val, y_val), None)
    assert fitted.k == 0
    seen = np.unique(train)
    np.testing.assert_allclose(fitted.of(seen), np.stack([own[int(t)] for t in seen]), atol=1e-12)


def test_noise_is_shrunk_away() -> None:
    train, y, val, y_val, table = made(4)
    rng = np.random.default_rng(1)
    y, y_val = rng.normal(size=y.shape), rng.normal(size=y_val.shape)
    fitted = fit_shrunken(sums_of(train, y, val, y_val, lookup(table)), lookup(table))
    assert fitted.k >= 256
    assert fitted.val_error == pytest.approx(float(((y_val - y.mean(axis=0)) ** 2).sum()), rel=0.02)


def test_what_cannot_be_summed_is_refused() -> None:
    vocabulary = Vocabulary.of([1, 2], [2], entry_bytes=8, memory=100)
    sums = TokenSums(vocabulary, np.zeros(1))
    with pytest.raises(FitError, match="not counted"):
        sums.add(TRAIN, [3], np.zeros((1, 1)))
    with pytest.raises(FitError, match="not finite"):
        sums.add(TRAIN, [1], np.full((1, 1), np.nan))
    with pytest.raises(FitError, match="1 train and 0 validation rows"):
        fit_shrunken(TokenSums(Vocabulary.of([1], [], entry_bytes=8, memory=100), np.zeros(1)), None)
