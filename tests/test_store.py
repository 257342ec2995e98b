"""Reading a store: equal to what every other Zarr reader sees, and never a wrong number from a damaged one."""

from __future__ import annotations

import copy
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import MODELS, Recipe, states, stored_states, texts, write_quickly

from featstore import formats, open_store
from featstore.errors import (
    CorruptDataError,
    FeatstoreError,
    LayerRangeError,
    PairingError,
    StoreFormatError,
    StoreNotFoundError,
    StoreStateError,
)
from featstore.index import add_pairs
from featstore.store import Store
from featstore.verify import verify_store
from featstore.writer import StoreWriter

RECIPES = {
    f"{layout}-{form}": Recipe(form=form, layout=layout, shard_rows=shard_rows, documents=40, seed=7)
    for layout, shard_rows in (("hot", 2048), ("archive", 768))
    for form in formats.FORMATS
}
LAYER = 3


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """One store of every format and layout, each with several shards and a part-filled last chunk."""
    root = tmp_path_factory.mktemp("synthetic")
    return {name: write_quickly(root / f"{name}.zarr", recipe) for name, recipe in RECIPES.items()}


def as_stored(values: Any, form: str) -> np.ndarray:
    """Another library's array with bfloat16 as 16-bit payloads."""
    array = np.asarray(values)
    return array.view(np.uint16) if form == "bfloat16" and array.dtype != np.uint16 else array


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
                np.testing.assert_array_equal(reader.stored(slice(None)), written)
                np.testing.assert_array_equal(reader[:], reader.form.decode(written))
                assert reader[:].dtype == np.float32
                np.testing.assert_allclose(
                    store.norms(model, layer), np.linalg.norm(states(recipe, model, layer, rows), axis=1), rtol=1e-2
                )

    def test_zarr_python_reads_the_same(self, stores, name):
        store, form = open_store(stores[name]), RECIPES[name].form
        for consolidated in (True, False):
            group = zarr.open_group(stores[name], mode="r", use_consolidated=consolidated)
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
            assert array.dtype.name == form
            whole = store.rows(model, LAYER).stored(slice(None))
            np.testing.assert_array_equal(as_stored(array.read().result(), form), whole)
            np.testing.assert_array_equal(as_stored(array[700:900].read().result(), form), whole[700:900])

    @given(data=st.data())
    def test_any_choice_of_rows_is_that_of_numpy(self, stores, name, data):
        reader, recipe = open_store(stores[name]).rows("a", LAYER), RECIPES[name]
        whole = stored_states(recipe, "a", LAYER, reader.rows)
        chosen = data.draw(
            st.slices(reader.rows)
            | st.lists(st.integers(0, reader.rows - 1), max_size=40)
            | st.lists(st.integers(0, reader.rows - 1), max_size=40).map(lambda rows: np.array(rows, np.int32))
        )
        expected = whole[chosen] if not isinstance(chosen, list) else whole[np.array(chosen, np.int64)]
        np.testing.assert_array_equal(reader.stored(chosen), expected)
        np.testing.assert_array_equal(reader[chosen], reader.form.decode(expected))


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
    assert len(seen) == 7 + 2 * (6 + 2 + 2) + 2


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
            reader[[0, bad, 5]]

    def test_a_mask_is_not_taken_for_row_numbers(self, stores):
        reader = open_store(stores["hot-float32"]).rows("a", LAYER)
        with pytest.raises(IndexError, match=r"by number, not by bool; for a mask use np\.flatnonzero"):
            reader[np.arange(reader.rows) % 2 == 0]
        with pytest.raises(IndexError, match="not by float64"):
            reader[[0.5, 1.5]]

    def test_no_rows(self, stores):
        reader = open_store(stores["archive-float16"]).rows("b", LAYER)
        for nothing in ([], slice(0, 0), slice(10**9, None), np.zeros(0, bool)):
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

    def test_sinks_are_rows_beyond_five_medians_at_any_layer(self, stores):
        store = open_store(stores["hot-float32"])
        for model in MODELS:
            medians = store.median_norms(model)
            assert list(medians) == ["0", "3"]
            expected = np.zeros(store.model(model).rows, bool)
            for layer, median in medians.items():
                expected |= store.norms(model, int(layer)) > 5 * median
            np.testing.assert_array_equal(store.tokens(model).sink, expected)
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
            ({"format_version": 2}, StoreFormatError, "format version 2, this featstore reads up to 1; upgrade"),
            ({"format_version": 0}, CorruptDataError, "format version 0"),
            ({"format_version": "1"}, CorruptDataError, "format version '1'"),
            ({"complete": False}, StoreStateError, "unfinished; run the same `featstore extract` command again"),
            ({"models": "ab"}, CorruptDataError, "'models' is 'ab', not usable"),
            ({"models": ["../../elsewhere"]}, CorruptDataError, "not a safe path; do not trust this store"),
            ({"models": ["/etc"]}, CorruptDataError, "not a safe path"),
            ({"models": [".."]}, CorruptDataError, "not a safe path"),
            ({"models": ["a\n"]}, CorruptDataError, "not a safe path"),
            ({"models": [["a"]]}, CorruptDataError, "not a safe path"),
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

    @pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "models/../../outside", "a/.."])
    def test_a_manifest_that_points_outside_is_refused_before_it_is_followed(self, small, tmp_path, name):
        path = copied(small, tmp_path)
        entry = {"unit": "evil", "files": {name: {"bytes": 1, "crc32": "00000000"}}}
        (path / "manifest" / "evil.json").write_text(json.dumps(entry))
        with pytest.raises(CorruptDataError, match="not a file of this store; do not trust it"):
            open_store(path).manifest  # noqa: B018
        assert "do not trust it" in verify_store(path, quiet=True)["damage"][0]

    def test_pairs_that_were_never_sealed_do_not_exist(self, small, tmp_path):
        path = copied(small, tmp_path)
        shutil.copytree(path / "pairs" / "a__b" / "end", path / "pairs" / "a__b" / "word")
        with pytest.raises(PairingError, match="no 'word' pairs"):
            open_store(path).pairs("a", "b", "word")
        add_pairs(path, "word")
        assert 0 < len(open_store(path).pairs("a", "b", "word")) < len(open_store(path).pairs("a", "b"))
        assert not verify_store(path, quiet=True)["damage"]


