"""Stores of which something lies elsewhere and is linked: read and told, and never written through."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from featstore import open_store
from featstore.errors import CorruptDataError, FeatstoreError, StoreAccessError
from featstore.store.conversion.convert import convert
from featstore.store.inspect.verify import verify_store
from featstore.store.moments.writing import add_moments
from featstore.store.read.links import links_of
from featstore.store.write.index import add_pairs
from featstore.store.write.listing import metadata_documents
from featstore.store.write.upgrade import begin_rebuild
from featstore.store.write.writer import StoreWriter, adding_to, exclusive
from tests.support.commands import call
from tests.support.store_fixtures import Recipe, tree_bytes, write_quickly

SMALL = Recipe(documents=5, document_bytes=150, width=4, shard_rows=256, layers=(0, 2))
LAYER = "models/a/resid/2"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_quickly(tmp_path_factory.mktemp("sound") / "s.zarr", SMALL)


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch) -> None:
    """These tests do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def store(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "s.zarr"))


def moved(store: Path, name: str) -> Path:
    """Move a folder of a store to another disk and link it."""
    away = store.parent / "disk" / name
    away.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(store / name, away)
    (store / name).symlink_to(away)
    return away


def test_the_documents_of_groups_are_all_there_are(sound):
    found = {path.parent.relative_to(sound).as_posix() for path in sound.rglob("zarr.json")} - {"."}
    assert set(metadata_documents(sound)) == found


@pytest.mark.parametrize("name", [LAYER, "models/a/resid", "models/a", "models", "corpus", f"{LAYER}/c"])
def test_what_was_moved_and_linked_is_read_sealed_and_told(sound, store, name, capsys):
    moved(store, name)
    assert np.array_equal(open_store(store).rows("a", 2)[:], open_store(sound).rows("a", 2)[:])
    add_pairs(store, "word")
    sealed = json.loads((store / "manifest/metadata.json").read_bytes())["files"]
    assert f"{LAYER}/zarr.json" in sealed
    assert "pairs/a__b/word/row_a/zarr.json" in sealed
    [link] = links_of(open_store(store))
    assert (link.name, link.target, link.outside, link.found) == (name, str(store.parent / "disk" / name), True, True)
    told = f"{name} is a link to {link.target}, outside the store"
    assert told in call(capsys, "featstore", "info", store, "--no-spectrum").out
    [damage] = verify_store(store, quiet=True)["damage"]
    assert damage.startswith(told)
    assert "--allow-links" in damage
    assert verify_store(store, allow_links=True, quiet=True)["damage"] == []


def test_the_command_verifies_with_links_where_they_are_allowed(store, capsys):
    moved(store, LAYER)
    refused, accepted = (call(capsys, "featstore", "verify", store, *more) for more in ((), ("--allow-links",)))
    assert (refused.code, accepted.code) == (1, 0)
    assert f"link: {LAYER} is a link to" in accepted.out
    assert f"damaged {LAYER} is a link to" in refused.out


def test_a_sound_store_has_no_links_and_one_within_it_is_no_damage(store):
    assert links_of(open_store(store)) == []
    (store / "models/a/resid/2").rename(store / "models/a/resid/.two")
    (store / "models/a/resid/2").symlink_to(".two")
    [link] = links_of(open_store(store))
    assert not link.outside
    result = verify_store(store, quiet=True)
    assert result["damage"] == []
    assert result["links"] == [link.to_dict()]


def test_damage_behind_a_link_is_found(store):
    moved(store, LAYER)
    chunk = store / LAYER / "c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert any(
        line.startswith(f"{LAYER}/c/0/0: ") for line in verify_store(store, allow_links=True, quiet=True)["damage"]
    )


@pytest.mark.parametrize("gone", ["target", "folder"])
def test_a_layer_that_is_away_is_not_left_out_of_the_seal(store, gone):
    away = moved(store, LAYER)
    (store / LAYER).unlink() if gone == "folder" else away.rename(away.with_name("unmounted"))
    before = (store / "manifest/metadata.json").read_bytes()
    with pytest.raises(FeatstoreError, match=rf"{LAYER}.* where nothing is|{LAYER}/zarr.json is missing"):
        add_pairs(store, "word")
    assert (store / "manifest/metadata.json").read_bytes() == before


@pytest.mark.parametrize("target", ["..", ".", "../../b/resid/2"])
def test_folders_that_are_part_of_a_store_twice_are_refused(store, target):
    (store / "models/a/resid/9").symlink_to(target)
    with pytest.raises(CorruptDataError, match="is the same folder as"):
        add_pairs(store, "word")


