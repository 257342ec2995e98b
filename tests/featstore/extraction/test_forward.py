"""Windows that share a pass have the states that they have alone, whatever the model makes of company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore import open_store
from featstore.extraction.forward import BatchReader
from featstore.extraction.job import prepare
from featstore.extraction.run import extract
from featstore.extraction.settings import Settings
from featstore.models.layout import Batching
from featstore.models.probe.prove import prove
from featstore.models.residual import ResidualStream, capture
from featstore.models.stack import ordinary_ids, residual_stream
from featstore.text.plan import Plan, PlannedCorpus, PlannedModel
from tests.support.architectures.building import save
from tests.support.tiny_models import small
from tests.support.truth import expected_rows

#: Tokens of windows: no two of one length, on both sides of the length at which LongRoPE changes (16).
LENGTHS = (7, 30, 1, 16, 12, 17, 3)
BATCHING = {
    "llama@bidirectional": Batching("equal"),
    "gemma3_text@bidirectional": Batching("equal"),
    "phi3@longrope": Batching("padded", 16),
}


def planned(stream: ResidualStream, lengths: tuple[int, ...] = LENGTHS) -> Plan:
    """Windows of ordinary tokens."""
    starts = np.cumsum([0, *lengths]).astype(np.int64)
    ids = ordinary_ids(stream.model, int(starts[-1]), seed=7).numpy().astype(np.int32)
    tokens = PlannedModel(
        starts,
        ids,
        np.zeros(len(ids), np.int32),
        np.zeros(len(ids), bool),
        np.ones(len(ids), bool),
        np.zeros(len(ids), np.uint8),
    )
    nothing = np.zeros(0, np.int64)
    corpus = PlannedCorpus(nothing.astype(np.uint8), nothing, nothing.astype(np.uint8), nothing.astype(np.uint8),
                           nothing.astype(np.int32), nothing, nothing)  # fmt: skip
    return Plan(corpus, {"m": tokens}, 64, 1024, 512, {})


def window(reader: BatchReader, number: int) -> torch.Tensor:
    """Token ids of one window, as a batch."""
    start, end = reader.planned.row_start[number : number + 2]
    return torch.from_numpy(reader.planned.ids[start:end].astype(np.int64))[None]


def layers(stream: ResidualStream) -> range:
    return range(stream.depth + 1)


@pytest.mark.parametrize("name", BATCHING)
def test_each_window_has_the_states_that_it_has_alone(name: str) -> None:
    stream = prove(small(name)).stream
    assert stream.batching == BATCHING[name]
    reader = BatchReader(stream, planned(stream), "m")
    # In another order than the plan's, with the longest in the middle.
    batch = np.array([4, 1, 0, 6, 3, 5, 2])
    together = reader.states(batch, layers(stream))
    rows = 0
    for number in batch:
        length = LENGTHS[number]
        alone = capture(stream, window(reader, number), layers(stream))
        for layer, states in together.items():
            found = states[rows : rows + length]
            if reader._stream.batching.kind == "equal":
                # Windows of other lengths are in other passes: the very same pass, so the same bits.
                assert torch.equal(found, alone[layer][0]), (number, layer)
            torch.testing.assert_close(found, alone[layer][0], rtol=1e-4, atol=1e-5)
        rows += length
    assert rows == sum(LENGTHS)
    # And that is not so where they are all padded.
    loose = BatchReader(replace(stream, batching=Batching()), reader.plan, "m").states(batch, layers(stream))
    moved = (loose[stream.depth] - together[stream.depth]).norm(dim=1) / together[stream.depth].norm(dim=1)
    assert moved.max() > 0.1


@pytest.mark.parametrize("batching", [Batching(), Batching("equal"), Batching("single"), Batching("padded", 16)])
def test_rows_leave_window_by_window_however_they_came(batching: Batching) -> None:
    # Layer 0 of a Llama is the token's own vector: every row says which token it is.
    stream = replace(residual_stream(small("llama")), batching=batching)
    lengths = (7, 30, 7, 16, 30, 17, 7)
    reader = BatchReader(stream, planned(stream, lengths), "m")
    for batch in (np.arange(7), np.array([5, 0, 3]), np.array([1]), np.array([6, 2, 0, 4, 1])):
        found = reader.states(batch, [0, 2])
        ids = torch.cat([window(reader, number)[0] for number in batch])
        assert torch.equal(found[0], small("llama").get_input_embeddings()(ids))
        assert found[2].shape == (len(ids), 64) == (reader.tokens_in(batch), 64)
        alone = [capture(stream, window(reader, number), [2])[2][0] for number in batch]
        torch.testing.assert_close(found[2], torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_windows_that_must_be_alone_are() -> None:
    stream = replace(residual_stream(small("llama")), batching=Batching("single"))
    reader = BatchReader(stream, planned(stream, (5, 5, 9)), "m")
    shapes: list[tuple[int, ...]] = []
    handle = stream.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = reader.states(np.arange(3), [1])
    handle.remove()
    assert shapes == [(1, 5), (1, 5), (1, 9)]
    for number, part in enumerate(found[1].split([5, 5, 9])):
        assert torch.equal(part, capture(stream, window(reader, number), [1])[1][0])


@pytest.mark.parametrize("name", ["deepseek_v4", "gemma3n_text", "qwen4_exp_text", "gpt2"])
def test_rows_of_several_streams_are_those_of_a_plain_hook(name: str) -> None:
    stream = prove(small(name)).stream
    reader = BatchReader(stream, planned(stream), "m")
    for number in (1, 4, 2):
        wanted = expected_rows(stream.model, name, window(reader, number))
        found = reader.states(np.array([number]), layers(stream))
        for layer in layers(stream):
            assert torch.equal(found[layer], wanted[layer][0]), (number, layer)
    together = reader.states(np.arange(len(LENGTHS)), [2])[2]
    assert together.shape == (sum(LENGTHS), stream.width)
    parts = [expected_rows(stream.model, name, window(reader, number))[2][0] for number in range(len(LENGTHS))]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-3, atol=1e-3)


# A whole extraction.


@pytest.fixture(scope="module")
def tokenizer_directory(byte_level_tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer.save_pretrained(directory)
    return directory


def documents(directory: Path, *, long: bool) -> str:
    directory.mkdir()
    texts = ["Short one here.\n", "Another small text, with nine words or so.\n", "Fine.\n"]
    if long:
        texts.append("The river runs past the hills and the old mill, and people walk along it in the evening. " * 4)
    for number, text in enumerate(texts):
        (directory / f"{number}.txt").write_text(text, encoding="utf-8")
    return f"text:{directory}/*.txt"


def rows_by_document(path: Path, layer: int) -> dict[bytes, np.ndarray]:
    store = open_store(path)
    document = store.corpus.window_document[store.tokens("m").window]
    rows = np.asarray(store.rows("m", layer)[:])
    found = {}
    for number in np.unique(document):
        [first, *_] = np.flatnonzero(store.corpus.window_document == number)
        found[store.corpus.window_text(int(first)).encode()] = rows[document == number]
    return found


@pytest.mark.parametrize("name", ["llama@bidirectional", "phi3@longrope"])
def test_a_document_has_its_states_whatever_else_is_in_the_corpus(
    name: str, tokenizer_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    model = save(name, tmp_path / "model", tokenizer_directory)
    stores = []
    for long in (False, True):
        settings = Settings(
            model=(f"m={model}",),
            layers=("2,4",),
            dataset=documents(tmp_path / f"texts-{long}", long=long),
            store=tmp_path / f"{long}.zarr",
            max_tokens=None,
            form="float32",
            device="cpu",
        )
        extract(prepare(settings, quiet=True), quiet=True)
        stores.append(rows_by_document(settings.store, 4))
    alone, beside = stores
    assert len(alone) == 3
    assert len(beside) == 4
    for text, rows in alone.items():
        np.testing.assert_allclose(beside[text], rows, rtol=1e-4, atol=1e-4)
