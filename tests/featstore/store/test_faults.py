"""Damage of every kind, in every kind of file: `verify` finds it, and reading gives our error, never a wrong array."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from featstore import open_store
from featstore.errors import CorruptDataError, FeatstoreError, NoSpaceError, PairingError, StoreStateError
from featstore.store.format.elements import parse_format
from featstore.store.format.shards import parse_layout, seal
from featstore.store.inspect.verify import verify_store
from featstore.store.write.index import add_pairs, sink_mask
from featstore.store.write.row_writer import RowArrays
from featstore.store.write.table import write_table
from featstore.store.write.writer import StoreWriter, exclusive
from tests.featstore.store.test_store import copied, read_everything
from tests.featstore.store.test_writer import RECIPE as WRITER
from tests.featstore.store.test_writer import check_invariants
from tests.support.commands import call
from tests.support.store_fixtures import MODELS, SINK_THRESHOLD, Recipe, states, tree_bytes, write_quickly
from tests.support.tiers import tiered

SMALL = Recipe(documents=5, document_bytes=150, width=4, shard_rows=256, layers=(0, 2))
RECIPES = {
    "bfloat16": SMALL,
    # Row and column scales, and the hot layout.
    "int8": replace(SMALL, form="int8", layout="hot", shard_rows=1024),
    # Layer 0 one row for every token, with row scales of its own.
    "table": replace(SMALL, form="fp8", layers=(2,)),
}
#: The first tells in the quick tier whether damage is found.
KINDS = tiered(["bfloat16"], ["int8", "table"])


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> dict[str, Path]:
    """Stores that are quick to copy and to read whole; never written to."""
    root = tmp_path_factory.mktemp("whole")
    stores = {name: write_quickly(root / f"{name}.zarr", recipe) for name, recipe in RECIPES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        add_tables(stores["table"], RECIPES["table"])
    return stores


def add_tables(path: Path, recipe: Recipe) -> None:
    """Give every model of a complete store a layer 0 that is a table."""
    with exclusive(path):
        writer, store = StoreWriter(path), open_store(path)
        for name in MODELS:
            ids, form = np.unique(store.tokens(name).id), parse_format(recipe.form)
            rows = form.encode(states(recipe, name, 0, len(ids)))
            arrays = RowArrays(
                store.model(name).rows, recipe.width, (2,), recipe.shard_rows, form, parse_layout(recipe.layout)
            )
            write_table(writer, name, ids, [rows], arrays, basis="ids")
            base = f"models/{name}"
            pilot = {f"{base}/origin/0": np.zeros(recipe.width, np.float32), f"{base}/median_norm/0": np.ones(1)}
            writer.vectors(f"{base}/pilot-0", pilot)
            writer.group(base, {"featstore": store.model(name).attributes | {"layers": [0, 2], "layer_0": "table"}})
        writer.group("", {"featstore": store.attributes | {"complete": False}})
        grown = open_store(path, allow_incomplete=True)
        for name in MODELS:
            mask = sink_mask(grown, name, SINK_THRESHOLD)
            writer.vectors(f"models/{name}/sinks", {f"models/{name}/tokens/sink": mask})
        writer.seal({"featstore": store.attributes})


def files_of(path: Path) -> list[str]:
    """Every file that holds something."""
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and p.stat().st_size)


def documents_of(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*.json"))


def damage_of(path: Path) -> list[str]:
    """What `verify` finds; a root too damaged to be one is damage, too."""
    try:
        return verify_store(path, quiet=True)["damage"]
    except FeatstoreError as error:
        return [str(error)]


def test_the_stores_below_hold_every_kind_of_array(whole):
    held = {Path(name).parts for path in whole.values() for name in files_of(path)}
    assert {parts[2] for parts in held if parts[0] == "models" and "c" in parts} == {
        "tokens", "resid", "norm", "origin", "median_norm", "row_scale", "column_scale", "embedding",
    }  # fmt: skip
    for path in whole.values():
        assert damage_of(path) == []
        arrays = read_everything(open_store(path))
        assert {len(arrays[f"models/a/resid/{layer}"]) for layer in (0, 2)} == {len(arrays["models/a/tokens/id"])}


# Bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_any_file_is_found_by_verify_and_by_reading(whole, tmp_path, kind):
    path = copied(whole[kind], tmp_path)
    rng = random.Random(kind)
    names = files_of(path)
    assert len(names) > 80
    for name in names:
        data = (path / name).read_bytes()
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        (path / name).write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        assert damage_of(path), (name, at, bit)
        if "/c/" in name:
            with pytest.raises(CorruptDataError, match="checksum mismatch"):
                read_everything(open_store(path))
        (path / name).write_bytes(data)
    assert damage_of(path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_lengthened_emptied_or_missing_file_is_found(whole, tmp_path, kind):
    path = copied(whole[kind], tmp_path)
    for i, name in enumerate(n for n in files_of(path) if n != "zarr.json"):
        data = (path / name).read_bytes()
        if i % 5 == 0:
            (path / name).unlink()
        else:
            (path / name).write_bytes((data[:-2], data + b"\0", b"", data[: len(data) // 2])[i % 5 - 1])
        assert damage_of(path), name
        if "/c/" in name:
            with pytest.raises(CorruptDataError):
                read_everything(open_store(path))
        (path / name).write_bytes(data)
    assert damage_of(path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_cut_anywhere_is_refused(whole, tmp_path, kind):
    """At every sixteenth byte: within a chunk, between chunks, within the index."""
    path = copied(whole[kind], tmp_path)
    shard = path / "models/b/resid/2/c/0/0"
    data = shard.read_bytes()
    for length in range(0, len(data), 16):
        shard.write_bytes(data[:length])
        with pytest.raises(CorruptDataError, match=r"truncated|missing or empty|checksum mismatch"):
            open_store(path).rows("b", 2)[:]


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


# The manifest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_lost_from_the_manifest_is_found_whichever_it_is(whole, tmp_path, kind):
    path = copied(whole[kind], tmp_path)
    entries = [name for name in documents_of(path) if name.startswith("manifest/")]
    assert len(entries) > 12
    for name in entries:
        entry = (path / name).read_bytes()
        (path / name).unlink()
        found = damage_of(path)
        if name == "manifest/metadata.json":
            assert found == [f"{path / name} is missing; restore it or extract again"]
        else:
            assert {f"{file}: not in the manifest" for file in json.loads(entry)["files"]} <= set(found), name
        (path / name).write_bytes(entry)
    assert damage_of(path) == []


def test_a_changed_byte_anywhere_in_a_row_of_the_manifest_is_found(whole, tmp_path):
    path = copied(whole["bfloat16"], tmp_path)
    for unit in ("corpus", "models/a/resid/2/rows-000000", "pairs/a__b/end"):
        row = path / "manifest" / f"{unit}.json"
        data = row.read_bytes()
        for at in range(0, len(data), 3):
            row.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert damage_of(path), (unit, at, row.read_bytes()[max(at - 20, 0) : at + 20])
        row.write_bytes(data)
    assert damage_of(path) == []


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "models/../../outside", "a/..", "a/../../b", "a//b", ""])
def test_a_manifest_that_points_outside_is_refused_before_it_is_followed(whole, tmp_path, name):
    path = copied(whole["bfloat16"], tmp_path)
    entry = {"unit": "evil", "files": {name: {"bytes": 1, "crc32": "00000000"}}}
    (path / "manifest" / "evil.json").write_text(json.dumps(entry))
    # What came after the seal is not in the sorted index, and so nobody looks at it; without one every entry is read.
    assert name not in open_store(path).manifest
    (path / "manifest" / "index").unlink()
    with pytest.raises(CorruptDataError, match="not a file of this store; do not trust it"):
        open_store(path).manifest  # noqa: B018
    with pytest.raises(CorruptDataError, match="do not trust it"):
        StoreWriter(path).entry("evil")
    assert "do not trust it" in verify_store(path, quiet=True)["damage"][0]


# Metadata -----------------------------------------------------------------------------------------------------------


class TestStaleConsolidatedMetadata:
    """The root repeats every document for readers that want only one file; such a copy can be old."""

    def test_rows_are_read_from_the_documents_themselves_and_verify_says_so(self, whole, tmp_path):
        path = copied(whole["bfloat16"], tmp_path)
        root = json.loads((path / "zarr.json").read_bytes())
        held = root["consolidated_metadata"]["metadata"]
        held["models/a/norm/2"]["shape"][0] -= 100
        held["models/b/norm/2"]["data_type"] = "int32"
        del held["models/b/norm/0"]
        (path / "zarr.json").write_text(json.dumps(root))
        # Another reader believes it ...
        group = zarr.open_group(path, mode="r")
        assert group["models/a/norm/2"].shape[0] == open_store(path).model("a").rows - 100
        # ... ours does not.
        same_arrays(read_everything(open_store(path)), read_everything(open_store(whole["bfloat16"])))
        assert damage_of(path) == ["zarr.json: " + size_or_checksum(whole["bfloat16"], path, "zarr.json")]

    def test_a_root_from_before_an_addition_hides_it_from_nobody_of_ours_and_is_renewed(self, whole, tmp_path):
        path = copied(whole["bfloat16"], tmp_path)
        before = (path / "zarr.json").read_bytes()
        add_pairs(path, "word")
        after = tree_bytes(path)
        (path / "zarr.json").write_bytes(before)  # what a crash between the last two writes leaves behind
        assert "pairs/a__b/word" not in zarr.open_group(path, mode="r")
        assert len(open_store(path).pairs("a", "b", "word")) > 0
        assert [line.partition(":")[0] for line in damage_of(path)] == ["zarr.json"]
        add_pairs(path, "word")  # the same command again
        assert tree_bytes(path) == after
        assert damage_of(path) == []

    def test_a_manifest_from_before_an_addition_makes_it_not_exist(self, whole, tmp_path):
        path = copied(whole["bfloat16"], tmp_path)
        before = (path / "manifest/metadata.json").read_bytes()
        add_pairs(path, "word")
        (path / "manifest/metadata.json").write_bytes(before)
        with pytest.raises(PairingError, match="no 'word' pairs"):
            open_store(path).pairs("a", "b", "word")
        assert damage_of(path)


def size_or_checksum(whole: Path, path: Path, name: str) -> str:
    was, size = (whole / name).stat().st_size, (path / name).stat().st_size
    return "checksum differs from the manifest" if size == was else f"{size} bytes, the manifest says {was}"


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


def outcome(path: Path) -> dict[str, np.ndarray] | FeatstoreError:
    """What reading a store gives: its arrays or one of our errors; any other exception passes through."""
    try:
        store = open_store(path)
        store.fingerprint  # noqa: B018 - reads the manifest
        return read_everything(store)
    except FeatstoreError as error:
        return error


def same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], what: object = "") -> None:
    assert found.keys() == expected.keys(), what
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, (key, what)
        np.testing.assert_array_equal(found[key], array, err_msg=f"{key} {what}")


#: Which documents of which store, and how many changes to them: 600 in all.
MUTATED = {
    "arrays": ("bfloat16", lambda name: name.endswith("/zarr.json"), 120),
    "manifest": ("bfloat16", lambda name: name.startswith("manifest/"), 120),
    "root": ("bfloat16", lambda name: name in ("zarr.json", "manifest/metadata.json"), 120),
    "corpus": ("bfloat16", lambda name: "corpus" in name, 80),
    "scales": ("int8", lambda name: "_scale" in name or "pilot" in name or "rows-" in name, 80),
    "table": ("table", lambda name: "embedding" in name or "row_scale" in name, 80),
}
assert sum(count for _, _, count in MUTATED.values()) >= 500


@pytest.mark.parametrize("kind", tiered(["arrays", "table"], ["manifest", "root", "corpus", "scales"]))
def test_a_changed_metadata_document_gives_our_error_or_the_same_arrays(whole, tmp_path, kind):
    which, wanted, count = MUTATED[kind]
    path = copied(whole[which], tmp_path)
    expected = read_everything(open_store(path))
    rng = random.Random(kind)
    chosen = [name for name in documents_of(path) if wanted(name)]
    refused = 0
    for i in range(count):
        name = chosen[i % len(chosen)]
        document = (path / name).read_bytes()
        changed = mutated(json.loads(document), rng).encode("utf-8", errors="surrogatepass")
        (path / name).write_bytes(changed)
        try:
            found, damage = outcome(path), damage_of(path)
        except Exception as error:  # noqa: BLE001
            pytest.fail(f"{name} changed to {changed[:300]!r} raises {error!r}")
        (path / name).write_bytes(document)
        if isinstance(found, FeatstoreError):
            refused += 1
            assert str(path) in str(found)
            assert damage, (name, changed[:300])
        else:
            same_arrays(found, expected, (name, changed[:300]))
    assert refused > count * 0.3
    assert damage_of(path) == []


def test_a_changed_shape_type_or_order_is_never_believed(whole, tmp_path):
    """Each of these would be read without complaint, as other numbers."""
    path = copied(whole["bfloat16"], tmp_path)
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


def test_contents_are_checked_even_where_every_checksum_is_right(whole, tmp_path):
    """What a writer with a bug would seal: norms that are not the rows', pairs that end elsewhere."""
    path = copied(whole["bfloat16"], tmp_path)
    store = open_store(path)
    pairs, norms = store.pairs("a", "b"), store.norms("a", 2).copy()
    norms[7] += 1
    writer = StoreWriter(path)
    base = "pairs/a__b/end"
    writer.vectors(base, {f"{base}/row_a": pairs.row_source, f"{base}/row_b": np.roll(pairs.row_target, 1)})
    unit = "models/a/resid/2/rows-000000"
    files = json.loads((path / "manifest" / f"{unit}.json").read_text())["files"]
    chunk = np.zeros(256, np.float32)
    chunk[: len(norms[:256])] = norms[:256]
    content = {name: (path / name).read_bytes() for name in files}
    writer.commit(unit, content | {"models/a/norm/2/c/0": seal(chunk.tobytes())})
    writer.seal({"featstore": store.attributes})
    first, second = verify_store(path, quiet=True)["damage"]
    assert first == "a: layer 2, row 7: the state is not finite or differs from its norm"
    assert second.startswith("pairs of a and b: ")
    assert second.endswith("do not end at the same byte")


