"""The report of what is not whole: runs cut short, empty directories, files that are not JSON, lost values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evaluate.reporting import build_report
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
    assert "unfinished run there is no map yet; go on with: align train --resume --out begun" in found.text
    assert "validation, epoch 2: 0.31" in found.titles
    whole_run = run_of(tmp_path)
    both = page(whole_run, begun)
    assert "beats every control" in both.text
    assert "unfinished run" in both.text
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
