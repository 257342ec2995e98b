"""Moments of many layer pairs from one pass over the rows: equal to sums over those rows, however they are grouped."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.closed_form.fit import Fit, fit_closed
from align.layers import LayerPair
from align.moments.device import DeviceProducts, multiplier, torch_device
from align.moments.scan import (
    Scan,
    limit_rows,
    memory_of,
    read_split,
    scan,
    scans,
    sites_of,
    stored_scan,
    usable_moments,
)
from align.moments.scatter import (
    Moments,
    as_if_shuffled,
    centered,
    means,
    merge,
    moments_of,
    moved,
    paired_with_itself,
    raw,
)
from featstore.errors import FitError, LayerRangeError, PairingError, SpecError, StoreStateError
from featstore.store import open_store
from featstore.store.moments import stored as kept
from featstore.store.moments.sums import steady_products
from featstore.store.moments.writing import add_moments
from featstore.store.write.writer import adding_to
from tests.align.moments.test_moments import assert_same
from tests.support.planted import TEST, TRAIN, VAL, Planted, plant, rotation, spectrum_rows

LAYERS = (0, 1, 3)
PAIRS = [LayerPair("a", (i,), "b", j) for i in LAYERS for j in (0, 2)]
JOINT = LayerPair("a", (3, 0, 1), "b", 2)
PARTS = ("train", "val")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    # Several cuts a split, the last one short.
    monkeypatch.setattr(kept, "CUT_ROWS", 128)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Three layers by two, of different widths, far from zero, with sinks on one side."""
    core = np.random.default_rng(0).normal(size=(900, 10))
    sides = []
    for side, (layers, width) in enumerate(((LAYERS, 12), ((0, 2), 16))):
        rows = {k: core @ rotation(10, 5 * side + k, width) for k in layers}
        noise = {k: spectrum_rows(900, width, 50 * side + k, mean=4.0) for k in layers}
        sides.append({k: rows[k] + 0.5 * noise[k] for k in layers})
    sides[1][2][::40] *= 60
    return plant(tmp_path_factory.mktemp("scan") / "s.zarr", *sides)


@pytest.fixture
def summed(planted: Planted, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(planted.path, tmp_path / "m.zarr"))
    add_moments(path, quiet=True)
    return path


def reference(planted: Planted, pair: LayerPair, split: int) -> Moments:
    """Float64 sums over the store's rows, source layers concatenated row by row."""
    store = planted.store
    pairs = store.pairs(pair.source, pair.target).select(split)
    x = np.concatenate(
        [store.rows(pair.source, k)[pairs.row_source].astype(np.float64) for k in pair.source_layers], axis=1
    )
    y = store.rows(pair.target, pair.target_layer)[pairs.row_target].astype(np.float64)
    origin = np.concatenate([store.origin(pair.source, k) for k in pair.source_layers])
    return moments_of(x, y, origin, store.origin(pair.target, pair.target_layer))


def about_means(planted: Planted, pair: LayerPair, split: int) -> Moments:
    """The same about the means of the train rows, where a scan has them."""
    return moved(reference(planted, pair, split), *means(reference(planted, pair, TRAIN)))


def assert_equal(one: Scan, other: Scan) -> None:
    for part in PARTS:
        assert_same(getattr(one, part), getattr(other, part), rtol=0)
    assert_same(one.shuffled, other.shuffled, rtol=0)


def both_ways(planted: Planted, wanted: list[LayerPair], **options: Any) -> dict[str, Scan]:
    store = planted.store
    return scan(store, store.pairs(wanted[0].source, wanted[0].target).select(), wanted, **options)


def test_every_layer_pair_is_the_sum_over_its_rows(planted: Planted) -> None:
    found = both_ways(planted, [*PAIRS, JOINT])
    assert list(found) == [pair.key for pair in (*PAIRS, JOINT)]
    for pair in (*PAIRS, JOINT):
        for split, part in enumerate(PARTS):
            assert_same(getattr(found[pair.key], part), about_means(planted, pair, split), rtol=1e-6)
    assert found[JOINT.key].train.gx.shape == (36, 36)


def test_what_is_about_the_train_means_is_not_copied_for_fits(planted: Planted) -> None:
    found = both_ways(planted, [PAIRS[0]])[PAIRS[0].key]
    train, val = found.centred
    assert train.gx is found.train.gx
    assert val.c is found.val.c
    assert val.gy is found.val.gy
    assert not found.train.sx.any()
    assert found.val.sx.any()
    lost = found.without_partners
    assert lost is found.without_partners
    assert lost.centred[0].gx is train.gx
    assert lost.centred[1].c is val.c
    assert not np.allclose(lost.centred[0].c, train.c)


