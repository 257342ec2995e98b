"""Minibatches: each pair once, x never without its y, an order that only (seed, epoch) decides, bounded memory."""

from __future__ import annotations

import shutil
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import CorruptDataError, SpecError
from featstore.store import open_store
from featstore.store.format.documents import rows_document
from featstore.store.format.elements import FORMATS, Format, column_scale_of
from featstore.store.format.shards import LAYOUTS, Layout, encode_shard, seal
from featstore.store.read.loader import BLOCK_ROWS, SHARD_ROWS, SHARDS_TOGETHER, EpochOrder, PairBatch, PairBatches
from featstore.store.read.pairs import Pairs
from featstore.store.read.rows import RowReader
from featstore.store.read.tables import TableReader
from tests.support.store_fixtures import Recipe, decoded_states, write_quickly

#: Every row a chunk of its own: the chunks that are fetched are then the rows that are read.
SINGLE = Layout("single", 1, compressed=False)


@dataclass
class Numbers:
    """Rows whose content is their own number plus a constant: a row that comes apart from its partner shows."""

    offset: int
    layout: Layout = LAYOUTS["hot"]
    form: Format = FORMATS["float32"]
    width: int = 1
    rows: int = 1 << 24  # beyond which float32 does not tell numbers apart
    path: str = "numbers"
    reads: list[int] = field(default_factory=list)

    def chunk(self, number: int) -> np.ndarray:
        self.reads.append(number)
        size = self.layout.chunk_rows
        return np.arange(number * size, (number + 1) * size, dtype=np.float32)[:, None] + np.float32(self.offset)

    def release(self) -> None:
        """There are no pages to give back."""


def pairs_of(source: np.ndarray, target: np.ndarray) -> Pairs:
    m = len(source)
    zeros = np.zeros(m, np.uint8)
    return Pairs(
        "a",
        "b",
        source,
        target,
        zeros,
        np.zeros(m, np.int32),
        np.zeros(m, bool),
        zeros,
        np.zeros(m, np.int32),
        (1.0, 1.0),
    )


def loader(n: int, *, batch: int = 1, batches: int | None = None, layout: Layout = LAYOUTS["hot"]) -> PairBatches:
    """Pairs (3 i, 5 i + 1): no row has its partner's number. If asked, with memory for so many batches a buffer."""
    number = np.arange(n, dtype=np.int64)
    sides = [Numbers(offset, layout) for offset in (0, 7)]
    rows = PairBatches(*sides, pairs_of(3 * number, 5 * number + 1))
    return rows if batches is None else PairBatches(*sides, rows.pairs, memory_for(rows, batch, batches))


def memory_for(rows: PairBatches, batch: int, batches: int) -> int:
    beside = rows._scratch + batch * (rows._held_bytes + 3 * rows._wide_bytes)
    return beside + 2 * batch * batches * rows._held_bytes


def pair_numbers(batch: PairBatch) -> np.ndarray:
    """Pair numbers as the rows tell them, having checked that source and target belong together."""
    assert batch.x.dtype == batch.y.dtype == np.float32
    number = batch.x[:, 0] / 3
    np.testing.assert_array_equal(batch.y[:, 0], 5 * number + 1 + 7)
    np.testing.assert_array_equal(batch.pairs, number)
    return batch.pairs


def epoch(rows: PairBatches, batch: int, seed: int = 0, number: int = 1, **which: int) -> list[np.ndarray]:
    return [pair_numbers(b) for b in rows.shuffled(batch, seed, number, **which)]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pair-loader")]


# -- the order


