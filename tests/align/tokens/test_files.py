"""The tables of a run on disk: what is written is read, and what is damaged is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from align.layers import LayerPair
from align.tokens.files import FILE, load_tables, save_tables
from align.tokens.table import TokenTable
from featstore.errors import AdapterError

PAIRS = [LayerPair("a", (1,), "b", 2), LayerPair("a", (1, 3), "b", 2), LayerPair("b", (2,), "a", 1)]


def table(seed: int = 0, m: int = 5, d: int = 3) -> TokenTable:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(100, m, replace=False)).astype(np.int64)
    states = rng.normal(size=(m, d)).astype(np.float32)
    return TokenTable(ids, states, rng.normal(size=d).astype(np.float32), {"k": 2.0, "ridge": None})


def test_what_is_written_is_read_and_pairs_with_one_target_share_it(tmp_path: Path) -> None:
    own = table()
    save_tables(tmp_path, {"a->b:2": own}, PAIRS, store="abc")
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    file = load_tables(tmp_path)
    assert file.store == "abc"
    assert dict(file.pairs) == {PAIRS[0].key: "a->b:2", PAIRS[1].key: "a->b:2"}
    for pair in PAIRS[:2]:
        read = file.table(pair.key)
        for name in ("ids", "states", "mean"):
            np.testing.assert_array_equal(getattr(read, name), getattr(own, name))
        assert read.facts == own.facts
    with pytest.raises(AdapterError, match="no token baseline of 'b:2->a:1'"):
        file.table(PAIRS[2].key)


def test_a_run_without_tables_writes_no_file_and_says_so_when_asked(tmp_path: Path) -> None:
    save_tables(tmp_path, {}, PAIRS, store="abc")
    assert not list(tmp_path.iterdir())
    with pytest.raises(AdapterError, match=r"has no tokens\.safetensors"):
        load_tables(tmp_path)


def test_unknown_tokens_have_the_mean_state_and_any_order_is_asked_for() -> None:
    own = table()
    asked = np.array([own.ids[3], 1000, own.ids[0], own.ids[0], -1])
    expected = np.stack([own.states[3], own.mean, own.states[0], own.states[0], own.mean])
    np.testing.assert_array_equal(own.predict(asked), expected)
    assert own.predict([]).shape == (0, 3)
    empty = TokenTable(own.ids[:0], own.states[:0], own.mean)
    np.testing.assert_array_equal(empty.predict([1, 2]), np.stack([own.mean] * 2))


def test_tokens_beyond_the_table_are_predicted_where_that_is_known() -> None:
    own = table()
    other = TokenTable(own.ids, own.states, own.mean, {}, lambda ids: np.outer(ids, np.ones(3)))
    np.testing.assert_array_equal(other.predict([500, own.ids[1], 400, 500])[:, 0], [500, own.states[1, 0], 400, 500])


def rewritten(path: Path, *, about: str | None = None, **tensors: np.ndarray) -> None:
    held = load_file(path / FILE)
    from safetensors import safe_open

    with safe_open(path / FILE, framework="numpy") as file:
        metadata = dict(file.metadata())
    save_file({**held, **tensors}, path / FILE, metadata=metadata if about is None else {"about": about})


def test_damage_is_one_line(tmp_path: Path) -> None:
    save_tables(tmp_path, {"a->b:2": table()}, PAIRS, store="abc")
    whole = (tmp_path / FILE).read_bytes()
    key = PAIRS[0].key
    for spoiled in (
        {"a->b:2.ids": np.arange(5)[::-1].copy()},
        {"a->b:2.ids": np.arange(4)},
        {"a->b:2.states": np.zeros((5, 4), np.float32)},
        {"a->b:2.mean": np.zeros(3, np.float64)},
    ):
        (tmp_path / FILE).write_bytes(whole)
        rewritten(tmp_path, **spoiled)
        with pytest.raises(AdapterError, match="damaged"):
            load_tables(tmp_path).table(key)
    for about in ("{", "[]", json.dumps({"format": 1})):
        (tmp_path / FILE).write_bytes(whole)
        rewritten(tmp_path, about=about)
        with pytest.raises(AdapterError, match="damaged"):
            load_tables(tmp_path)
    (tmp_path / FILE).write_bytes(whole)
    rewritten(tmp_path, about=json.dumps({"format": 2}))
    with pytest.raises(AdapterError, match="format 2"):
        load_tables(tmp_path)
    (tmp_path / FILE).write_bytes(whole[:40])
    with pytest.raises(AdapterError, match="damaged"):
        load_tables(tmp_path)