# A full disk --------------------------------------------------------------------------------------------------------


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        path.mkdir()
        try:
            self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"a tmpfs cannot be mounted here: {why.strip()}")

    def _mount(self, *words: str) -> None:
        subprocess.run(["mount", *words], check=True, capture_output=True, text=True)

    def grow(self, by: int) -> None:
        self.size += by
        self._mount("-o", f"remount,size={self.size}", str(self.path))

    def close(self) -> None:
        # Lazily: a reader that failed may still have a shard mapped.
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", 64 << 10)
    yield made
    made.close()


def no_space_for(path: Path) -> str:
    """Write a store, or go on with it; why it could not be completed."""
    try:
        write_quickly(path, WRITER)
    except NoSpaceError as error:
        return str(error)
    return ""


def test_a_disk_that_fills_up_again_and_again_ends_with_the_same_bytes(disk, tmp_path):
    """With a little more space each time, so that it is full at ever other places: documents, shards, manifest rows."""
    path, failures = disk.path / "store.zarr", 0
    while refused := no_space_for(path):
        assert "No space left on device" in refused
        assert "run the same command again" in refused
        failures += 1
        check_invariants(path)
        with pytest.raises(FeatstoreError):
            open_store(path)
        disk.grow(20 << 10)
    assert failures > 30
    assert tree_bytes(path) == tree_bytes(write_quickly(tmp_path / "undisturbed.zarr", WRITER))


