"""Measures under exchanged partners: what each of them prepares once, against computing all of it anew."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from align.metrics import debiased_cka
from align.similarity.floors import tokens
from align.similarity.floors.strata import strata
from align.similarity.measures.base import Measure, Partners
from align.similarity.measures.by_name import parse_measures
from align.similarity.measures.exchanged import TOGETHER
from align.similarity.measures.partners import recomputed
from featstore.errors import FitError

SIZES = (41, 60, 33, 52, 38, 45, 57, 30, 47)


def rows_of() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, place and token."""
    rng = np.random.default_rng(3)
    document = np.repeat(np.arange(len(SIZES)), SIZES)
    return document, np.concatenate([np.arange(size) for size in SIZES]), rng.integers(0, 25, len(document))


def layers_of(token: np.ndarray, document: np.ndarray, widths: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Layers in which token, document and what only these rows share all have a part."""
    shared = np.random.default_rng(0)
    parts = [shared.normal(size=(25, 8))[token], shared.normal(size=(9, 8))[document]]
    parts.append(shared.normal(size=(len(token), 8)))
    rng = np.random.default_rng(seed)
    made = []
    for width in widths:
        rows = sum(part @ rng.normal(size=(8, width)) for part in parts) + rng.normal(size=(len(token), width))
        made.append((rows + 2).astype(np.float32))
    return made


def whole_documents(draws: int = 3) -> tuple[np.ndarray, Partners]:
    document, place, _ = rows_of()
    found = strata(document, place)
    return found.chosen, found.partners(document, draws, np.random.default_rng(1))


def same_tokens(draws: int = 3) -> tuple[np.ndarray, Partners]:
    document, _, token = rows_of()
    rng = np.random.default_rng(1)
    chosen = tokens.exchangeable(token, document, rng)
    return chosen, tokens.partners(token[chosen], document[chosen], draws, rng)


def silent(_: float) -> None:
    pass


@pytest.mark.parametrize("kind", [whole_documents, same_tokens])
@pytest.mark.parametrize("measure", parse_measures("all"), ids=lambda measure: measure.name)
def test_prepared_layers_give_what_computing_anew_gives(measure: Measure, kind: object) -> None:
    document, _, token = rows_of()
    chosen, partners = kind()  # type: ignore[operator]
    xs, ys = (layers_of(token, document, widths, seed) for widths, seed in (((7, 9), 1), ((6, 8, 5), 2)))
    xs, ys = [x[chosen] for x in xs], [y[chosen] for y in ys]
    found = measure.under(xs, ys, partners, silent)
    wanted = recomputed(measure, xs, ys, partners)
    assert found.shape == (4, 2, 3)
    if kind is same_tokens and measure.name in ("cka", "rbf-cka"):
        # Pairs within a document of the second side are no pairs of one document of the first.
        found, wanted = found[:1], wanted[:1]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    assert np.ptp(found) > 0.01 or len(found) == 1
    if not measure.symmetric:
        back = measure.under(ys, xs, partners.inverse(), silent)
        assert back.shape == (4, 3, 2)
        assert np.abs(back.transpose(0, 2, 1) - found).max() > 0.01


@pytest.mark.parametrize("name", ["cka", "rbf-cka", "rsa"])
def test_several_strata_give_what_computing_anew_gives(name: str) -> None:
    rng = np.random.default_rng(4)
    sizes = rng.integers(12, 40, 27)
    document = np.repeat(np.arange(27), sizes)
    found = strata(document, np.concatenate([np.arange(size) for size in sizes]))
    partners = found.partners(document, 3, rng)
    assert len(partners.strata) == 3
    topic = rng.normal(size=(27, 5))[document[found.chosen]]
    x, y, z = ((topic + rng.normal(size=topic.shape)).astype(np.float32) for _ in range(3))
    [measure] = parse_measures(name)
    exchanged = measure.under([x, z], [y], partners, silent)
    np.testing.assert_allclose(exchanged, recomputed(measure, [x, z], [y], partners), atol=1e-6)
    # The same exchanges without their strata: row by row, all pairs of rows within documents being left out as well.
    if name == "rsa":
        plain = measure.under([x, z], [y], Partners(partners.index, partners.document), silent)
        np.testing.assert_allclose(plain, exchanged, atol=1e-6)


def test_more_layers_than_are_gathered_together_give_the_same() -> None:
    document, _, token = rows_of()
    chosen, partners = whole_documents(1)
    [measure] = parse_measures("cka")
    ys = [y[chosen] for y in layers_of(token, document, (4,) * (TOGETHER + 2), 5)]
    xs = [x[chosen] for x in layers_of(token, document, (6,), 1)]
    found = measure.under(xs, ys, partners, silent)
    each = np.concatenate([measure.under(xs, [y], partners, silent) for y in ys], axis=2)
    np.testing.assert_allclose(found, each, atol=1e-7)


def test_cka_of_tokens_leaves_out_pairs_within_a_document_of_either_side() -> None:
    """By the definition, pair of rows by pair of rows, in float64."""
    document, _, token = rows_of()
    keep = np.flatnonzero(document < 5)[::3]
    document, token = document[keep], token[keep] % 3
    chosen = tokens.exchangeable(token, document, np.random.default_rng(0))
    document, token = document[chosen], token[chosen]
    partners = tokens.partners(token, document, 2, np.random.default_rng(0))
    rng = np.random.default_rng(5)
    x, y = (rng.normal(size=(len(token), 4)).astype(np.float32) for _ in range(2))
    [measure] = parse_measures("cka")
    found = measure.under([x], [y], partners, silent)[:, 0, 0]

    n = len(token)
    apart = document[:, None] != document
    pairs = [(i, j) for i, j in combinations(range(n), 2) if apart[i, j]]
    design = np.zeros((len(pairs), n))
    for line, (i, j) in zip(design, pairs, strict=True):
        line[[i, j]] = 1

    def left(rows: np.ndarray) -> np.ndarray:
        wide = rows.astype(np.float64)
        wide -= wide.mean(axis=0)
        kernel = wide @ wide.T
        values = np.array([kernel[pair] for pair in pairs])
        rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
        whole = np.zeros((n, n))
        for (i, j), value in zip(pairs, rest, strict=True):
            whole[i, j] = whole[j, i] = value
        return whole

    a, b = left(x), left(y)
    for line, value in zip(partners.index, found, strict=True):
        moved = b[np.ix_(line, line)]
        share = (apart & apart[np.ix_(line, line)]).sum() / apart.sum()
        cosine = (a * moved).sum() / np.sqrt((a**2).sum() * (b**2).sum()) / share
        assert value == pytest.approx(cosine, abs=1e-6)
    assert found[0] == pytest.approx(debiased_cka(x, y, documents=document)[0], abs=1e-6)


def test_an_undefined_layer_leaves_the_others_alone() -> None:
    document, _, token = rows_of()
    chosen, partners = whole_documents(1)
    [x] = (x[chosen] for x in layers_of(token, document, (6,), 1))
    flat = np.ones_like(x)
    for measure in parse_measures("all"):
        found = measure.under([flat, x], [x, flat], partners, silent)
        assert np.isnan(found[:, 0]).all(), measure.name
        assert np.isnan(found[:, :, 1]).all(), measure.name
        assert np.isfinite(found[:, 1, 0]).all(), measure.name


def test_partners_are_permutations() -> None:
    document = np.zeros(4, dtype=np.int64)
    with pytest.raises(FitError, match="permutation"):
        Partners(np.array([[0, 1, 1, 3]]), document)
    with pytest.raises(FitError, match="4 rows"):
        Partners(np.array([[0, 1, 2]]), document)
    line = np.array([[1, 2, 0, 3]])
    assert (Partners(line, document).inverse().index == [[2, 0, 1, 3]]).all()
