"""Which documents and rows change places, and what the draws say of a value."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.similarity.floors import tokens
from align.similarity.floors.exchange import Sampled, floors
from align.similarity.floors.reading import readings
from align.similarity.floors.strata import FEWEST, STRATUM, by_place, grouped, strata
from align.similarity.floors.summary import summary
from align.similarity.measures.by_name import parse_measures


def documents_of(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    document = np.repeat(np.arange(len(sizes)), sizes)
    return document, np.concatenate([np.arange(size) for size in sizes])


# Documents


def test_documents_change_places_at_equal_positions() -> None:
    rng = np.random.default_rng(0)
    document, place = documents_of(rng.integers(20, 90, 40).tolist())
    shuffle = rng.permutation(len(document))
    document, place = document[shuffle], place[shuffle]
    found = strata(document, place)
    partners = found.partners(document, 25, rng)
    own, at = document[found.chosen], place[found.chosen]
    moved, stayed = 0, 0
    for line in partners.index[1:]:
        assert (at[line] == at).all()
        pairs = {(int(a), int(b)) for a, b in zip(own, own[line], strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        moved += sum(a != b for a, b in pairs)
        stayed += sum(a == b for a, b in pairs)
    assert (partners.index[0] == np.arange(len(own))).all()
    # One of a stratum's documents stays on average.
    assert moved > 5 * stayed > 0
    assert len(own) > 0.75 * len(document)


def test_strata_keep_as_many_rows_as_any_cut_of_the_lengths() -> None:
    """Against every way to cut few documents into groups of neighbours in length, some left out."""
    rng = np.random.default_rng(1)

    def best(lengths: list[int], least: int) -> int:
        if not lengths:
            return 0
        kept = best(lengths[1:], least)
        for size in range(least, min(2 * least - 1, len(lengths)) + 1):
            kept = max(kept, size * lengths[size - 1] + best(lengths[size:], least))
        return kept

    for count in (4, 5, 7, 8, 13, 17, 20):
        sizes = rng.integers(1, 60, count)
        groups = grouped((np.arange(count), sizes))
        least = min(STRATUM, max(FEWEST, math.ceil(0.75 * count)))
        assert all(len(group) >= least for group in groups)
        assert sum(len(group) * sizes[group].min() for group in groups) == best(sorted(sizes, reverse=True), least)


def test_a_stump_of_a_document_does_not_shorten_all_others() -> None:
    document, place = documents_of([50, 50, 50, 50, 50, 50, 2])
    found = strata(document, place)
    assert found.documents == 6
    assert len(found.chosen) == 300


def test_three_documents_have_no_floor() -> None:
    document, place = documents_of([30, 30, 30])
    assert strata(document, place).rows == ()


def test_positions_that_a_document_lacks_take_no_part() -> None:
    document, place = documents_of([10] * 5)
    keep = ~((document == 2) & (place == 4))
    found = strata(document[keep], place[keep])
    assert 4 not in place[keep][found.chosen]
    assert len(found.chosen) == 45


def test_a_sample_has_the_same_places_in_documents_of_similar_length() -> None:
    document, place = documents_of([100] * 24 + [37] * 9)
    chosen = by_place(document, place, 400, seed=3)
    assert len(chosen) == 400
    found = strata(document[chosen], place[chosen])
    assert len(found.chosen) > 380
    assert len(by_place(document, place, 10_000, seed=3)) == len(document)
    # Every row is about as likely as any other.
    times = sum(np.isin(np.arange(len(document)), by_place(document, place, 400, seed=seed)) for seed in range(300))
    share = 400 / len(document)
    assert abs(times[document < 24].mean() / 300 - share) < 0.01
    assert abs(times[document >= 24].mean() / 300 - share) < 0.02


def test_limited_strata_keep_their_documents() -> None:
    document, place = documents_of([80] * 16)
    found = strata(document, place).limited(320, np.random.default_rng(0))
    assert found.chosen.size <= 320
    assert found.documents == 16
    assert len(found.partners(document, 2, np.random.default_rng(0)).document) == found.chosen.size


# Tokens


def test_partners_have_the_same_token_in_another_document() -> None:
    rng = np.random.default_rng(0)
    document, _ = documents_of([70, 30, 45, 60])
    token = np.minimum(rng.zipf(1.4, len(document)), 50)
    chosen = tokens.exchangeable(token, document, rng)
    own, of = token[chosen], document[chosen]
    partners = tokens.partners(own, of, 30, rng)
    for line in partners.index[1:]:
        assert (own[line] == own).all()
        assert (of[line] != of).all()
        assert len(set(line)) == len(line)
    lonely = [t for t in np.unique(token) if len(np.unique(document[token == t])) == 1]
    assert lonely
    assert not np.isin(own, lonely).any()


def test_a_token_of_one_document_mostly_keeps_as_many_rows_as_others_have() -> None:
    document = np.array([0] * 10 + [1] * 3 + [2])
    chosen = tokens.exchangeable(np.zeros(14, dtype=np.int64), document, np.random.default_rng(0))
    assert np.bincount(document[chosen]).tolist() == [4, 3, 1]


def test_every_partner_of_a_token_can_be_drawn() -> None:
    document = np.array([0, 0, 1, 1, 2, 2])
    index = tokens.partners(np.zeros(6, dtype=np.int64), document, 500, np.random.default_rng(0)).index[1:]
    counts = np.zeros((6, 6))
    for line in index:
        counts[np.arange(6), line] += 1
    apart = document[:, None] != document
    assert (counts[~apart] == 0).all()
    assert counts[apart].min() > 80


# What draws say


def test_p_values_count_draws_as_close_as_the_value() -> None:
    found = np.zeros((5, 1, 2))
    found[:, 0, 0] = [0.5, 0.1, 0.5, 0.2, 0.6]
    found[:, 0, 1] = [0.9, 0.1, 0.2, 0.3, 0.4]
    tables = summary(found, "higher")
    assert tables["value"].tolist() == [[0.5, 0.9]]
    assert tables["p"].tolist() == [[3 / 5, 1 / 5]]
    assert tables["mean"][0, 1] == pytest.approx(0.25)
    assert tables["p95"][0, 1] == pytest.approx(np.quantile([0.1, 0.2, 0.3, 0.4], 0.95))
    # The closest of each exchange, in spreads: that of the second pair, then the first's, the second's, the first's.
    assert tables["p_max"].tolist() == [[3 / 5, 1 / 5]]
    lower = summary(-found, "lower")
    for name in ("p", "p_max"):
        assert (lower[name] == tables[name]).all()
    assert np.allclose(lower["p95"], -tables["p95"])


def test_rounding_is_no_difference() -> None:
    found = np.full((5, 1, 1), 0.3)
    found[0] += 1e-9
    assert summary(found, "higher")["p"] == 1
    assert summary(found, "lower")["p"] == 1


def test_a_layer_with_itself_is_not_among_the_closest() -> None:
    found = np.full((4, 2, 2), 0.1)
    found[0, 0, 1] = found[0, 1, 0] = 0.5
    found[1, 0, 0] = 0.9
    assert summary(found, "higher", alone=True)["p_max"][0, 1] == 1 / 4
    assert summary(found, "higher")["p_max"][0, 1] == 2 / 4


def test_a_pair_with_a_high_floor_is_no_rival_of_others() -> None:
    rng = np.random.default_rng(2)
    found = np.empty((40, 1, 2))
    found[:, 0, 0] = 0.4 + 0.01 * rng.normal(size=40)
    found[:, 0, 1] = 0.02 + 0.001 * rng.normal(size=40)
    found[0, 0, 1] = 0.03
    assert summary(found, "higher")["p_max"][0, 1] == 1 / 40
    assert summary(found, "higher")["p_max"][0, 0] > 0.05


def test_the_closest_of_several_null_pairs_is_rarely_above() -> None:
    rng = np.random.default_rng(3)
    scale = np.array([0.4, 0.1, 0.01, 0.001])
    wrong = sum((summary(rng.normal(size=(40, 1, 4)) * scale, "higher")["p_max"] <= 0.05).any() for _ in range(600))
    # Two of forty arrangements may stand first: 5 %.
    assert 12 <= wrong <= 50


def test_what_is_undefined_has_no_p_value() -> None:
    found = np.random.default_rng(0).normal(size=(4, 2, 2))
    found[:, 1] = np.nan
    tables = summary(found, "higher")
    for name in ("mean", "p95", "p", "p_max"):
        assert np.isfinite(tables[name][0]).all()
        assert np.isnan(tables[name][1]).all()


# Both floors


def world(count: int = 14, seed: int = 0, *, planted: float = 0.0, by_token: float = 0.0, topic: float = 0.0) -> tuple:
    """Two models' rows with equal tokens, topics of their own, and a planted relation."""
    rng = np.random.default_rng(seed)
    document, place = documents_of(rng.integers(30, 60, count).tolist())
    token = rng.integers(0, 30, len(document))
    both = rng.normal(size=(len(document), 6))
    sides = []
    for _ in range(2):
        rows = rng.normal(size=(len(document), 6)) + planted * both @ rng.normal(size=(6, 6))
        rows += by_token * rng.normal(size=(30, 6))[token] + topic * rng.normal(size=(count, 6))[document]
        sides.append(rows.astype(np.float32))
    return (*sides, Sampled(document, place, token))


