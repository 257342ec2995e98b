"""Rows in any order from shards that lie side by side: what the road by chunk gives, and the same refusals."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featstore.errors import CorruptDataError
from featstore.store.format.documents import rows_document
from featstore.store.format.elements import FORMATS
from featstore.store.format.shards import LAYOUTS, encode_shard
from featstore.store.read import rows as reading
from featstore.store.read import together
from featstore.store.read.rows import RowReader

HOT = replace(LAYOUTS["hot"], chunk_rows=64)
SHARD = 256
ROWS = 3 * SHARD + 70


def layer(path, width: int, form: str = "bfloat16"):
    values = np.random.default_rng(0).integers(0, 30_000, (ROWS, width)).astype(FORMATS[form].storage)
    for shard, start in enumerate(range(0, ROWS, SHARD)):
        file = path / "c" / str(shard) / "0"
        file.parent.mkdir(parents=True)
        file.write_bytes(encode_shard(values[start : start + SHARD], SHARD, HOT))
    return values, RowReader(path, rows_document(ROWS, width, SHARD, FORMATS[form], HOT))


#: Orders in which rows may be wanted.
ORDERS = {
    "any": np.random.default_rng(1).integers(0, ROWS, 500),
    "rising": np.sort(np.random.default_rng(2).integers(0, ROWS, 300)),
    "one": np.array([ROWS - 1]),
    "none": np.zeros(0, np.int64),
    "all, backwards": np.arange(ROWS)[::-1],
}


@pytest.mark.parametrize("threads", [1 << 40, 1])
@pytest.mark.parametrize("width", [512, 32, 8, 576, 7])
def test_rows_are_those_that_were_written(tmp_path, width, threads, monkeypatch):
    monkeypatch.setattr(reading, "_THREADED_BYTES", threads)
    values, reader = layer(tmp_path, width)
    for name, numbers in ORDERS.items():
        out = np.zeros((len(numbers), width), values.dtype)
        np.testing.assert_array_equal(reader.stored(numbers, out=out), values[numbers], err_msg=name)
        np.testing.assert_array_equal(reader.stored(numbers), values[numbers], err_msg=name)
        by_chunk = np.zeros_like(out)
        if len(numbers):
            reader._gather_by_chunk(numbers, by_chunk)
            np.testing.assert_array_equal(by_chunk, out, err_msg=name)
    np.testing.assert_array_equal(reader.stored(slice(3, ROWS - 2)), values[3:-2])
    if sys.platform == "linux":
        assert (reader._gathering is not None) == (width != 7)


def test_what_cannot_lie_side_by_side_is_gathered_by_chunk(tmp_path, monkeypatch):
    values, reader = layer(tmp_path, 512)
    numbers = ORDERS["any"]
    monkeypatch.setattr(reading, "MOST_FILES", 3)
    np.testing.assert_array_equal(reader.stored(numbers), values[numbers])
    assert reader._gathering is None
    monkeypatch.undo()

    def refused(*_):
        raise OSError("no addresses")

    monkeypatch.setattr(together.SideBySide, "_map", refused)
    np.testing.assert_array_equal(reader.stored(numbers), values[numbers])


def test_chunks_off_their_place_are_gathered_by_chunk(tmp_path, monkeypatch):
    # Older stores put one chunk right behind the other.
    monkeypatch.setattr("featstore.store.format.shards.HOT_ALIGNMENT", 1)
    values, reader = layer(tmp_path, 512)
    monkeypatch.undo()
    np.testing.assert_array_equal(reader.stored(ORDERS["any"]), values[ORDERS["any"]])
    assert reader._gathering is None or not reader._gathering.even


@pytest.mark.parametrize("damage", ["chunk", "index", "short", "gone"])
def test_damage_is_refused_where_it_is_read(tmp_path, damage):
    values, reader = layer(tmp_path, 512)
    file = tmp_path / "c/1/0"
    data = bytearray(file.read_bytes())
    data[{"chunk": 70_000, "index": len(data) - 9}.get(damage, 0)] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes(data[:50] if damage == "short" else data)
    numbers = np.r_[np.arange(0, SHARD, 3), np.arange(2 * SHARD, ROWS)]
    np.testing.assert_array_equal(reader.stored(numbers), values[numbers])
    for _ in range(2):  # refused again, and not believed the second time
        with pytest.raises(CorruptDataError, match=str(tmp_path)):
            reader.stored(np.arange(SHARD, 2 * SHARD))


def test_few_shards_stay_mapped_and_views_keep_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MOST_SHARDS", 2)
    values, reader = layer(tmp_path, 16)
    views = [reader.stored(slice(start, start + 64)) for start in range(0, ROWS - 64, 64)]
    assert len(reader._shards) == 2
    for number, view in enumerate(views):
        np.testing.assert_array_equal(view, values[number * 64 : number * 64 + 64])
    np.testing.assert_array_equal(reader.stored(slice(0, ROWS)), values)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel how much of the files is mapped")
def test_released_pages_are_no_memory_of_the_process_and_are_read_again(tmp_path):
    values, reader = layer(tmp_path, 512)

    def resident() -> int:
        """KiB of the layer's files in this process's memory, over all maps of them."""
        total, ours = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
                ours = str(tmp_path) in line
            elif ours and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total

    for _ in range(2):
        np.testing.assert_array_equal(reader.stored(ORDERS["any"]), values[ORDERS["any"]])
        np.testing.assert_array_equal(reader.stored(slice(0, ROWS)), values)
        assert resident() >= values.nbytes >> 10
        reader.release()
        assert resident() == 0
