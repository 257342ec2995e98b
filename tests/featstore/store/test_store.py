"""Reading a store: equal to what every other Zarr reader sees, and never a wrong number from a damaged one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from featstore import open_store
from featstore.errors import (
    CorruptDataError,
    LayerRangeError,
    PairingError,
    StoreFormatError,
    StoreNotFoundError,
    StoreStateError,
)
from featstore.store import Store
from featstore.store.format.elements import FORMATS
from featstore.store.inspect.verify import verify_store
from featstore.store.write.index import add_pairs
from featstore.store.write.writer import StoreWriter
from tests.support.store_fixtures import MODELS, Recipe, decoded_states, stored_states, texts, write_quickly

RECIPES = {
    f"{layout}-{form}": Recipe(form=form, layout=layout, shard_rows=shard_rows, documents=40, seed=7)
    for layout, shard_rows in (("hot", 2048), ("archive", 768))
    for form in FORMATS
}
LAYER = 3


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """One store of every format and layout, each with several shards and a part-filled last chunk."""
    root = tmp_path_factory.mktemp("synthetic")
    return {name: write_quickly(root / f"{name}.zarr", recipe) for name, recipe in RECIPES.items()}


def as_stored(values: Any, form: str) -> np.ndarray:
    """Another library's array with the types that numpy lacks as payloads."""
    return np.asarray(values).view(FORMATS[form].storage)


def tensorstore_array(path: Path):
    import tensorstore

    return tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}, open=True).result()


@pytest.mark.parametrize("name", RECIPES)
class TestEveryReaderAgrees:
    def test_rows_are_those_that_were_written(self, stores, name):
        store, recipe = open_store(stores[name]), RECIPES[name]
        for model in MODELS:
            rows = store.model(model).rows
            assert rows > 2 * recipe.shard_rows > rows - rows % recipe.shard_rows - 1 or rows % 256
            for layer in recipe.layers:
                written = stored_states(recipe, model, layer, rows)
                reader = store.rows(model, layer)
                assert reader.shape == (rows, recipe.width)
                np.testing.assert_array_equal(reader.stored(slice(None)), written.stored)
                np.testing.assert_array_equal(reader[:], decoded_states(recipe, model, layer, rows))
                assert reader[:].dtype == np.float32
                np.testing.assert_allclose(
                    store.norms(model, layer),
                    np.linalg.norm(decoded_states(recipe, model, layer, rows), axis=1),
                    rtol=1e-6,
                )

    def test_zarr_python_reads_the_same(self, stores, name):
        store, form = open_store(stores[name]), RECIPES[name].form
        # Consolidated metadata leaves out what only some readers know; test_other_readers.py has the rest.
        group = zarr.open_group(stores[name], mode="r", use_consolidated=False)
        for model in MODELS:
            array = group[f"models/{model}/resid/{LAYER}"]
            whole = store.rows(model, LAYER).stored(slice(None))
            np.testing.assert_array_equal(as_stored(array[:], form), whole)
            np.testing.assert_array_equal(as_stored(array[700:900], form), whole[700:900])
            np.testing.assert_array_equal(as_stored(array.oindex[[5, 1030, 2]], form), whole[[5, 1030, 2]])

    def test_tensorstore_reads_the_same(self, stores, name):
        store, form = open_store(stores[name]), RECIPES[name].form
        for model in MODELS:
            array = tensorstore_array(stores[name] / "models" / model / "resid" / str(LAYER))
            assert array.dtype.name == FORMATS[form].data_type
            whole = store.rows(model, LAYER).stored(slice(None))
            np.testing.assert_array_equal(as_stored(array.read().result(), form), whole)
            np.testing.assert_array_equal(as_stored(array[700:900].read().result(), form), whole[700:900])

    @given(data=st.data())
    def test_any_choice_of_rows_is_that_of_numpy(self, stores, name, data):
        reader, recipe = open_store(stores[name]).rows("a", LAYER), RECIPES[name]
        whole = stored_states(recipe, "a", LAYER, reader.rows).stored
        wide = decoded_states(recipe, "a", LAYER, reader.rows)
        chosen = data.draw(
            st.slices(reader.rows)
            | st.lists(st.integers(0, reader.rows - 1), max_size=40)
            | st.lists(st.integers(0, reader.rows - 1), max_size=40).map(lambda rows: np.array(rows, np.int32))
        )
        index = chosen if not isinstance(chosen, list) else np.array(chosen, np.int64)
        np.testing.assert_array_equal(reader.stored(chosen), whole[index])
        np.testing.assert_array_equal(reader[chosen], wide[index])


