"""Other people's readers, without our package: they list a store and read all but states of types they do not know.

Each reader runs in a process in which ``featstore`` cannot be imported; see ``tests/support/readers``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zarr

from featstore import open_store
from featstore.store import Store
from featstore.store.format.documents import CORE_TYPES
from featstore.store.format.elements import BY_DATA_TYPE, FORMATS
from featstore.store.format.shards import parse_layout
from featstore.store.inspect.verify import verify_store
from featstore.store.write.row_writer import RowArrays
from featstore.store.write.table import write_table
from featstore.store.write.upgrade import begin_rebuild, upgrade_metadata
from featstore.store.write.writer import adding_to
from tests.support import ROOT, old_store, readers
from tests.support.store_fixtures import Recipe, stored_states, write_quickly

RECIPES = {
    f"{layout}-{form}": Recipe(form=form, layout=layout, shard_rows=shard_rows, documents=40, seed=7)
    for layout, shard_rows in (("hot", 2048), ("archive", 768))
    for form in FORMATS
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """A store of every format and layout, one with layer 0 as a table, one of version 1 that was brought up to 2."""
    root = tmp_path_factory.mktemp("stores")
    found = {name: write_quickly(root / f"{name}.zarr", recipe) for name, recipe in RECIPES.items()}
    recipe = Recipe(form="fp8", layout="hot", shard_rows=1024)
    found["table"] = write_quickly(root / "table.zarr", recipe)
    with adding_to(found["table"]) as writer:
        arrays = RowArrays(0, recipe.width, (0,), 1024, FORMATS["fp8"], parse_layout("hot"), {})
        rows = stored_states(recipe, "a", 0, 50)
        write_table(writer, "a", np.arange(50, dtype=np.int32), [rows], arrays, basis="")
        writer.seal(writer.attributes() or {})
    found["old"] = old_store.unpack(root)
    with adding_to(found["old"], rebuild=True) as writer:
        begin_rebuild(writer)
        upgrade_metadata(writer)
    return found


def documents(store: Path) -> dict[str, dict]:
    """Every array's document, by its path."""
    found = {p.parent.relative_to(store).as_posix(): json.loads(p.read_text()) for p in store.rglob("zarr.json")}
    return {name: document for name, document in found.items() if document["node_type"] == "array"}


def ours(store: Store, name: str, document: dict) -> np.ndarray:
    """An array as our reader has it: numbers, without the scales of scaled formats."""
    if len(document["shape"]) == 1 or document["codecs"][0]["name"] != "sharding_indexed":
        return store.vector(name)
    stored = store.files.rows((name, document), None, None).stored(slice(None))
    form = BY_DATA_TYPE[document["data_type"]]
    return stored if form.row_scaled and form.name == "int8" else numbers(stored, form.name)


def numbers(stored: np.ndarray, form: str) -> np.ndarray:
    """float32, spelt out here: the payloads that numpy has no type for."""
    if form == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if form == "fp8":
        import ml_dtypes

        return stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return stored.astype(np.float32)


@pytest.fixture(scope="module")
def expected(stores) -> dict[str, np.ndarray]:
    """Every array of every store by ``<store>:<path>``, read by us."""
    return {
        f"{name}:{path}": ours(open_store(store), path, document)
        for name, store in stores.items()
        for path, document in documents(store).items()
    }


def names_of(stores: dict[str, Path], types: frozenset[str] | set[str]) -> dict[str, list[str]]:
    """Arrays of some data types, by store."""
    return {
        name: sorted(path for path, document in documents(store).items() if document["data_type"] in types)
        for name, store in stores.items()
    }


def flat(names: dict[str, list[str]]) -> set[str]:
    return {f"{store}:{path}" for store, paths in names.items() for path in paths}


