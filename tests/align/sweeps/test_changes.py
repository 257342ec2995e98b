"""What changed between two runs, and the page about runs: the numbers of the runs' own files, and nothing lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import align
from align.sweeps.changes import changes, describe_changes
from align.sweeps.compare import compare_runs
from align.sweeps.page import render, write
from align.sweeps.table import describe
from tests.align.sweeps.test_compare import HARD, RNG, SST, by_hand, write_run
from tests.support.browser import Browser, Tab, browser
from tests.support.commands import call
from tests.support.drawings import drawing, marks
from tests.support.report_fixtures import Page

__all__ = ["browser"]

PAIRS = ("a:1->b:1", "a:2->b:2", "a:3->b:3")
BETTER = HARD * SST - 0.05 * SST * RNG.uniform(0.9, 1.1, len(SST))


def joined(out: Path, parts: dict[str, Path]) -> Path:
    """One run of several written ones, each with a layer pair of its own."""
    out.mkdir()
    whole: dict[str, Any] = {}
    for pair, part in parts.items():
        for name in ("metrics", "adapter", "documents"):
            content = json.loads((part / f"{name}.json").read_text())
            own = whole.setdefault(name, {**content, "pairs": [] if name == "adapter" else {}})
            if name == "adapter":
                [entry] = content["pairs"]
                layer = int(pair.rpartition(":")[2])
                sides = {side: {**entry[side], "layer": layer} for side in ("source", "target")}
                own["pairs"].append({**entry, **sides, "key": pair})
            else:
                own["pairs"][pair] = content["pairs"]["a:1->b:1"]
    for name, content in whole.items():
        (out / f"{name}.json").write_text(json.dumps(content))
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs: a pair that got worse, one that stayed, and one of its own each."""
    root = tmp_path_factory.mktemp("two")
    good = write_run(root / "good", BETTER, closed=HARD * SST)
    plain = write_run(root / "plain", HARD * SST)
    first = joined(root / "first", {PAIRS[0]: good, PAIRS[1]: plain, "a:4->b:4": plain})
    second = joined(root / "second", {PAIRS[0]: plain, PAIRS[1]: plain, "a:5->b:5": good})
    return first, second


def r2(sse: Any) -> float:
    return 1 - float(np.sum(sse) / np.sum(SST))


def test_maps_of_both_have_their_difference_and_its_interval(two: tuple[Path, Path]) -> None:
    found = changes(*two)
    assert [block["pair"] for block in found["both"]] == [PAIRS[0], PAIRS[1]]
    lost, same = found["both"]
    assert lost["r2"] == pytest.approx([r2(BETTER), r2(HARD * SST)])
    assert lost["difference"] == pytest.approx(r2(HARD * SST) - r2(BETTER))
    assert lost["ci95"] == pytest.approx(by_hand(HARD * SST, BETTER))
    assert (lost["verdict"], same["verdict"]) == ("worse", "no clear difference")
    assert same["difference"] == 0
    assert [row["pair"] for row in found["only_first"]] == ["a:4->b:4"]
    assert [row["pair"] for row in found["only_second"]] == ["a:5->b:5"]
    assert found["only_second"][0]["r2"] == pytest.approx(r2(BETTER))
    turned = changes(*two[::-1])
    assert turned["both"][-1]["difference"] == pytest.approx(-lost["difference"])
    assert turned["both"][-1]["verdict"] == "better"


def test_the_record_has_the_same_figures(two: tuple[Path, Path]) -> None:
    found = align.changes(*two)
    lost, same = found.both
    low, high = by_hand(HARD * SST, BETTER)
    rows = found.to_pandas()
    assert rows.pair.tolist() == [lost.pair, same.pair]
    assert rows[["low", "difference", "high"]].iloc[0].tolist() == pytest.approx([low, lost.difference, high])
    assert rows.verdict.tolist() == ["worse", "no clear difference"]
    assert repr(found).endswith("second': 2 layer pairs in both, 1 worse, 1 no clear difference>")
    [bar, _] = found.plot().axes[0].containers
    [segment] = bar.lines[2][0].get_segments()
    assert segment[:, 0].tolist() == pytest.approx([low, high])