class TestNothingIsWrittenThrough:
    @pytest.mark.parametrize("name", ["pairs", "pairs/a__b"])
    def test_pairs(self, store, name, capsys):
        away = moved(store, name)
        before = tree_bytes(away)
        refused = call(capsys, "featstore", "pair", store, "--policy", "word").refusal
        assert f"{store / name} is a link to {away}, and nothing is written through links below {store}" in refused
        assert tree_bytes(away) == before

    def test_moments(self, store):
        (store.parent / "away").mkdir()
        (store / "moments").symlink_to(store.parent / "away")
        with pytest.raises(StoreAccessError, match="moments is a link"):
            add_moments(store, quiet=True)
        assert list((store.parent / "away").iterdir()) == []

    @pytest.mark.parametrize("name", ["manifest", "manifest/models", "manifest/models/a/tokens.json"])
    def test_a_manifest_lies_in_the_store_itself(self, store, name):
        moved(store, name)
        with pytest.raises(FeatstoreError, match=rf"{name} is a link to .*; put the (file or )?folder itself there"):
            add_pairs(store, "word")
        assert "is a link" in verify_store(store, allow_links=True, quiet=True)["damage"][0]

    @pytest.mark.parametrize("name", [LAYER, f"{LAYER}/c", "models/a/norm", "models"])
    def test_rows(self, store, name, tmp_path):
        away = moved(store, name)
        before = tree_bytes(away)
        longer = Recipe(**{**vars(SMALL), "documents": 9})
        attributes = json.loads((store / "zarr.json").read_bytes())["attributes"]
        attributes["featstore"]["complete"] = False
        with exclusive(store):
            StoreWriter(store).group("", attributes)
        with pytest.raises(StoreAccessError, match=rf"{name} is a link"):
            write_quickly(store, longer)
        assert tree_bytes(away) == before

    def test_rows_are_refused_before_a_model_runs(self, store, monkeypatch):
        from featstore.store.format.elements import parse_format
        from featstore.store.format.shards import parse_layout
        from featstore.store.write.row_writer import RowArrays, RowWriter

        moved(store, LAYER)
        arrays = RowArrays(5000, 4, (0, 2), 256, parse_format("bfloat16"), parse_layout("archive"))
        with pytest.raises(StoreAccessError, match=f"{LAYER} is a link"):
            RowWriter(StoreWriter(store), "a", arrays, owned=[0, 19])

    @pytest.mark.parametrize(("name", "touched"), [("models/a/tokens", True), ("pairs", True), (LAYER, False)])
    def test_a_rebuild_is_refused_before_the_store_is_closed(self, store, name, touched):
        moved(store, name)
        before = (store / "zarr.json").read_bytes()
        with adding_to(store, rebuild=True) as writer:
            if not touched:
                begin_rebuild(writer)
                return
            with pytest.raises(StoreAccessError, match=f"{name} is a link"):
                begin_rebuild(writer)
        assert (store / "zarr.json").read_bytes() == before

    def test_removals(self, store):
        away = moved(store, "models")
        before = tree_bytes(away)
        for name in ("models/a", "models"):
            with pytest.raises(StoreAccessError, match="models is a link"):
                StoreWriter(store).remove(name)
        assert tree_bytes(away) == before

    def test_what_is_left_aside_behind_a_link_stays(self, store):
        away = moved(store, LAYER)
        for folder in (away, store):
            (folder / ".x.0123.part").write_text("half")
        with exclusive(store):
            assert (away / ".x.0123.part").exists()
            assert not (store / ".x.0123.part").exists()

    def test_a_lock_that_is_a_link(self, store, capsys):
        (store.parent / "victim").write_text("precious")
        (store / ".writer.lock").unlink()
        (store / ".writer.lock").symlink_to(store.parent / "victim")
        refused = call(capsys, "featstore", "pair", store, "--policy", "word").refusal
        assert ".writer.lock is a link to" in refused
        assert (store.parent / "victim").read_text() == "precious"

    def test_files_that_are_links_are_replaced(self, store):
        root = store.parent / "root.json"
        (store / "zarr.json").rename(root)
        (store / "zarr.json").symlink_to(root)
        before = root.read_bytes()
        add_pairs(store, "word")
        assert root.read_bytes() == before
        assert not (store / "zarr.json").is_symlink()
        assert verify_store(store, quiet=True)["damage"] == []


def test_a_root_that_is_a_link_is_the_users_own(store):
    root = store.parent / "typed.zarr"
    root.symlink_to(store)
    add_pairs(root, "word")
    assert verify_store(root, quiet=True)["damage"] == []
    assert verify_store(root, quiet=True)["links"] == []


def test_a_conversion_reads_through_links_and_is_whole_itself(store):
    moved(store, LAYER)
    out = store.parent / "out.zarr"
    convert(store, out, form="float32", quiet=True)
    assert verify_store(out, quiet=True)["damage"] == []
    assert np.array_equal(open_store(out).rows("a", 2)[:], open_store(store).rows("a", 2)[:])
    (store.parent / "away").mkdir()
    other = store.parent / "other.zarr"
    other.mkdir()
    (other / "models").symlink_to(store.parent / "away")
    with pytest.raises(FeatstoreError, match=r"models is a link|is not a feature store"):
        convert(store, other, form="float32", quiet=True)
    assert list((store.parent / "away").iterdir()) == []
