"""Findings are made once: one table of codes and thresholds, and nothing else that judges or that reads words."""

from __future__ import annotations

import ast
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.judging.findings import finding
from align.judging.record import Finding
from align.judging.sentences import described, kind, placed, sentence, together
from align.judging.table import CODES, LEVELS
from tests.support import ROOT
from tests.support.rooms import SOURCES, tree

#: What puts results before people.
RENDERING = (
    "align.notebook",
    "align.similarity.page",
    "align.similarity.words",
    "align.sweeps.table",
    "evaluate.notebook",
    "evaluate.reporting",
    "evaluate.reproduce.analysis",
    "evaluate.stitching.words",
    "featstore.demo.words",
)
#: Comparisons with a fraction that decide how something looks, or which of two figures are the same rate.
LOOKS = {
    "align.pages.palette": "luminance < 0.179",
    "evaluate.reporting.reading.inputs": "abs(number) <= _LARGEST",
    "evaluate.reporting.reading.numbers": "abs(value) < _NOISE",
    "evaluate.reporting.sections.rates": "_SAME_RATE",
    # The package knows nothing of align; the demo quotes the p value of one layer pair that is named beforehand.
    "featstore.demo.words": "floor.p <= _ALPHA",
}
PAGE = ROOT / "docs" / "reading-results.md"


def calls(name: str) -> Iterator[tuple[str, ast.Call, list[Any]]]:
    """Calls of a function by its bare name, with the constants among their arguments."""
    for module in SOURCES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                yield module, node, [arg.value for arg in node.args if isinstance(arg, ast.Constant)]


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def test_the_table_is_whole() -> None:
    levels = [LEVELS.index(code.level) for code in CODES.values()]
    assert levels == sorted(levels), "the gravest stand first: pages keep this order"
    for name, code in CODES.items():
        assert code.says, name
        assert fields(code.meaning) <= set(code.limits), name
        assert "{" not in code.means, name


def test_every_finding_that_is_made_is_in_the_table_and_none_else() -> None:
    made = {given[0] for module, _, given in calls("finding") if given}
    # The code of a leak has a name, which pages use as well.
    assert made | {"side-channel"} == set(CODES)


def test_every_value_that_a_sentence_names_is_given() -> None:
    """At least one template of every code can be filled from what some call gives."""
    for module, node, given in calls("finding"):
        if given and all(word.arg for word in node.keywords):
            known = {word.arg for word in node.keywords} | set(CODES[given[0]].limits)
            assert any(fields(says) <= known for says in CODES[given[0]].says), (module, node.lineno)


def test_every_limit_is_looked_at_and_no_other() -> None:
    asked = {tuple(given) for _, _, given in calls("limit") if len(given) == 2}
    names = {(name, limit) for name, code in CODES.items() for limit in code.limits}
    assert asked <= names
    # `no-scale` asks for its three in a loop.
    assert {each for each in names - asked if each[0] != "no-scale"} == set()


def fractions(module: str) -> Iterator[ast.Compare]:
    """Comparisons with a number that is no whole one, written there or bound to a name of the module."""
    bound = {
        node.targets[0].id
        for node in tree(module).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, float)
    }
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Compare):
            for part in (each for side in (node.left, *node.comparators) for each in ast.walk(side)):
                written = isinstance(part, ast.Constant) and isinstance(part.value, float)
                whole = written and float(part.value).is_integer()
                if (written and not whole) or (isinstance(part, ast.Name) and part.id in bound):
                    yield node
                    break


def test_what_renders_has_no_threshold_of_its_own() -> None:
    rooms = [name for name in SOURCES if any(name == room or name.startswith(f"{room}.") for room in RENDERING)]
    assert len(rooms) > 40
    for name in rooms:
        for node in fractions(name):
            text = ast.unparse(node)
            known = LOOKS.get(name)
            decides = known is None or not (known in text or text.replace("token.p", "floor.p") == known)
            assert not decides, f"{name}:{node.lineno}: {text}; judge where it is measured, by a limit of the table"
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ImportFrom):
                asked = {alias.name for alias in node.names} & {"limit", "FEWEST", "FEWEST_EFFECTIVE"}
                assert not asked, f"{name} asks for {asked}"


