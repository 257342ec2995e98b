"""Moments kept in a store: equal to sums over its rows, and the same bytes however they came about."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, local
from typing import Any

import numpy as np
import pytest
import zarr

from align.closed_form.fit import Fit, baselines, fit_closed
from align.execution.threads import Threads
from align.layers import LayerPair
from align.maps.fitted import Aligner, load_adapter
from align.metrics import RETRIEVAL_KEYS, score
from align.moments.scan import scan, stored_scan, usable_moments
from align.moments.scatter import as_if_shuffled, centered
from align.runs.train import describe
from align.scoring.moments import NEEDS_DOCUMENTS, NEEDS_ROWS, score_moments
from align.similarity.compare import Comparison
from featstore.errors import CorruptDataError, FitError, SpecError, StoreBusyError, StoreStateError
from featstore.runtime.processes import Ranks
from featstore.store import Store, open_store
from featstore.store.format.packed import pack
from featstore.store.inspect.verify import verify_store
from featstore.store.moments import pieces, writing
from featstore.store.moments import stored as module
from featstore.store.moments.pieces import PieceSums, Sums, _read, least_memory
from featstore.store.moments.stored import CUT_ROWS, MEMORY, Site, StoredMoments, all_blocks, unit_of
from featstore.store.moments.sums import PANEL, BlockSums, Moments, moments_of, products, steady_products
from featstore.store.moments.writing import StoredRows, add_moments, pieces_of, sums_aside
from featstore.store.write.index import add_pairs
from featstore.store.write.writer import StoreWriter, exclusive
from tests.align.moments.test_moments import assert_same
from tests.align.similarity.test_cka import related
from tests.support.commands import call, strict_json
from tests.support.planted import SHARD_ROWS, Planted, only, plant, rotation, spectrum_rows, trained
from tests.support.store_fixtures import rowless, tree_bytes

MODELS = ("a", "b")
#: Three layers of one model and two of the other.
BLOCKS = 15


def compare_layers(path: Path, **options: Any) -> dict[str, Any]:
    """A comparison on threads, which moments alone do not need."""
    with Threads(2) as threads:
        return Comparison(path, **options).run(threads)


def rows_with_sinks(n: int = 700) -> tuple[dict[int, Any], dict[int, Any]]:
    """Layers of different widths, far from the origin; every 40th row of one model is a sink at one layer."""
    x, y = related(n)
    y[2][::40] *= 60
    return x, y


def read_moments(store: Store, x: Site, y: Site, split: int, models: tuple[str, str] | None = None) -> Moments | None:
    return StoredMoments(store, *(models or (x[0], y[0]))).read(x, y, split)


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    # Several cuts a split, the last one short.
    for room in (module, pieces, writing):
        monkeypatch.setattr(room, "CUT_ROWS", 64)
    return


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A store without moments; never written to."""
    return plant(tmp_path_factory.mktemp("moments") / "s.zarr", *rows_with_sinks())


@pytest.fixture
def path(plain: Planted, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain.path, tmp_path / "s.zarr"))


@pytest.fixture
def summed(path: Path) -> Path:
    add_moments(path, quiet=True)
    return path


def reference(path: Path, x: tuple[str, int], y: tuple[str, int], split: int) -> Any:
    """Float64 sums over the rows of the store, in one go."""
    store = open_store(path)
    pairs = store.pairs(*MODELS)
    keep = (pairs.split == split) & ~pairs.sink
    numbers = {"a": pairs.row_source[keep], "b": pairs.row_target[keep]}
    rows = [store.rows(*site)[numbers[site[0]]].astype(np.float64) for site in (x, y)]
    return moments_of(*rows, store.origin(*x), store.origin(*y))


def moment_files(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_bytes(path).items() if "moments/" in name}


# What they are.


@pytest.mark.parametrize("split", [0, 1, 2])
def test_every_block_is_the_float64_sum_over_the_rows_that_are_not_sinks(summed: Path, split: int) -> None:
    store = open_store(summed)
    stored = StoredMoments(store, "a", "b")
    assert stored.pairs.sink.sum() == 0
    assert store.pairs("a", "b").sink.sum() > 10
    sites = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 2)]
    for x in sites:
        for y in sites:
            found = stored.read(x, y, split)
            assert found is not None
            assert_same(found, reference(summed, x, y, split), rtol=1e-6)


