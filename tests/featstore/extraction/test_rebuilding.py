"""A store's token tables and pairs derived again: on a store that the former version wrote, with its own tokenizers."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import featstore
import featstore.store.write.writer as writing
from align.runs.train import train
from align.settings import Settings
from featstore import open_store
from featstore.errors import ModelLoadError, OldStoreWarning, SpecError, StoreStateError
from featstore.extraction.rebuilding import describe_rebuild, rebuild
from featstore.store import Store
from featstore.store.inspect.verify import verify_store
from featstore.store.moments.stored import StoredMoments, all_blocks
from featstore.store.moments.writing import add_moments
from featstore.store.write.index import add_pairs
from featstore.store.write.writer import adding_to
from tests.support import old_store
from tests.support.commands import call
from tests.support.store_fixtures import rowless, tree_bytes

#: Kinds of files that a rebuild has no business with.
STATES = ("resid", "norm", "origin", "median_norm", "column_scale", "row_scale", "embedding")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old store, where its models are found by the paths that it names."""
    path = old_store.unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return path


def quietly(path: Path) -> Store:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OldStoreWarning)
        return open_store(path)


def stand_ins() -> dict[str, int]:
    """GPT-2's table, the other way round than it is usually written."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in plain}
    for byte in range(256):
        if byte not in plain:
            table[chr(256 + len(table) - len(plain))] = byte
    return table


def bytes_read(store: Store, name: str) -> np.ndarray:
    """How much of its window each token has read, added up from the vocabulary's own spelling."""
    tokenizer, table, known = AutoTokenizer.from_pretrained(name), store.tokens(name), stand_ins()
    lengths = [
        0 if special else len(bytes(known[c] for c in tokenizer.convert_ids_to_tokens(int(number))))
        for number, special in zip(table.id, table.special, strict=True)
    ]
    read = np.cumsum(lengths)
    first = np.searchsorted(table.window, table.window)
    return np.where(table.special, 0, read - np.where(first > 0, read[first - 1], 0))


def wrong(store: Store, policy: str) -> int:
    """Pairs whose states have not read the same bytes."""
    pairs = store.pairs("a", "b", policy)
    read = {name: bytes_read(store, name) for name in ("a", "b")}
    window = store.tokens("a").window[pairs.row_source] != store.tokens("b").window[pairs.row_target]
    return int((window | (read["a"][pairs.row_source] != read["b"][pairs.row_target])).sum())


def state_files(path: Path) -> dict[str, bytes]:
    return {
        name: data
        for name, data in tree_bytes(path).items()
        if name.startswith("models/") and set(name.split("/")) & set(STATES) and not name.endswith("zarr.json")
    }


def test_no_pair_is_wrong_and_no_state_is_touched(old: Path) -> None:
    before, states = quietly(old), state_files(old)
    fingerprint = before.fingerprint
    assert {policy: wrong(before, policy) for policy in ("end", "word")} == {
        policy: old_store.TRUTH[policy][1] for policy in ("end", "word")
    }
    result = rebuild(old, quiet=True)
    store = open_store(old)  # and no warning
    # Without a start token the first token of a window takes its part, which version 1 did not know.
    first = np.diff(store.tokens("a").window, prepend=-1) != 0
    assert (before.model("a").attributes.get("start_token"), store.tokens("a").sink[first].all()) == (None, True)
    for name in ("a", "b"):
        np.testing.assert_array_equal(store.tokens(name).byte_end, bytes_read(store, name))
        rows, moved = old_store.TRUTH[name]
        assert result["models"][name] == {
            "rows": rows,
            "ends_changed": moved,
            "special_changed": 0,
            "exact_changed": 0,
            "role_changed": 0,
            "sinks_changed": int(first.sum()) if name == "a" else 0,
        }
        assert store.model(name).attributes["byte_ends"] == "bytes"
    assert [wrong(store, policy) for policy in ("end", "word")] == [0, 0]
    counts = result["pairs"]["a__b"]
    assert counts["end"] == {"before": 982, "after": len(store.pairs("a", "b")), "removed": 56, "added": 0}
    assert counts["word"] == {"before": 158, "after": 158, "removed": 0, "added": 0}
    assert state_files(old) == states
    assert not verify_store(old, quiet=True)["damage"]
    assert {"normalise": "none", "control_tokens": "special"}.items() <= store.attributes["corpus"].items()
    assert (result["from_version"], result["version"], result["changed"]) == (1, 3, True)
    assert result["fingerprint_before"] == fingerprint
    assert result["fingerprint_after"] == store.fingerprint != fingerprint
    assert store.attributes["rebuilt"] == [{k: v for k, v in result.items() if k not in ("store", "version")}]


