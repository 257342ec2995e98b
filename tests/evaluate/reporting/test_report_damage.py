"""The report of what is not whole: runs cut short, empty directories, files that are not JSON, lost values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from evaluate.reporting import build_report
from evaluate.reporting.reading.inputs import read_runs
from featstore.errors import AdapterError, CorruptDataError
from tests.evaluate.reporting.test_report_evidence import whole, windows
from tests.support import report_fixtures as made
from tests.support.report_fixtures import page, run_of
from tests.support.tiers import tiered


def test_a_run_that_was_cut_short_has_its_curves_and_a_note(tmp_path: Path) -> None:
    begun = made.write(tmp_path / "begun", {"eval_epoch_1.json": made.epoch(1)}, made.log()[:2])
    (begun / "run.yaml").write_text("type: lora\n")
    found = page(begun)
    assert "This run is not finished: there is no map to judge yet." in found.text
    assert "unfinished-run there is no map yet; go on with: align train --resume --out begun" in found.text
    assert "validation, epoch 2: 0.31" in found.titles
    whole_run = run_of(tmp_path)
    both = page(whole_run, begun)
    assert "beats every control" in both.text
    assert "unfinished-run" in both.text
    only = tmp_path / "only"
    only.mkdir()
    (only / "run.yaml").write_text("type: lora\n")
    assert "not finished" in page(only).text


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AdapterError, match="empty holds none of") as caught:
        build_report([run_of(tmp_path), empty])
    assert "\n" not in str(caught.value)
    torn = made.write(tmp_path / "torn", {"metrics.json": made.metrics()})
    (torn / "communicate.json").write_text("<html>not JSON</html>")
    with pytest.raises(CorruptDataError, match=r"communicate\.json") as broken:
        build_report([torn])
    assert "\n" not in str(broken.value)


@pytest.mark.parametrize("name", ["gains", "conditions", "pairs", "warnings", "reasons", "n", "chance", "task"])
@pytest.mark.parametrize("value", tiered([None, {"aligned smol:15->twin:15": None}], [[], {}, "x", 3]))
def test_answers_with_anything_missing_still_give_a_page(tmp_path: Path, name: str, value: Any) -> None:
    files = windows(4, 0.3)
    files["communicate.json"]["tasks"]["countries"][name] = value
    page(made.write(tmp_path / "m4", files), run_of(tmp_path, "whole", communicate=whole()))


def test_a_value_that_is_not_of_its_type_is_left_out_and_said(tmp_path: Path) -> None:
    scored = made.metrics()
    entry = scored["pairs"][made.PAIR]
    entry["test"]["retrieval_top1"] = "0.9023"
    entry["baselines"]["identity"] = [1]
    found = page(run_of(tmp_path, metrics=scored))
    [note] = re.findall(r"damaged-file (left out of metrics\.json: .*?expected an object)", found.text)
    assert f"/pairs/{made.PAIR}/baselines/identity is a list of 1, expected an object" in note
    assert f"/pairs/{made.PAIR}/test/retrieval_top1 is '0.9023', expected a number" in note
    places = {attrs["data-from"] for attrs, _ in found.figures}
    assert f"run/metrics.json#/pairs/{made.PAIR}/test/r2" in places
    assert f"run/metrics.json#/pairs/{made.PAIR}/test/retrieval_top1" not in places
    assert "damaged-file" not in page(run_of(tmp_path, "whole")).text


def test_a_name_that_no_file_has_is_a_mistake_of_ours(tmp_path: Path) -> None:
    [run] = read_runs([run_of(tmp_path)])
    metrics = run.file("metrics.json").get("pairs", made.PAIR)
    assert metrics.get("rate", "latents").value is None
    assert metrics.get("baselines", "no such map", "r2").value is None
    with pytest.raises(AttributeError, match="Scores declares no member 'retrieval_top2'"):
        metrics.get("test", "retrieval_top2")
    assert metrics.get("test").maybe("retrieval_top2").value is None