@given(
    n=st.integers(1, 2 * BLOCK_ROWS),
    batch=st.integers(1, 900),
    batches=st.integers(1, 6),
    seed=st.integers(0, 5),
    number=st.integers(1, 3),
)
def test_every_pair_once_and_only_the_last_batch_is_short(
    n: int, batch: int, batches: int, seed: int, number: int
) -> None:
    got = epoch(loader(n, batch=batch, batches=batches), batch, seed, number)
    np.testing.assert_array_equal(np.sort(np.concatenate(got)), np.arange(n))
    sizes = [len(part) for part in got]
    assert all(size == batch for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch


@given(
    n=st.integers(1, 3 * BLOCK_ROWS),
    batch=st.integers(7, 900),
    batches=st.integers(1, 6),
    world=st.integers(1, 4),
    start=st.integers(0, 8),
)
def test_processes_share_the_batches_and_a_resume_is_the_tail(
    n: int, batch: int, batches: int, world: int, start: int
) -> None:
    rows = loader(n, batch=batch, batches=batches)
    whole = epoch(rows, batch)
    shares = [[(b.number, pair_numbers(b)) for b in rows.shuffled(batch, 0, 1, start=start, rank=rank, world=world)]
              for rank in range(world)]  # fmt: skip
    for rank, share in enumerate(shares):
        assert [number for number, _ in share] == list(range(start + rank, len(whole), world))
    together = sorted((part for share in shares for part in share), key=lambda part: part[0])
    assert [number for number, _ in together] == list(range(start, len(whole)))
    for number, numbers in together:
        np.testing.assert_array_equal(numbers, whole[number])


@pytest.mark.parametrize(("start", "rank", "world"), [(5, 0, 1), (0, 1, 3), (4, 2, 3)])
def test_only_the_rows_of_the_batches_asked_for_are_read(start: int, rank: int, world: int) -> None:
    rows = loader(5000, batch=300, batches=4, layout=SINGLE)
    got = np.concatenate(epoch(rows, 300, start=start, rank=rank, world=world))
    np.testing.assert_array_equal(np.sort(rows.source.reads), np.sort(3 * got))  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.sort(rows.target.reads), np.sort(5 * got + 1))  # type: ignore[union-attr]


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, number: int) -> np.ndarray:
        return np.concatenate(epoch(loader(4500, batch=64, batches=9), 64, seed, number))

    once = order(3, 2)
    np.testing.assert_array_equal(once, order(3, 2))
    assert (once != order(3, 3)).mean() > 0.9
    assert (once != order(4, 2)).mean() > 0.9


def test_an_epoch_does_not_depend_on_what_was_read_before() -> None:
    rows = loader(3000, batch=64, batches=9)
    next(rows.shuffled(64, 5, 4))
    epoch(rows, 64, 0, 1)
    np.testing.assert_array_equal(
        np.concatenate(epoch(rows, 64, 0, 2)), np.concatenate(epoch(loader(3000, batch=64, batches=9), 64, 0, 2))
    )


def test_seed_and_epoch_do_not_stand_in_for_each_other() -> None:
    rows = loader(2000)
    orders = {tuple(np.concatenate(epoch(rows, 500, s, e))) for s in range(3) for e in range(1, 4)}
    assert len(orders) == 9


def test_the_layout_does_not_change_the_order() -> None:
    """A run on a converted store is the same run."""
    hot = loader(6000, batch=64, batches=9)
    archive = PairBatches(*(Numbers(o, LAYOUTS["archive"]) for o in (0, 7)), hot.pairs, hot.memory)
    np.testing.assert_array_equal(np.concatenate(epoch(hot, 64)), np.concatenate(epoch(archive, 64)))


def many_shards(shards: int, buffer_pairs: int = SHARD_ROWS, seed: int = 0) -> EpochOrder:
    return EpochOrder.of(np.arange(shards * SHARD_ROWS), buffer_pairs, seed, 1)