def test_the_products_are_float32_and_the_sums_float64(summed: Path) -> None:
    found = read_moments(open_store(summed), ("a", 1), ("b", 2), 0)
    exact = reference(summed, ("a", 1), ("b", 2), 0)
    assert found is not None
    assert found.c.dtype == np.float64
    assert not np.array_equal(found.c, exact.c)
    assert not np.array_equal(found.c, found.c.astype(np.float32))


def test_a_direction_is_the_other_one_turned_round(summed: Path) -> None:
    store = open_store(summed)
    there, back = (read_moments(store, *pair, 0) for pair in ((("a", 1), ("b", 2)), (("b", 2), ("a", 1))))
    assert there is not None
    assert back is not None
    np.testing.assert_array_equal(back.c, there.c.T)
    np.testing.assert_array_equal(back.ux, there.uy)
    np.testing.assert_array_equal(back.vy, there.vx)
    assert (back.a, back.b, back.aa, back.d) == (there.b, there.a, there.bb, there.d)


def test_any_zarr_reader_finds_them(summed: Path) -> None:
    root = zarr.open_group(summed, mode="r")
    block = root["moments/a__b/train/a.1__b.2"]
    assert block["correlation"].shape == (20, 28)
    n = int(block["totals"][0])
    assert n == reference(summed, ("a", 1), ("b", 2), 0).n
    assert verify_store(summed, quiet=True)["damage"] == []


def test_verify_compares_them_with_the_rows(summed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with exclusive(summed):
        writer = StoreWriter(summed)
        stored = StoredMoments(writer.view, *MODELS)
        block = (("a", 1), ("b", 2))
        original, changed = stored.block(block, 1), []

        def spoiled(product: Any, roots: Any, *, half: bool) -> bytes:
            product[3, 5] += 1e-3 * roots[0][3] * roots[1][5]
            changed.append(half)
            return pack(product, roots, half=half)

        monkeypatch.setattr(writing, "pack", spoiled)
        x, y = (
            np.vstack([side, roots**2]) for side, roots in zip((original.x, original.y), roots_of(stored), strict=True)
        )
        totals = np.array([original.n, *original.totals])
        writing._commit(writer, stored, 1, block, Sums(original.product.copy(), x, y, totals, np.zeros(0, dtype=bool)))
        writer.seal(writer.attributes() or {})
    assert changed == [False]
    assert verify_store(summed, quiet=True)["damage"] == [
        "moments of a 1 and b 2 (val): they are not the sums of the rows"
    ]


def roots_of(stored: StoredMoments) -> list[Any]:
    """Roots of the sums of squares of the two sides of one block."""
    return [stored.store.vector(f"moments/a__b/val/a.1__b.2/{side}")[2] for side in "xy"]


def test_a_store_without_them_says_so(path: Path) -> None:
    store = open_store(path)
    assert read_moments(store, ("a", 1), ("b", 2), 0) is None
    assert not StoredMoments(store, "a", "b").covers([(("a", 1), ("b", 2))])


def test_a_model_with_itself_is_another_set_of_rows(summed: Path) -> None:
    store = open_store(summed)
    assert read_moments(store, ("a", 0), ("a", 1), 0) is None
    assert read_moments(store, ("a", 0), ("a", 1), 0, ("a", "b")) is not None


def test_a_damaged_block_is_refused(summed: Path) -> None:
    file = summed / unit_of(MODELS, 0, (("a", 1), ("b", 2))) / "correlation" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptDataError, match="correlation"):
        read_moments(open_store(summed), ("a", 1), ("b", 2), 0)


# However they came about.


def test_a_second_run_has_nothing_to_do(summed: Path) -> None:
    before = tree_bytes(summed)
    times = {p: p.stat().st_mtime_ns for p in summed.rglob("correlation/c/0/0")}
    assert add_moments(summed, quiet=True)["moments"]["a__b"] == {
        "blocks": 3 * BLOCKS,
        "written": 0,
        "bytes": sum(p.stat().st_size for p in (summed / "moments").rglob("c/**/*") if p.is_file()),
    }
    assert tree_bytes(summed) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_the_memory_allowed_does_not_touch_the_bytes(summed: Path, plain: Planted, tmp_path: Path) -> None:
    other = Path(shutil.copytree(plain.path, tmp_path / "other.zarr"))
    store = open_store(other)
    widths = [store.model(name).width for name in MODELS for _ in store.model(name).layers]
    add_moments(other, memory=sum(least_memory(widths, SHARD_ROWS)), quiet=True)
    assert tree_bytes(other) == tree_bytes(summed)