# Damage -------------------------------------------------------------------------------------------------------------


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
        result[f"models/{model}/tokens/median_norm"] = np.array(list(store.median_norms(model).values()))
        for layer in store.model(model).layers:
            result[f"models/{model}/resid/{layer}"] = store.rows(model, layer)[:]
            result[f"models/{model}/norm/{layer}"] = store.norms(model, layer)
            result[f"models/{model}/origin/{layer}"] = store.origin(model, layer)
    pairs = store.pairs(*store.models[:2])
    result["pairs/a__b/end/row_a"], result["pairs/a__b/end/row_b"] = pairs.row_source, pairs.row_target
    result["split"], result["document"], result["mask"] = pairs.split, pairs.document, pairs.sink
    return result


VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 255, 2**31, 2**64, 10**30, 1.5, -0.0, float("nan"), 1e999, "", "x", "float64",
    "int8", "bfloat16", "../..", "a\x00b", "n" * 5000, "\ud800", [], [0], [[]], {}, {"name": "x"},
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


def mutated(document: Any, rng: random.Random) -> str:
    """A JSON text with one thing changed."""
    document = copy.deepcopy(document)
    kind = rng.choice(["value", "value", "value", "near", "delete", "rename", "add", "text"])
    if kind == "text":
        text = json.dumps(document)
        return rng.choice([text[: rng.randrange(len(text))], "", "null", "[]", f"[{text}]", text + "}", "\x00" + text])
    at = rng.choice([place for place in places(document) if place])
    holder = document
    for key in at[:-1]:
        holder = holder[key]
    old = holder[at[-1]]
    if kind == "delete":
        del holder[at[-1]]
    elif kind == "rename" and isinstance(holder, dict):
        del holder[at[-1]]
        holder[rng.choice(["x", "", "n" * 5000, "\ud800", "/etc/passwd", "a\x00b", at[-1] + "x"])] = old
    elif kind == "add" and isinstance(old, dict):
        old["extra"] = rng.choice(VALUES)
    elif kind == "add" and isinstance(old, list):
        old.append(copy.deepcopy(rng.choice([*old, 0])))
    elif kind == "near" and isinstance(old, list):
        old.reverse()
    elif kind == "near" and isinstance(old, int):
        holder[at[-1]] = old + rng.choice([-1, 1])
    elif kind == "near" and isinstance(old, str):
        holder[at[-1]] = old[:-1] + rng.choice("08ax/")
    else:
        holder[at[-1]] = rng.choice(VALUES)
    return json.dumps(document)


