"""Rows for torch, which share memory with the map, and for Dask, in blocks of whole shards."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path

import dask
import dask.array
import numpy as np
import pytest
import torch

from featstore.errors import CorruptDataError
from featstore.store import open_store
from featstore.store.format.elements import FORMATS
from featstore.store.format.shards import LAYOUTS
from featstore.store.read.rows import RowReader, TableReader
from featstore.store.read.views import dask_rows, torch_rows
from tests.support.store_fixtures import Recipe, decoded_states, write_quickly
from tests.support.tiers import tiered

KINDS = [(form, layout) for form in FORMATS for layout in LAYOUTS]
TYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
SHARD_ROWS = 2048


def recipe(form: str, layout: str) -> Recipe:
    return Recipe(form=form, layout=layout, shard_rows=SHARD_ROWS, documents=40)


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """One store of every format and layout, of two whole shards and a little more."""
    root = tmp_path_factory.mktemp("views")
    return {kind: write_quickly(root / f"{'-'.join(kind)}.zarr", recipe(*kind)) for kind in KINDS}


def payload(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor, for types that numpy lacks, too."""
    return tensor.view(torch.uint8).numpy()


class TestTorch:
    @pytest.mark.parametrize("way", ["mapped", "portable"])
    @pytest.mark.parametrize("kind", KINDS, ids="-".join)
    def test_the_stored_numbers_in_the_stored_type(self, stores, kind, way):
        form = kind[0]
        reader = open_store(stores[kind], portable=way == "portable").rows("a", 3)
        for rows in (slice(1030, 1050), slice(1000, 1050), slice(None, None, -100), [5, 1, 5]):
            tensor, stored = torch_rows(reader, rows), reader.stored(rows)
            assert tensor.dtype == TYPES[form]
            assert tensor.shape == stored.shape
            np.testing.assert_array_equal(payload(tensor), stored.copy().view(np.uint8))
            if not reader.form.row_scaled:
                np.testing.assert_array_equal(tensor.float().numpy(), reader[rows])
        for nothing in ([], slice(0, 0), slice(9, 3)):
            tensor = torch_rows(reader, nothing)
            assert (tensor.dtype, tensor.shape) == (TYPES[form], (0, 8))

    def test_values_of_scaled_formats(self, stores):
        """float8 as torch widens it, times the scales, is what the reader gives."""
        reader = open_store(stores["fp8", "hot"]).rows("a", 3)
        scale = reader.row_scale(np.arange(100))
        values = torch_rows(reader, slice(0, 100)).float() * torch.from_numpy(scale)[:, None]
        np.testing.assert_array_equal(values.numpy(), reader[:100])

    @pytest.mark.parametrize("form", FORMATS)
    def test_a_slice_within_a_hot_chunk_shares_memory_with_the_map(self, stores, form):
        reader = open_store(stores[form, "hot"]).rows("a", 3)
        assert isinstance(reader, RowReader)
        whole = reader.private.chunk(1)
        tensor, later = torch_rows(reader, slice(1030, 2048)), torch_rows(reader, slice(1040, 1041))
        assert tensor.data_ptr() == whole.ctypes.data + 6 * whole.strides[0]
        assert later.data_ptr() == tensor.data_ptr() + 10 * whole.strides[0]
        assert np.shares_memory(payload(tensor), whole)
        assert memory_of(tensor.data_ptr()).endswith("/models/a/resid/3/c/0/0")

    def test_across_chunks_and_when_compressed_it_is_a_copy(self, stores):
        for layout, rows in (("hot", slice(1000, 1050)), ("hot", [1, 2]), ("archive", slice(3, 9))):
            reader = open_store(stores["float32", layout]).rows("a", 3)
            assert not memory_of(torch_rows(reader, rows).data_ptr()).endswith("/c/0/0")

    @pytest.mark.parametrize("form", FORMATS)
    def test_writing_to_a_tensor_changes_neither_the_file_nor_the_reader(self, stores, tmp_path, form):
        path = Path(shutil.copytree(stores[form, "hot"], tmp_path / "s.zarr"))
        reader = open_store(path).rows("a", 3)
        file = path / "models/a/resid/3/c/0/0"
        before, stored, values = file.read_bytes(), reader.stored(slice(0, 50)), reader[:50]
        expected = stored.copy()
        tensor = torch_rows(reader, slice(0, 50))
        tensor.view(torch.uint8).fill_(7)
        assert (payload(tensor) == 7).all()
        np.testing.assert_array_equal(stored, expected)
        np.testing.assert_array_equal(reader.stored(slice(0, 50)), expected)
        np.testing.assert_array_equal(reader[:50], values)
        np.testing.assert_array_equal(open_store(path).rows("a", 3).stored(slice(0, 50)), expected)
        assert file.read_bytes() == before

    def test_arrays_of_the_reader_stay_read_only(self, stores):
        reader = open_store(stores["float32", "hot"]).rows("a", 3)
        torch_rows(reader, slice(0, 5))
        for array in (reader.stored(slice(0, 5)), reader.chunk(0)):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            with pytest.raises(ValueError, match="cannot set WRITEABLE"):
                array.flags.writeable = True

    def test_a_tensor_outlives_store_and_file(self, stores, tmp_path):
        path = Path(shutil.copytree(stores["int8", "hot"], tmp_path / "s.zarr"))
        expected = open_store(path).rows("a", 3).stored(slice(0, 900)).copy()
        tensor = torch_rows(open_store(path).rows("a", 3), slice(0, 900))
        shutil.rmtree(path)
        np.testing.assert_array_equal(tensor.numpy(), expected)

    def test_damage_is_found_before_a_tensor_is_lent(self, stores, tmp_path):
        path = Path(shutil.copytree(stores["bfloat16", "hot"], tmp_path / "s.zarr"))
        file = path / "models/a/resid/3/c/0/0"
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
        reader = open_store(path).rows("a", 3)
        with pytest.raises(CorruptDataError, match=r"checksum mismatch in .*chunk 0"):
            torch_rows(reader, slice(0, 5))
        torch_rows(reader, slice(1024, 1030))

    def test_layer_0_as_a_table(self, stores):
        rows = open_store(stores["fp8", "hot"]).rows("a", 3)
        assert isinstance(rows, RowReader)
        table = TableReader(rows, np.array([7, 0, 7, 2000]))
        np.testing.assert_array_equal(payload(torch_rows(table, slice(1, 4))), rows.stored([0, 7, 2000]))


