"""Rows on disk behave as the numpy array of the same numbers, whichever reader they come from."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from featstore.errors import CorruptDataError
from featstore.store import open_store
from featstore.store.format.elements import FORMATS
from featstore.store.format.shards import LAYOUTS
from featstore.store.read.arrays import RowArray
from featstore.store.read.portable import PortableRows
from featstore.store.read.rows import RowReader
from featstore.store.read.tables import TableReader
from tests.support.store_fixtures import Recipe, decoded_states, write_quickly

SHARD_ROWS = 2048
KINDS = [(form, layout) for form in FORMATS for layout in LAYOUTS]
READERS = ("mapped", "portable", "table", "table-portable")


def recipe(form: str, layout: str) -> Recipe:
    return Recipe(form=form, layout=layout, shard_rows=SHARD_ROWS, documents=40)


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """One store of every format and layout, of two whole shards and a little more."""
    root = tmp_path_factory.mktemp("arrays")
    return {kind: write_quickly(root / f"{'-'.join(kind)}.zarr", recipe(*kind)) for kind in KINDS}


def rows_of(path: Path, way: str) -> RowArray:
    """The same layer through every kind of reader; a table has its rows in another order."""
    reader = open_store(path, portable="portable" in way).rows("a", 3)
    if not way.startswith("table"):
        return reader
    assert isinstance(reader, RowReader)
    return TableReader(reader, np.random.default_rng(0).integers(0, reader.rows, 700))


@pytest.fixture(scope="session", params=READERS)
def case(request, stores) -> tuple[RowArray, np.ndarray]:
    """A reader and its rows in memory, as they were written."""
    reader = rows_of(stores["bfloat16", "hot"], request.param)
    whole = decoded_states(recipe("bfloat16", "hot"), "a", 3, open_store(stores["bfloat16", "hot"]).model("a").rows)
    assert isinstance(reader, {"mapped": RowReader, "portable": PortableRows}.get(request.param, TableReader))
    return reader, whole[reader.index] if isinstance(reader, TableReader) else whole


@pytest.mark.parametrize("way", READERS)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_numpy_torch_dask_and_brackets_agree(stores, kind, way):
    rows = rows_of(stores[kind], way)
    whole = decoded_states(recipe(*kind), "a", 3, open_store(stores[kind]).model("a").rows)
    expected = whole[rows.index] if isinstance(rows, TableReader) else whole
    np.testing.assert_array_equal(np.asarray(rows), expected)
    np.testing.assert_array_equal(rows[...], expected)
    np.testing.assert_array_equal(torch.from_numpy(rows[10:650]).numpy(), expected[10:650])
    lazy = dask.array.from_array(rows)
    assert (lazy.shape, lazy.dtype) == (expected.shape, np.float32)
    np.testing.assert_array_equal(lazy.compute(scheduler="threads"), expected)
    np.testing.assert_array_equal(lazy[7:600:3, 2:5].compute(scheduler="synchronous"), expected[7:600:3, 2:5])


def test_what_an_array_says_of_itself(case):
    rows, whole = case
    for name in ("shape", "dtype", "ndim", "size", "nbytes"):
        assert getattr(rows, name) == getattr(whole, name), name
    assert len(rows) == len(whole)
    shown = repr(rows)
    assert "\n" not in shown
    for part in (type(rows).__name__, str(whole.shape), "float32", "bfloat16 hot", "models/a/resid/3"):
        assert part in shown


def indices(count: int, width: int) -> st.SearchStrategy[Any]:
    """What may stand in brackets."""
    row, column = st.integers(-count, count - 1), st.integers(-width, width - 1)
    listed = arrays(np.int64, array_shapes(max_dims=2, max_side=5), elements=row)
    # Rows and columns by number broadcast: of equal shape they give single elements, as open grids a block.
    paired = array_shapes(max_dims=2, max_side=4).flatmap(
        lambda shape: st.tuples(arrays(np.int32, shape, elements=row), arrays(np.int64, shape, elements=column))
    )
    grid = st.tuples(st.lists(row, min_size=1, max_size=4), st.lists(column, min_size=1, max_size=4))
    mask = arrays(np.bool_, count)
    rows = row | st.slices(count) | listed | st.lists(row, max_size=9) | mask | row.map(np.int16) | st.just(...)
    columns = column | st.slices(width) | arrays(np.bool_, width)
    both = st.tuples(row | st.slices(count) | st.lists(row, min_size=1, max_size=9), column | st.slices(width))
    last = st.tuples(st.just(...), columns) | st.tuples(st.slices(count), columns)
    return rows | both | last | paired | grid.map(lambda some: np.ix_(*some)) | st.tuples(rows) | st.just(())


@given(data=st.data())
def test_brackets_are_those_of_numpy(case, data):
    rows, whole = case
    key = data.draw(indices(*whole.shape))
    if isinstance(key, list) and not key:
        key = np.array([], np.int64)  # numpy takes an empty list for floating point here and there
    expected, found = whole[key], rows[key]
    assert (np.shape(found), found.dtype) == (np.shape(expected), np.float32)
    np.testing.assert_array_equal(found, expected)


def test_what_is_read_belongs_to_the_caller(case):
    rows, whole = case
    for key in (slice(3, 9), [5, 1], -1, slice(None), (slice(3, 9), slice(2, 4))):
        part = rows[key]
        assert part.flags.writeable
        part[:] = 7
    np.testing.assert_array_equal(np.asarray(rows), whole)


def test_iteration_gives_rows(case):
    rows, whole = case
    count = 0
    for row, expected in zip(rows, whole, strict=True):
        np.testing.assert_array_equal(row, expected)
        count += 1
    assert count == len(rows)
    first, *_, last = rows
    np.testing.assert_array_equal([first, last], whole[[0, -1]])


def test_the_array_protocol(case):
    rows, whole = case
    assert np.asarray(rows).dtype == np.float32
    for dtype in (np.float64, np.float16):
        found = np.asarray(rows, dtype=dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, whole.astype(dtype))
    np.testing.assert_array_equal(np.array(rows, copy=True), whole)
    with pytest.raises(ValueError, match=r"lies on disk and is widened .*; use np\.asarray\(rows\)"):
        np.array(rows, copy=False)
    np.testing.assert_array_equal(np.mean(rows, axis=0), whole.mean(axis=0))
    np.testing.assert_array_equal(whole[0] - rows, whole[0] - whole)
    np.testing.assert_array_equal(np.concatenate([rows, whole]), np.concatenate([whole, whole]))


def test_what_chooses_no_rows_is_refused(case):
    rows, whole = case
    n, width = whole.shape
    refused: list[tuple[Any, str]] = [
        (n, rf"row {n} is outside 0\.\.{n - 1} of .*resid/3"),
        (-n - 1, rf"row {-n - 1} is outside 0\.\.{n - 1}"),
        ([0, 2**40], rf"row {2**40} is outside"),
        (np.array([2**64 - 1], np.uint64), rf"row {2**64 - 1} is outside"),
        (np.array([-1, -n - 1]), rf"row {-1} is outside|row {-n - 1} is outside"),
        ([0.5, 1.5], "by number, not by float64"),
        ("first", "by number, not by <U5"),
        (np.ones(n - 1, bool), rf"a mask of shape \({n - 1},\) .* it must be \({n},\)"),
        (np.zeros(0, bool), r"a mask of shape \(0,\)"),
        (True, r"a mask of shape \(\)"),
        (np.ones((n, width), bool), r"read first: np\.asarray\(rows\)\[mask\]"),
        (None, "no new axis; read first"),
        ((slice(None), None), "no new axis"),
        ((0, 0, 0), r"3 indices for an array of two axes"),
        ((..., 0, ...), "3 indices"),
        ((0, width), rf"index {width} is out of bounds"),
        (([0, 1], [0, 1, 2]), "shape mismatch"),
    ]
    for key, message in refused:
        with pytest.raises(IndexError, match=message):
            rows[key]


@pytest.mark.parametrize("way", READERS)
def test_a_reader_travels_to_another_process_as_its_place(stores, monkeypatch, way):
    path = stores["int8", "archive"]
    monkeypatch.chdir(path.parent)
    rows = rows_of(Path(path.name), way)
    expected = np.asarray(rows)  # what has been mapped here must not travel
    lazy = dask.array.from_array(rows, chunks=(1024, -1))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[...], expected)
    # torch is in this process; workers that are forked from it would inherit its threads' locks.
    with dask.config.set({"multiprocessing.context": "spawn"}):
        np.testing.assert_array_equal(lazy.compute(scheduler="processes", num_workers=1), expected)
    if not way.startswith("table"):
        assert len(pickle.dumps(rows)) < 3000


class TestDask:
    def test_nothing_is_read_until_it_is_computed_and_then_only_what_is_asked_for(self, stores, tmp_path):
        path = Path(shutil.copytree(stores["float32", "hot"], tmp_path / "s.zarr"))
        for shard in (0, 2):
            (path / f"models/a/resid/3/c/{shard}/0").unlink()
        lazy = dask.array.from_array(open_store(path).rows("a", 3), chunks=(1024, -1))
        assert lazy[SHARD_ROWS + 5 : SHARD_ROWS + 9].compute(scheduler="synchronous").shape == (4, 8)
        with pytest.raises(CorruptDataError, match="c/0/0 is missing"):
            lazy[:5].compute(scheduler="synchronous")

    def test_its_blocks_are_whole_chunks(self, stores):
        rows = open_store(stores["bfloat16", "archive"]).rows("a", 3)
        assert rows.chunks == (256, 8)
        with dask.config.set({"array.chunk-size": "40 kB"}):
            blocks = dask.array.from_array(rows).chunks[0]
        assert len(blocks) > 3
        assert {size % 256 for size in blocks[:-1]} == {0}

    @pytest.mark.parametrize("way", READERS)
    def test_equal_names_mean_equal_data(self, stores, tmp_path, way):
        path = Path(shutil.copytree(stores["float32", "hot"], tmp_path / "s.zarr"))

        def name() -> str:
            return dask.array.from_array(rows_of(path, way)).name

        before = name()
        # Where a place may be anywhere, no name is given twice.
        assert (name() == before) == ("portable" not in way)
        shutil.rmtree(path)
        other = Recipe("float32", "hot", SHARD_ROWS, documents=40, state_seed=1)
        write_quickly(path, other)
        assert name() != before


@pytest.mark.parametrize("form", FORMATS)
def test_stored_rows_of_a_hot_chunk_are_a_view_that_cannot_be_written(stores, form):
    rows = rows_of(stores[form, "hot"], "mapped")
    assert isinstance(rows, RowReader)
    part = rows.stored(slice(0, 5))
    assert np.shares_memory(part, rows.chunk(0))
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        part.flags.writeable = True