def documents_of(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*.json"))


def outcome(path: Path) -> dict[str, np.ndarray] | FeatstoreError:
    """What reading a store gives: its arrays or one of our errors; any other exception passes through."""
    try:
        store = open_store(path)
        store.fingerprint  # noqa: B018 - reads the manifest
        return read_everything(store)
    except FeatstoreError as error:
        return error


@pytest.mark.parametrize("kind", ["zarr", "manifest", "root"])
def test_a_changed_metadata_document_gives_our_error_or_the_same_arrays(small, tmp_path, kind):
    path = copied(small, tmp_path)
    expected = read_everything(open_store(path))
    rng = random.Random(kind)
    chosen = {
        "zarr": [n for n in documents_of(path) if n.endswith("/zarr.json")],
        "manifest": [n for n in documents_of(path) if n.startswith("manifest/")],
        "root": ["zarr.json", "manifest/metadata.json"],
    }[kind]
    refused = 0
    for i in range(200):
        name = chosen[i % len(chosen)]
        whole = (path / name).read_bytes()
        changed = mutated(json.loads(whole), rng).encode("utf-8", errors="surrogatepass")
        (path / name).write_bytes(changed)
        try:
            found = outcome(path)
        except Exception as error:  # noqa: BLE001
            pytest.fail(f"{name} changed to {changed[:300]!r} raises {error!r}")
        (path / name).write_bytes(whole)
        if isinstance(found, FeatstoreError):
            refused += 1
            assert str(path) in str(found)
            continue
        assert found.keys() == expected.keys(), (name, changed[:300])
        for key, array in expected.items():
            assert found[key].dtype == array.dtype, (name, key, changed[:300])
            np.testing.assert_array_equal(found[key], array, err_msg=f"{name} {key} {changed[:300]!r}")
    assert refused > 60
    assert not isinstance(outcome(path), FeatstoreError)


def test_a_changed_shape_type_or_order_is_never_believed(small, tmp_path):
    """Each of these would be read without complaint, as other numbers."""
    path = copied(small, tmp_path)
    same_size = {"int32": "float32", "float32": "int32", "int64": "float64", "float64": "int64", "uint8": "bool"}
    same_size |= {"bool": "uint8", "bfloat16": "float16"}
    for name in documents_of(path):
        document = json.loads((path / name).read_bytes())
        changes = []
        if document.get("node_type") == "array" and name != "zarr.json":
            changes.append({"shape": [document["shape"][0] - 1, *document["shape"][1:]]})
            changes.append({"data_type": same_size[document["data_type"]]})
        elif name.startswith("models/") and "layers" in document["attributes"].get("featstore", {}):
            own = document["attributes"]["featstore"]
            changes.append({"attributes": {"featstore": own | {"layers": own["layers"][::-1]}}})
        whole = (path / name).read_bytes()
        for change in changes:
            (path / name).write_text(json.dumps(document | change))
            with pytest.raises(CorruptDataError, match=f"{name} is not the document that the manifest records"):
                read_everything(open_store(path))
        (path / name).write_bytes(whole)
    assert not isinstance(outcome(path), FeatstoreError)


def test_a_flipped_bit_in_any_file_is_found_by_verify_and_by_reading(small, tmp_path):
    path = copied(small, tmp_path)
    assert verify_store(path, quiet=True)["damage"] == []
    rng = random.Random(0)
    names = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file() and p.stat().st_size]
    assert len(names) > 80
    for name in names:
        whole = (path / name).read_bytes()
        at, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        (path / name).write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            if name == "zarr.json":
                with pytest.raises(FeatstoreError):
                    raise_damage(path)
            else:
                assert verify_store(path, quiet=True)["damage"], (name, at, bit)
            if "/c/" in name:
                with pytest.raises(CorruptDataError, match="checksum mismatch"):
                    read_everything(open_store(path))
        finally:
            (path / name).write_bytes(whole)
    assert verify_store(path, quiet=True)["damage"] == []


