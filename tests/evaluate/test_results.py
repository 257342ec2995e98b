"""Results of `evaluate` as records: real files come back byte for byte, and every member of them is declared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from align.runs.train import train
from align.settings import LoopSettings, Settings
from evaluate.results import (
    Communication,
    Generations,
    Stitched,
    StitchedDocuments,
    StitchedPair,
    kind_of,
    read_communication,
    read_generations,
    read_stitch,
    read_stitch_documents,
    write_communication,
)
from featstore.errors import AdapterError, CorruptDataError
from featstore.runtime.provenance import json_text
from tests.support import report_fixtures as made
from tests.support.commands import call
from tests.support.record_walk import check_file


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A map in both directions, and a compressed one, between two tiny models."""
    base = tmp_path_factory.mktemp("results")
    train(Settings(str(tiny_store), "affine", layers="2", both=True), base / "affine", quiet=True)
    loop = LoopSettings(latents=4, latent_dim=8, epochs=1)
    train(Settings(str(tiny_store), "compress", layers="2", loop=loop), base / "compress", quiet=True)
    return SimpleNamespace(store=tiny_store, base=base)


@pytest.mark.parametrize("name", ["affine", "compress"])
def test_stitched_losses_come_back_byte_for_byte(
    run: SimpleNamespace, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max-tokens", "400", "--source-alone") if name == "affine" else ("--max-tokens", "400")
    done = call(capsys, "evaluate", "stitch", "--store", run.store, "--adapter", run.base / name, *options, "--json")
    check_file(Stitched, run.base / name / "stitch.json", tmp_path)
    stitched = read_stitch(run.base / name)
    assert stitched == Stitched.parse(done.json)
    key, pair = next(iter(stitched.pairs.items()))
    assert pair.recovered.value == done.json["pairs"][key]["recovered"]["value"]
    assert (pair.rate is None) == (name == "affine")
    table = stitched.to_pandas()
    mapped = table[(table.pair == key) & (table.condition == "mapped")].iloc[0]
    own = done.json["pairs"][key]["conditions"]["mapped"]
    assert mapped.nats_per_token == own["nats_per_token"]
    # The tiny store has two test documents, of which there is no interval; columns without a value are left out.
    assert own["ci95"] is None
    assert not {"low", "high"} & set(table.columns)
    check_file(StitchedDocuments, run.base / name / "stitch_documents.json", tmp_path)
    sums = read_stitch_documents(run.base / name)
    assert sums.pairs[key].documents
    assert len(sums.to_pandas()) == sum(len(one.nats) * len(one.documents) for one in sums.pairs.values())
    assert "raw" not in set(table.condition)


def test_texts_come_back_byte_for_byte(
    run: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = run.base / "affine"
    done = call(capsys, "evaluate", "generate", "--adapter", adapter, "--max-new-tokens", "4", "--json").json
    check_file(Generations, adapter / "generations.json", tmp_path)
    texts = read_generations(adapter)
    assert texts == Generations.parse(done)
    table = texts.to_pandas()
    conditions = {"alone", "mapped", "self", "mean", "random_norm", "shuffled"}
    assert set(table.condition) == conditions
    assert len(table) == len(texts.entries) * 2 * len(conditions)
    row = table[(table.condition == "mapped") & (table.model == texts.entries[0].target)].iloc[0]
    assert row.text == texts.entries[0].source_to_target[row.pair]["mapped"]
    assert row.nats_per_token == texts.entries[0].likelihood.source_to_target[row.pair]["mapped"]


@pytest.mark.parametrize("name", ["affine", "compress"])
def test_answers_come_back_byte_for_byte(
    run: SimpleNamespace, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("--task", "lookup", "--task", "countries", "--examples", "4")
    done = call(capsys, "evaluate", "communicate", "--adapter", run.base / name, *tasks, "--json").json
    check_file(Communication, run.base / name / "communicate.json", tmp_path)
    answers = read_communication(run.base / name)
    assert answers == Communication.parse(done)
    table = answers.to_pandas()
    assert len(table) == sum(len(task.conditions) for task in answers.tasks.values())
    assert set(table.task) == set(done["tasks"])


def test_an_epoch_holds_a_stitched_pair() -> None:
    stitched = made.stitch()["pairs"][made.PAIR]
    assert StitchedPair.parse(stitched).content() == stitched


def test_unknown_members_are_kept(tmp_path: Path) -> None:
    content = made.communicated()
    content["tasks"]["countries"]["warnings"].pop()
    (tmp_path / "communicate.json").write_text(json_text(content))
    answers = read_communication(tmp_path)
    assert answers.tasks["countries"].conditions["text"].member("unknown") == {"more": 1}
    assert write_communication(tmp_path / "again", answers).read_text() == json_text(content)


@pytest.mark.parametrize(
    ("kind", "read", "name"),
    [
        (Stitched, read_stitch, "stitch.json"),
        (Generations, read_generations, "generations.json"),
        (Communication, read_communication, "communicate.json"),
    ],
)
def test_missing_and_damaged_files_are_one_line(tmp_path: Path, kind: type, read: object, name: str) -> None:
    assert callable(read)
    with pytest.raises(AdapterError, match=f"^no {name} in .*; make one with `evaluate ") as missing:
        read(tmp_path)
    for content in ("", "[]", "{}", json.dumps({"pairs": {"a": 1}, "tasks": {"a": 1}, "entries": {"a": 1}})):
        (tmp_path / name).write_text(content)
        with pytest.raises(CorruptDataError, match=name) as damaged:
            read(tmp_path)
        assert "\n" not in str(missing.value) + str(damaged.value)
    assert kind_of(name) is kind