def compare(read: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for key, values in read.items():
        np.testing.assert_array_equal(values, expected[key], err_msg=key)


#: A few arrays that must be among those that are compared, whatever the rest of this file makes of the stores.
SOME = {
    "hot-bfloat16:models/a/tokens/id",
    "hot-bfloat16:models/b/tokens/special",
    "archive-fp8:models/a/norm/3",
    "archive-fp8:models/b/row_scale/0",
    "hot-int8:models/a/column_scale/3",
    "hot-bfloat16:corpus/text",
    "hot-bfloat16:corpus/document/split",
    "hot-bfloat16:pairs/a__b/end/row_b",
    "old:pairs/a__b/word/row_a",
    "old:moments/a__b/train/a.1__b.3/product",
    "table:models/a/embedding/id",
}


def test_zarr_python_lists_a_store_and_reads_it(stores, expected, tmp_path):
    read, printed = readers.read_with("zarr_python", tmp_path, stores)
    assert flat(names_of(stores, CORE_TYPES)) == read.keys() >= SOME | {"hot-float16:models/a/resid/3"}
    compare(read, expected)
    for name, said in json.loads(printed).items():
        top = ["corpus", "models", "moments", "pairs"] if name == "old" else ["corpus", "models", "pairs"]
        assert said["groups"] == said["by looking"] == said["members"] == top
        assert {"norm", "resid", "tokens"} <= set(said["model"])
        usual = name.partition("-")[2] in ("float16", "float32", "int8")
        assert said["states"] == (["0", "3"] if usual else [])
        assert "tokens" in said["tree"]


def test_xarray_opens_a_store_as_a_tree_of_datasets(stores, expected, tmp_path):
    read, printed = readers.read_with("with_xarray", tmp_path, stores)
    assert flat(names_of(stores, CORE_TYPES)) == read.keys() >= SOME
    compare(read, expected)
    dimensions = json.loads(printed)
    for name, store in stores.items():
        for path, document in documents(store).items():
            if document["data_type"] in CORE_TYPES:
                assert dimensions[f"{name}:{path}"] == document["dimension_names"]
    assert dimensions["hot-bfloat16:models/a/tokens/id"] == ["row"]
    assert dimensions["old:moments/a__b/train/a.1__b.3/product"] == ["width_x", "width_y"]


def test_tensorstore_reads_everything_states_of_every_format_as_well(stores, expected, tmp_path):
    every = {name: sorted(documents(store)) for name, store in stores.items()}
    read, _ = readers.read_with("with_tensorstore", tmp_path, stores, every)
    assert read.keys() == expected.keys() >= SOME | {"table:models/a/embedding/state", "old:models/b/resid/3"}
    compare(read, expected)


def test_the_zarrita_of_pypi_reads_all_but_booleans_and_floats_of_16_and_8_bits(stores, expected, tmp_path):
    pytest.importorskip("zarrita", reason="zarrita (PyPI) is not installed: it has no wheels for Python 3.12")
    # It knows "bool" by name, and looks for numpy's type of it under another.
    names = names_of(stores, CORE_TYPES - {"float16", "bool"})
    read, _ = readers.read_with("zarrita_pypi", tmp_path, stores, names)
    assert (
        flat(names)
        == read.keys()
        >= SOME - {"hot-bfloat16:models/b/tokens/special"}
        | {"archive-float32:models/a/resid/3", "hot-int8:models/b/resid/0"}
    )
    compare(read, expected)


@pytest.fixture(scope="session")
def zarrita_npm(tmp_path_factory) -> Path:
    """A directory with zarrita as npm's lock file pins it, and the program that uses it; fetched once."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: what zarrita reads under Node is not tested")
    source = readers.HERE / "zarrita_npm"
    place = readers.NPM_CACHE / f"zarrita-{readers.digest_of(source / 'package-lock.json')}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = tmp_path_factory.mktemp("npm", numbered=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(source / name, aside)
        # npm itself compares every archive with the SHA-512 in the lock file.
        subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"], cwd=aside, check=True
        )
        readers.put(aside, place)
    return place


def test_the_zarrita_of_npm_lists_a_store_and_reads_it(stores, expected, tmp_path, zarrita_npm):
    # Node has no Float16Array before version 24.
    names = names_of(stores, CORE_TYPES - {"float16"})
    shutil.copytree(zarrita_npm, tmp_path / "node")
    shutil.copy(readers.HERE / "zarrita_npm" / "read.mjs", tmp_path / "node")
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"stores": {k: str(v) for k, v in stores.items()}, "arrays": names}))
    done = subprocess.run(
        ["node", "read.mjs", str(task)], cwd=tmp_path / "node", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == stores.keys()
    listed = names_of(stores, CORE_TYPES)
    for store, result in found.items():
        assert result["version"] == 2
        contents = {(entry["path"].strip("/"), entry["kind"]) for entry in result["contents"]}
        assert {path for path, kind in contents if kind == "array"} == set(listed[store])
        assert {"", "models/a", "models/a/resid", "pairs/a__b/end"} <= {
            path for path, kind in contents if kind == "group"
        }
        assert result["read"].keys() == set(names[store])
        for path, array in result["read"].items():
            values = np.array(array["data"], np.float64).reshape(array["shape"])
            np.testing.assert_array_equal(values, expected[f"{store}:{path}"].astype(np.float64), err_msg=path)
            assert array["dimensions"] == documents(stores[store])[path]["dimension_names"]


def test_with_our_package_states_are_read_by_their_path_or_by_looking(stores):
    path = stores["hot-bfloat16"]
    whole = open_store(path).rows("a", 3).stored(slice(None))
    np.testing.assert_array_equal(zarr.open_array(path / "models" / "a" / "resid" / "3", mode="r")[:], whole)
    looking = zarr.open_group(path, mode="r", use_consolidated=False)
    np.testing.assert_array_equal(looking["models/a/resid/3"][:], whole)
    with pytest.raises(KeyError, match="resid/3"):
        zarr.open_group(path, mode="r")["models/a/resid/3"]


def test_the_manifest_still_guards_every_document(stores, tmp_path):
    for name in ("hot-bfloat16", "table"):
        sealed = json.loads((stores[name] / "manifest" / "metadata.json").read_text())["files"]
        found = {p.relative_to(stores[name]).as_posix() for p in stores[name].rglob("zarr.json")}
        assert sealed.keys() == found
    assert not verify_store(stores["hot-bfloat16"], quiet=True)["damage"]


def test_no_dimension_has_two_lengths_in_a_group(stores):
    lengths: dict[tuple[str, str, str], int] = {}
    for name, store in stores.items():
        for path, document in documents(store).items():
            dimensions = document["dimension_names"]
            assert len(set(dimensions)) == len(dimensions) == len(document["shape"])
            for dimension, length in zip(dimensions, document["shape"], strict=True):
                assert lengths.setdefault((name, path.rpartition("/")[0], dimension), length) == length, path


def test_the_format_document_names_the_versions_that_these_tests_ran_with():
    text = (ROOT / "docs" / "format.md").read_text()
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    lock = json.loads((readers.HERE / "zarrita_npm" / "package-lock.json").read_text())["packages"]
    for reader, version in {
        "zarr-python": pinned["zarr"],
        "xarray": pinned["xarray"],
        "tensorstore": pinned["tensorstore"],
        "zarrita (PyPI)": pinned["zarrita"],
        "zarrita (npm)": lock["node_modules/zarrita"]["version"],
        "zarrs": pinned["zarrs"],
    }.items():
        assert f"| {reader} {version} |" in text, reader
