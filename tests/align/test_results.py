"""Results of `align` as records: real files come back byte for byte, and every member of them is declared."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from align.metrics import KEYS
from align.results import (
    Documents,
    EpochRecord,
    Metrics,
    Scores,
    Similarity,
    SimilarityDocuments,
    epoch_files,
    kind_of,
    read_documents,
    read_epoch,
    read_epochs,
    read_metrics,
    read_similarity,
    write_metrics,
)
from featstore.errors import AdapterError, CorruptDataError
from featstore.runtime.provenance import json_text
from tests.support.commands import call
from tests.support.planted import Planted, plant, rotation, spectrum_rows, trained
from tests.support.record_walk import check_file, undeclared
from tests.support.similarity_fixture import similarity_result


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    x = {k: spectrum_rows(1500, 16, k) for k in (1, 2)}
    y = {k: 0.5 * x[k] @ rotation(16, k) for k in (1, 2)}
    # Four test documents: fewer than three have no interval.
    return plant(tmp_path_factory.mktemp("results") / "s.zarr", x, y, documents=40)


@pytest.fixture(scope="module")
def runs(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    trained(planted, base / "procrustes", "procrustes")
    trained(planted, base / "auto", "affine", layer_map="auto")
    trained(planted, base / "lora", "lora", layers="1", rank=2, epochs=2, loss="mse=1,infonce=0.1")
    trained(planted, base / "compress", "compress", layers="1", latents=4, latent_dim=8, epochs=1)
    return {path.name: path for path in base.iterdir()}


@pytest.mark.parametrize("run", ["procrustes", "auto", "lora", "compress"])
def test_the_files_of_a_run_come_back_byte_for_byte(runs: dict[str, Path], run: str, tmp_path: Path) -> None:
    names = {path.name for path in runs[run].glob("*.json")} - {"adapter.json"}
    assert {"metrics.json", "documents.json", "eval_epoch_0.json"} <= names
    for name in names:
        kind = kind_of(name)
        assert kind is not None, name
        check_file(kind, runs[run] / name, tmp_path)


def test_cka_comes_back_byte_for_byte(planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in {
        "all": ("--measures", "all", "--draws", "5", "--max-rows", "200"),
        "rbf": ("--kernel", "rbf", "--max-rows", "200"),
        "minibatch": ("--estimator", "minibatch", "--keep-sinks"),
    }.items():
        shown = call(capsys, "align", "cka", "--store", planted.path, "--out", tmp_path / name, *options, "--json").json
        check_file(Similarity, tmp_path / name / "cka.json", tmp_path)
        if name != "minibatch":
            check_file(SimilarityDocuments, tmp_path / name / "cka_documents.json", tmp_path)
        similarity = read_similarity(tmp_path / name)
        assert similarity.layers == {"a": (1, 2), "b": (1, 2)}
        assert [list(row) for row in similarity.cross] == shown["cross"]


def test_a_record_says_what_its_file_says(runs: dict[str, Path]) -> None:
    content = json.loads((runs["procrustes"] / "metrics.json").read_text())
    metrics = read_metrics(runs["procrustes"])
    assert metrics == read_metrics(runs["procrustes"] / "metrics.json")
    assert metrics.type == "procrustes"
    assert list(metrics.pairs) == list(content["pairs"])
    for key, pair in metrics.pairs.items():
        own = content["pairs"][key]
        assert pair.test.r2 == own["test"]["r2"]
        assert pair.test.r2_ci95 == tuple(own["test"]["r2_ci95"])
        assert [finding.code for finding in pair.warnings] == [w["code"] for w in own["warnings"]]
        identity = pair.baselines["identity"]
        assert identity is not None
        assert identity.cosine == own["baselines"]["identity"]["cosine"]
        assert pair.baselines["closed_form"] is None


def test_every_figure_of_a_block_is_declared() -> None:
    assert [name for name in Scores.model_fields if name in KEYS] == list(KEYS)


def test_epochs_come_in_order(runs: dict[str, Path], tmp_path: Path) -> None:
    assert [epoch.epoch for epoch in read_epochs(runs["lora"])] == [0, 1, 2]
    assert read_epoch(runs["lora"], 2) == read_epochs(runs["lora"])[2]
    assert read_epochs(tmp_path) == ()
    for number in (10, 9, 0):
        (tmp_path / f"eval_epoch_{number}.json").write_text("{}")
    (tmp_path / "eval_epoch_x.json").write_text("{}")
    assert [number for number, _ in epoch_files(tmp_path)] == [0, 9, 10]


def test_tables(runs: dict[str, Path]) -> None:
    metrics = read_metrics(runs["procrustes"]).to_pandas()
    assert isinstance(metrics, pd.DataFrame)
    test = metrics[(metrics.split == "test") & (metrics["map"] == "procrustes")].set_index("pair")
    content = json.loads((runs["procrustes"] / "metrics.json").read_text())["pairs"]
    assert test.r2.to_dict() == {key: entry["test"]["r2"] for key, entry in content.items()}
    assert test.r2_low.to_dict() == {key: entry["test"]["r2_ci95"][0] for key, entry in content.items()}
    assert set(metrics.split) == {"train", "val", "test", "masked", "kept"}
    sums = read_documents(runs["procrustes"]).to_pandas()
    for key, rows in sums.groupby("pair"):
        assert 1 - rows.sse_map.sum() / rows.sst.sum() == pytest.approx(content[key]["test"]["r2"], abs=1e-9)
    epochs = pd.concat([epoch.to_pandas() for epoch in read_epochs(runs["lora"])])
    assert list(epochs.epoch) == [0, 1, 2]
    assert {"val_loss", "train_loss", "val_r2", "train_mse", "val_infonce"} <= set(epochs)
    similarity = Similarity.parse(similarity_result(3, 4))
    table = similarity.to_pandas()
    assert len(table) == 12
    assert {"cka", "documents_mean", "token_p_max", "unmasked", "cka_sample", "rsa", "svcca"} <= set(table)
    assert table.loc[5, "cka_sample"] == similarity.measures["cka"].cross[1][1]
    assert table.loc[5, "cka"] == similarity.cross[1][1]
    assert (table.loc[5, "first_layer"], table.loc[5, "second_layer"]) == (7, 7)


def test_many_layers_with_all_measures(tmp_path: Path) -> None:
    content = similarity_result(30, 40)
    similarity = Similarity.parse(content)
    assert json_text(similarity.content()) == json_text(content)
    assert list(undeclared(similarity)) == []
    assert similarity.measures["pwcca"].reverse[2][3] == content["measures"]["pwcca"]["reverse"][2][3]


def test_unknown_members_are_kept(runs: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads((runs["procrustes"] / "metrics.json").read_text())
    content["from_next_year"] = {"a": [1, None]}
    for pair in content["pairs"].values():
        pair["test"]["new_figure"] = 0.25
    (tmp_path / "metrics.json").write_text(json_text(content))
    metrics = read_metrics(tmp_path)
    assert write_metrics(tmp_path / "again", metrics).read_text() == json_text(content)
    assert next(iter(metrics.pairs.values())).test.member("new_figure") == 0.25


def test_early_versions_wrote_warnings_as_texts() -> None:
    metrics = Metrics.parse({"pairs": {"a:1->b:1": {"warnings": ["few rows"]}}})
    assert metrics.pairs["a:1->b:1"].warnings[0].message == "few rows"


@pytest.mark.parametrize(
    ("kind", "read", "name"),
    [
        (Metrics, read_metrics, "metrics.json"),
        (Documents, read_documents, "documents.json"),
        (EpochRecord, read_epoch, "eval_epoch_0.json"),
        (Similarity, read_similarity, "cka.json"),
    ],
)
def test_missing_and_damaged_files_are_one_line(tmp_path: Path, kind: type, read: object, name: str) -> None:
    assert callable(read)
    with pytest.raises(AdapterError, match=f"^no {name} in .*; make one with `align ") as missing:
        read(tmp_path)
    for text in ("", "{", "[]", "{}", '{"pairs": 3, "models": 4}', '{"type": "x", "epoch": "1"}', "[" * 10**5):
        (tmp_path / name).write_text(text)
        with pytest.raises(CorruptDataError, match=name) as damaged:
            read(tmp_path)
        assert "\n" not in str(missing.value) + str(damaged.value)
    assert kind_of(name) is kind