def test_right_pairs_inside_characters_are_an_option(old: Path) -> None:
    rebuild(old, quiet=True)
    add_pairs(old, "byte")
    store = open_store(old)
    read = {name: bytes_read(store, name) for name in ("a", "b")}
    ends = [{(int(w), int(e)) for w, e in zip(store.tokens(n).window, read[n], strict=True) if e} for n in ("a", "b")]
    assert len(store.pairs("a", "b", "byte")) == len(ends[0] & ends[1]) > len(store.pairs("a", "b"))
    assert wrong(store, "byte") == 0
    assert not verify_store(old, quiet=True)["damage"]
    # Whatever a store has is derived again.
    result = rebuild(old, quiet=True)
    assert set(result["pairs"]["a__b"]) == {"end", "word", "byte"}


def test_moments_are_those_of_the_new_pairs(old: Path) -> None:
    rebuild(old, quiet=True)
    store = open_store(old)
    stored = StoredMoments(store, "a", "b")
    assert stored.covers(all_blocks(store, ("a", "b")))
    pairs = store.pairs("a", "b").select(0)
    moments = stored.read(("a", 1), ("b", 3), 0)
    assert moments is not None
    assert moments.n == len(pairs)
    x = store.rows("a", 1)[pairs.row_source] - store.origin("a", 1)
    y = store.rows("b", 3)[pairs.row_target] - store.origin("b", 3)
    np.testing.assert_allclose(moments.c, x.T @ y, rtol=1e-4, atol=1e-4)


def test_once_more_changes_nothing(old: Path) -> None:
    rebuild(old, quiet=True)
    once = tree_bytes(old)
    result = rebuild(old, quiet=True)
    assert tree_bytes(old) == once
    assert not result["changed"]
    # Version 3 for the moments that were summed again.
    assert result["from_version"] == 3
    assert result["pairs"]["a__b"]["end"]["removed"] == 0
    assert "its tokens and pairs are those of its text" in describe_rebuild(result)


class Killed(BaseException):
    """What no handler takes for an error of its own."""