def memory_of(address: int) -> str:
    """The file that is mapped at an address of this process, if any."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, rest = line.partition(" ")
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return rest
    return ""


class TestDask:
    @pytest.mark.parametrize("kind", KINDS, ids="-".join)
    def test_the_rows_in_blocks_of_whole_shards(self, stores, kind):
        store = open_store(stores[kind])
        for model in store.models:
            array, rows = dask_rows(store, model, 3), store.model(model).rows
            assert (array.shape, array.dtype) == ((rows, 8), np.float32)
            assert array.chunks == ((SHARD_ROWS, SHARD_ROWS, rows - 2 * SHARD_ROWS), (8,))
            expected = decoded_states(recipe(*kind), model, 3, rows)
            for scheduler in ("synchronous", "threads"):
                found = array.compute(scheduler=scheduler)
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, expected)
            assert array.sum().dtype == np.float32

    @pytest.mark.parametrize("way", tiered(["mapped"], ["portable"]))
    def test_in_other_processes(self, stores, monkeypatch, way):
        """They begin elsewhere and get no open file, only the place."""
        path = stores["int8", "archive"]
        monkeypatch.chdir(path.parent)
        store = open_store(path.name, portable=way == "portable")
        arrays = [dask_rows(store, model, 3) for model in store.models]
        expected = [store.rows(model, 3)[:] for model in store.models]
        monkeypatch.chdir("/")
        # Read here already: what has been mapped must not travel.
        assert len(pickle.dumps(store)) < 1000
        # torch is in this process; workers that are forked from it would inherit its threads' locks.
        with dask.config.set({"multiprocessing.context": "spawn"}):
            for array, rows in zip(dask.compute(*arrays, scheduler="processes", num_workers=2), expected, strict=True):
                np.testing.assert_array_equal(array, rows)

    def test_nothing_is_read_until_it_is_computed_and_then_only_what_is_asked_for(self, stores, tmp_path):
        path = Path(shutil.copytree(stores["float32", "hot"], tmp_path / "s.zarr"))
        for shard in (0, 2):
            (path / f"models/a/resid/3/c/{shard}/0").unlink()
        array = dask_rows(open_store(path), "a", 3)
        assert array[SHARD_ROWS + 5 : SHARD_ROWS + 9].compute(scheduler="synchronous").shape == (4, 8)
        with pytest.raises(CorruptDataError, match="c/0/0 is missing"):
            array[:5].compute(scheduler="synchronous")

    def test_equal_names_mean_equal_data(self, stores, tmp_path):
        path = stores["float32", "hot"]
        moved = Path(shutil.copytree(path, tmp_path / "moved.zarr"))
        other = write_quickly(tmp_path / "other.zarr", Recipe("float32", "hot", SHARD_ROWS, documents=40, state_seed=1))
        names = [dask_rows(open_store(p), "a", 3).name for p in (path, moved, other)]
        assert names[0] == names[1] != names[2]
        assert len({dask_rows(open_store(path), model, k).name for model in "ab" for k in (0, 3)}) == 4

    def test_it_computes_with_the_rest_of_dask(self, stores):
        store = open_store(stores["bfloat16", "archive"])
        rows = store.rows("a", 3)[:]
        gram = dask_rows(store, "a", 3).T @ dask_rows(store, "a", 3)
        np.testing.assert_allclose(gram.compute(scheduler="threads"), rows.T @ rows, rtol=1e-3, atol=1e-2)


def test_torch_is_imported_when_it_is_asked_for():
    """`test_walls` holds that reading does not need it; this, that the module is not what brings it."""
    source = Path(sys.modules["featstore.store.read.views"].__file__ or "").read_text()
    assert "\n    import torch\n" in source
    assert "\nimport torch" not in source
    assert "\nimport dask" not in source