def test_memory_for_less_than_a_block_is_refused(path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"--moments-memory 1 kB is too little: one block and the rows of a piece take .* MB"
    ):
        add_moments(path, memory=1000, quiet=True)


def test_a_killed_run_goes_on(summed: Path, plain: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(shutil.copytree(plain.path, tmp_path / "other.zarr"))
    original, calls = StoreWriter.commit, []

    def killed(self: Any, unit: str, *args: Any, **facts: Any) -> None:
        calls.append(unit)
        if len(calls) == 20:
            raise KeyboardInterrupt
        original(self, unit, *args, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            add_moments(other, quiet=True)
    store = open_store(other)
    assert read_moments(store, ("a", 0), ("b", 0), 0) is None, "what is not sealed is not there"
    assert add_moments(other, quiet=True)["moments"]["a__b"]["written"] == 3 * BLOCKS - 19
    assert tree_bytes(other) == tree_bytes(summed)


def test_a_layer_added_later_brings_only_its_blocks(tmp_path: Path) -> None:
    x, y = related()
    whole = plant(tmp_path / "whole.zarr", x, y)
    add_moments(whole.path, quiet=True)
    few = plant(tmp_path / "few.zarr", {k: x[k] for k in (0, 2)}, y)
    add_moments(few.path, quiet=True)
    # The store of all layers with the moments that the store of two had.
    for name in ("moments", "manifest/moments"):
        shutil.rmtree(whole.path / name, ignore_errors=True)
        shutil.copytree(few.path / name, whole.path / name)
    add_pairs(whole.path, "end")  # seals
    assert read_moments(whole.store, ("a", 0), ("b", 0), 0) is not None
    assert read_moments(whole.store, ("a", 1), ("b", 0), 0) is None
    assert add_moments(whole.path, quiet=True)["moments"]["a__b"]["written"] == 3 * 5
    at_once = plant(tmp_path / "once.zarr", x, y)
    add_moments(at_once.path, quiet=True)
    assert tree_bytes(whole.path) == tree_bytes(at_once.path)


def test_another_mask_makes_them_outdated(summed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding a layer can add sinks; sums that still contain them must not be believed."""
    store = open_store(summed)
    pairs = store.pairs("a", "b").select(0)
    mask = store.tokens("a").sink.copy()
    mask[pairs.row_source[3]] = True
    with exclusive(summed):
        writer = StoreWriter(summed)
        writer.vectors("models/a/sinks", {"models/a/tokens/sink": mask})
        writer.seal(writer.attributes() or {})
    store = open_store(summed)
    assert read_moments(store, ("a", 1), ("b", 2), 0) is None
    assert read_moments(store, ("a", 1), ("b", 2), 1) is not None, "no validation row changed"
    with monkeypatch.context() as patch:
        # Killed between the files of a block: no entry may be left that speaks for a mixture of old and new.
        patch.setattr(StoreWriter, "commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add_moments(summed, quiet=True)
    assert StoreWriter(summed).entry(unit_of(MODELS, 0, (("a", 0), ("a", 0)))) is None
    assert add_moments(summed, quiet=True)["moments"]["a__b"]["written"] == BLOCKS
    found = read_moments(open_store(summed), ("a", 1), ("b", 2), 0)
    assert found is not None
    assert found.n == len(pairs) - 1
    assert_same(found, reference(summed, ("a", 1), ("b", 2), 0), rtol=1e-6)
    assert not [words for words in verify_store(summed, quiet=True)["damage"] if "moments" in words]


def test_a_store_of_moments_alone(summed: Path) -> None:
    store = open_store(summed)
    before = read_moments(store, ("a", 1), ("b", 2), 0)
    rowless(summed)
    after = read_moments(open_store(summed), ("a", 1), ("b", 2), 0)
    assert before is not None
    assert after is not None
    assert_same(after, before, rtol=0)
    assert add_moments(summed, quiet=True)["moments"]["a__b"]["written"] == 0
    shutil.rmtree(summed / "manifest" / "moments" / "a__b" / "train")
    with pytest.raises(StoreStateError, match=r"lacks moments of layer 0 of 'a' and holds no rows"):
        add_moments(summed, quiet=True)


def test_one_writer_at_a_time(path: Path) -> None:
    with exclusive(path), pytest.raises(StoreBusyError):
        add_moments(path, quiet=True)


# The sums themselves, as an extraction that never stores a row feeds them.


@pytest.mark.parametrize("pieces", [1, 3, 64, 100])
def test_pieces_of_any_length_give_the_same_bits(pieces: int) -> None:
    rng = np.random.default_rng(0)
    rows = {k: rng.standard_normal((300, w)).astype(np.float32) for k, w in (("x", 5), ("y", 7), ("z", 4))}
    origins = {k: np.full(v.shape[1], 0.1) for k, v in rows.items()}
    whole = BlockSums(origins, [("x", "y"), ("x", "x"), ("y", "z")], block_rows=64)
    whole.add(rows)
    cut = BlockSums(origins, [("x", "y")], block_rows=64)
    for start in range(0, 300, pieces):
        buffer = {k: v[start : start + pieces].copy() for k, v in rows.items()}
        cut.add(buffer)
        for value in buffer.values():
            value[:] = np.nan  # the caller may use its buffers again
    a, b = whole.blocks()["x", "y"], cut.blocks()["x", "y"]
    assert a.n == b.n == 300
    for name in ("product", "x", "y", "totals"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces, the last one short."""
    monkeypatch.setattr(pieces, "PIECE_ROWS", 128)


def shares(path: Path, order: list[list[int]]) -> None:
    """Sum pieces as several processes would, each its own in the order given, and leave them aside."""
    writer = StoreWriter(path)
    stored = StoredMoments(writer.view, *MODELS)
    wanted = dict.fromkeys(range(3), all_blocks(writer.view, MODELS))
    count, rows = pieces_of(writer.view, "b")
    assert {piece for mine in order for piece in mine} <= set(range(count))
    for rank, mine in enumerate(order):
        sums = sums_aside(writer, MODELS, wanted, MEMORY, Ranks(rank, len(order)))
        for piece in mine:
            sums.add(piece, StoredRows(writer.view, stored.pairs, rows))
        sums.flush()


@pytest.mark.usefixtures("in_pieces")
def test_any_number_of_processes_makes_the_same_bytes(
    plain: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = []
    for number, order in enumerate(([[0, 1, 2, 3, 4, 5]], [[3, 4, 5], [2, 1, 0]], [[5, 0], [], [4, 2], [1, 3]])):
        stores.append(Path(shutil.copytree(plain.path, tmp_path / f"{number}.zarr")))
        with exclusive(stores[-1]):
            shares(stores[-1], order)
        with monkeypatch.context() as patch:
            # All lies aside: no row is read again.
            patch.setattr(StoredRows, "rows", None)
            add_moments(stores[-1], quiet=True)
        assert not (stores[-1] / ".sums").exists()
    one, two, four = map(tree_bytes, stores)
    assert one == two == four
    found = read_moments(open_store(stores[0]), ("a", 1), ("b", 2), 0)
    assert_same(found, reference(stores[0], ("a", 1), ("b", 2), 0), rtol=1e-6)


@pytest.mark.usefixtures("in_pieces")
def test_the_command_by_several_processes(plain: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, barrier, own = Path(shutil.copytree(plain.path, tmp_path / "many.zarr")), Barrier(2), local()
    monkeypatch.setattr(Ranks, "from_environment", lambda: Ranks(own.rank, 2))
    monkeypatch.setattr(Ranks, "wait", lambda _: barrier.wait(60))

    def process(rank: int) -> Any:
        own.rank = rank
        return add_moments(path, quiet=True)

    with ThreadPoolExecutor(2) as pool:
        assert [len(result["moments"]) for result in pool.map(process, range(2))] == [1, 0]
    monkeypatch.undo()
    assert verify_store(path, quiet=True)["damage"] == []
    assert open_store(path).version == 3


@pytest.mark.usefixtures("in_pieces")
def test_adding_pieces_rounds_nothing(plain: Planted, tmp_path: Path) -> None:
    path = Path(shutil.copytree(plain.path, tmp_path / "s.zarr"))
    with exclusive(path):
        shares(path, [[0], [1], [2], [3], [4], [5]])
    parts = [_read(file, 6) for file in sorted((path / ".sums").rglob("0/a.1__b.2/*.npz"))]
    assert len(parts) == 6
    for name in ("product", "x", "y", "totals"):
        forward, back = (
            sum(getattr(part, name) for part in order[1:]) + getattr(order[0], name) for order in (parts, parts[::-1])
        )
        np.testing.assert_array_equal(forward, back, err_msg=name)
    # Without a common grain they would not: the same numbers, each a little off.
    off = [part.product * (1 + 1e-9) for part in parts]
    assert not np.array_equal(sum(off[1:]) + off[0], sum(off[-2::-1]) + off[-1])


@pytest.mark.usefixtures("in_pieces")
def test_what_was_summed_before_a_kill_is_not_summed_again(
    plain: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "FLUSH", 0.0)
    stores = [Path(shutil.copytree(plain.path, tmp_path / f"{name}.zarr")) for name in ("once", "killed")]
    added, original = [], PieceSums.add

    def add(self: PieceSums, piece: int, source: Any) -> int:
        added.append((*self.wanted, piece))
        if len(added) == 4:
            raise KeyboardInterrupt
        return original(self, piece, source)

    with monkeypatch.context() as patch:
        patch.setattr(PieceSums, "add", add)
        with pytest.raises(KeyboardInterrupt):
            add_moments(stores[1], quiet=True)
        assert open_store(stores[1]).version == 2
        assert verify_store(stores[1], quiet=True)["damage"] == []
        add_moments(stores[1], quiet=True)
    assert added[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 3)]
    assert len(set(added)) == len(added) - 1
    add_moments(stores[0], quiet=True)
    assert tree_bytes(stores[1]) == tree_bytes(stores[0])


def test_sums_aside_of_other_pairs_are_refused_and_removed(path: Path) -> None:
    with exclusive(path):
        shares(path, [[0]])
    file = next((path / ".sums").rglob("0/a.1__b.2/*.npz"))
    held = dict(np.load(file))
    np.savez(file, **held | {"totals": held["totals"] - 1})
    with pytest.raises(CorruptDataError, match=r"held sums over 544 train pairs .* run the same command again"):
        add_moments(path, quiet=True)
    add_moments(path, quiet=True)
    assert verify_store(path, quiet=True)["damage"] == []


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(1)
    rows = {k: rng.standard_normal((CUT_ROWS, 700)).astype(np.float32) for k in "xy"}
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            found.append(next(iter(steady_products(rows, [("x", "y")]))))
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(next(products(rows, [("x", "y")])), found[0], rtol=0, atol=1e-3)


def test_a_wide_block_is_the_same_product_in_panels_with_the_same_bits_on_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(2)
    wide, narrow = (rng.standard_normal((300, width)).astype(np.float32) for width in (2 * PANEL + 37, 50))
    rows, blocks = {"x": wide, "y": narrow}, [("x", "x"), ("x", "y"), ("y", "x"), ("y", "y")]
    found = []
    for workers in (1, 3):
        monkeypatch.setattr("featstore.store.moments.sums.product_threads", lambda workers=workers: workers)
        found.append(list(steady_products(rows, blocks)))
    for (x, y), one, other in zip(blocks, *found, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, rows[x].T.astype(np.float64) @ rows[y], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(found[0][0], found[0][0].T)


def test_a_row_that_is_not_finite_is_named() -> None:
    sums = BlockSums({"x": np.zeros(2)}, [("x", "x")], block_rows=4)
    x = np.ones((10, 2), dtype=np.float32)
    x[6, 1] = np.nan
    with pytest.raises(FitError, match="row 6"):
        sums.add({"x": x})


# What align makes of them.

N, D = 6000, 24
PAIR = LayerPair("a", (1,), "b", 1)
SITES = (("a", 1), ("b", 1))


@pytest.fixture(scope="module")
def related_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer each: a rotation, a change on top of it, and noise; moments beside the rows."""
    x = spectrum_rows(N, D, 1, decay=0.7, mean=3.0)
    rng = np.random.default_rng(3)
    y = (x - 1.0) @ rotation(D, 2) + 0.3 * x @ rng.normal(size=(D, D)) / np.sqrt(D) + 5.0
    y = y + 0.2 * rng.normal(size=y.shape)
    path = plant(tmp_path_factory.mktemp("fit") / "s.zarr", x, y).path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(module, "CUT_ROWS", 64)
        add_moments(path, quiet=True)
    return path


@pytest.fixture(scope="module")
def moments_alone(related_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        return rowless(Path(shutil.copytree(related_pair, tmp_path_factory.mktemp("fit") / "m.zarr")))


def test_stored_moments_fit_what_a_scan_fits(related_pair: Path) -> None:
    store = open_store(related_pair)
    stored = usable_moments(store, MODELS, [SITES])
    assert stored is not None
    for pair in (PAIR, PAIR.reversed):
        pairs = store.pairs(pair.source, pair.target).select()
        rows, kept = scan(store, pairs, [pair])[pair.key], stored_scan(stored, [pair])[pair.key]
        assert_same(kept.train, rows.train, rtol=1e-6)
        assert_same(kept.val, rows.val, rtol=1e-6)
        for fit in (Fit("procrustes", scale=True), Fit("linear"), Fit("affine"), Fit("reduced-rank", rank=4)):
            weights = [fit_closed(fit, pair, found).tensors["weight"] for found in (rows, kept)]
            np.testing.assert_allclose(weights[1], weights[0], atol=2e-5, err_msg=fit.type)


def test_a_drawn_shuffle_is_like_a_real_one() -> None:
    """Mean and covariance of the cross term over permutations, and its size against real permutations."""
    rng = np.random.default_rng(0)
    n = 500
    x = rng.standard_normal((n, 3)) @ np.array([[2.0, 0, 0], [1, 1, 0], [0, 0.5, 0.3]]) + 4.0
    y = x[:, :2] @ np.array([[1.0, 0.5], [-0.5, 2]]) + 1.0
    m = moments_of(x, y, np.full(3, 3.5), np.zeros(2))
    drawn = np.array([centered(as_if_shuffled(m, rng)).c.ravel() for _ in range(4000)])
    real = np.array([((x - x.mean(0)).T @ (y - y.mean(0))[rng.permutation(n)]).ravel() for _ in range(4000)])
    c = centered(m)
    covariance = np.kron(c.gx, c.gy) / (n - 1)
    size = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    for sample in (drawn, real):
        assert np.abs(sample.mean(0) / np.sqrt(np.diag(covariance))).max() < 0.08
        assert np.abs((np.cov(sample.T) - covariance) / size).max() < 0.1
    few = moments_of(x[:3], y[:3], np.zeros(3), np.zeros(2))
    assert np.isfinite(as_if_shuffled(few, rng).c).all(), "fewer rows than dimensions: the Gram is singular"


def test_what_moments_say_of_a_map_is_what_its_rows_say(related_pair: Path) -> None:
    store = open_store(related_pair)
    stored = StoredMoments(store, "a", "b")
    found = stored_scan(stored, [PAIR])[PAIR.key]
    maps: dict[str, Aligner | str] = {"affine": fit_closed(Fit("affine"), PAIR, found), "none": "why"}
    maps |= baselines(Fit("procrustes"), PAIR, found, 0)
    maps["procrustes"] = fit_closed(Fit("procrustes", scale=True), PAIR, found)
    test = stored.read(*SITES, 2)
    assert test is not None
    scores = score_moments(test, maps)
    assert scores.pop("none") == (None, {"none": "why"})
    pairs = store.pairs("a", "b").select(2)
    x, y = store.rows("a", 1)[pairs.row_source], store.rows("b", 1)[pairs.row_target]
    with_cka = set()
    for name, (figures, reasons) in scores.items():
        aligner = maps[name]
        assert isinstance(aligner, Aligner)
        assert figures is not None
        expected, _ = score(y, aligner.apply(x), aligner.tensors["control_mean"])
        for key in ("r2", "r2_median_dim", "r2_without_top_dims", "mse"):
            assert figures[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6), (name, key)
        assert figures["n"] == expected["n"]
        for key in ("cosine", "cosine_centered", *RETRIEVAL_KEYS):
            assert figures[key] is None
            assert reasons[key] == NEEDS_ROWS
        assert reasons["cka_debiased"] == NEEDS_DOCUMENTS
        if figures["cka_debiased_rows"] is not None:
            # A shuffled control has next to no scale: of its float32 rows the mean takes the digits.
            tolerance = 1e-3 if name == "shuffled" else 1e-5
            assert figures["cka_debiased_rows"] == pytest.approx(expected["cka_debiased_rows"], abs=tolerance), name
            with_cka.add(name)
        assert {key for key, value in figures.items() if value is None} == reasons.keys()
    assert with_cka == {"procrustes", "identity", "random_rotation", "shuffled"}
    assert scores["mean"][1]["cka_debiased_rows"] == "the second set of states does not vary"
    assert "rotations alone" in scores["affine"][1]["cka_debiased_rows"]


@pytest.mark.parametrize("options", [{"keep_sinks": True}, {"policy": "word"}, {"max_rows": 100}, {"roles": ("text",)}])
def test_what_moments_do_not_answer_needs_rows(
    related_pair: Path, moments_alone: Path, options: dict[str, Any]
) -> None:
    assert usable_moments(open_store(related_pair), MODELS, [SITES]) is not None
    assert usable_moments(open_store(related_pair), MODELS, [SITES], **options) is None
    [flag] = (name.replace("_", "-") for name in options)
    with pytest.raises(
        StoreStateError, match=rf"--{flag}.* needs rows, and .* holds none of layer 1 of 'a'.*--moments-only"
    ):
        usable_moments(open_store(moments_alone), MODELS, [SITES], **options)


def test_similarity_of_layers_from_moments_is_that_from_rows(
    plain: Planted, summed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = {"a": (0, 1, 2), "b": (0, 2)}
    for estimator in ("debiased-rows", "biased"):
        scanned = compare_layers(plain.path, models=MODELS, layers=layers, estimator=estimator, quiet=True)
        kept = compare_layers(summed, models=MODELS, layers=layers, estimator=estimator, quiet=True)
        np.testing.assert_allclose(kept["cross"], scanned["cross"], atol=2e-7)
        for model in MODELS:
            np.testing.assert_allclose(kept["within"][model], scanned["within"][model], atol=2e-7)
        assert not np.array_equal(kept["cross"], scanned["cross"]), "the moments were not used"
        for same in ("n", "unmasked", "masked_rows"):
            np.testing.assert_equal(kept[same], scanned[same])
        assert kept["null"] == scanned["null"]
    store = rowless(summed)
    bare = compare_layers(store, models=MODELS, layers=layers, estimator="biased", quiet=True)
    np.testing.assert_array_equal(bare["cross"], kept["cross"])
    assert bare["unmasked"]["n"] == scanned["unmasked"]["n"]
    assert np.isnan(bare["unmasked"]["cross"]).all()
    assert set(bare["unmasked"]["reasons"].values()) == {NEEDS_ROWS}
    assert np.shape(bare["null"]["cross"]) == (3, 2)
    assert bare["null"]["reason"] == NEEDS_ROWS
    # Over documents is the default, which sums of all rows cannot tell apart; the result says what it is.
    capsys.readouterr()
    found = compare_layers(store, models=MODELS, layers=layers)
    assert found["estimator"] == "debiased-rows"
    assert "cannot be told apart" in capsys.readouterr().err
    with pytest.raises(StoreStateError, match="--correct-features needs rows"):
        compare_layers(store, models=MODELS, layers=layers, correct_features=True, quiet=True)
    with pytest.raises(StoreStateError, match="--keep-sinks needs rows"):
        compare_layers(store, models=MODELS, layers=layers, keep_sinks=True, quiet=True)
    with pytest.raises(StoreStateError, match="aligning 'a' with itself needs rows"):
        compare_layers(store, models=("a", "a"), layers=layers, quiet=True)


def test_the_command_works_without_rows(summed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "align", "cka", "--store", rowless(summed), "--out", tmp_path / "cka", "--json").json  # noqa: B018
    result = strict_json((tmp_path / "cka" / "cka.json").read_text())
    assert all(value is not None for row in result["cross"] for value in row)
    assert result["null"]["cross"] == [[None, None]] * 3
    text = call(capsys, "align", "cka", "--store", summed, "--out", tmp_path / "again")
    assert text.code == 0, text.err


@pytest.mark.parametrize("type_", ["procrustes", "linear", "affine", "reduced-rank"])
def test_a_run_without_rows_is_the_run_with_them(
    related_pair: Path, moments_alone: Path, tmp_path: Path, type_: str
) -> None:
    options = {"rank": 4} if type_ == "reduced-rank" else {}
    planted = Planted(related_pair, {}, {}, np.zeros(0, np.uint8), np.zeros(0, np.int32))
    full = trained(planted, tmp_path / "full", type_, both=True, **options)
    bare = trained(replace(planted, path=moments_alone), tmp_path / "bare", type_, both=True, **options)
    one, other = (load_adapter(tmp_path / name).aligners for name in ("full", "bare"))
    assert len(one) == 2
    for key, aligner in one.items():
        for name, tensor in aligner.tensors.items():
            np.testing.assert_array_equal(other[key].tensors[name], tensor, err_msg=name)
        there, here = full["pairs"][key], bare["pairs"][key]
        assert here["train"]["n"] == there["train"]["n"]
        for block in ("train", "val", "test"):
            for figure in ("r2", "r2_median_dim", "r2_without_top_dims", "mse"):
                assert here[block][figure] == pytest.approx(there[block][figure], rel=1e-6, abs=1e-6)
            assert here[block].keys() == there[block].keys()
            missing = {f"{block}.{figure}" for figure, value in here[block].items() if value is None}
            assert missing
            assert missing <= here["reasons"].keys()
        for name in ("mean", "identity", "random_rotation"):
            assert here["baselines"][name]["r2"] == pytest.approx(there["baselines"][name]["r2"], rel=1e-6, abs=1e-6)
        # Documents can be exchanged where there are rows; sums of all rows leave rows shuffled. Both find nothing.
        controls = [one["baselines"]["shuffled"] for one in (there, here)]
        assert [control["name"] for control in controls] == ["documents exchanged", "rows shuffled"]
        assert [control["r2"] for control in controls] == [pytest.approx(0.0, abs=0.1)] * 2
        assert controls[0]["r2"] != controls[1]["r2"]
        assert there["baselines"]["token"]["r2"] is not None
        assert here["baselines"]["token"] is None
        assert here["token"] is None
        assert here["reasons"]["baselines.token"] == NEEDS_ROWS
        assert here["test"]["partial_r2"] is None
        assert here["reasons"]["test.partial_r2"] == NEEDS_ROWS
        assert here["by_mask"]["masked"]["r2"] == here["test"]["r2"]
        assert here["by_mask"]["kept"] is None
        assert here["reasons"]["by_mask.kept"] == NEEDS_ROWS
        assert [w["code"] for w in here["warnings"]] == [w["code"] for w in there["warnings"]]
    assert " - " in describe(bare)
    epoch = strict_json((tmp_path / "bare" / "eval_epoch_0.json").read_text())
    assert epoch["pairs"][key]["val_loss"] == pytest.approx(1 - here["val"]["r2"])


def test_a_run_uses_the_moments_where_they_are(
    related_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = Planted(related_pair, {}, {}, np.zeros(0, np.uint8), np.zeros(0, np.int32))
    scans = []

    def counted(*args: Any, **options: Any) -> Any:
        scans.append(args)
        return scan(*args, **options)

    monkeypatch.setattr("align.runs.train.scan", counted)
    kept = only(trained(planted, tmp_path / "kept", "affine"))
    assert not scans
    assert kept["test"]["retrieval_top1"] is not None, "scored from rows, which are there"
    scanned = only(trained(planted, tmp_path / "scanned", "affine", keep_sinks=True))
    assert len(scans) == 1
    assert scanned["test"]["r2"] == pytest.approx(kept["test"]["r2"], abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_sinks": True},
        {"policy": "word"},
        {"roles": "text"},
        {"source": "a", "target": "a"},
        {"solver": "adamw"},
    ],
)
def test_a_run_that_needs_rows_is_refused_before_it_writes(
    moments_alone: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    planted = Planted(moments_alone, {}, {}, np.zeros(0, np.uint8), np.zeros(0, np.int32))
    with pytest.raises(StoreStateError, match="needs rows, and"):
        trained(planted, tmp_path / "run", "affine", **options)
    with pytest.raises(StoreStateError, match="training lora by gradient needs rows"):
        trained(planted, tmp_path / "run", "lora", rank=2)
    assert not (tmp_path / "run").exists()
