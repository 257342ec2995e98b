"""A store of format version 1: it reads, says what it lacks, takes nothing in, and can be made one of version 2."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

import featstore
from featstore import open_store
from featstore.errors import OldStoreWarning, StoreStateError
from featstore.store import Store
from featstore.store.conversion.convert import convert
from featstore.store.format import documents
from featstore.store.format.version import FORMAT_VERSION
from featstore.store.inspect.verify import verify_store
from featstore.store.moments.writing import add_moments
from featstore.store.write.index import add_pairs
from featstore.store.write.upgrade import begin_rebuild, upgrade_metadata
from featstore.store.write.writer import adding_to
from tests.support import old_store
from tests.support.commands import call
from tests.support.store_fixtures import tree_bytes

REMEDY = r"featstore pair --rebuild \S*old\.zarr"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The old store, where its models are found by the paths that it names."""
    path = old_store.unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    return path


def quietly(path: Path, **options) -> Store:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OldStoreWarning)
        return open_store(path, **options)


def own(path: Path) -> dict:
    return json.loads((path / "zarr.json").read_text())["attributes"]["featstore"]


def test_the_fixture_is_what_the_former_version_wrote(old):
    assert own(old)["format_version"] == 1
    documents_ = [json.loads(p.read_text()) for p in old.rglob("zarr.json")]
    assert len(documents_) == 213
    assert not any("dimension_names" in document for document in documents_)
    held = json.loads((old / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    assert held["models/a/resid/2"]["data_type"] == "bfloat16"
    assert not (old / "models" / "a" / "tokens" / "exact").exists()


class TestReading:
    def test_opening_one_says_in_a_line_what_it_lacks(self, old):
        with pytest.warns(OldStoreWarning, match=f"format version 1, whose pairs may join .* `{REMEDY}`") as caught:
            open_store(old)
        assert len(caught) == 1
        assert "\n" not in str(caught[0].message)

    def test_python_shows_it_once_for_each_store(self, old, tmp_path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                open_store(old)
                featstore.open_store(str(old))
            open_store(old_store.unpack(tmp_path / "another"))
        assert len([w for w in caught if w.category is OldStoreWarning]) == 2

    def test_what_is_in_it_reads(self, old):
        for portable in (False, True):
            store = quietly(old, portable=portable)
            assert store.version == 1
            for name in ("a", "b"):
                rows = old_store.TRUTH[name][0]
                assert len(store.tokens(name).id) == rows
                for layer in store.model(name).layers:
                    values = store.rows(name, layer)[:]
                    assert values.shape == (rows, store.model(name).width)
                    np.testing.assert_allclose(np.linalg.norm(values, axis=1), store.norms(name, layer), rtol=1e-6)
            for policy in ("end", "word"):
                assert len(store.pairs("a", "b", policy)) == old_store.TRUTH[policy][0]

    def test_another_process_is_not_told_again(self, old):
        store = pickle.loads(pickle.dumps(quietly(old)))  # warnings are errors here
        assert store.version == 1

    def test_verify_finds_no_damage(self, old):
        with pytest.warns(OldStoreWarning):
            assert not verify_store(old, quiet=True)["damage"]


class TestCommands:
    @pytest.mark.filterwarnings("default::featstore.errors.OldStoreWarning")
    def test_a_command_says_it_in_one_line_on_stderr(self, old, capsys):
        done = call(capsys, "featstore", "verify", old, "--json")
        assert done.json["damage"] == []
        [line] = [line for line in done.err.splitlines() if "format version" in line]
        assert re.fullmatch(f"featstore: .*old.zarr has format version 1, whose pairs may join .*`{REMEDY}` .*", line)

    @pytest.mark.parametrize(
        "words",
        [
            ("pair",),
            ("pair", "--policy", "word"),
            ("moments",),
            ("convert", "--format", "float32"),
            ("extract", "--layers", "a=0"),
            ("extract", "--dry-run"),
        ],
        ids=" ".join,
    )
    def test_what_would_add_to_it_is_refused_and_nothing_changes(self, old, words, capsys):
        before = tree_bytes(old.parent)
        place = ("--store", old) if words[0] == "extract" else (old,)
        refusal = call(capsys, "featstore", words[0], *place, *words[1:]).refusal
        assert re.search(f"has format version 1, this featstore writes 2; run `{REMEDY}` first", refusal)
        assert tree_bytes(old.parent) == before

    def test_functions_refuse_as_the_commands_do(self, old):
        for act in (
            lambda: add_pairs(old, "end"),
            lambda: add_moments(old, quiet=True),
            lambda: convert(old, form="float32", quiet=True),
            lambda: featstore.extract(store=old, layers=[0], quiet=True),
        ):
            with pytest.raises(StoreStateError, match=f"run `{REMEDY}` first"):
                act()

    def test_one_that_was_never_completed_has_no_such_remedy(self, old):
        document = json.loads((old / "zarr.json").read_text())
        document["attributes"]["featstore"]["complete"] = False
        (old / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(
            StoreStateError, match="unfinished and has format version 1, this featstore writes 2; remove"
        ):
            featstore.extract(store=old, quiet=True)
        with pytest.raises(StoreStateError, match="unfinished"), adding_to(old, rebuild=True):
            pass


class TestUpgrading:
    def upgrade(self, path: Path, **changes) -> None:
        with adding_to(path, rebuild=True) as writer:
            begin_rebuild(writer)
            upgrade_metadata(writer, changes)

    def test_it_is_then_a_store_of_version_2_with_the_same_content(self, old):
        before = quietly(old)
        fingerprint, root = before.fingerprint, own(old)
        self.upgrade(old, note="x")
        after = open_store(old)  # and no warning
        assert own(old) == root | {"format_version": FORMAT_VERSION, "note": "x"}
        assert after.fingerprint == fingerprint
        assert not verify_store(old, quiet=True)["damage"]
        for path in old.rglob("zarr.json"):
            document = json.loads(path.read_text())
            assert ("dimension_names" in document) == (document["node_type"] == "array")
            assert {"name": "bytes"} not in document.get("codecs", ())
        assert "models/a/resid/2" not in zarr.open_group(old, mode="r")
        after.require_current()
        add_pairs(old, "end")

    def test_its_documents_are_those_that_this_version_writes(self, old):
        self.upgrade(old)
        document = json.loads((old / "corpus" / "document" / "split" / "zarr.json").read_text())
        fresh = documents.named("corpus/document/split", documents.vector_document(np.zeros(6, np.uint8), 6))
        assert document == fresh

    def test_half_way_nobody_reads_it_and_it_can_be_gone_on_with(self, old):
        with adding_to(old, rebuild=True) as writer:
            begin_rebuild(writer)
        with pytest.raises(StoreStateError, match=f"half rebuilt; run `{REMEDY}` again"):
            open_store(old)
        for act in (lambda: featstore.extract(store=old, quiet=True), lambda: add_pairs(old, "end")):
            with pytest.raises(StoreStateError, match=f"half rebuilt; run `{REMEDY}` again"):
                act()
        self.upgrade(old)
        assert "rebuilding" not in own(old)
        assert not verify_store(old, quiet=True)["damage"]

    def test_once_more_changes_nothing(self, old):
        self.upgrade(old)
        once = tree_bytes(old)
        self.upgrade(old)
        assert tree_bytes(old) == once


def test_names_of_dimensions():
    for path, axes, names in (
        ("models/m/tokens/anything", 1, ("row",)),
        ("models/tokens/resid/0", 2, ("row", "width")),
        ("models/m/embedding/state", 2, ("entry", "width")),
        ("pairs/tokens__norm/end/row_a", 1, ("pair",)),
        ("corpus/document/id", 2, ("document", "digest_byte")),
        ("corpus/document/start", 1, ("document_edge",)),
        ("models/m/tokens/two", 2, ("two_0", "two_1")),
        ("new", 1, ("new_0",)),
    ):
        assert documents.dimension_names(path, axes) == names