def raise_damage(path: Path) -> None:
    """Verify; a damaged root may also be no root at all."""
    damage = verify_store(path, quiet=True)["damage"]
    if damage:
        raise CorruptDataError(damage[0])


def test_a_truncated_lengthened_emptied_or_missing_file_is_found(small, tmp_path):
    path = copied(small, tmp_path)
    data = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file() and p.stat().st_size]
    for i, name in enumerate(n for n in data if n != "zarr.json"):
        whole = (path / name).read_bytes()
        if i % 4 == 0:
            (path / name).unlink()
        else:
            (path / name).write_bytes((whole[:-2], whole + b"\0", b"")[i % 4 - 1])
        assert verify_store(path, quiet=True)["damage"], name
        if "/c/" in name and (i % 4 != 2 or "/resid/" not in name):
            with pytest.raises(CorruptDataError):
                read_everything(open_store(path))
        (path / name).write_bytes(whole)
    assert verify_store(path, quiet=True)["damage"] == []


@pytest.mark.parametrize("layout", ["hot", "archive"])
def test_two_whole_files_swapped_are_found_by_verify(tmp_path, layout):
    """Each is sound in itself and, in the hot layout, of the same size."""
    shard_rows = 1024 if layout == "hot" else 256
    path = write_quickly(tmp_path / "s.zarr", Recipe(layout=layout, shard_rows=shard_rows, documents=30))
    swaps = [("resid/3/c/0/0", "resid/3/c/1/0"), ("resid/0/c/0/0", "resid/3/c/0/0"), ("norm/0/c/0", "norm/3/c/0")]
    for pair in swaps:
        first, second = (path / "models" / "b" / name for name in pair)
        one, two = first.read_bytes(), second.read_bytes()
        assert layout == "archive" or len(one) == len(two)
        first.write_bytes(two)
        second.write_bytes(one)
        damage = verify_store(path, quiet=True)["damage"]
        assert sorted(line.partition(":")[0] for line in damage) == sorted(f"models/b/{name}" for name in pair)
        first.write_bytes(one)
        second.write_bytes(two)
    assert verify_store(path, quiet=True)["damage"] == []


def test_a_unit_lost_from_the_manifest_is_found_by_verify(small, tmp_path):
    path = copied(small, tmp_path)
    (path / "manifest" / "models" / "a" / "rows-000000.json").unlink()
    (path / "manifest" / "corpus.json").unlink()
    damage = verify_store(path, quiet=True)["damage"]
    assert "models/a/resid/2/c/0/0: not in the manifest" in damage
    assert "corpus/text/c/0: not in the manifest" in damage
    assert "corpus/document/id/c/0/0: not in the manifest" in damage


def test_contents_are_checked_even_where_every_checksum_is_right(small, tmp_path):
    """What a writer with a bug would seal: norms that are not the rows', pairs that end elsewhere."""
    path = copied(small, tmp_path)
    store = open_store(path)
    pairs, norms = store.pairs("a", "b"), store.norms("a", 2).copy()
    norms[7] += 1
    writer = StoreWriter(path)
    base = "pairs/a__b/end"
    writer.vectors(base, {f"{base}/row_a": pairs.row_source, f"{base}/row_b": np.roll(pairs.row_target, 1)})
    files = json.loads((path / "manifest" / "models" / "a" / "rows-000000.json").read_text())["files"]
    chunk = np.zeros(256, np.float32)
    chunk[: len(norms[:256])] = norms[:256]
    content = {name: (path / name).read_bytes() for name in files}
    writer.commit("models/a/rows-000000", content | {"models/a/norm/2/c/0": formats.seal(chunk.tobytes())})
    writer.seal({"featstore": store.attributes})
    first, second = verify_store(path, quiet=True)["damage"]
    assert first == "a: layer 2, row 7: the state is not finite or differs from its norm"
    assert second.startswith("pairs of a and b: ")
    assert second.endswith("do not end at the same byte")