def test_every_small_array_reads_the_same_everywhere(stores):
    path = stores["archive-bfloat16"]
    group = zarr.open_group(path, mode="r")
    store = open_store(path)
    arrays = read_everything(store)
    seen = set()
    for name, array in group.members(max_depth=None):
        if isinstance(array, zarr.Array) and "/resid/" not in name:
            ours = arrays[name]
            np.testing.assert_array_equal(array[...], ours)
            np.testing.assert_array_equal(tensorstore_array(path / name).read().result(), ours)
            seen.add(name)
    assert {"corpus/text", "corpus/document/id", "models/b/tokens/special", "pairs/a__b/end/row_b"} <= seen
    assert len(seen) == 7 + 2 * (5 + 2 + 2 + 2) + 2


def test_without_this_package_zarr_python_cannot_name_the_data_type_but_with_it_it_can(stores):
    array = zarr.open_array(stores["hot-bfloat16"] / "models" / "a" / "resid" / "0", mode="r")
    assert array.metadata.to_dict()["data_type"] == "bfloat16"
    assert array.dtype == np.uint16
    assert array.shards == (2048, 8)
    assert array.chunks == (1024, 8)


class TestRowReader:
    def test_a_slice_within_a_hot_chunk_is_a_view_of_the_file(self, stores):
        reader = open_store(stores["hot-bfloat16"]).rows("a", LAYER)
        rows = reader.stored(slice(1030, 1050))
        assert np.shares_memory(rows, reader.chunk(1))
        assert np.shares_memory(rows, reader.stored(slice(1049, 1060)))
        assert not rows.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            rows[0, 0] = 1

    def test_across_chunks_and_when_compressed_it_is_a_copy(self, stores):
        hot, archive = (open_store(stores[f"{layout}-float32"]).rows("a", LAYER) for layout in ("hot", "archive"))
        across = hot.stored(slice(1000, 1050))
        assert across.flags.writeable
        assert not np.shares_memory(across, hot.chunk(0))
        assert not np.shares_memory(archive.stored(slice(0, 5)), archive.stored(slice(0, 5)))

    @pytest.mark.parametrize("bad", [-1, 10**6, 2**40])
    def test_a_row_outside_is_named(self, stores, bad):
        reader = open_store(stores["hot-float32"]).rows("a", LAYER)
        with pytest.raises(IndexError, match=rf"row {bad} is outside 0\.\.{reader.rows - 1}"):
            reader.stored([0, bad, 5])

    def test_a_mask_is_not_taken_for_row_numbers(self, stores):
        reader = open_store(stores["hot-float32"]).rows("a", LAYER)
        with pytest.raises(IndexError, match=r"by number, not by bool; for a mask use np\.flatnonzero"):
            reader.stored(np.arange(reader.rows) % 2 == 0)
        with pytest.raises(IndexError, match="not by float64"):
            reader.stored([0.5, 1.5])

    def test_no_rows(self, stores):
        reader = open_store(stores["archive-float16"]).rows("b", LAYER)
        for nothing in ([], slice(0, 0), slice(10**9, None), np.zeros(reader.rows, bool)):
            assert reader[nothing].shape == (0, 8)
            assert reader[nothing].dtype == np.float32

    def test_readers_are_kept(self, stores):
        store = open_store(stores["hot-float32"])
        assert store.rows("a", 3) is store.rows("a", 3)
        assert store.tokens("a") is store.tokens("a")


