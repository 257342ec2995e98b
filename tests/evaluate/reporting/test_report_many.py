"""Reports of very many layer pairs: small enough to open, and nothing of them lost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evaluate.reporting import page
from evaluate.reporting.page import build_report, write_report
from evaluate.reporting.reading.inputs import Node, read_runs
from evaluate.reporting.reading.narrowed import narrowed
from tests.support.many_pairs import write_run
from tests.support.report_fixtures import Page

#: What 10,000 layer pairs may take.
LARGEST = 20_000_000
#: Maps that are shown in full.
IN_FULL = page._BEST + page._WORST


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that shows few maps in full, as a large one does."""
    monkeypatch.setattr(page, "_BEST", 6)
    monkeypatch.setattr(page, "_WORST", 2)


def table_of(text: str) -> dict[str, Any]:
    """The data block of all maps."""
    found = re.search(r'<script type="application/json" id="every-map">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    table = json.loads(found[1])
    assert isinstance(table, dict)
    return table


def cells(table: dict[str, Any]) -> list[list[Any]]:
    numbers = [number for _, number in table["columns"]]
    return [
        [value if number else table["words"][value] for value, number in zip(row, numbers, strict=True)]
        for row in table["rows"]
    ]


def test_a_large_report_grows_by_its_table_alone(tmp_path: Path, few: None) -> None:
    sizes = {}
    for pairs in (200, 800):
        text = build_report([write_run(tmp_path / str(pairs), pairs, stitched=True)])
        sizes[pairs] = len(text.encode())
        assert len(table_of(text)["rows"]) == pairs
        # In full are eight of them, whatever there are.
        assert text.count('class="stitch"') == 8
        assert text.count('<tr class="map"') == 8
    each = (sizes[800] - sizes[200]) / 600
    assert each < 200
    # Eight maps are shown in full here, two hundred by a page that nobody patched.
    assert 10_000 * each + (sizes[200] - 200 * each) / 8 * IN_FULL < LARGEST


def test_work_grows_as_the_layer_pairs_do(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    get = Node.get
    monkeypatch.setattr(Node, "get", lambda node, *keys: (steps.append(1), get(node, *keys))[1])
    looks = {}
    for pairs in (100, 300):
        run = write_run(tmp_path / str(pairs), pairs, stitched=True)
        keys = json.loads((run / "metrics.json").read_text())["pairs"]
        lines = [{"event": "stop", "pair": key, "best_epoch": 3} for key in keys]
        (run / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        steps.clear()
        build_report([run])
        looks[pairs] = len(steps)
    assert looks[300] < 3.3 * looks[100]


def test_nothing_of_a_large_report_is_lost(tmp_path: Path, few: None) -> None:
    run = write_run(tmp_path / "run", 60, stitched=True)
    text = build_report([run])
    table = table_of(text)
    metrics = json.loads((run / "metrics.json").read_text())["pairs"]
    rows = cells(table)
    titles = ["run", "layers", "type", "direction", "layer", "shown to do", "val R²", "R²"]
    assert [title for title, _ in table["columns"]][:8] == titles
    assert {row[1].replace(" → ", "->") for row in rows} == metrics.keys()
    for row in rows:
        pair = metrics[row[1].replace(" → ", "->")]
        assert row[0] == "run"
        assert row[2:5] == ["Procrustes", "smol → twin", row[1].split(" ")[0].removeprefix("smol:")]
        assert row[6:11] == [
            round(value, 4)
            for value in (pair["val"]["r2"], pair["test"]["r2"], *pair["test"]["r2_ci95"], pair["test"]["partial_r2"])
        ]
    # In the order of validation; in full are the best and the worst of them.
    validated = [row[6] for row in rows]
    assert validated == sorted(validated, reverse=True)
    titles = re.findall(r'<details class="stitch".*?<h3>(.*?) <span', text, re.DOTALL)
    shown = {row[1] for row in (*rows[:6], *rows[-2:])}
    assert {title.removeprefix("Procrustes, ") for title in titles} == shown
    assert "60 maps are too many for one page" in text
    # The headline and the warnings are of all maps, though no list names them all.
    assert "60 times" in text
    assert "10 more" in text
    judged = write_report([run], tmp_path / "report.html")
    assert judged["maps"] == 60
    Page(text).check()


def test_a_report_of_few_maps_has_no_such_table(tmp_path: Path) -> None:
    text = build_report([write_run(tmp_path / "run", 20, stitched=True)])
    assert 'id="every-map"' not in text
    assert text.count('class="stitch"') == 20


def test_words_do_not_end_the_data_block(tmp_path: Path, few: None) -> None:
    text = build_report([write_run(tmp_path / "<script><b>x", 20)])
    assert cells(table_of(text))[0][0] == "<script><b>x"
    assert "<script><b>" not in text
    Page(text).check()


def test_a_narrowed_run_keeps_what_is_of_no_pair(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20, stitched=True)
    (run / "log.jsonl").write_text(
        '{"event": "stop", "pair": "smol:3->twin:0", "best_epoch": 0}\n'
        '{"event": "stop", "pair": "smol:4->twin:0", "best_epoch": 0}\n{"event": "begin"}\n'
    )
    [whole] = read_runs([run])
    [one] = narrowed([whole], {"run": ["smol:3->twin:0"]})
    assert [pair.key for pair in one.pairs] == ["smol:3->twin:0"]
    assert [event.get("event").text for event in one.log] == ["stop", "begin"]
    place = ("pairs", "smol:3->twin:0", "test", "r2")
    assert one.file("metrics.json").get(*place) == whole.file("metrics.json").get(*place)
    assert one.file("stitch.json").get("split") == whole.file("stitch.json").get("split")
    assert one.sources == whole.sources
    assert narrowed([whole], {})[0].pairs == []
