"""Long columns give what arrays give, whatever is asked of them."""

from __future__ import annotations

import numpy as np
import pytest

from featstore.store.read import columns
from featstore.store.read.columns import OfRows, RowSet, StoredColumn, get_bits

ROWS = 5 * columns._BLOCK + 77


@pytest.fixture
def numbers() -> np.ndarray:
    chosen = np.random.default_rng(0).random(ROWS) < 0.3
    # A block that is empty, and one that is full.
    chosen[columns._BLOCK : 2 * columns._BLOCK] = False
    chosen[2 * columns._BLOCK : 3 * columns._BLOCK] = True
    return np.flatnonzero(chosen)


def every(numbers: np.ndarray) -> list[tuple[columns.Column, np.ndarray]]:
    """A column of each kind with the array that it stands for."""
    rows = RowSet.of(ROWS, numbers)
    values = np.random.default_rng(1).integers(0, 100, ROWS).astype(np.int32)
    chunk = 1000
    read = [np.resize(values[at : at + chunk], chunk) for at in range(0, ROWS, chunk)]
    return [
        (rows, numbers),
        (OfRows(rows, lambda r: values[r], np.int32), values[numbers]),
        (StoredColumn(lambda number: read[number], ROWS, chunk, values.dtype), values),
    ]


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("piece", [1 << 20, 777])
def test_indexing_is_that_of_an_array(numbers, kind, piece, monkeypatch):
    monkeypatch.setattr(columns, "PIECE", piece)
    column, array = every(numbers)[kind]
    n, rng = len(array), np.random.default_rng(2)
    assert len(column) == n
    assert column.dtype == array.dtype
    keys = [
        slice(None), slice(5, 5), slice(100, 4000), slice(-300, None), slice(n, n + 5), slice(10, 9000, 7),
        slice(None, None, -3),
        rng.integers(0, n, 3000), np.sort(rng.integers(0, n, 3000)), rng.integers(-n, n, (4, 5)), np.zeros(0, np.int64),
        rng.random(n) < 0.1, np.zeros(n, bool), [3, 1, 2],
    ]  # fmt: skip
    for key in keys:
        np.testing.assert_array_equal(column[key], array[key])
        assert column[key].dtype == array.dtype
    assert column[7] == array[7]
    assert column[-1] == array[-1]
    for key in (n, -n - 1, [0, n]):
        with pytest.raises(IndexError):
            column[key]
    with pytest.raises(IndexError):
        column[np.ones(n - 1, bool)]
    np.testing.assert_array_equal(np.asarray(column), array)
    np.testing.assert_array_equal(column == 3, array == 3)
    np.testing.assert_array_equal(column != 3, array != 3)
    np.testing.assert_array_equal(column.astype(np.float64), array.astype(np.float64))
    assert list(column)[:50] == list(array)[:50]
    assert column.tobytes() == array.tobytes()


def test_a_subset_of_a_set_of_rows(numbers):
    rows = RowSet.of(ROWS, numbers)
    keep = np.random.default_rng(3).random(len(numbers)) < 0.2
    np.testing.assert_array_equal(np.asarray(rows.where(keep)), numbers[keep])
    np.testing.assert_array_equal(rows.counts(1024)[: ROWS // 1024], np.bincount(numbers // 1024)[: ROWS // 1024])
    everybody = np.random.default_rng(4).permutation(ROWS)
    np.testing.assert_array_equal(get_bits(rows.bits, everybody), np.isin(everybody, numbers))


def test_no_rows_at_all():
    rows = RowSet.of(ROWS, np.zeros(0, np.int64))
    assert len(rows) == 0
    assert len(rows[np.zeros(0, np.int64)]) == len(rows[:]) == 0
