"""The shuffled control of fits: targets of other documents at equal places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from align.closed_form.fit import Fit, baselines
from align.layers import LayerPair
from align.moments import scan as scanning
from align.moments.control import next_document
from align.moments.places import places
from align.moments.scan import scan, stored_scan, usable_moments
from align.moments.scatter import as_if_shuffled, centered
from featstore.store.moments.writing import add_moments
from tests.support.planted import Planted, plant, spectrum_rows

PAIR = LayerPair("a", (1,), "b", 1)


@pytest.fixture(scope="module")
def topical(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Two models that share what documents and positions share, and nothing else."""
    rng = np.random.default_rng(0)
    document, place = np.divmod(np.arange(3000), 150)
    at = rng.normal(size=(150, 8))[place]
    x, y = (at @ rng.normal(size=(8, 8)) + rng.normal(size=(3000, 8)) for _ in range(2))
    return plant(tmp_path_factory.mktemp("control") / "s.zarr", {1: x}, {1: y}, document=document)


def test_partners_are_at_the_same_place_of_another_document() -> None:
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(6), [40, 25, 60, 25, 10, 33])
    place = np.concatenate([np.arange(size) for size in (40, 25, 60, 25, 10, 33)])
    shuffle = rng.permutation(len(document))
    document, place = document[shuffle], place[shuffle]
    line = next_document(document, place, rng)
    assert sorted(line) == list(range(len(line)))
    shared = place < 40
    assert (place[line][shared] == place[shared]).all()
    assert (document[line][shared] != document[shared]).all()
    # Beyond the second longest there is nobody else: other places of the same document.
    assert (line != np.arange(len(line))).all()
    # One document after the other in one circle: where all have a place, each has one next.
    early = place < 10
    assert len({(a, b) for a, b in zip(document[early], document[line][early], strict=True)}) == 6


def test_a_place_is_a_window_and_a_number_in_it(topical: Planted) -> None:
    store = topical.store
    pairs = store.pairs("a", "b").select()
    found = places(store, pairs)
    shuffle = np.random.default_rng(0).permutation(len(pairs))
    for number in np.unique(pairs.document):
        own = found[pairs.document == number]
        assert len(np.unique(own)) == len(own)
        assert own.min() == 0
    picked = pairs.where(np.arange(len(pairs)) % 2 == 0)
    assert (np.diff(places(store, picked)[picked.document == picked.document[0]]) >= 1).all()
    assert len(shuffle) == len(found)


def test_the_control_is_the_product_of_exchanged_rows(topical: Planted) -> None:
    store = topical.store
    found = scan(store, store.pairs("a", "b").select(), [PAIR], seed=3)[PAIR.key]
    assert found.control == "documents exchanged"
    train = store.pairs("a", "b").select(0)
    line = next_document(train.document.astype(np.int64), places(store, train), np.random.default_rng(found.seed))
    x = store.rows("a", 1)[train.row_source] - found.train.origin_x
    y = store.rows("b", 1)[train.row_target[line]] - found.train.origin_y
    a, b = (np.square(rows).sum(axis=1) for rows in (x, y))
    control = found.shuffled
    for own, wanted in ((control.c, x.T @ y), (control.ux, x.T @ b), (control.uy, y.T @ a), (control.d, a @ b)):
        np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-3)
    for name in ("gx", "gy", "sx", "sy", "a", "b", "aa", "bb"):
        assert np.array_equal(getattr(control, name), getattr(found.train, name)), name


def test_the_control_keeps_what_places_share(topical: Planted) -> None:
    """A map fitted to it predicts as well as one fitted to true partners; to shuffled rows it could not."""
    store = topical.store
    found = scan(store, store.pairs("a", "b").select(), [PAIR])[PAIR.key]
    true, control = (np.linalg.norm(centered(m).c) for m in (found.train, found.shuffled))
    assert 0.9 < control / true < 1.1
    rows = np.linalg.norm(centered(as_if_shuffled(found.train, np.random.default_rng(0))).c)
    assert rows < 0.2 * true
    fitted = baselines(Fit("affine"), PAIR, found, 0)["shuffled"]
    assert not isinstance(fitted, str)
    test = store.pairs("a", "b").select(2)
    x, y = store.rows("a", 1)[test.row_source], store.rows("b", 1)[test.row_target]
    error = np.square(fitted.apply(x) - y).sum() / np.square(y - y.mean(axis=0)).sum()
    assert error < 0.75


def test_both_directions_and_stored_moments_exchange_the_same(topical: Planted, tmp_path: Path) -> None:
    add_moments(topical.path, quiet=True)
    store = topical.store
    for source, target in (("a", "b"), ("b", "a")):
        pair = LayerPair(source, (1,), target, 1)
        stored = usable_moments(store, (source, target), [((source, 1), (target, 1))])
        assert stored is not None
        rows = scan(store, store.pairs(source, target).select(), [pair])[pair.key]
        kept = stored_scan(stored, [pair])[pair.key]
        assert kept.control == "documents exchanged"
        np.testing.assert_allclose(kept.shuffled.c, rows.shuffled.c, rtol=1e-6, atol=1e-6)


def test_a_joint_map_exchanges_all_its_sources_alike(tmp_path: Path) -> None:
    x = {k: spectrum_rows(900, 6, k) for k in (1, 2)}
    store = plant(tmp_path / "s.zarr", x, {1: x[1]}).store
    joint = LayerPair("a", (1, 2), "b", 1)
    found = scan(store, store.pairs("a", "b").select(), [joint])[joint.key]
    assert found.shuffled.c.shape == (12, 6)
    assert np.linalg.norm(centered(found.shuffled).c) < 0.3 * np.linalg.norm(centered(found.train).c)


def test_many_rows_beside_stored_moments_are_drawn_as_if_shuffled(
    topical: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_moments(topical.path, quiet=True)
    monkeypatch.setattr(scanning, "EXCHANGED_ROWS", 10)
    stored = usable_moments(topical.store, ("a", "b"), [(("a", 1), ("b", 1))])
    assert stored is not None
    found = stored_scan(stored, [PAIR])[PAIR.key]
    assert found.control == "rows shuffled"
    wanted = as_if_shuffled(found.train, np.random.default_rng(found.seed))
    np.testing.assert_array_equal(found.shuffled.c, wanted.c)