def test_the_command_on_a_disk_that_fills_up_says_so_in_one_line_and_goes_on_later(
    disk, tiny_llama, tiny_mistral, short_corpus, capsys, tmp_path
):
    """The estimate counts states and no metadata: it lets a disk pass that is a little too small."""
    from featstore.extraction.job import prepare
    from featstore.extraction.run import extract
    from featstore.extraction.settings import Settings

    settings = Settings(
        model=(f"llama={tiny_llama}", f"mistral={tiny_mistral}"),
        layers=("0,2",),
        dataset=f"jsonl:{short_corpus}",
        store=tmp_path / "undisturbed.zarr",
        max_documents=12,
        max_tokens=None,
        window_bytes=512,
        shard_rows=1024,
        device="cpu",
    )
    job = prepare(settings, quiet=True)
    disk.grow(job.bytes_to_write() + (24 << 10))
    words: list[object] = ["extract", "--store", disk.path / "store.zarr", "--max-tokens", "all", "--layers", "0,2"]
    words += ["--max-documents", 12, "--window-bytes", 512, "--shard-rows", 1024, "--device", "cpu"]
    words += ["--dataset", settings.dataset, *(word for model in settings.model for word in ("--model", model))]
    stopped = call(capsys, "featstore", *words)
    assert stopped.code == 2
    assert stopped.err.splitlines()[-1].startswith("featstore: cannot write ")
    assert "No space left on device" in stopped.err
    assert "Traceback" not in stopped.err
    with pytest.raises(StoreStateError, match="unfinished"):
        open_store(disk.path / "store.zarr")
    kept = {p: p.stat().st_mtime_ns for p in disk.path.rglob("rows-*.json")}
    assert kept
    disk.grow(4 << 20)
    done = call(capsys, "featstore", *words)
    assert done.code == 0, done.err
    assert all(p.stat().st_mtime_ns == changed for p, changed in kept.items())
    extract(job, quiet=True)
    assert tree_bytes(disk.path / "store.zarr") == tree_bytes(settings.store)