@pytest.mark.parametrize("module", ["align.runs.findings", "align.similarity.findings", "evaluate.stitching.findings"])
def test_what_judges_has_its_thresholds_from_the_table(module: str) -> None:
    assert [ast.unparse(node) for node in fractions(module)] == []


def test_thresholds_of_statistics_are_defined_once() -> None:
    found: dict[str, list[str]] = {}
    for module in SOURCES:
        for node in tree(module).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id.lstrip("_")
                if name in ("LEVEL", "SIGNIFICANT", "FEWEST_EFFECTIVE", "FEW_DOCUMENTS", "FEWEST_DRAWS"):
                    found.setdefault(name, []).append(module)
    home = ["align.statistics.linearised"]
    assert found == {"LEVEL": home, "SIGNIFICANT": home, "FEWEST_EFFECTIVE": home}


def test_nobody_reads_the_words_of_a_finding() -> None:
    """Codes, places and values say what words do; words of earlier versions are shown, and not looked into."""
    for module in SOURCES:
        if module.startswith(("align.", "evaluate.")) and not module.startswith("align.judging"):
            for node in ast.walk(tree(module)):
                asked = (isinstance(node, ast.Attribute) and node.attr == "message") or (
                    isinstance(node, ast.Constant) and node.value == "message"
                )
                assert not asked, f"{module}:{node.lineno}"


def test_the_documented_table_is_made_from_this_one(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "findings")]
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stale = tmp_path / "page.md"
    stale.write_text(PAGE.read_text().replace("| `few-rows` | warning", "| `few-rows` | note"))
    done = subprocess.run([*command, "--check", "--out", str(stale)], capture_output=True, text=True, check=False)
    assert (done.returncode, "run scripts/findings" in done.stderr) == (1, True)
    assert subprocess.run([*command, "--out", str(stale)], check=False).returncode == 0
    assert stale.read_text() == PAGE.read_text()


class TestSentences:
    def test_values_and_limits_make_the_sentence(self) -> None:
        found = finding("few-rows", {"pair": "a:1->b:2"}, rows=159, width=16, wanted=160)
        assert set(found) == {"code", "level", "where", "values", "limits"}
        assert found["limits"] == {"per_dimension": 10}
        assert sentence(found) == (
            "159 pairs for width 16: under 10 per dimension, where 160 are wanted; figures are noisy, and held-out "
            "ones suffer; extract more text, or fit fewer parameters"
        )
        assert placed(found) == f"a:1->b:2: {sentence(found)}"
        assert described(found, "pair") == f"warning: {sentence(found)} (few-rows)"
        assert Finding.parse(found).sentence == sentence(found)

    def test_what_is_not_known_is_left_out_and_chooses_the_words(self) -> None:
        known, unknown = (finding("side-channel", leak=leak) for leak in (0.2134, None))
        assert "leaks 0.21 at" in sentence(known)
        assert "without bound" in sentence(unknown)
        assert "leak" not in unknown["values"]
        assert finding("high-null", reached=float("nan"))["values"] == {}

    def test_several_become_ranges_where_only_numbers_differ(self) -> None:
        few = [finding("few-documents", documents=n) for n in (7, 4, 9)]
        assert len({kind(each) for each in few}) == 1
        assert together(few).startswith("4 to 9 documents: ")
        assert together(few[:1]).startswith("7 documents: ")
        others = [finding("few-documents", documents=2, needed=3), finding("few-documents", documents=2, effective=1.5)]
        assert len({kind(each) for each in (*few, *others)}) == 3

    def test_a_file_may_hold_anything(self) -> None:
        assert sentence({"code": "few-rows", "message": "12 pairs < 5760"}) == "12 pairs < 5760"
        assert sentence({"code": "of a newer version", "values": {"x": 1}}) == "of a newer version"
        assert sentence({"code": "few-rows"}) == "few-rows"
        values = {"rows": "{x}", "width": "y", "wanted": "z"}
        odd = {"code": "few-rows", "values": values, "limits": {"per_dimension": 1}}
        assert sentence(odd) == CODES["few-rows"].means
        assert sentence({}) == ""
