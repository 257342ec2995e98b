"""A stranger's store: what `verify` refuses, no other command believes, and nothing ends in a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore import open_store
from featstore.errors import CorruptDataError
from featstore.store.format.documents import plain_document, rows_document
from featstore.store.format.elements import parse_format
from featstore.store.format.plain import Plain
from featstore.store.format.shards import parse_layout
from featstore.store.format.version import PACKED
from featstore.store.inspect.verify import verify_store
from featstore.store.read.geometry import Geometry
from featstore.store.read.recorded import announced_problems
from featstore.store.write.writer import StoreWriter
from tests.support.fuzz import mutations
from tests.support.fuzz_store import SHARDS, Judgement, changed, documents_of, fuzz, judge, kind_of, small_store
from tests.support.tiers import tiered


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return small_store(tmp_path_factory.mktemp("strangers") / "s.zarr")


@pytest.fixture
def path(sound, tmp_path) -> Path:
    shutil.copytree(sound, tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def test_the_store_itself_is_sound_and_every_command_takes_it(sound, tmp_path):
    found = judge(sound, tmp_path / "scratch")
    assert found == Judgement([], ["verify", "open", "info", "inspect", "train", "cka"], {})
    kinds = {kind_of(name) for name in documents_of(sound)}
    assert len(kinds) > 50
    assert {"zarr.json", SHARDS, "models/*/zarr.json", "manifest/corpus.json"} <= kinds


#: Mutated documents and whether sound ones are fitted, too; 2,200 in all.
FUZZED = tiered([(150, 1, False)], [(700, 2, False), (1000, 3, False), (350, 4, True)])


@pytest.mark.parametrize(("count", "seed", "figures"), FUZZED)
def test_no_mutated_document_ends_in_a_traceback_or_is_believed_against_verify(path, tmp_path, count, seed, figures):
    refused = 0
    before = {name: (path / name).read_bytes() for name in documents_of(path)}
    for name, described, found in fuzz(path, tmp_path / "scratch", seed, count, figures=figures):
        assert not found.crashed, (name, described, found.crashed)
        refused += bool(found.verify)
        believed = {"train", "cka"} & set(found.accepted)
        if found.verify and believed:
            # A checksum of a file is compared where the whole file is read, an index of pairs where pairs are.
            unread = ("checksum differs", "pairs of a and b (word)")
            assert all(any(words in line for words in unread) for line in found.verify), (name, described, found)
        if not found.verify:
            assert {"open", "info", "inspect"} <= set(found.accepted), (name, described)
            assert not figures or {"train", "cka"} <= set(found.accepted), (name, described)
    assert refused > 0.6 * count
    assert {name: (path / name).read_bytes() for name in documents_of(path)} == before


# Documents ------------------------------------------------------------------------------------------------------------


def said(path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A document with its own attributes, or itself, changed."""
    document = json.loads((path / name).read_bytes())
    own = document.get("attributes", {}).get("featstore")
    change(document if own is None else own)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("zarr.json", lambda d: d.update(models=[]), "/models is a list of 0, expected a list of 1 or more"),
        ("zarr.json", lambda d: d.update(models=["a", "a"]), "/models/1 is 'a', expected what the list does not hold"),
        ("zarr.json", lambda d: d.update(models=["../a"]), "expected a safe name"),
        ("zarr.json", lambda d: d["mask"].update(sink_threshold=0), "/mask/sink_threshold is 0"),
        ("zarr.json", lambda d: d["corpus"].update(windows=10**17), "/corpus/windows is"),
        ("models/a/zarr.json", lambda d: d.update(layers=[2, 2]), "/layers/1 is 2, expected what the list does not"),
        ("models/a/zarr.json", lambda d: d.update(layers=[]), "/layers is a list of 0"),
        ("models/a/zarr.json", lambda d: d.update(layers=[200]), "do not fit a depth of 2"),
        ("models/a/zarr.json", lambda d: d.update(rows=True), "/rows is true, expected an integer"),
        ("models/a/zarr.json", lambda d: d.update(width=5), "expected [5]"),
        ("models/a/zarr.json", lambda d: d.update(format="fp8"), "the model's attributes say fp8"),
        ("models/b/tokens/sink/zarr.json", lambda d: d.update(shape=[7]), "shape [7], expected"),
        ("models/b/norm/2/zarr.json", lambda d: d.update(shape=[7]), "shape [7], expected"),
        ("models/b/norm/2/zarr.json", lambda d: d.update(data_type="int32"), "data type 'int32' is not float32"),
        ("models/a/resid/2/zarr.json", lambda d: d.update(data_type="float16"), "format float16"),
        ("models/a/resid/2/zarr.json", lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[2**40, 4]),
         "are not up to"),
        ("corpus/text/zarr.json", lambda d: d.update(shape=[10**9]), "expected ["),
        ("pairs/a__b/end/zarr.json", lambda d: d["coverage"].update(a=0.5), "recorded coverage"),
        ("pairs/a__b/end/zarr.json", lambda d: d.update(policy="word"), "says to hold the word pairs"),
        ("zarr.json", lambda d: d["mask"].update(sink_threshold=4.0), "the sink mask was made by another threshold"),
    ],
)  # fmt: skip
def test_what_a_document_claims_is_refused_by_verify_and_by_whoever_fits(sound, path, tmp_path, name, change, words):
    with changed(path, name, said(path, name, change)):
        found = judge(path, tmp_path / "scratch")
        assert words in " ".join(found.verify)
        assert not found.crashed
        assert not {"train", "cka", "verify"} & set(found.accepted)


