"""docs/models.md: every causal type is right, or refused for the reason that is true; somebody looked at each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featstore.models.layout import Batching
from featstore.models.probe.prove import Proven
from featstore.models.verdict import Verdict
from tests.support import ROOT
from tests.support.architectures import building
from tests.support.architectures.building import NotBuiltError, build, causal_types, variants
from tests.support.table import counting, measuring
from tests.support.table.agreeing import checked
from tests.support.table.measuring import Row, measured, proved
from tests.support.table.page import page
from tests.support.table.recorded import not_looked_at, plain, read, text, versions
from tests.support.tiers import tiered

VERSIONS, ROWS = read()
INSTALLED = [*(listed.name for listed in causal_types()), *variants()]
#: Whether the file is of the installed transformers; of another one, a type may be right in another way.
SAME = versions()["transformers"] == VERSIONS["transformers"]
#: One of each kind that the table tells apart.
QUICK = (
    "llama", "gpt2", "phi3@longrope", "llama@bidirectional", "deepseek_v4", "gemma4_unified_text", "longcat_flash",
    "mpt", "mamba", "bamba", "zaya", "moshi", "git", "rwkv", "bert", "bart", "xlnet",
    "blt", "cpmant", "reformer", "hrm_text", "mllama", "xlm", "gemma4_assistant",
)  # fmt: skip


def wrong_with(name: str, row: Row, rows: dict[str, Row], *, same: bool = SAME) -> str:
    """What is wrong with a type that was measured anew; empty for nothing."""
    if "disagrees" in row:
        return f"{name} is silently wrong: {'; '.join(row['disagrees'])}"
    if name not in rows:
        return f"nobody looked at {name} yet; run scripts/models and read what it says"
    if same and row != rows[name]:
        members = [member for member in {**row, **rows[name]} if row.get(member) != rows[name].get(member)]
        return f"{name}: {', '.join(members)} are not what docs/models.json says; run scripts/models"
    return ""


def test_every_type_of_the_installed_transformers_was_looked_at() -> None:
    new = not_looked_at(INSTALLED, ROWS)
    assert not new, f"nobody looked at {', '.join(new)} yet; run scripts/models and read what it says of them"
    if SAME:
        assert sorted(ROWS) == sorted(INSTALLED)


@pytest.mark.parametrize("name", tiered(QUICK, [name for name in INSTALLED if name not in QUICK]))
def test_a_type_is_right_or_refused_for_the_reason_that_is_true(name: str) -> None:
    assert wrong_with(name, plain(measured(name)), ROWS) == ""


def test_the_counts_are_not_fewer_than_they_were() -> None:
    found = list(counting.counted(ROWS).values())
    extracts, injects, inside, generates, pads, hides, everything, refused, silent = found
    assert len(counting.decoders(ROWS)) == extracts + refused >= 154
    assert extracts >= 149
    assert injects == generates >= 135
    assert inside >= 144
    assert (pads >= 143, hides >= 110, everything >= 109) == (True, True, True)
    assert silent == 0


def test_the_page_is_what_the_results_say(tmp_path: Path) -> None:
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == page(VERSIONS, ROWS)
    if SAME and versions() == VERSIONS:
        assert (ROOT / "docs" / "models.json").read_text(encoding="utf-8") == text(ROWS)


def test_every_type_and_every_reason_is_on_the_page() -> None:
    whole = page(VERSIONS, ROWS)
    for name, row in ROWS.items():
        assert f"| `{name}` |" in whole, name
        if "refused" in row:
            assert f"- `{name}`: {row['refused'].partition(': ')[2].partition('; ')[0]}." in whole, name
    for words, number in counting.counted(ROWS).items():
        assert f"| {words} | {number} |" in whole


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "models"), *words], capture_output=True, text=True, check=False
    )


@pytest.mark.thorough
def test_the_command_measures_types() -> None:
    done = command("gpt2", "llama@bidirectional")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: plain(measured(name)) for name in ("gpt2", "llama@bidirectional")}


def test_the_command_checks_the_page_and_refuses_what_is_no_type() -> None:
    done = command("gpt5")
    assert done.returncode == 2
    assert done.stderr.endswith("transformers has no causal type gpt5\n")
    assert command("--page", "--check").returncode == 0


# The test itself: what is spoiled is seen.


def test_a_type_that_is_new_is_named() -> None:
    assert not_looked_at(["llama", "new_model"], ROWS) == ["new_model"]
    # Types that a transformers no longer has are no fault.
    assert not_looked_at(["llama"], ROWS) == []
    row = ROWS["llama"]
    assert wrong_with("new_model", row, ROWS).startswith("nobody looked at new_model yet")
    assert wrong_with("llama", row, {}, same=False).startswith("nobody looked at llama yet")


def test_a_type_that_cannot_be_built_any_more_is_no_reason_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    known = building.settings()
    monkeypatch.setattr(building, "settings", lambda: replace(known, unbuildable={}))
    with pytest.raises(NotBuiltError, match="nobody looked at 'gemma4_assistant' yet"):
        measured("gemma4_assistant")


@pytest.mark.parametrize(
    ("member", "spoil"),
    [
        ("layers", lambda row: row["layers"]["leak"].__setitem__(0, 0.1)),
        ("layers", lambda row: row["layers"]["hide"].pop()),
        ("reading", lambda row: row["reading"].update(causal=False)),
        ("continuing", lambda row: row["continuing"].update(kind="stepwise")),
        ("commands", lambda row: row["commands"].update(table=False)),
        ("attention", lambda row: row.update(attention="eager")),
        ("truth", lambda row: row["truth"].remove("leaks")),
        ("refused", lambda row: row.update(refused="for no reason")),
    ],
)
def test_a_row_that_is_spoiled_is_seen(member: str, spoil: Callable[[Row], Any]) -> None:
    row = plain(measured("llama"))
    rows = {"llama": deepcopy(row)}
    assert wrong_with("llama", row, rows, same=True) == ""
    spoil(rows["llama"])
    assert wrong_with("llama", row, rows, same=True).startswith(f"llama: {member} are not what docs/models.json says")


def spoiled(proven: Proven, **changes: Any) -> Proven:
    """A verdict with members that say something else: ``layers__3__leak=0.0``."""
    content = proven.verdict.content()
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return replace(proven, verdict=Verdict.parse(content))


@pytest.mark.parametrize(
    ("name", "changes", "seen"),
    [
        ("gemma4_unified_text", {"layers__3__leak": 0.0}, "leaks: the probe says 0.0, the truth"),
        ("zaya", {"layers__2__leak": 0.0}, "leaks: the probe says none at layer 2, and other texts leak"),
        ("llama", {"layers__2__leak": 1e-5}, "leaks: the probe says 1e-05, the truth 0 at layer 2"),
        ("llama", {"layers__2__self_identical": False}, "injection: layer 2 does not take its own stream"),
        ("llama@bidirectional", {"reading__causal": True}, "reading: causal is True, and what follows moves rows by"),
        ("llama", {"reading__causal": False}, "reading: causal is False, and what follows moves rows by"),
        ("phi3@longrope", {"reading__switch": None}, "reading: batching is padded, and padding at the right moves"),
        ("llama", {"reading__batching": "single"}, "reading: batching is single, and neighbours move rows by 0"),
        ("gpt2", {"reading__layer_0_is_table": True}, "layer 0: it is a table: True; from place to place it moves by"),
        ("llama", {"reading__layer_0_is_table": False}, "layer 0: it is a table: False; from place to place it moves"),
        ("llama", {"continuing__padded": False}, "padding: prompts may not share a batch, but padding moves"),
        ("mamba2", {"layers__1__hide_refused": None}, "hide: the probe says that it holds at layer 1"),
        ("llama", {"layers__1__hide_refused": "no"}, "hide: the probe says at layer 1: no; and two prompts are"),
    ],
)
def test_a_verdict_that_is_not_true_is_seen(name: str, changes: dict[str, Any], seen: str) -> None:
    model = build(name)
    proven = proved(model)
    assert checked(name, model, proven, "")[1] == []
    wrong = checked(name, model, spoiled(proven, **changes), "")[1]
    assert any(line.startswith(seen) for line in wrong), wrong


@pytest.mark.parametrize(
    ("name", "change", "seen"),
    [
        ("phi3@longrope", {"batching": Batching()}, "batches: window 1 at layer 1 is another in its batch"),
        ("llama@bidirectional", {"batching": Batching()}, "batches: window 1 at layer 1 is another in its batch"),
        ("gemma4_text", {"skips": frozenset(range(7))}, "injection: another answer at layer 4"),
    ],
)
def test_a_stream_that_knows_less_than_the_verdict_is_seen(name: str, change: dict[str, Any], seen: str) -> None:
    model = build(name)
    proven = proved(model)
    try:
        wrong = checked(name, model, replace(proven, stream=replace(proven.stream, **change)), "")[1]
    except KeyError:
        wrong = [seen]  # blocks that are left out gave later ones what these need
    assert any(line.startswith(seen) for line in wrong), wrong


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("llama", "the blocks in model.layers get no tensor"),
        ("cpmant", "13 tokens became 16 positions"),
        ("hrm_text", "runs its 4 blocks 8 times in one pass"),
        ("mllama", "does not run block 2 on text"),
        ("mllama", "hands each member something else than the one before gave back"),
    ],
)
def test_a_refusal_that_is_not_true_is_seen(name: str, refused: str) -> None:
    assert checked(name, build(name), None, refused)[1]


def test_a_limit_of_the_probe_that_is_too_wide_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.models.probe.hiding._NONE", 2.0)
    assert "hide: the probe says that it holds at layer" in wrong_with("mamba2", measured("falcon_h1"), ROWS)
    monkeypatch.setattr("featstore.models.probe.continuing.rounding", lambda *_: 1.0)
    assert "going on: " in wrong_with("jamba", measured("jamba"), ROWS)


def test_a_figure_has_one_digit_and_a_small_leak_is_none_the_less_one() -> None:
    assert [measuring.digit(value) for value in (0.0, 7.4e-5, 0.961, None)] == [0, 7e-5, 1.0, None]
    assert [measuring.digit(value, rounding=1e-4) for value in (7.4e-5, 2.2e-3)] == [0, 2e-3]
    assert min(leak for leak in ROWS["zaya"]["layers"]["leak"] if leak) < 1e-3