def test_one_vector_for_every_token_is_at_the_token_floor() -> None:
    x, _, rows = world(planted=0.5, by_token=2)
    y = np.random.default_rng(9).normal(size=(30, 6)).astype(np.float32)[rows.token]
    for measure in parse_measures("all"):
        found = floors(measure, [x], [y], rows, draws=19)
        floor, documents = found["token"], found["documents"]
        # Partners of the same token are the very same rows. Pairs within a document on the other side drop out of CKA,
        # and which of equal rows are neighbours depends on their order.
        loose = 0.02 if measure.name in ("cka", "rbf-cka", "mutual-knn", "cknna") else 1e-5
        np.testing.assert_allclose(floor["mean"], floor["value"], atol=loose)
        assert floor["p"][0, 0] > 0.05, measure.name
        assert documents["p"][0, 0] == 1 / 20, measure.name


def test_a_planted_relation_is_above_both_floors() -> None:
    x, y, rows = world(planted=1, by_token=0.5, topic=0.5)
    for measure in parse_measures("all"):
        found = floors(measure, [x], [y], rows, draws=19)
        assert found["documents"]["p_max"][0, 0] == found["token"]["p_max"][0, 0] == 1 / 20, measure.name
        assert ("opposite" in found["token"]) != measure.symmetric
        sign = 1 if measure.closer == "higher" else -1
        assert sign * (found["documents"]["value"] - found["documents"]["p95"])[0, 0] > 0


