"""A leak stands beside every figure of its layer pair, and the page says what was verified on each model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from evaluate.injection.verified import side_channels
from tests.support import report_fixtures as made
from tests.support.report_fixtures import PAIR, page, write

MARK, MEANS = "leak 0.21", "later blocks also learn of the text past the stream"
LAYER = {"self_identical": True, "leak": 0.2134, "skips": True}
VERDICT: dict[str, Any] = {
    "stack": "model.layers",
    "blocks": 30,
    "width": 576,
    "streams": 1,
    "attention": "sdpa",
    "reading": {"batching": "equal", "padding": 0.5, "causal": True, "future": 0.0},
    "continuing": {"kind": "stepwise", "padded": False, "padding": 0.15},
    "layers": {"15": LAYER, "30": {**LAYER, "leak": 0.0}},
}


def files(leak: float | None = 0.2134) -> dict[str, Any]:
    """A run whose every file tells of a leak."""
    found = made.documents()
    warned = side_channels({PAIR: leak})
    found["stitch.json"]["pairs"][PAIR] |= {"leak": leak}
    found["stitch.json"]["verified"] = {"twin": VERDICT}
    found["generations.json"] |= {"leaks": {PAIR: leak}, "warnings": warned, "verified": {"twin": VERDICT}}
    task = found["communicate.json"]["tasks"]["countries"]
    of_pair = {f"{name} {PAIR}": block for name, block in task["conditions"].items() if name not in ("silent", "text")}
    kept = {name: task["conditions"][name] for name in ("silent", "text")}
    task["conditions"] = kept | {key: {**block, "pair": PAIR} for key, block in of_pair.items()}
    gain = {"value": 0.3, "ci95": [0.1, 0.5], "above": True}
    task["gains"] = {f"aligned {PAIR}": {"silent": gain, "random": gain, "shuffled": gain}}
    task |= {"pairs": {PAIR: {"leak": leak}}, "warnings": warned}
    return found


def section(html: str, name: str) -> str:
    return html.partition(f'<section id="{name}"')[2].partition('<section id="')[0]


def test_the_leak_is_beside_every_figure_of_the_pair(tmp_path: Path) -> None:
    shown = page(write(tmp_path / "run", files(), made.log()))
    board = section(shown.html, "leaderboard")
    maps = [row for row in re.split(r"<tr", board) if row.startswith(' class="map"')]
    assert [row.count(f">{MARK}<") for row in maps] == [2]
    stitched = section(shown.html, "stitched")
    rows = re.findall(r'<tr class="\w+"><th scope="row">([^<]+)</th>(.*?)</tr>', stitched, re.DOTALL)
    losses = {name: f">{MARK}<" in cells for name, cells in rows}
    assert losses.pop("clean") is False
    # A condition that was not run has no figure for it to stand beside.
    assert set(losses) >= {"self", "mapped", "mean", "shuffled"}
    assert losses.pop("raw") is False
    assert all(losses.values()), losses
    assert f"Leak 0.21: {MEANS}" in stitched
    answers = section(shown.html, "answers")
    rows = re.findall(r'<tr class="\w+"><th scope="row"[^>]*>([^<]+)</th>(.*?)</tr>', answers, re.DOTALL)
    assert {name: f">{MARK}<" in cells for name, cells in rows} == {
        "silent": False,
        "text": False,
        "aligned": True,
        "replace": True,
        "random": True,
    }
    assert MARK in answers[answers.index("Mapped states against controls") :]
    texts = section(shown.html, "texts")
    assert texts.count(f"{MARK}: {MEANS}") == 1
    # The direction without a leak has none.
    assert texts.index(MEANS) < texts.index("twin:15 → smol:15")


def test_the_summary_does_not_call_it_proven(tmp_path: Path) -> None:
    shown = page(write(tmp_path / "run", files(), made.log()))
    summary = section(shown.html, "summary")
    assert "with a side channel" in summary
    assert "beats every control" not in summary
    assert f"At this layer a side channel is open ({MARK}: {MEANS})." in shown.text
    [lede] = re.findall(r'<p class="lede">(.*?)</p>', shown.html, re.DOTALL)
    assert MARK in lede
    # One finding of three files is one warning, and comes first.
    warned = summary[summary.index('id="warnings"') :]
    assert warned.index("<b>side-channel</b>") == warned.index("<b>")
    assert warned.count("<b>side-channel</b>") == 1
    assert "3 times" in warned
    clean = page(write(tmp_path / "clean", files(0.0), made.log()))
    assert "beats every control" in clean.text
    assert "leak 0" not in clean.text


def test_a_leak_without_bound_is_said(tmp_path: Path) -> None:
    shown = page(write(tmp_path / "run", files(None), made.log()))
    assert ">leak without bound<" in section(shown.html, "leaderboard")
    assert "with a side channel" in shown.text


def test_files_of_earlier_versions_say_nothing(tmp_path: Path) -> None:
    shown = page(write(tmp_path / "run", made.documents(), made.log()))
    assert 'class="leak"' not in shown.html
    assert "What was verified" not in shown.text
    assert "beats every control" in shown.text


def test_what_was_verified_is_a_row_for_every_model(tmp_path: Path) -> None:
    found = files()
    found["adapter.json"]["models"]["smol"]["verified"] = {k: v for k, v in VERDICT.items() if k != "layers"}
    hidden = {**LAYER, "hide": 0.5, "hide_cached": 0.25, "hide_refused": "blocks 0 keep a recurrent state"}
    found["communicate.json"]["verified"] = {"twin": {**VERDICT, "layers": {"15": hidden}}}
    shown = page(write(tmp_path / "run", found, made.log()))
    table = re.findall(r'<table class="verified">.*?</table>', shown.html, re.DOTALL)[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[2:]]
    assert [row[0] for row in rows] == ["smol", "twin"]
    smol, twin = rows
    assert smol[1:5] == [
        "30",
        "1",
        "windows of one length share a pass (longer ones beside them change states by 0.5)",
        "from a cache, one token at a time",
    ]
    assert smol[6:] == ["not tested", "not tested", "sdpa"]
    assert twin[5] == "prompts of one length share a batch (padding at the left changes logits by 0.15)"
    # What several files say of a model is put together.
    assert twin[6:8] == ["0 at 30; 0.21 at 15", "refused at layer 15: blocks 0 keep a recurrent state"]
    assert "run/communicate.json" in shown.text[shown.text.index("What was verified") :]


@pytest.mark.parametrize("damage", [None, 3, {"layers": 3}, {"layers": {"x": 3}}, {"blocks": "many"}, {"reading": []}])
def test_a_damaged_verdict_breaks_no_page(tmp_path: Path, damage: Any) -> None:
    found = files()
    found["adapter.json"]["models"]["smol"]["verified"] = damage
    found["stitch.json"]["verified"] = {"twin": damage, "other": {**VERDICT, "layers": {"x": LAYER}}}
    found["generations.json"]["leaks"] = damage
    shown = page(write(tmp_path / "run", found, made.log()))
    assert MARK in shown.text
    assert "What was verified" in shown.text


def test_two_runs_of_one_model_share_a_row_unless_they_differ(tmp_path: Path) -> None:
    other = files()
    other["stitch.json"]["verified"] = {"twin": {**VERDICT, "attention": "eager"}}
    other["generations.json"]["verified"] = {}
    runs = [write(tmp_path / name, each, made.log()) for name, each in (("a", files()), ("b", files()), ("c", other))]
    assert page(*runs[:2]).html.count('<th scope="row">twin</th>') == 1
    assert page(*runs).html.count('<th scope="row">twin</th>') == 2