def test_layer_pairs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", HARD * SST)
    keys = [f"a:{layer}->b:{layer}" for layer in (10, 2, 1)]
    runs = [joined(tmp_path / name, dict.fromkeys(keys, plain)) for name in ("one", "other")]
    assert [row["pair"] for row in compare_runs(runs)["rows"][::2]] == keys[::-1]
    assert [block["pair"] for block in changes(*runs)["both"]] == keys[::-1], "equal differences, so by layer"
    assert [row["pair"] for row in changes(runs[0], plain)["only_first"]] == ["a:2->b:2", "a:10->b:10"]


def test_other_rows_are_not_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", HARD * SST, fingerprint="0" * 64)
    [block] = changes(two[0], other)["both"]
    assert block["difference"] is block["ci95"] is None
    assert block["verdict"] == "unknown"
    assert block["reason"] == "the two runs were scored on different sets of rows"
    assert f"difference -: {block['reason']}" in describe_changes(changes(two[0], other))


def test_the_command(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    shown = call(capsys, "align", "compare", *two, "--changes", "--json", "--page", page).json
    assert shown == json.loads(json.dumps(changes(*two)))
    assert page.read_text() == render(compare_runs(list(two)), changes(*two))
    text = call(capsys, "align", "compare", *two, "--changes").out
    assert text.startswith("from first to second: 2 layer pairs in both")
    assert "only in second:\n  a:5->b:5, affine, R2" in text
    assert "--changes is about two runs, not 1" in call(capsys, "align", "compare", two[0], "--changes").refusal
    plain, whole = (call(capsys, "align", "compare", *two, *more).out for more in ((), ("--controls",)))
    assert "shuffled" not in plain
    assert plain == describe(compare_runs(list(two))) + "\n"
    assert whole == describe(compare_runs(list(two)), controls=True) + "\n"


def test_the_page_shows_the_numbers_of_the_runs(two: tuple[Path, Path]) -> None:
    board, changed = compare_runs(list(two)), changes(*two)
    found = Page(render(board, changed))
    found.check()
    drawn = drawing(found.html, "Difference of R², second minus first")
    assert [value for _, _, value in marks(drawn)] == pytest.approx([b["difference"] for b in changed["both"]])
    ends = [line[0][1:3] for _, line, *_ in drawn["lines"]]
    assert ends == [pytest.approx(block["ci95"]) if block["ci95"] else [None, None] for block in changed["both"]]
    scores = drawing(found.html, "Held-out R² of every map")
    assert [value for _, _, value in marks(scores)] == pytest.approx([row["r2"] for row in board["rows"]])
    kinds = [attrs["class"] for tag, attrs in found.tags if tag == "tr" and attrs.get("class") in ("map", "control")]
    assert kinds.count("map") == len(board["rows"]) == 6
    controls = [value for row in board["rows"] for name, value in row["baselines"].items() if name != "closed_form"]
    assert kinds.count("control") == sum(value is not None for value in controls)


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    with browser.tab() as tab:
        yield tab


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(tab: Tab, two: tuple[Path, Path], tmp_path: Path, dark: bool) -> None:
    write(tmp_path / "page.html", compare_runs(list(two)), changes(*two))
    tab.size(375, 800, phone=True)
    tab.media(dark=dark)
    tab.open(tmp_path / "page.html")
    assert tab.complaints == []
    assert tab.requests == [(tmp_path / "page.html").resolve().as_uri()]
    assert tab.overflow() <= 0
    rows = "document.querySelectorAll('#board tbody tr').length"
    assert tab.run(rows) == 6
    tab.choose("#board-controls .filters select", "4")
    assert tab.run(rows) == 1
    tab.choose("#board-controls .filters select", "")
    tab.run("document.getElementById('beside').click()")
    tab.settle()
    assert tab.run(rows) > 6
    tab.run("document.querySelector('#changes [tabindex=\"0\"].above, #changes .points [tabindex]').focus()")
    tab.settle()
    assert tab.text("#readout").startswith("\u2212")
