"""A store of very many units and rows, in small: what is read piece by piece is what is read at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from align.moments.scan import limit_rows
from featstore.errors import ContradictionError, CorruptDataError
from featstore.store import open_store
from featstore.store.format.index import INDEX, FileIndex, index_text
from featstore.store.inspect.entries import recorded
from featstore.store.inspect.verify import verify_store
from featstore.store.read import columns, contents, pairs, store
from featstore.store.read.columns import RowSet
from featstore.store.read.files import parse_entry
from featstore.store.read.loader import EpochOrder, PairBatches
from featstore.store.read.portable import store_files
from featstore.store.read.store import open_files
from featstore.store.write.row_writer import RowWriter
from featstore.store.write.writer import StoreWriter, exclusive
from tests.support.many_rows import MODELS, SMALL, begin, finish, row_arrays

COLUMNS = ("row_source", "row_target", "split", "document", "sink", "role", "token")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    return begin(tmp_path_factory.mktemp("many") / "begun.zarr", SMALL)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "simulated.zarr"
    return finish(begin(path, SMALL), SMALL)


@pytest.fixture
def large(monkeypatch):
    """Every store counts as large, and pieces are short."""
    monkeypatch.setattr(columns, "PIECE", 3000)
    for module in (pairs, store):
        monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(store, "LARGE_TEXT", 1)
    monkeypatch.setattr(pairs, "HELD", 100)


def same(ours, theirs) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.coverage == theirs.coverage


class TestPairs:
    @pytest.mark.parametrize("sides", [("a", "b"), ("b", "a"), ("a", "a")])
    def test_columns_are_the_arrays(self, simulated, sides, request):
        arrays = open_store(simulated).pairs(*sides)
        request.getfixturevalue("large")
        made = open_store(simulated).pairs(*sides)
        assert isinstance(made.row_source, RowSet)
        same(made, arrays)
        for split in (0, 1, 2, None):
            same(made.select(split), arrays.select(split))
        same(limit_rows(made.select(0), 50, 1), limit_rows(arrays.select(0), 50, 1))
        assert isinstance(limit_rows(made, 50, 1).row_source, np.ndarray)

    def test_an_epoch_has_the_same_order(self, simulated, request):
        arrays = open_store(simulated).pairs("a", "b").select(0)
        request.getfixturevalue("large")
        held = open_store(simulated)
        made = held.pairs("a", "b").select(0)
        orders = [EpochOrder.of(each.row_source, 512, 3, 2) for each in (arrays, made)]
        np.testing.assert_array_equal(orders[0].first, orders[1].first)
        np.testing.assert_array_equal(orders[0].end, orders[1].end)
        rows = (held.rows("a", 1), held.rows("b", 1))
        batches = [list(PairBatches(*rows, each, 1 << 22).shuffled(64, 0, 1)) for each in (arrays, made)]
        for one, other in zip(*batches, strict=True):
            np.testing.assert_array_equal(one.pairs, other.pairs)
            np.testing.assert_array_equal(one.x, other.x)
            np.testing.assert_array_equal(one.y, other.y)

    def test_damage_is_found_in_any_piece(self, simulated, large):
        held = open_store(simulated)
        table = held.tokens("b")
        whole = {name: np.array(getattr(table, name)) for name in vars(table)}
        corpus, rows, row = held.corpus, SMALL.rows, 3000 * 4 + 2
        for name, at, value in (
            ("window", row, 0), ("byte_end", row, 10_000), ("id", row, 2000), ("role", row, 77), ("byte_end", 3000, 1),
        ):  # fmt: skip
            changed = {**whole, name: whole[name].copy()}
            changed[name][at] = value
            assert list(contents.token_problems("b", rows, type(table)(**changed), corpus, 1000)), (name, at)
        assert not list(contents.token_problems("b", rows, type(table)(**whole), corpus, 1000))
        a, b = held.pair_index("a", "b", "end")
        tables = held.tokens("a"), table
        assert not list(contents.pair_problems("", a, b, *tables))
        swapped = a.copy()
        swapped[[2999, 3000]] = swapped[[3000, 2999]]  # across the edge of a piece
        assert list(contents.pair_problems("", swapped, b, *tables))

    def test_a_damaged_chunk_is_refused(self, tmp_path, large):
        path = finish(begin(tmp_path / "s.zarr", SMALL), SMALL)
        chunk = path / "models/a/tokens/byte_end/c/3"
        data = bytearray(chunk.read_bytes())
        data[5] ^= 1
        chunk.unlink()  # it has other names
        chunk.write_bytes(data)
        with pytest.raises(CorruptDataError, match="byte_end/c/3"):
            open_store(path).pairs("a", "b")


class TestIndex:
    def test_it_says_what_the_entries_say(self, simulated):
        held = open_store(simulated)
        assert dict(held.manifest) == held.recorded_files
        by_entries = open_store(simulated)
        vars(by_entries)["index"] = None
        assert held.fingerprint == by_entries.fingerprint
        assert open_store(simulated, portable=True).fingerprint == held.fingerprint

    def test_without_it_and_with_another_one_the_entries_are_read(self, tmp_path):
        path = finish(begin(tmp_path / "s.zarr", SMALL), SMALL)
        fingerprint = open_store(path).fingerprint
        data = (path / INDEX).read_bytes()
        for content in (None, data[:-1], data.replace(b"resid/0", b"resid/1")):
            (path / INDEX).unlink()
            if content is not None:
                (path / INDEX).write_bytes(content)
            assert open_store(path).index is None
            assert open_store(path).fingerprint == fingerprint
            [line] = verify_store(path, quiet=True)["damage"]
            assert line.startswith(f"{INDEX}: ")
            (path / INDEX).write_bytes(data)
        assert verify_store(path, quiet=True)["damage"] == []

    def test_a_sound_store_is_verified_an_entry_at_a_time(self, simulated):
        files = open_files(store_files(simulated))
        records, damage = recorded(files)
        assert damage == []
        assert not {"entries", "recorded_files"} & vars(files).keys()
        assert dict(records) == open_store(simulated).recorded_files

    @pytest.mark.parametrize("fault", ["changed", "gone", "added", "index"])
    def test_whatever_is_wrong_with_entries_is_told_as_all_of_them_tell_it(self, tmp_path, fault):
        path = finish(begin(tmp_path / "s.zarr", SMALL), SMALL)
        entry = path / "manifest/models/a/resid/0/rows-000003.json"
        text, says = entry.read_text(), ["checksum differs"]
        if fault == "changed":
            entry.write_text(text + " ")
            says.append("rows-000003.json is not what its entry")
        elif fault == "gone":
            entry.unlink()
            says = ["rows-000003.json: missing", *["is not what its entry"] * (1 + len(json.loads(text)["files"]))]
        elif fault == "added":
            entry.with_name("rows-more.json").write_text(text.replace("rows-000003", "rows-more"))
            says = []
        else:
            (path / INDEX).write_bytes(b"")
            says = ["not the index that the store was sealed with"]
        files = open_files(store_files(path))
        records, damage = recorded(files)
        assert len(damage) == len(says)
        assert all(part in line for part, line in zip(says, damage, strict=True))
        assert records == files.recorded_files

    @pytest.mark.parametrize("lie", ["size", "more"])
    def test_an_index_that_was_sealed_and_says_something_else_is_told(self, simulated, lie):
        files = open_files(store_files(simulated))
        lines = [(name, record["bytes"], record["crc32"]) for name, record in files.index.items()]
        if lie == "size":
            name, size, checksum = lines[3]
            lines[3] = name, size + 1, checksum
        else:
            name = "models/a/resid/0/c/999/0"
            lines.append((name, 1, "0" * 8))
        vars(files)["index"] = FileIndex.parse(index_text(lines), "index")
        records, damage = recorded(files)
        assert damage == [f"{INDEX}: {name} is not what its entry in the manifest says"]
        assert records == files.recorded_files

    def test_an_entry_that_is_gone_is_missed(self, tmp_path):
        path = finish(begin(tmp_path / "s.zarr", SMALL), SMALL)
        (path / "manifest/models/a/resid/0/rows-000003.json").unlink()
        with pytest.raises(ContradictionError, match=r"rows-000003\.json: missing"):
            open_store(path).manifest  # noqa: B018

    def test_a_file_of_another_size_is_missed(self, tmp_path):
        path = finish(begin(tmp_path / "s.zarr", SMALL), SMALL)
        norm = path / "models/a/norm/0/c/3"
        data = norm.read_bytes()
        norm.unlink()
        norm.write_bytes(data[:-1])
        with pytest.raises(ContradictionError, match="norm/0/c/3"):
            open_store(path).manifest  # noqa: B018

    @pytest.mark.parametrize(
        "text",
        [
            b"a\t1\t00000000", b"a\t1\n", b"a\t-1\t00000000\n", b"a\t\t00000000\n", b"a\t1\t0000000g\n", b"a\t1\t0\n",
            b"/a\t1\t00000000\n", b"a/../b\t1\t00000000\n", b"a//b\t1\t00000000\n", b"..\t1\t00000000\n",
            b"a/\t1\t00000000\n",
            b"a b\t1\t00000000\n", b"\xff\t1\t00000000\n", b"\t1\t00000000\n", b"b\t1\t00000000\na\t1\t00000000\n",
            b"a\t1\t00000000\na\t1\t00000000\n", b"a\t9999999999999999999\t00000000\n", b"a" * 300 + b"\t1\t00000000\n",
            b"/".join([b"a"] * 20) + b"\t1\t00000000\n",
        ],
    )  # fmt: skip
    def test_what_is_no_index_is_refused(self, text):
        with pytest.raises(CorruptDataError, match="index"):
            FileIndex.parse(text, "index")

    def test_it_is_a_table_of_files(self):
        files = [("b/c", 5, "0000000f"), ("a", 0, "ffffffff"), ("b/a", 7, "12345678"), ("b.c", 1, "00000001")]
        held = FileIndex.parse(index_text(files), "index")
        assert dict(held) == {name: {"bytes": size, "crc32": crc} for name, size, crc in files}
        assert list(held) == sorted(held)
        assert list(held.below("b/")) == ["b/a", "b/c"]
        assert list(held.without("b/")) == ["a", "b.c"]
        assert held.total == 13
        assert "b" not in held
        assert 3 not in held
        assert len(FileIndex.parse(b"", "index")) == 0


class TestResume:
    def test_what_is_missing_is_the_last_shard(self, unfinished):
        size = SMALL.shard_rows
        with exclusive(unfinished):
            writer = StoreWriter(unfinished)
            for name in MODELS:
                rows = RowWriter(writer, name, row_arrays(SMALL))
                found = [bool(rows.missing(at, at + size)) for at in range(0, SMALL.rows, size)]
                assert found == [False] * (len(found) - 1) + [True]

    def test_entries_of_a_folder_are_those_that_stand_in_it(self, unfinished):
        writer = StoreWriter(unfinished)
        found = writer.entries("models/a/resid/1")
        assert found == {
            unit: writer.entry(unit) for unit in writer.unit_names() if unit.startswith("models/a/resid/1/")
        }
        assert writer.entries("models/a/resid/9") == {}

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'"unit": "models', b'"unit": "model5'), (b'"bytes": ', b'"bytes": 0'), (b"/c/1/0", b"/../1"),
            (b'"rows": 1', b'"rows": -1'),
            (b'"bytes": ', b'"bytes": 99999999999999999'), (b"  },\n", b"  }\n"),
        ],
    )  # fmt: skip
    def test_an_entry_that_stands_otherwise_is_judged(self, unfinished, old, new):
        unit = "models/a/resid/1/rows-000001"
        data = (unfinished / "manifest" / f"{unit}.json").read_bytes()
        assert parse_entry(data, "here", unit)["rows"] == SMALL.shard_rows
        # Written otherwise it says the same.
        assert parse_entry(data.replace(b"\n", b""), "here", unit) == parse_entry(data, "here", unit)
        assert old in data
        with pytest.raises(CorruptDataError):
            parse_entry(data.replace(old, new), "here", unit)


def test_the_simulated_store_is_whole(simulated, large):
    assert verify_store(simulated, quiet=True)["damage"] == []
    assert len(list((simulated / "models/a/resid/0/c").iterdir())) == SMALL.rows // SMALL.shard_rows