class TestWhatAStoreHolds:
    def test_attributes_text_and_splits(self, stores):
        path = stores["hot-bfloat16"]
        store, recipe = open_store(str(path)), RECIPES["hot-bfloat16"]
        assert store.models == MODELS
        assert (store.model("a").depth, store.model("a").width, store.model("a").layers) == (3, 8, (0, 3))
        raw = texts(recipe)
        assert store.corpus.text.tobytes() == b"".join(raw)
        windows = range(len(store.corpus.window_document))
        assert "".join(store.corpus.window_text(w) for w in windows) == b"".join(raw).decode()
        for w in windows:
            start = int(store.corpus.window_offset[w])
            assert b"".join(raw)[start:].startswith(store.corpus.window_text(w).encode())
            document = store.corpus.window_document[w]
            assert store.corpus.window_split[w] == store.corpus.document_split[document]

    def test_sinks_are_first_rows_and_those_beyond_five_medians_at_any_layer(self, stores):
        store = open_store(stores["hot-float32"])
        for model in MODELS:
            medians = store.median_norms(model)
            assert list(medians) == ["0", "3"]
            expected = np.zeros(store.model(model).rows, bool)
            for layer, median in medians.items():
                expected |= store.norms(model, int(layer)) > 5 * median
            loud = expected.copy()
            tokens = store.tokens(model)
            for first in np.flatnonzero(np.diff(tokens.window, prepend=-1)):
                expected[first] |= not tokens.special[first]
            np.testing.assert_array_equal(tokens.sink, expected)
            expected = loud
            assert min(expected[layer::50].mean() for layer in (0, 3)) > 0.9 > 0.1 > expected.mean()

    def test_the_origin_is_a_float64_row(self, stores):
        origin = open_store(stores["hot-float32"]).origin("b", 3)
        assert (origin.shape, origin.dtype) == ((8,), np.float64)

    def test_what_is_not_there_is_named_with_what_is(self, stores):
        store = open_store(stores["hot-float32"])
        with pytest.raises(StoreStateError, match=r"no model 'c' in .*; it holds a, b"):
            store.model("c")
        with pytest.raises(StoreStateError, match="no model 'c'"):
            store.pairs("a", "c")
        with pytest.raises(LayerRangeError, match=r"layer 1 of 'a' is not in .*; it holds 0, 3"):
            store.rows("a", 1)

    def test_equal_data_have_equal_fingerprints_and_other_data_of_the_same_shape_have_not(self, stores, tmp_path):
        recipe = RECIPES["hot-float32"]
        again = open_store(write_quickly(tmp_path / "again.zarr", recipe))
        other = open_store(write_quickly(tmp_path / "other.zarr", replace(recipe, state_seed=1)))
        fingerprint = open_store(stores["hot-float32"]).fingerprint
        assert again.fingerprint == fingerprint != other.fingerprint
        assert len(fingerprint) == 64
        sizes = [{name: r["bytes"] for name, r in s.manifest.items() if "/c/" in name} for s in (again, other)]
        assert sizes[0] == sizes[1]