def test_a_buffer_mixes_shards_far_apart() -> None:
    order = many_shards(40)
    for number in range(40):
        shards = np.unique(order.buffer(number) // SHARD_ROWS)
        assert len(shards) >= 4
        assert np.ptp(shards) >= 8


def test_shards_take_turns_so_that_few_files_are_read_at_a_time() -> None:
    order = many_shards(40)
    turns = [np.concatenate([order.buffer(t * 8 + i) for i in range(8)]) // SHARD_ROWS for t in range(5)]
    groups = [set(np.unique(turn).tolist()) for turn in turns]
    assert [len(group) for group in groups] == [SHARDS_TOGETHER] * 5
    assert len(set.union(*groups)) == 40
    assert groups != [set(range(8 * t, 8 * t + 8)) for t in range(5)]


def test_a_buffer_is_whole_blocks_with_their_pairs_shuffled() -> None:
    numbers = many_shards(4, buffer_pairs=8 * BLOCK_ROWS).buffer(3)
    _, counts = np.unique(numbers // BLOCK_ROWS, return_counts=True)
    assert counts.tolist() == [BLOCK_ROWS] * 8
    assert (np.diff(numbers) == 1).mean() < 0.01
    # Every quarter of the buffer has its share of every block.
    for part in np.split(numbers, 4):
        assert np.bincount(part // BLOCK_ROWS, minlength=1).max() < BLOCK_ROWS / 2


def shuffle_of(order: EpochOrder, number: int) -> tuple[int, ...]:
    """The permutation within a buffer, of an order whose blocks are of one pair."""
    place = np.argsort(order.first)
    return tuple((place[order.buffer(number)] - number * order.buffer_pairs).tolist())


def test_every_buffer_of_every_epoch_has_a_permutation_of_its_own() -> None:
    rows = np.arange(4 * 64) * BLOCK_ROWS
    orders = [EpochOrder.of(rows, 64, seed, number) for seed in (0, 1) for number in (1, 2)]
    assert len({shuffle_of(order, k) for order in orders for k in range(4)}) == 16
    assert len({tuple(order.first.tolist()) for order in orders}) == 4


def test_the_first_buffer_is_not_shuffled_as_the_shards_are() -> None:
    order = EpochOrder.of(np.arange(512) * SHARD_ROWS, 512, 0, 1)
    turn = np.argsort(order.first) // SHARDS_TOGETHER
    assert (np.array(shuffle_of(order, 0)) // SHARDS_TOGETHER == turn).mean() < 0.1


def test_blocks_follow_the_rows_where_pairs_are_sparse() -> None:
    """A block is rows that lie together, however few of them are paired, in no chunk but one."""
    rows = np.flatnonzero(np.random.default_rng(0).random(50_000) < 0.02)
    order = EpochOrder.of(rows, 10**6, 0, 1)
    assert len(order.first) == -(-50_000 // BLOCK_ROWS)
    lengths = np.diff(order.end, prepend=0)
    for first, length in zip(order.first, lengths, strict=True):
        assert len(np.unique(rows[first : first + length] // BLOCK_ROWS)) == 1


# -- what is read


def test_reads_run_forward_through_the_store_once_a_buffer() -> None:
    rows = loader(6000, batch=500, batches=3, layout=SINGLE)
    epoch(rows, 500)
    for side in (rows.source, rows.target):
        assert all((np.diff(part) > 0).all() for part in np.split(np.array(side.reads), 4))  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1, 7, 1000, 5000])
def test_blocks_come_in_document_order(size: int) -> None:
    got = list(loader(2500).blocks(size))
    np.testing.assert_array_equal(np.concatenate([pair_numbers(block) for block in got]), np.arange(2500))
    assert max(map(len, got)) == min(size, 2500)
    assert [block.number for block in got] == list(range(len(got)))


def test_no_pairs_give_no_batches() -> None:
    rows = loader(0)
    assert list(rows.shuffled(8, 0, 1)) == []
    assert list(rows.blocks()) == []
    assert len(rows) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": -1}, "batch size -1"),
        ({"start": -1}, "start -1"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"rank": -1}, "rank -1 of 1"),
        ({"world": 0}, "rank 0 of 0"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(options: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        loader(10).shuffled(**{"batch_size": 4, "seed": 0, "epoch": 1, **options})


def test_a_start_beyond_the_end_gives_nothing() -> None:
    assert epoch(loader(10), 4, start=3) == []


RECIPE = Recipe(documents=40, shard_rows=1024, width=16)


@pytest.fixture(scope="module", params=["hot", "archive"])
def store_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quickly(
        tmp_path_factory.mktemp("loader") / "s.zarr", Recipe(**{**vars(RECIPE), "layout": request.param})
    )


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_pairs_of_a_real_store_stay_together(tmp_path: Path, layout: str, form: str) -> None:
    recipe = Recipe(form=form, layout=layout, documents=20, shard_rows=1024, width=16)
    store = open_store(write_quickly(tmp_path / "s.zarr", recipe))
    pairs = store.pairs("a", "b").select(0)
    rows = PairBatches(store.rows("a", 3), store.rows("b", 0), pairs)
    rows = PairBatches(rows.source, rows.target, pairs, memory_for(rows, 32, 3))
    want_x = decoded_states(recipe, "a", 3, store.model("a").rows)
    want_y = decoded_states(recipe, "b", 0, store.model("b").rows)
    # Compared when the epoch is over: a batch must outlive the buffer it came from.
    got = list(rows.shuffled(32, 0, 1))
    for batch in (*got, *rows.blocks(100)):
        np.testing.assert_array_equal(batch.x, want_x[pairs.row_source[batch.pairs]])
        np.testing.assert_array_equal(batch.y, want_y[pairs.row_target[batch.pairs]])
    assert len(got) > 12
    np.testing.assert_array_equal(np.sort(np.concatenate([b.pairs for b in got])), np.arange(len(pairs)))


def test_several_layers_are_read_side_by_side(store_path: Path) -> None:
    store = open_store(store_path)
    pairs = store.pairs("a", "b")
    one = PairBatches(store.rows("a", 3), store.rows("b", 3), pairs)
    two = PairBatches([store.rows("a", 0), store.rows("a", 3)], store.rows("b", 3), pairs)
    for single, double in zip(one.shuffled(100, 0, 1), two.shuffled(100, 0, 1), strict=True):
        assert double.x.shape == (len(single), 32)
        np.testing.assert_array_equal(double.x[:, 16:], single.x)
        np.testing.assert_array_equal(double.x[:, :16], store.rows("a", 0)[pairs.row_source[single.pairs]])
        np.testing.assert_array_equal(double.y, single.y)


def test_a_layer_that_is_a_table_is_read_in_the_order_of_the_table(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(store_path)
    table = store.rows("a", 3)
    assert isinstance(table, RowReader)
    index = np.random.default_rng(0).integers(0, table.rows, 3000)
    pairs = pairs_of(np.arange(3000), np.arange(3000)[::-1].copy())
    decoded = count_chunks(monkeypatch)
    expected = table[index]
    decoded.clear()
    for batch in PairBatches(TableReader(table, index), TableReader(table, index), pairs).shuffled(128, 0, 1):
        np.testing.assert_array_equal(batch.x, expected[batch.pairs])
        np.testing.assert_array_equal(batch.y, expected[2999 - batch.pairs])
    if table.layout.compressed:
        assert set(decoded.values()) == {2}  # once for the source, once for the target


def count_chunks(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each chunk is fetched."""
    fetched: Counter[tuple[str, int]] = Counter()
    fetch = RowReader.chunk

    def chunk(reader: RowReader, number: int) -> np.ndarray:
        fetched[str(reader.path), number] += 1
        return fetch(reader, number)

    monkeypatch.setattr(RowReader, "chunk", chunk)
    return fetched


def test_a_compressed_chunk_is_decoded_once_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(write_quickly(tmp_path / "s.zarr", Recipe(documents=60, shard_rows=1024)))
    rows = PairBatches(store.rows("a", 3), store.rows("b", 3), store.pairs("a", "b"))
    fetched = count_chunks(monkeypatch)
    assert len(list(rows.shuffled(64, 0, 1))) > 15
    assert len(fetched) > 30
    assert set(fetched.values()) == {1}


def test_pairs_that_fit_into_memory_are_read_once_for_all_epochs() -> None:
    rows = loader(5000)
    first = epoch(rows, 128)
    read = [len(side.reads) for side in (rows.source, rows.target)]
    assert all(read)
    others = [epoch(rows, 128, number=2), epoch(rows, 50, number=3)]
    assert [len(side.reads) for side in (rows.source, rows.target)] == read
    # The same batches as from buffers that are filled anew.
    for number, size, batches in ((1, 128, first), (2, 128, others[0]), (3, 50, others[1])):
        for rank in (0, 1):
            for one, other in zip(
                batches[rank::2], epoch(loader(5000), size, number=number, rank=rank, world=2), strict=True
            ):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("row", [-1, 1020])
def test_a_row_that_does_not_exist_is_refused(row: int) -> None:
    """The last chunk is padded: beyond the end there are zeros to be read."""
    rows = PairBatches(Numbers(0, rows=1020), Numbers(7), pairs_of(np.array([row]), np.array([0])))
    with pytest.raises(IndexError, match=f"row {row} is outside 0..1019"):
        next(rows.shuffled(1, 0, 1))


# -- the thread


def test_a_damaged_shard_is_an_error_where_batches_are_used(store_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.zarr"
    shutil.copytree(store_path, path)
    shard = path / "models/b/resid/3/c/1/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    store = open_store(path)
    pairs = store.pairs("a", "b")
    rows = PairBatches(store.rows("a", 3), store.rows("b", 3), pairs)
    rows = PairBatches(rows.source, rows.target, pairs, memory_for(rows, 50, 2))
    with pytest.raises(CorruptDataError, match=r"models/b/resid/3"):
        for _ in rows.shuffled(50, 0, 1):
            pass
    assert threads() == []


@dataclass
class Gated(Numbers):
    """Rows that tell when they are read, and wait until they may be."""

    told: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def chunk(self, number: int) -> np.ndarray:
        self.told.release()
        assert self.may.acquire(timeout=30)
        return super().chunk(number)


def gated(free: int) -> tuple[Gated, Generator[PairBatch]]:
    """Batches of 100 pairs, two a buffer, of which the first so many may be read."""
    plain = loader(3000, batch=100, batches=2)
    source = Gated(0, SINGLE)
    source.may.release(100 * free)
    return source, PairBatches(source, Numbers(7), plain.pairs, plain.memory).shuffled(100, 0, 1)


def test_after_an_error_nothing_more_is_read() -> None:
    class Failing(Numbers):
        def chunk(self, number: int) -> np.ndarray:
            super().chunk(number)
            raise CorruptDataError("this file")

    plain = loader(3000, batch=100, batches=2)
    source = Failing(0)
    with pytest.raises(CorruptDataError, match="this file"):
        next(PairBatches(source, Numbers(7), plain.pairs, plain.memory).shuffled(100, 0, 1))
    assert threads() == []
    assert len(source.reads) == 1


def test_the_next_buffer_is_read_while_this_one_is_used_and_no_more() -> None:
    source, batches = gated(free=30)
    next(batches)
    assert all(source.told.acquire(timeout=30) for _ in range(400))
    assert not source.told.acquire(timeout=0.2)
    batches.close()


def test_a_batch_does_not_wait_for_the_buffer_after_its_own() -> None:
    source, batches = gated(free=2)
    # A batch that waited would wait at the gate, which fails in the end.
    assert [len(next(batches)), len(next(batches))] == [100, 100]
    assert len(source.reads) == 200
    source.may.release(1000)
    batches.close()


def test_closing_waits_for_no_more_than_the_read_in_progress() -> None:
    source, batches = gated(free=2)
    next(batches)
    threading.Timer(0.1, source.may.release, (1000,)).start()
    batches.close()
    assert len(source.reads) <= 400
    assert threads() == []


@pytest.mark.parametrize("after", [0, 1, 7, 29])
def test_closing_early_ends_the_thread(after: int) -> None:
    batches = loader(3000, batch=100, batches=5).shuffled(100, 0, 1)
    for _ in range(after):
        next(batches)
    batches.close()
    assert threads() == []


def test_a_whole_epoch_leaves_no_thread() -> None:
    epoch(loader(3000, batch=100, batches=5), 100)
    assert threads() == []


# -- memory


def write_rows(path: Path, rows: np.ndarray, form: Format, layout: Layout, shard_rows: int = 4096) -> RowReader:
    """The files of one layer, without the store around it."""
    columns = column_scale_of(rows) if form.column_scaled else None
    encoded = form.encode(rows, columns)
    for start in range(0, len(rows), shard_rows):
        part = encoded.part(start, min(start + shard_rows, len(rows)))
        shard = path / "c" / str(start // shard_rows) / "0"
        shard.parent.mkdir(parents=True)
        shard.write_bytes(encode_shard(part.stored, shard_rows, layout))
        if part.row_scale is not None:
            scale = path / "scale" / "c" / shard.parent.name
            scale.parent.mkdir(parents=True, exist_ok=True)
            scale.write_bytes(seal(np.resize(part.row_scale, shard_rows).tobytes()))
    document = rows_document(len(rows), rows.shape[1], shard_rows, form, layout)
    return RowReader(path, document, path / "scale", columns)


def peak_of(work: Callable[[], Iterable[object]]) -> int:
    """Most bytes allocated at a time while an iterator is used up, its items dropped one by one."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in work():
            pass
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("layout", "form"), [("hot", "bfloat16"), ("archive", "bfloat16"), ("hot", "float32"), ("archive", "int8")]
)
def test_memory_is_bounded(tmp_path: Path, layout: str, form: str) -> None:
    values = np.random.default_rng(0).standard_normal((20_000, 64)).astype(np.float32)
    source, target = (write_rows(tmp_path / side, values, FORMATS[form], LAYOUTS[layout]) for side in "ab")
    number = np.flatnonzero(np.arange(20_000) % 7)
    unbounded = PairBatches(source, target, pairs_of(number, number))
    for _ in unbounded.blocks():
        pass  # maps the shards, which costs no memory of the kind that is counted here
    memory = memory_for(unbounded, 64, 20)
    bounded = PairBatches(source, target, unbounded.pairs, memory)
    assert len(number) > 5 * bounded.order(64, 0, 1).buffer_pairs
    used = peak_of(lambda: bounded.shuffled(64, 0, 1))
    assert memory / 3 < used <= memory
    assert peak_of(lambda: unbounded.shuffled(64, 0, 1)) > memory
    assert peak_of(bounded.blocks) <= memory
    assert peak_of(unbounded.blocks) > memory


def test_the_least_memory_is_named_and_enough() -> None:
    rows = loader(3000)
    least = memory_for(rows, 100, 1)
    tight = PairBatches(rows.source, rows.target, rows.pairs, least)
    np.testing.assert_array_equal(np.sort(np.concatenate(epoch(tight, 100))), np.arange(3000))
    with pytest.raises(SpecError, match=rf"--memory {least - 1}: .* {least} bytes .*--batch-size"):
        PairBatches(rows.source, rows.target, rows.pairs, least - 1).shuffled(100, 0, 1)
    with pytest.raises(SpecError, match=r"--memory 10: .* 1 pair at a time"):
        next(PairBatches(rows.source, rows.target, rows.pairs, 10).blocks())
