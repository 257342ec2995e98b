"""What no type can say of a result: members that do not fit each other are named, where a whole file is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.results import Documents, SimilarityDocuments, read_similarity
from align.runs.logged import read_log
from align.sweeps.recorded import read_sweep
from evaluate.results import StitchedDocuments
from featstore.errors import CorruptDataError, MemberError
from featstore.runtime.records import Record, read
from tests.support import report_fixtures as made

SUMS = {"documents": [0, 1], "n": [3, 4], "sst": [1.0, 2.0], "sse": {"map": [0.5, None]}}
NATS = {"documents": [0, 1], "tokens": [3, 4], "bytes": [9, 9], "nats": {"clean": [1.0, 2.0]},
        "kl": {"clean": [0, 0]}, "same": {"clean": [3, 4]}}  # fmt: skip


def of(kind: type[Record], tmp_path: Path, content: Any) -> str:
    """What is said of a file with this content."""
    path = tmp_path / kind.file
    path.write_text(json.dumps(content))
    with pytest.raises(MemberError) as caught:
        read(kind, path)
    assert str(caught.value).startswith(f"{path}: /")
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": [3]}, "/pairs/p/n is a list of 1, expected one of 2, the number of documents"),
        ({"sst": [1.0, 2.0, 3.0]}, "/pairs/p/sst is a list of 3, expected one of 2"),
        ({"sse": {"map": []}}, "/pairs/p/sse/map is a list of 0, expected one of 2"),
        ({"documents": [1, 1]}, "/pairs/p/documents is not ascending"),
        ({"sst": [-1.0, 2.0]}, "/pairs/p/sst/0 is -1.0, expected at least 0"),
        ({"n": [3, -4]}, "/pairs/p/n/1 is -4, expected at least 0"),
    ],
)
def test_sums_by_document_fit_their_documents(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    assert words in of(Documents, tmp_path, {"pairs": {"p": {**SUMS, **change}}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [3]}, "/pairs/p/tokens is a list of 1, expected one of 2"),
        ({"kl": {}}, "/pairs/p/kl has no 'clean', expected every condition of nats"),
        ({"same": {"clean": [1]}}, "/pairs/p/same/clean is a list of 1, expected one of 2"),
    ],
)
def test_stitched_sums_fit_their_documents(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    assert words in of(StitchedDocuments, tmp_path, {"pairs": {"p": {**NATS, **change}}})


def test_older_files_of_stitched_sums_have_a_table(tmp_path: Path) -> None:
    older = {"documents": [0, 1], "nats": {"clean": [1.0, 2.0]}}
    (tmp_path / StitchedDocuments.file).write_text(json.dumps({"pairs": {"p": older}}))
    table = read(StitchedDocuments, tmp_path).to_pandas()
    assert table["nats"].tolist() == [1.0, 2.0]


def test_values_without_a_document_fit_the_documents(tmp_path: Path) -> None:
    measures = {"rsa": {"values": {"a:0 b:0": [0.1]}}}
    found = of(
        SimilarityDocuments, tmp_path, {"models": ["a"], "documents": [0, 1], "rows": [3, 4], "measures": measures}
    )
    assert "/measures/rsa/values/a:0 b:0 is a list of 1, expected one of 2" in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cka: cka.update(models=[]), "/models is a list of 0, expected one of one model or two"),
        (lambda cka: cka["layers"].pop("twin"), "/layers has no 'twin', expected the layers of 'smol' and 'twin'"),
        (lambda cka: cka["cross"].pop(), "/cross is a matrix of another shape, expected 2 x 3 by the layers"),
        (lambda cka: cka["cross"][0].pop(), "/cross is a matrix of another shape, expected 2 x 3 by the layers"),
        (lambda cka: cka.update(cross=[]), "/cross is empty"),
        (lambda cka: cka["within"]["twin"].pop(), "/within/twin is a matrix of another shape, expected 3 x 3"),
        (lambda cka: cka["null"]["cross"].pop(), "/null/cross is a matrix of another shape, expected 2 x 3"),
        (lambda cka: cka["layers"].update(smol=[-1, 15]), "/layers/smol/0 is -1, expected at least 0"),
    ],
)
def test_matrices_fit_their_layers(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    content = made.cka()
    (tmp_path / "cka.json").write_text(json.dumps(content))
    assert len(read_similarity(tmp_path).to_pandas()) == 6
    change(content)
    (tmp_path / "cka.json").write_text(json.dumps(content))
    with pytest.raises(MemberError) as caught:
        read_similarity(tmp_path)
    assert words in str(caught.value)


def test_both_directions_of_a_measure_have_a_row_for_every_layer_of_the_first_model(tmp_path: Path) -> None:
    content = made.measured()
    content["measures"]["rsa"]["reverse"] = content["measures"]["rsa"]["cross"]
    (tmp_path / "cka.json").write_text(json.dumps(content))
    assert len(read_similarity(tmp_path).measures["rsa"].reverse) == 2
    content["measures"]["rsa"]["reverse"] = [[0.0] * 2] * 3
    (tmp_path / "cka.json").write_text(json.dumps(content))
    with pytest.raises(MemberError, match="/measures/rsa/reverse is a matrix of another shape, expected 2 x 3"):
        read_similarity(tmp_path)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ({"name": "x", "status": "fine"}, "/cells/0/status is 'fine', expected one of waiting, done, skipped, failed"),
        ({"name": "../x", "status": "done"}, "/cells/0/name is '../x', expected the name of a directory"),
        ({"name": "x", "status": "done", "seconds": -1}, "/cells/0/seconds is -1, expected at least 0"),
        ({"name": "x"}, "/cells/0 has no 'status'"),
    ],
)
def test_cells_of_a_sweep_are_cells(tmp_path: Path, cell: dict[str, Any], words: str) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(MemberError) as caught:
        read_sweep(tmp_path)
    assert words in str(caught.value)


def test_a_log_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = ['{"event": "epoch", "pair": "p", "epoch": 1, "val_loss": NaN, "lr": "x"}', "", '{"event": "st']
    path.write_text("\n".join(lines))
    events, torn, lost = read_log(path)
    assert [event.content() for event in events] == [{"event": "epoch", "pair": "p", "epoch": 1}]
    assert torn
    assert lost is not None
    assert lost.startswith(
        "log.jsonl, line 1: /val_loss is nan, expected a finite number; /lr is 'x', expected a number"
    )
    path.write_text("\n".join(["[" * 20_000, lines[0]]))
    with pytest.raises(CorruptDataError, match=r"log\.jsonl, line 1, is not valid JSON"):
        read_log(path)
