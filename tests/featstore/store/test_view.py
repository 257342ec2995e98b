"""A writer's view: the store as a reader sees it, of what has been committed, never of what was there before."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import featstore.store.read.store
import featstore.store.write.writer
from featstore import open_store
from featstore.errors import StoreFormatError
from featstore.store.write.index import add_pairs, sink_mask, write_pairs, write_sinks
from featstore.store.write.writer import StoreWriter, exclusive
from tests.support.store_fixtures import Recipe, write_quickly

RECIPE = Recipe(documents=6, shard_rows=256)


@pytest.fixture
def path(tmp_path) -> Path:
    return write_quickly(tmp_path / "s.zarr", RECIPE)


def unsealed(path: Path) -> StoreWriter:
    writer = StoreWriter(path)
    root = writer.attributes() or {}
    root["featstore"] |= {"complete": False, "mask": {"sink_threshold": 5.0}}
    writer.group("", root)
    return writer


def test_nothing_is_there_before_there_is_a_root(tmp_path):
    with exclusive(tmp_path / "s.zarr"), pytest.raises(StoreFormatError, match=r"no zarr\.json"):
        StoreWriter(tmp_path / "s.zarr").view  # noqa: B018


def test_it_is_what_opening_gives(path):
    view, store = StoreWriter(path).view, open_store(path)
    assert (view.attributes, view.models, view.fingerprint) == (store.attributes, store.models, store.fingerprint)
    np.testing.assert_array_equal(view.rows("a", 3), store.rows("a", 3))


def test_it_is_kept_until_something_it_has_read_changes(path):
    writer = unsealed(path)
    view = writer.view
    assert writer.view is view
    before = view.tokens("a").sink
    writer.vectors("models/a/sinks", {"models/a/tokens/sink": ~before})
    assert writer.view is not view
    np.testing.assert_array_equal(writer.view.tokens("a").sink, ~before)


def test_attributes_and_rows_that_change_are_seen(path):
    writer = unsealed(path)
    assert writer.view.model("a").layers == (0, 3)
    rows, document = writer.view.rows("a", 3).rows, writer.view.document("models/a/resid/3")
    writer.describe({"models/a/resid/3": document})
    kept = writer.view
    writer.describe({"models/a/resid/3": document})
    assert writer.view is kept
    writer.describe({"models/a/resid/3": document | {"shape": [rows - 5, 8]}})
    assert writer.view.rows("a", 3).rows == rows - 5
    attributes = writer.attributes("models/a") or {}
    writer.group("models/a", {"featstore": attributes["featstore"] | {"layers": [3]}})
    assert writer.view.model("a").layers == (3,)


def test_pairs_and_moments_leave_it_but_are_seen_through_it(path):
    writer = unsealed(path)
    view, tokens = writer.view, writer.view.tokens("a")
    assert not view.has("pairs/a__b/word")
    write_pairs(writer, "a", "b", "word")
    assert writer.view is view
    assert view.tokens("a") is tokens
    assert 0 < len(view.pairs("a", "b", "word")) < len(view.pairs("a", "b"))
    assert view.entry("pairs/a__b/word") == writer.entry("pairs/a__b/word")


def test_a_manifest_that_was_read_is_not_kept_over_a_commit(path):
    writer = unsealed(path)
    assert "pairs/a__b/word/row_a/c/0" not in writer.view.manifest
    write_pairs(writer, "a", "b", "word")
    assert "pairs/a__b/word/row_a/c/0" in writer.view.manifest
    writer.drop("pairs/a__b/word")
    assert "pairs/a__b/word/row_a/c/0" not in writer.view.manifest


def test_sinks_are_those_of_the_rows_there_are(path):
    writer = unsealed(path)
    for name in ("a", "b"):
        attributes = writer.attributes(f"models/{name}") or {}
        writer.group(f"models/{name}", {"featstore": attributes["featstore"] | {"tokens_sha256": "x"}})
        write_sinks(writer, name)
        np.testing.assert_array_equal(writer.view.tokens(name).sink, sink_mask(writer.view, name, 5.0))


def test_sealing_gives_a_view_that_believes_only_what_is_sealed(path):
    writer = unsealed(path)
    root = writer.attributes() or {}
    assert not writer.view.attributes["complete"]
    writer.seal({"featstore": root["featstore"] | {"complete": True}})
    assert writer.view.attributes["complete"]
    shutil.copytree(path / "pairs/a__b/end", path / "pairs/a__b/word")
    assert not writer.view.has("pairs/a__b/word")


def test_adding_to_a_store_opens_it_as_little_as_can_be(path, monkeypatch):
    """Before the lock, under it, and sealed; what is written in between is read through the writer."""
    opened = []
    real = featstore.store.read.store.open_files
    for module in (featstore.store.read.store, featstore.store.write.writer):
        monkeypatch.setattr(module, "open_files", lambda *a, **k: (opened.append(a), real(*a, **k))[1])
    assert add_pairs(path, "word")["pairs"]["a__b"]["pairs"] > 0
    assert len(opened) == 3