def test_layers_are_summed_once_and_shared(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    found = both_ways(planted, PAIRS)
    assert found["a:1->b:0"].train.gx is found["a:1->b:2"].train.gx
    assert found["a:0->b:2"].train.gy is found["a:3->b:2"].train.gy
    made: list[int] = []

    def counted(rows: Any, blocks: Any) -> Any:
        made.append(len(blocks))
        return steady_products(rows, blocks)

    monkeypatch.setattr("align.moments.scan.multiplier", lambda _: counted)
    both_ways(planted, PAIRS)
    # Three sources and two targets with themselves, and six layer pairs.
    assert set(made) == {3 + 2 + 6}


def test_scan_alone_and_in_company_are_the_same_bits(planted: Planted) -> None:
    many = both_ways(planted, [*PAIRS, JOINT])
    for pair in (PAIRS[0], PAIRS[5], JOINT):
        assert_equal(both_ways(planted, [pair])[pair.key], many[pair.key])


@pytest.mark.parametrize("pair", [PAIRS[1], JOINT], ids=["one", "joint"])
def test_of_a_target_the_diagonal_is_enough_for_most_fits(planted: Planted, pair: LayerPair) -> None:
    whole, narrow = (both_ways(planted, [pair], target_gram=gram)[pair.key] for gram in (True, False))
    for split, part in enumerate(PARTS):
        full, found = getattr(whole, part), getattr(narrow, part)
        for name in ("n", "origin_x", "origin_y", "sx", "sy", "gx", "c", "a", "d", "aa", "ux", "uy", "vx"):
            np.testing.assert_array_equal(getattr(found, name), getattr(full, name), err_msg=f"{part} {name}")
        np.testing.assert_allclose(found.gy, np.diag(full.gy), rtol=1e-6)
        np.testing.assert_allclose(found.gy, np.diag(about_means(planted, pair, split).gy), rtol=1e-6)
        # About another point, too, and nobody takes the diagonal for more than it is.
        np.testing.assert_allclose(raw(found).gy, np.diag(raw(full).gy), rtol=1e-6)
        assert np.isnan(found.bb)
        assert np.isnan(found.vy).all()
        for mixed in ((found, full), (full, found)):
            with pytest.raises(FitError, match="do not add"):
                merge(*mixed)
        for refused in (lambda m: paired_with_itself(m, "y"), lambda m: as_if_shuffled(m, np.random.default_rng(0))):
            with pytest.raises(FitError, match="target_gram=True"):
                refused(found)
    for fit in (Fit("procrustes"), Fit("linear"), Fit("affine"), Fit("reduced-rank", rank=3)):
        if fit.type == "procrustes" and pair is JOINT:
            continue
        maps = [fit_closed(fit, pair, one).tensors["weight"] for one in (whole, narrow)]
        np.testing.assert_allclose(maps[1], maps[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(FitError, match="target_gram=True"):
        fit_closed(Fit("procrustes", components=3), pair, narrow)


def test_groups_fit_the_memory_and_give_the_same_bits(planted: Planted) -> None:
    store = planted.store
    pairs = store.pairs("a", "b").select()
    whole = scan(store, pairs, PAIRS)
    memory = memory_of(store, PAIRS[:2])
    done: list[float] = []
    groups = list(scans(store, pairs, PAIRS, memory=memory, tick=done.append))
    assert len(groups) == 3
    assert [key for group in groups for key in group] == list(whole)
    for group in groups:
        for key, found in group.items():
            assert_equal(found, whole[key])
    assert sum(done) == pytest.approx((pairs.split != TEST).sum())
    # Both splits of: three source Grams, two target Grams, six products.
    assert memory_of(store, PAIRS) == 2 * 8 * (3 * 12**2 + 2 * 16**2 + 6 * 12 * 16)
    with pytest.raises(SpecError, match=r"a:0->b:0 alone takes .* more than the 1 kB allowed"):
        next(scans(store, pairs, PAIRS, memory=1000))


def test_every_pair_is_counted_once(planted: Planted) -> None:
    done: list[float] = []
    pairs = planted.store.pairs("a", "b").select()
    scan(planted.store, pairs, PAIRS, tick=done.append)
    assert sum(done) == (pairs.split != TEST).sum()
    assert len(done) > 2


def test_the_cut_moves_the_last_digits_only(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    one = both_ways(planted, [JOINT])[JOINT.key]
    monkeypatch.setattr(kept, "CUT_ROWS", 4096)
    other = both_ways(planted, [JOINT])[JOINT.key]
    for part in PARTS:
        assert_same(getattr(other, part), getattr(one, part), rtol=1e-6)
    assert not np.array_equal(other.train.c, one.train.c)


@pytest.mark.parametrize("pair", [PAIRS[3], PAIRS[3].reversed, JOINT], ids=lambda pair: pair.key)
def test_stored_moments_are_the_scan_to_their_rounding(planted: Planted, summed: Path, pair: LayerPair) -> None:
    store = open_store(summed)
    stored = usable_moments(store, ("a", "b"), [sites_of(pair)])
    assert stored is not None
    rows = scan(store, store.pairs(pair.source, pair.target).select(), [pair], seed=3)[pair.key]
    if pair is JOINT:
        for part in PARTS:
            assert_same(getattr(stored_scan(stored, [pair], seed=3)[pair.key], part), getattr(rows, part), rtol=1e-6)
    for split, part in enumerate(PARTS):
        found = read_split(stored, pair, split)
        if pair.source == "a":
            assert_same(found, reference(planted, replace(pair), split), rtol=1e-6)
        assert_same(moved(found, rows.train.origin_x, rows.train.origin_y), getattr(rows, part), rtol=1e-6)
    test = read_split(stored, pair, 2)
    assert test.n == (store.pairs("a", "b").select().split == TEST).sum()


def test_stored_grams_are_shared_between_layer_pairs(summed: Path) -> None:
    stored = usable_moments(open_store(summed), ("a", "b"), [sites_of(pair) for pair in PAIRS])
    assert stored is not None
    found = stored_scan(stored, PAIRS)
    assert found["a:1->b:0"].train.gx is found["a:1->b:2"].train.gx
    assert found["a:1->b:0"].train.gx is not found["a:1->b:0"].val.gx
    with pytest.raises(FitError, match="no layer pairs"):
        stored_scan(stored, [])


def test_a_joint_map_needs_the_products_between_its_layers(summed: Path) -> None:
    unit = kept.unit_of(("a", "b"), 0, (("a", 0), ("a", 3)))
    for name in (summed / unit, summed / "manifest" / f"{unit}.json"):
        if name.is_dir():
            shutil.rmtree(name)
        else:
            name.unlink()
    with adding_to(summed) as writer:
        writer.seal(writer.attributes() or {})
    store = open_store(summed)
    # Without the block of a:0 with a:3 the pairs answer, the joint map has to scan.
    assert usable_moments(store, ("a", "b"), [sites_of(PAIRS[0])]) is not None
    assert usable_moments(store, ("a", "b"), [sites_of(JOINT)]) is None
    stored = usable_moments(store, ("a", "b"), [sites_of(PAIRS[0])])
    assert stored is not None
    with pytest.raises(StoreStateError, match="featstore moments"):
        read_split(stored, JOINT, 0)


def test_a_model_with_itself(planted: Planted) -> None:
    pair = LayerPair("a", (0,), "a", 3)
    found = both_ways(planted, [pair, LayerPair("a", (0,), "a", 0), LayerPair("a", (0, 3), "a", 1)])
    for split, part in enumerate(PARTS):
        assert_same(getattr(found[pair.key], part), about_means(planted, pair, split), rtol=1e-6)
    same = found["a:0->a:0"].train
    np.testing.assert_array_equal(same.gx, same.gy)
    np.testing.assert_allclose(same.c, same.gx, rtol=1e-6, atol=1e-6 * np.abs(same.gx).max())


def test_the_shuffled_control_keeps_all_but_the_pairing(tmp_path: Path) -> None:
    x = spectrum_rows(4000, 16, 1, mean=2.0)
    store = plant(tmp_path / "s.zarr", {1: x, 2: x}, x @ rotation(16, 2)).store
    wanted = [LayerPair("a", (k,), "b", 1) for k in (1, 2)]
    pairs = store.pairs("a", "b").select()
    found = scan(store, pairs, wanted, seed=3)
    train, drawn = (centered(m) for m in (found["a:1->b:1"].train, found["a:1->b:1"].shuffled))
    np.testing.assert_array_equal(drawn.gx, train.gx)
    np.testing.assert_array_equal(drawn.gy, train.gy)
    # The variance of an element over permutations is gx_ii gy_jj / (n - 1).
    size = np.sqrt(np.outer(np.diag(train.gx), np.diag(train.gy)) / (train.n - 1))
    assert 0.9 < np.sqrt(np.mean((drawn.c / size) ** 2)) < 1.1
    assert np.linalg.norm(drawn.c) < 0.1 * np.linalg.norm(train.c)
    # Drawn anew for another seed and for another pair, equal moments or not.
    for other in (found["a:2->b:1"], scan(store, pairs, wanted, seed=4)["a:1->b:1"]):
        assert np.abs(centered(other.shuffled).c - drawn.c).max() > 0.1 * size.max()
    np.testing.assert_array_equal(centered(found["a:1->b:1"].shuffled).c, drawn.c)
    assert as_if_shuffled(found["a:1->b:1"].train, np.random.default_rng(0)).n == train.n


@pytest.mark.parametrize("count", [10, 100, 5000])
def test_fewer_rows_are_a_seeded_choice_in_document_order(planted: Planted, count: int) -> None:
    pairs = planted.store.pairs("a", "b")
    few = limit_rows(pairs, count, 0)
    assert len(few) == min(count, len(pairs))
    assert (np.diff(few.row_source) > 0).all()
    np.testing.assert_array_equal(few.row_source, limit_rows(pairs, count, 0).row_source)
    if count < len(pairs):
        assert (few.row_source != limit_rows(pairs, count, 1).row_source).any()
    assert limit_rows(pairs, None, 0) is pairs


# On a device.


def products_of(device: str) -> list[Any]:
    rng = np.random.default_rng(0)
    rows = {k: (rng.standard_normal((4096, w)) * 30).astype(np.float32) for k, w in (("x", 96), ("y", 64))}
    blocks = [("x", "y"), ("x", "x"), ("y", "x")]
    exact = [rows[x].astype(np.float64).T @ rows[y].astype(np.float64) for x, y in blocks]
    norms = {k: np.linalg.norm(v.astype(np.float64), axis=0) for k, v in rows.items()}
    found = list(multiplier(device)(rows, blocks))
    for (x, y), product, want in zip(blocks, found, exact, strict=True):
        assert product.dtype == np.float32
        # Far below what one TensorFloat-32 product of norms this large is off by (2^-11).
        assert (np.abs(product - want) / np.outer(norms[x], norms[y])).max() < 64 * 2.0**-24 / 4
    return found


def test_torch_multiplies_as_the_host_does(planted: Planted) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        products_of("torch-cpu")
        assert torch.get_float32_matmul_precision() == "high", "the caller's choice is left alone"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert isinstance(multiplier("torch-cpu"), DeviceProducts)
    assert multiplier("cpu") is steady_products
    host, there = (both_ways(planted, [PAIRS[0], JOINT], device=device) for device in ("cpu", "torch-cpu"))
    for key, found in there.items():
        for part in PARTS:
            assert_same(getattr(found, part), getattr(host[key], part), rtol=1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_multiplies_as_the_host_does(planted: Planted) -> None:
    products_of("cuda")
    host, there = (both_ways(planted, [JOINT], device=device)[JOINT.key] for device in ("cpu", "cuda"))
    for part in PARTS:
        assert_same(getattr(there, part), getattr(host, part), rtol=1e-6)


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(SpecError, match=rf"device '{device}' cannot be used .*; use cpu"):
        torch_device(device)


# What cannot be scanned.


def test_what_cannot_be_scanned_is_refused(planted: Planted) -> None:
    store = planted.store
    pairs = store.pairs("a", "b").select()
    with pytest.raises(FitError, match=r"no layer pairs to scan; name some with --layers"):
        scan(store, pairs, [])
    with pytest.raises(LayerRangeError, match="7"):
        scan(store, pairs, [LayerPair("a", (7,), "b", 2)])
    with pytest.raises(FitError, match=r"b:2->a:0 is not of the pairs of a and b"):
        scan(store, pairs, [LayerPair("b", (2,), "a", 0)])
    with pytest.raises(FitError, match=r"names a source layer twice"):
        scan(store, pairs, [LayerPair("a", (0, 1, 0), "b", 2)])
    for split, words in ((TRAIN, "0 pairs of a and b for training"), (VAL, "0 pairs of a and b for validation")):
        with pytest.raises(PairingError, match=words):
            scan(store, pairs.where(pairs.split != split), PAIRS)
