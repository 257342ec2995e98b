"""The Unicode form in which an extraction reads text: decided by the tokenizers, recorded, kept by later commands."""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest

import featstore
from featstore import open_store
from featstore.errors import CorruptDataError, StoreStateError
from featstore.extraction import job as jobs
from featstore.extraction.recorded import read_recorded
from tests.support.commands import call

#: Decomposed, with Windows line ends.
TEXTS = [unicodedata.normalize("NFD", f"Au café n° {i}, l’été, où l’élève lit.\r\nNăm {i} năm.\r\n") for i in range(8)]
COMPOSED = [unicodedata.normalize("NFC", text) for text in TEXTS]


@pytest.fixture(scope="module")
def composing(tiny_llama, tmp_path_factory) -> Path:
    """The tiny Llama with a tokenizer that composes, as Qwen's does."""
    directory = tmp_path_factory.mktemp("composing") / "model"
    shutil.copytree(tiny_llama, directory)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"normalizer": {"type": "NFC"}}))
    return directory


@pytest.fixture
def corpus(tmp_path) -> str:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    return f"text:{tmp_path}/*.txt"


def extracted(store: Path, **given) -> featstore.Store:
    given = {"layers": [0], "window_bytes": 256, "device": "cpu", "quiet": True} | given
    return featstore.extract(store=store, **given)


def read(store: featstore.Store) -> tuple[str, list[str], list[bytes]]:
    """The form that a store names, its documents' texts and their ids."""
    held = store.corpus

    texts = [held.text[a:b].tobytes().decode() for a, b in pairwise(held.document_start)]
    return store.attributes["corpus"]["normalise"], texts, [row.tobytes() for row in held.document_id]


def digests(texts: list[str]) -> list[bytes]:
    return [hashlib.sha256(text.encode()).digest() for text in texts]


def test_one_tokenizer_that_composes_decides_for_all(tiny_mistral, composing, corpus, tmp_path):
    store = extracted(tmp_path / "s.zarr", models={"m": tiny_mistral, "c": composing}, dataset=corpus)
    assert read(store) == ("nfc", COMPOSED, digests(COMPOSED))
    assert len(store.pairs("m", "c")) > 50


def test_where_none_composes_the_text_stays_as_it_is(tiny_llama, corpus, tmp_path):
    store = extracted(tmp_path / "s.zarr", models={"l": tiny_llama}, dataset=corpus)
    assert read(store) == ("none", TEXTS, digests(TEXTS))
    assert store.corpus.text.tobytes().count(b"\r\n") == 2 * len(TEXTS)


@pytest.mark.parametrize(("form", "expected"), [("nfc", COMPOSED), ("none", TEXTS)])
def test_what_is_typed_decides_and_is_kept(capsys, tiny_llama, corpus, tmp_path, form, expected):
    path = tmp_path / "s.zarr"
    words = ("extract", "--model", f"l={tiny_llama}", "--layers", "0", "--dataset", corpus, "--normalise", form)
    words = (*words, "--store", path, "--device", "cpu", "--max-documents", "6")
    assert call(capsys, "featstore", *words, "--dry-run", "--json").json["normalise"] == form
    assert call(capsys, "featstore", *words).code == 0
    assert read(open_store(path)) == (form, expected[:6], digests(expected[:6]))
    # More documents, without naming the form again, naming it, and leaving it to the tokenizers.
    assert read(extracted(path, max_documents=7, layers=None, window_bytes=None))[1] == expected[:7]
    store = extracted(path, max_documents=8, normalise=form, layers=None, window_bytes=None)
    assert read(store) == (form, expected, digests(expected))
    assert read(extracted(path, normalise="auto", layers=[0, 2], window_bytes=None))[0] == form
    assert open_store(path).model("l").layers == (0, 2)
    info = call(capsys, "featstore", "info", path, "--no-spectrum")
    assert ("in Unicode form NFC" in info.out) == (form == "nfc")
    other = {"nfc": "none", "none": "nfc"}[form]
    with pytest.raises(StoreStateError, match=f"read with --normalise {form}, not {other}; leave --normalise out"):
        extracted(path, normalise=other)


def test_a_model_that_joins_reads_the_text_that_is_there(tiny_llama, composing, tmp_path, sample_texts):
    path, data = tmp_path / "s.zarr", tmp_path / "x.jsonl"
    data.write_text("".join(json.dumps({"text": text[:300]}) + "\n" for text in sample_texts[:4]))
    extracted(path, models={"l": tiny_llama}, dataset=f"jsonl:{data}")
    store = extracted(path, models={"c": composing}, window_bytes=None)
    assert store.models == ("l", "c")
    assert store.attributes["corpus"]["normalise"] == "none"


def test_an_older_store_has_its_text_as_it_was(monkeypatch, tiny_llama, tiny_mistral, corpus, tmp_path):
    path, text_settings = tmp_path / "s.zarr", jobs._text_settings
    with monkeypatch.context() as patch:
        patch.setattr(
            jobs, "_text_settings", lambda *args: {k: v for k, v in text_settings(*args).items() if k != "normalise"}
        )
        extracted(path, models={"l": tiny_llama}, dataset=corpus, max_documents=6)
    assert "normalise" not in open_store(path).attributes["corpus"]
    assert read_recorded(path).normalise == "none"
    with pytest.raises(StoreStateError, match="read with --normalise none, not nfc"):
        extracted(path, normalise="nfc")
    assert extracted(path, models={"m": tiny_mistral}, window_bytes=None).models == ("l", "m")
    assert len(extracted(path, max_documents=8, layers=None, window_bytes=None).corpus.document_id) == 8


def test_a_form_that_is_none_is_refused(capsys, tiny_llama, corpus, tmp_path):
    store = tmp_path / "s.zarr"
    words = ("extract", "--model", f"l={tiny_llama}", "--dataset", corpus, "--store", store, "--normalise", "nfkc")
    assert call(capsys, "featstore", *words).refusal == "featstore: --normalise 'nfkc': choose auto, none or nfc\n"
    extracted(store, models={"l": tiny_llama}, dataset=corpus)
    assert "--normalise 'nfkc': choose" in call(capsys, "featstore", *words).refusal


def test_a_record_that_is_damaged_is_named(monkeypatch, tiny_llama, corpus, tmp_path):
    text_settings = jobs._text_settings
    monkeypatch.setattr(jobs, "_text_settings", lambda *args: text_settings(*args) | {"normalise": "nfd"})
    words = "/corpus/normalise is 'nfd', expected one of 'none', 'nfc'"
    # Whoever wrote it is told when the finished store is opened, and whoever goes on with it again.
    with pytest.raises(CorruptDataError, match=words):
        extracted(tmp_path / "s.zarr", models={"l": tiny_llama}, dataset=corpus)
    with pytest.raises(CorruptDataError, match=words):
        extracted(tmp_path / "s.zarr")