def test_one_that_is_killed_ends_as_it_would_have(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shutil.copytree(old, tmp_path / "whole.zarr")
    told = rebuild(whole, quiet=True)
    place, count, stop = writing.StoreWriter._place, 0, 0
    write = writing.StoreWriter._write

    def counted(function: Any) -> Any:
        def step(*args: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == stop:
                raise Killed
            return function(*args, **named)

        return step

    monkeypatch.setattr(writing.StoreWriter, "_place", counted(place))
    monkeypatch.setattr(writing.StoreWriter, "_write", counted(write))
    rebuild(shutil.copytree(old, tmp_path / "counted.zarr"), quiet=True)
    total = count
    assert total > 100
    for stop in (1, 2, 3, 5, 9, 14, 16, 20, 24, 30, 60, total - 2, total):
        count = 0
        path = shutil.copytree(old, tmp_path / f"{stop}.zarr")
        with pytest.raises(Killed):
            rebuild(path, quiet=True)
        if stop > 1:
            with pytest.raises(StoreStateError, match="half rebuilt; run `featstore pair --rebuild"):
                open_store(path)
        count = -(10**9)
        assert rebuild(path, quiet=True) | {"store": ""} == told | {"store": ""}
        assert tree_bytes(path) == tree_bytes(whole)


def test_other_tokenizers_are_no_way_to_go_on(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("featstore.store.conversion.rebuild.upgrade_metadata", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rebuild(old, quiet=True)
    root = json.loads((old / "zarr.json").read_text())
    root["attributes"]["featstore"]["rebuilding"]["tables"]["b"] = "0" * 64
    (old / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreStateError, match=r"half rebuilt with other tokenizers \(b\) than those that are here now"):
        rebuild(old, quiet=True)


class TestRefusals:
    def refused(self, path: Path, *model: str, error: type[Exception] = StoreStateError, match: str) -> None:
        (path / ".writer.lock").touch()
        before = tree_bytes(path)
        with pytest.raises(error, match=match) as caught:
            rebuild(path, model, quiet=True)
        assert "\n" not in str(caught.value)
        assert tree_bytes(path) == before

    def test_other_ids(self, old: Path) -> None:
        self.refused(
            old,
            "a=./b",
            match=r"the tokenizer of 'a' \(\./b\) gives other ids .*: window 0, token 0, token \d+ for token \d+; "
            r"nothing was changed: name the one .* \(--model a=REF\), or extract again",
        )

    def test_a_token_more(self, old: Path) -> None:
        path = Path("a") / "tokenizer.json"
        made = json.loads(path.read_text())
        name = next(iter(made["model"]["vocab"]))
        made["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": name, "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {name: {"id": name, "ids": [made["model"]["vocab"][name]], "tokens": [name]}},
        }
        path.write_text(json.dumps(made))
        self.refused(old, match=r"gives other ids .*: window 0, token \d+, token \d+ for nothing;")

    def test_a_tokenizer_that_is_not_there(self, old: Path) -> None:
        Path("a").rename("moved")
        self.refused(old, error=ModelLoadError, match=r"the tokenizer of 'a' is needed: .* with --model a=REF$")
        assert rebuild(old, ["a=./moved"], quiet=True)["changed"]

    def test_a_name_that_is_not_in_it(self, old: Path) -> None:
        self.refused(old, "c=./a", error=SpecError, match="holds a, b, name one of these")

    def test_sums_that_cannot_be_made_again(self, old: Path) -> None:
        rowless(old)
        self.refused(old, match=r"moments of a and b over pairs that would change, and no rows .* --moments-only")


@pytest.mark.parametrize("rows", [True, False])
def test_sums_over_the_same_pairs_stay(old: Path, rows: bool) -> None:
    """A table's hash may change with what it holds besides: sums over the same rows are the same sums."""
    rebuild(old, quiet=True)
    with adding_to(old) as writer:
        own = (writer.attributes("models/a") or {})["featstore"]
        writer.group("models/a", {"featstore": own | {"tokens_sha256": "0" * 64}})
        writer.restate("models/a/tokens", sha256="0" * 64)
        # What was derived from the table says from which; another one would be refused.
        for unit in ("models/a/sinks", "pairs/a__b/end"):
            basis = (writer.entry(unit) or {})["basis"]
            writer.restate(unit, basis=basis.replace(own["tokens_sha256"], "0" * 64))
        writer.seal(writer.attributes() or {})
    add_moments(old, quiet=True)
    if not rows:
        rowless(old)
    sums = {name: data for name, data in tree_bytes(old).items() if name.startswith("moments/")}
    result = rebuild(old, quiet=True)
    assert result["moments"] == {"a__b": {"kept": 30, "summed": False}}
    assert not result["changed"]
    assert {name: data for name, data in tree_bytes(old).items() if name.startswith("moments/")} == sums
    store = open_store(old)
    assert StoredMoments(store, "a", "b").covers(all_blocks(store, ("a", "b")))
    # What was fitted before is of the same data.
    assert store.rebuilt_since(result["fingerprint_before"]) is False
    assert store.rebuilt_since(store.attributes["rebuilt"][0]["fingerprint_before"]) is True
    assert store.rebuilt_since("0" * 64) is None


def test_extraction_goes_on_afterwards(old: Path) -> None:
    rebuild(old, quiet=True)
    states = state_files(old)
    store = featstore.extract(models={"a": "./a"}, layers="a=0", store=old, device="cpu", quiet=True)
    assert store.model("a").layers == (0, 1, 2)
    assert states.items() <= state_files(old).items()
    assert len(store.attributes["rebuilt"]) == 1
    assert not verify_store(old, quiet=True)["damage"]
    assert not rebuild(old, quiet=True)["changed"]


class TestCommand:
    def test_it_says_what_changed(self, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
        done = call(capsys, "featstore", "pair", old, "--rebuild", "--policy", "byte")
        assert done.code == 0
        assert "a: 190 of 1143 rows end at another byte" in done.out
        assert "a__b (end): 982 pairs before, 926 after: 56 removed, 0 added" in done.out
        assert "format version 1 is now 3" in done.out
        assert "a__b: 1001 pairs" in done.out
        assert call(capsys, "featstore", "pair", old, "--rebuild", "--json").json["changed"] is False
        assert call(capsys, "featstore", "verify", old, "--json").json["damage"] == []

    def test_models_are_for_rebuilding(self, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert (
            "--model and --yes are for --rebuild" in call(capsys, "featstore", "pair", old, "--model", "a=./a").refusal
        )

    def test_the_function_gives_the_store(self, old: Path) -> None:
        store = featstore.rebuild(str(old), {"a": "./a"}, quiet=True)
        assert (store.version, len(store.pairs("a", "b"))) == (3, 926)


def test_a_map_is_fitted_over_pairs_of_every_policy(old: Path, tmp_path: Path) -> None:
    rebuild(old, quiet=True)
    add_pairs(old, "byte")
    result = train(Settings(str(old), "procrustes", policy="byte", layer_map="1:3"), tmp_path / "run", quiet=True)
    assert result["pairs"]
    assert json.loads((tmp_path / "run" / "adapter.json").read_text())["pair_policy"] == "byte"