# Arrays ---------------------------------------------------------------------------------------------------------------


def rewrite(path: Path, unit: str, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change arrays of a unit and seal again: wrong, with every checksum right."""
    writer, store = StoreWriter(path), open_store(path)
    entry = writer.entry(unit)
    packed = {name: (path / name).read_bytes() for name in entry["files"] if f"/{PACKED}/" in name}
    arrays = {
        name: store.vector(name).copy() for name in {name.split("/c/")[0] for name in entry["files"] - packed.keys()}
    }
    change(arrays)
    facts = {key: value for key, value in entry.items() if key not in ("unit", "files")}
    writer.vectors(unit, arrays, more=packed, **facts)
    writer.seal({"featstore": store.attributes})


def put(name: str, at: int | slice, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays[name].__setitem__(at, value)


def swap(name: str, first: int, second: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][[first, second]] = arrays[name][[second, first]]

    return change


TOKENS, END = "models/a/tokens", "pairs/a__b/end"


@pytest.mark.parametrize(
    ("unit", "change", "words"),
    [
        ("models/a/pilot-2", put("models/a/median_norm/2", 0, np.nan), "the median norm is nan, not a finite number"),
        ("models/a/pilot-2", put("models/a/origin/2", 1, np.inf), "the origin is not 4 finite numbers"),
        ("corpus", put("corpus/document/split", 0, 3), "document 0 has split 3, not 0 to 2"),
        ("corpus", put("corpus/document/split", slice(None), 0), "the attributes say"),
        ("corpus", put("corpus/document/start", 1, 10**12), "the documents do not fit the text"),
        ("corpus", swap("corpus/window/start", 0, 1), "the windows do not cover the documents"),
        ("corpus", swap("corpus/window/document", 0, -1), "the windows are not in order"),
        ("corpus", put("corpus/window/document", -1, 10**6), "the windows are not in order, or of documents"),
        ("corpus", put("corpus/message/end", 0, 10**9), "the messages do not lie within their documents, in order"),
        (TOKENS, put(f"{TOKENS}/byte_end", 3, 10**6), "a token ends beyond its window"),
        (TOKENS, put(f"{TOKENS}/byte_end", 3, -5), "a token ends beyond its window"),
        (TOKENS, swap(f"{TOKENS}/window", 0, -1), "the tokens' windows are not those of the corpus, in order"),
        (TOKENS, put(f"{TOKENS}/window", -1, 10**6), "the tokens' windows are not those of the corpus, in order"),
        (TOKENS, put(f"{TOKENS}/id", 3, 10**6), "token id 1000000, outside the vocabulary of 1000"),
        (TOKENS, put(f"{TOKENS}/id", 3, -1), "token id -1, outside the vocabulary of 1000"),
        (END, put(f"{END}/row_a", 0, 10**9), "pair 0 names row 1000000000, outside 0.."),
        (END, put(f"{END}/row_b", 0, -1), "pair 0 names row -1, outside 0.."),
        (END, lambda arrays: [each.__setitem__(1, each[0]) for each in arrays.values()], "rows are repeated"),
        (END, lambda arrays: [each.__setitem__(slice(None), each[::-1]) for each in arrays.values()], "rows are repea"),
    ],
)  # fmt: skip
def test_what_arrays_contradict_is_refused_by_verify_and_by_whoever_fits(path, tmp_path, unit, change, words):
    rewrite(path, unit, change)
    found = judge(path, tmp_path / "scratch")
    assert words in " ".join(found.verify), found.verify
    assert not found.crashed
    assert not {"train", "cka", "verify"} & set(found.accepted)


@pytest.mark.parametrize(
    ("part", "at", "value", "words"),
    [
        ("totals", 0, 3.0, "it sums 3 pairs, the split has"),
        ("totals", 1, np.nan, "not finite"),
        ("x", (2, 0), 1e9, "the trace of its product"),
        ("x", (2, 0), np.nan, "the roots of its sums of squares are no such roots"),
    ],
)
def test_moments_that_contradict_the_rows_are_refused(path, tmp_path, part, at, value, words):
    unit = "moments/a__b/train/a.2__a.2"
    rewrite(path, unit, put(f"{unit}/{part}", at, value))
    found = judge(path, tmp_path / "scratch")
    assert words in " ".join(found.verify), found.verify
    assert "train" not in found.accepted
    assert not found.crashed


# Announced sizes ------------------------------------------------------------------------------------------------------


def test_chunks_are_counted_before_they_are_listed():
    """An array may announce any number of chunks; what is on disk bounds the work."""
    plain = Plain.parse(plain_document((4_000_000,), "int32", 1), "s/models/a/tokens/id")
    (line,) = announced_problems({"models/a/tokens/id": plain}, {})
    assert line == "models/a/tokens/id: 4000000 chunk files are announced, the manifest names 0 files in all"


@pytest.mark.parametrize("layout", ["hot", "archive"])
def test_rows_need_bytes(layout):
    chosen, form = parse_layout(layout), parse_format("bfloat16")
    document = rows_document(16 * chosen.chunk_rows, 8, 1024 * chosen.chunk_rows, form, chosen)
    geometry = Geometry.parse(document, "s/models/a/resid/2")
    record = {"models/a/resid/2/c/0/0": {"bytes": 16 * 1024 + 4, "crc32": "00000000"}}
    (line,) = announced_problems({"models/a/resid/2": geometry}, record)
    assert line.startswith("models/a/resid/2/c/0/0: 16388 bytes, its array says ")


def test_a_shard_of_more_chunks_than_any_has_is_not_read(tmp_path):
    form, layout = parse_format("bfloat16"), parse_layout("archive")
    with pytest.raises(CorruptDataError, match="are not up to 131072 chunks of 256"):
        Geometry.parse(rows_document(10, 8, 256 * 2**20, form, layout), "s/models/a/resid/2")


def test_a_file_of_another_size_than_recorded_is_refused_by_whoever_fits(path, tmp_path):
    with (path / "models/a/norm/2/c/0").open("ab") as file:
        file.write(b"more")
    found = judge(path, tmp_path / "scratch")
    assert found.verify == ["models/a/norm/2/c/0: 1032 bytes, the manifest says 1028"]
    assert not {"info", "train", "cka"} & set(found.accepted)


def test_copies_that_other_readers_believe_are_compared(path):
    root = json.loads((path / "zarr.json").read_bytes())
    root["consolidated_metadata"]["metadata"]["models/a/norm/2"]["fill_value"] = 1.0
    with changed(path, "zarr.json", json.dumps(root).encode()):
        assert verify_store(path, quiet=True)["damage"] == [
            "zarr.json: the consolidated metadata are not copies of the documents"
        ]


# The mutator ----------------------------------------------------------------------------------------------------------


def test_mutations_are_seeded_and_all_different_from_the_document():
    document = {"models": ["a", "b"], "corpus": {"bytes": 5, "form": "text"}, "mask": {"threshold": 5.0}, "none": None}
    made = list(mutations(document, random.Random(3), 400))
    assert made == list(mutations(document, random.Random(3), 400))
    assert len({text for _, text in made}) > 200
    assert document == {
        "models": ["a", "b"], "corpus": {"bytes": 5, "form": "text"}, "mask": {"threshold": 5.0}, "none": None,
    }  # fmt: skip
    told = " ".join(described for described, _ in made)
    for words in ("left out", "stands twice", "nested", "repeated", "exchanged", "is called", "the document is", "nan"):
        assert words in told