class TestOpening:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(StoreNotFoundError, match=r"no store at '.*x\.zarr'; create one with `featstore extract"):
            open_store(tmp_path / "x.zarr")

    def test_not_a_store(self, tmp_path):
        (tmp_path / "file").write_text("x")
        (tmp_path / "empty").mkdir()
        zarr.create_group(tmp_path / "plain", attributes={"mine": 1})
        zarr.create_array(tmp_path / "array", shape=(3,), dtype="float32")
        for name, message in {
            "file": "no zarr.json",
            "empty": "no zarr.json",
            "plain": "Zarr node but not a feature store",
            "array": "Zarr node but not a feature store",
        }.items():
            with pytest.raises(StoreFormatError, match=message):
                open_store(tmp_path / name)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"format_version": 4}, StoreFormatError, "format version 4, this featstore reads up to 3; upgrade"),
            ({"format_version": 0}, CorruptDataError, "format version 0"),
            ({"format_version": "1"}, CorruptDataError, "format version '1'"),
            ({"complete": False}, StoreStateError, "unfinished; run the same `featstore extract` command again"),
            ({"models": "ab"}, CorruptDataError, "/models is 'ab', expected a list"),
            ({"models": ["../../elsewhere"]}, CorruptDataError, "expected a safe name"),
            ({"models": ["/etc"]}, CorruptDataError, "expected a safe name"),
            ({"models": [".."]}, CorruptDataError, "expected a safe name"),
            ({"models": ["a\n"]}, CorruptDataError, "expected a safe name"),
            ({"models": [["a"]]}, CorruptDataError, "/models/0 is a list of 1, expected text"),
        ],
    )
    def test_attributes_of_another_kind_even_when_sealed(self, small, tmp_path, change, error, message):
        path = copied(small, tmp_path)
        root = json.loads((path / "zarr.json").read_text())["attributes"]["featstore"]
        StoreWriter(path).seal({"featstore": root | change})
        with pytest.raises(error, match=message):
            open_store(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"attributes": 3}', "{" * 100_000, "9" * 5000])
    def test_a_damaged_root(self, small, tmp_path, text):
        path = copied(small, tmp_path)
        (path / "zarr.json").write_bytes(text.encode("latin-1"))
        with pytest.raises((CorruptDataError, StoreFormatError), match="zarr"):
            open_store(path)

    def test_pairs_that_were_never_sealed_do_not_exist(self, small, tmp_path):
        path = copied(small, tmp_path)
        shutil.copytree(path / "pairs" / "a__b" / "end", path / "pairs" / "a__b" / "word")
        with pytest.raises(PairingError, match="no 'word' pairs"):
            open_store(path).pairs("a", "b", "word")
        add_pairs(path, "word")
        assert 0 < len(open_store(path).pairs("a", "b", "word")) < len(open_store(path).pairs("a", "b"))
        assert not verify_store(path, quiet=True)["damage"]


# Shared with the fault tests ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A store that is quick to copy and to read whole."""
    recipe = Recipe(documents=5, document_bytes=150, width=4, shard_rows=256, layers=(0, 2))
    return write_quickly(tmp_path_factory.mktemp("small") / "small.zarr", recipe)


def copied(store: Path, into: Path) -> Path:
    return Path(shutil.copytree(store, into / "copy.zarr"))


def read_everything(store: Store) -> dict[str, np.ndarray]:
    """Every array that the library gives out, by a name; those that lie on disk by their path."""
    result: dict[str, np.ndarray] = {}
    for name, group in (("document", ("start", "id", "split")), ("window", ("document", "start", "end"))):
        for part in group:
            result[f"corpus/{name}/{part}"] = getattr(store.corpus, f"{name}_{part}")
    result["corpus/text"] = store.corpus.text
    for model in store.models:
        result |= {f"models/{model}/tokens/{k}": v for k, v in vars(store.tokens(model)).items()}
        for layer, median in store.median_norms(model).items():
            result[f"models/{model}/median_norm/{layer}"] = np.array([median])
        for layer in store.model(model).layers:
            result[f"models/{model}/resid/{layer}"] = store.rows(model, layer)[:]
            result[f"models/{model}/norm/{layer}"] = store.norms(model, layer)
            result[f"models/{model}/origin/{layer}"] = store.origin(model, layer)
    pairs = store.pairs(*store.models[:2])
    result["pairs/a__b/end/row_a"], result["pairs/a__b/end/row_b"] = pairs.row_source, pairs.row_target
    result["split"], result["document"], result["mask"] = pairs.split, pairs.document, pairs.sink
    return result


FORKED = """
import os, sys
import numpy as np
from featstore import open_store

rows = open_store(sys.argv[1]).rows("a", 3)
whole = rows.stored(slice(None))
pid = os.fork()
if pid == 0:
    os._exit(0 if np.array_equal(rows.stored(slice(None)), whole) else 3)
_, status = os.waitpid(pid, 0)
print(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_process_reads_on(stores):
    """The threads that decode are its parent's and do not come along."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, str(stores["archive-bfloat16"])],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_what_a_thread_finds_damaged_reaches_the_reader(stores, tmp_path):
    path = shutil.copytree(stores["archive-bfloat16"], tmp_path / "s.zarr")
    shard = path / "models" / "a" / "resid" / str(LAYER) / "c" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    rows = open_store(path).rows("a", LAYER)
    with pytest.raises(CorruptDataError, match="checksum mismatch"):
        rows.stored(slice(None))
    rows.stored(slice(0, 700))