def test_the_same_seed_draws_the_same_and_another_others() -> None:
    x, y, rows = world()
    [measure] = parse_measures("cka")
    first, again, other = (floors(measure, [x], [y], rows, draws=5, seed=seed) for seed in (0, 0, 1))
    assert first["token"]["mean"] == again["token"]["mean"] != other["token"]["mean"]


def test_rows_stay_within_what_is_allowed() -> None:
    x, y, rows = world()
    [measure] = parse_measures("rsa")
    found = floors(measure, [x], [y], rows, draws=3, most=200)
    assert 100 < found["documents"]["rows"] <= 200
    assert 100 < found["token"]["rows"] <= 200
    assert found["token"]["of"] == len(x)


def test_where_there_is_no_floor_the_reason_is_told() -> None:
    document, place = documents_of([30, 30])
    rows = Sampled(document, place, np.arange(60))
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    [measure] = parse_measures("cka")
    found = floors(measure, [x], [x], rows, draws=3)
    assert "2 documents" in found["documents"]["reason"]
    assert "hardly any token" in found["token"]["reason"]
    assert [floor["draws"] for floor in found.values()] == [0, 0]
    told = readings(found)
    assert [reading.pairs for reading in told] == [0, 0]
    assert told[0].reason == found["documents"]["reason"]


def test_a_reading_counts_pairs_of_layers_once() -> None:
    table = [[0.5, 0.1], [0.1, 0.5]]
    floor = {"mean": table, "p95": table, "p_max": [[0.01, 0.04], [0.04, 0.01]], "rows": 10, "draws": 39}
    [whole] = readings({"token": floor})
    assert (whole.above, whole.pairs, whole.low, whole.high) == (4, 4, 0.1, 0.5)
    [once] = readings({"token": floor}, alone=True)
    assert (once.above, once.pairs, once.high) == (1, 1, 0.1)


# Validity


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "count"), [("topic", 4), ("topic", 6), ("topic", 24), ("position", 8)])
def test_documents_or_positions_alone_pass_the_floor_in_one_of_twenty(kind: str, count: int) -> None:
    """Independent models whose rows vary by document, or by position, alike: 400 worlds, 19 draws each."""
    [measure] = parse_measures("cka")
    above = 0
    for seed in range(400):
        x, y, rows = world(count, seed, topic=0.7 if kind == "topic" else 0.0)
        if kind == "position":
            rng = np.random.default_rng(seed)
            x, y = (side + rng.normal(size=(60, 6)).astype(np.float32)[rows.place] for side in (x, y))
        found = floors(measure, [x], [y], rows, draws=19)["documents"]
        above += found["p"][0, 0] <= 0.05
    # 5 %, three standard errors above.
    assert above / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
