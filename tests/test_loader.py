"""Minibatches: every pair once, x never without its y, in an order that only (seed, epoch) decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import plant, rotation, spectrum_rows

from featstore.errors import SpecError
from featstore.loader import BLOCK_PAIRS, PairBatches
from featstore.pairs import Pairs


class Numbers:
    """Rows whose content is their own number plus a constant: a row that comes apart from its partner shows."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.reads: list[np.ndarray] = []

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.reads.append(np.asarray(rows))
        return np.asarray(rows, dtype=np.float32)[:, None] + np.float32(self.offset)


def batches(n: int, buffer_blocks: int = 64) -> PairBatches:
    """Pairs (3 i, 5 i + 1): no row has its partner's number."""
    number = np.arange(n, dtype=np.int64)
    pairs = Pairs(
        "a",
        "b",
        3 * number,
        5 * number + 1,
        np.zeros(n, np.uint8),
        np.zeros(n, np.int32),
        np.zeros(n, bool),
        (1.0, 1.0),
    )
    return PairBatches(Numbers(0), Numbers(7), pairs, buffer_blocks)  # type: ignore[arg-type]


def numbers_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pair numbers of a batch, having checked that source and target belong together."""
    number = x[:, 0] / 3
    np.testing.assert_array_equal(y[:, 0], 5 * number + 1 + 7)
    return number.astype(np.int64)


def epoch(rows: PairBatches, batch: int, seed: int = 0, number: int = 1) -> list[np.ndarray]:
    return [numbers_of(x, y) for x, y in rows.shuffled(batch, seed, number)]


@given(
    n=st.integers(1, 5 * BLOCK_PAIRS),
    batch=st.integers(1, 3000),
    buffer_blocks=st.integers(1, 6),
    seed=st.integers(0, 5),
    number=st.integers(1, 3),
)
def test_every_pair_once_and_only_the_last_batch_is_short(
    n: int, batch: int, buffer_blocks: int, seed: int, number: int
) -> None:
    got = epoch(batches(n, buffer_blocks), batch, seed, number)
    np.testing.assert_array_equal(np.sort(np.concatenate(got)), np.arange(n))
    sizes = [len(part) for part in got]
    assert all(size == batch for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(*, batch: int, seed: int, number: int) -> np.ndarray:
        return np.concatenate(epoch(batches(4500, 2), batch, seed, number))

    once = order(batch=64, seed=3, number=2)
    np.testing.assert_array_equal(once, order(batch=64, seed=3, number=2))
    np.testing.assert_array_equal(once, order(batch=1000, seed=3, number=2))
    assert (once != order(batch=64, seed=3, number=3)).mean() > 0.9
    assert (once != order(batch=64, seed=4, number=2)).mean() > 0.9


def test_an_epoch_does_not_depend_on_the_ones_before() -> None:
    rows = batches(3000)
    for _ in rows.shuffled(64, 0, 1):
        pass
    np.testing.assert_array_equal(np.concatenate(epoch(rows, 64, 0, 2)), np.concatenate(epoch(batches(3000), 64, 0, 2)))


def test_seed_and_epoch_do_not_stand_in_for_each_other() -> None:
    rows = batches(2000)
    orders = {tuple(np.concatenate(epoch(rows, 500, s, e))) for s in range(3) for e in range(1, 4)}
    assert len(orders) == 9


def test_rows_are_shuffled_and_not_only_blocks() -> None:
    got = np.concatenate(epoch(batches(8 * BLOCK_PAIRS, 2), 256))
    assert (np.diff(got) == 1).mean() < 0.01
    # Blocks too: the first buffer is not the first two blocks.
    assert set((got[: 2 * BLOCK_PAIRS] // BLOCK_PAIRS).tolist()) != {0, 1}


@pytest.mark.parametrize("buffer_blocks", [1, 3, 64])
def test_any_buffer_gives_the_same_whole(buffer_blocks: int) -> None:
    got = epoch(batches(5 * BLOCK_PAIRS + 17, buffer_blocks), 300)
    np.testing.assert_array_equal(np.sort(np.concatenate(got)), np.arange(5 * BLOCK_PAIRS + 17))


def test_the_buffer_bounds_what_is_read_at_once() -> None:
    rows = batches(10 * BLOCK_PAIRS, 2)
    list(rows.shuffled(500, 0, 1))
    source: Numbers = rows.source  # type: ignore[assignment]
    assert max(map(len, source.reads)) == 2 * BLOCK_PAIRS


def test_reads_run_forward_through_the_store() -> None:
    rows = batches(6 * BLOCK_PAIRS, 3)
    list(rows.shuffled(3 * BLOCK_PAIRS, 0, 1))
    source: Numbers = rows.source  # type: ignore[assignment]
    assert all((np.diff(read) > 0).all() for read in source.reads)


@pytest.mark.parametrize("size", [1, 7, 1000, 5000])
def test_blocks_come_in_document_order(size: int) -> None:
    got = [numbers_of(x, y) for x, y in batches(2500).blocks(size)]
    np.testing.assert_array_equal(np.concatenate(got), np.arange(2500))
    assert max(map(len, got)) == min(size, 2500)


def test_take_gives_pairs_in_the_order_asked_for() -> None:
    index = np.array([5, 1, 1, 900, 0])
    np.testing.assert_array_equal(numbers_of(*batches(1000).take(index)), index)


def test_no_pairs_give_no_batches() -> None:
    rows = batches(0)
    assert list(rows.shuffled(8, 0, 1)) == []
    assert list(rows.blocks()) == []
    assert len(rows) == 0


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_nothing_is_refused(batch: int) -> None:
    with pytest.raises(SpecError, match=f"batch size {batch}"):
        next(batches(10).shuffled(batch, 0, 1))


def test_pairs_of_a_real_store_stay_together(tmp_path: Path) -> None:
    x = spectrum_rows(4000, 8, 1)
    planted = plant(tmp_path / "s.zarr", x, x @ rotation(8, 2))
    store = planted.store
    rows = PairBatches(store.rows("a", 1), store.rows("b", 1), store.pairs("a", "b"), buffer_blocks=2)
    seen = 0
    for source, target in rows.shuffled(128, 0, 1):
        np.testing.assert_allclose(source @ rotation(8, 2), target, atol=1e-5)
        seen += len(source)
    assert seen == 4000
