"""The report's parts: refusing what is no run, shortening numbers, remembering where a value came from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from report_fixtures import run_of

from evaluate.report import build_report, write_report
from evaluate.report.inputs import Node
from evaluate.report.numbers import fixed, percent
from evaluate.report.svg import ticks_between
from featstore.errors import AdapterError, CorruptDataError, SpecError


def test_directory_without_known_files_names_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(AdapterError) as caught:
        build_report([tmp_path])
    assert str(tmp_path) in str(caught.value)
    for name in ("metrics.json", "cka.json", "stitch.json", "generations.json", "adapter.json"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere does not exist"):
        build_report([tmp_path / "nowhere"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="file is not a directory"):
        build_report([tmp_path / "file"])
    with pytest.raises(AdapterError, match="at least one"):
        build_report([])
    with pytest.raises(SpecError, match="is a directory"):
        write_report([run_of(tmp_path)], tmp_path)
    with pytest.raises(SpecError, match="cannot write the report"):
        write_report([tmp_path / "run"], tmp_path / "file" / "report.html")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"", b"[" * 100_000])
@pytest.mark.parametrize("name", ["metrics.json", "stitch.json", "eval_epoch_1.json"])
def test_unreadable_json_names_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    directory = run_of(tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(CorruptDataError, match=re.escape(name)):
        build_report([directory])


def test_damage_inside_the_log_names_file_and_line(tmp_path: Path) -> None:
    directory = run_of(tmp_path)
    (directory / "log.jsonl").write_text('{"event": "epoch"}\n{broken\n{"event": "stop"}\n')
    with pytest.raises(CorruptDataError, match=r"log\.jsonl, line 2"):
        build_report([directory])


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.8612, 3, "0.861"),
        (0.99964, 3, "0.9996"),
        (1.0, 3, "1.000"),
        (0.0, 2, "0.00"),
        (-0.0004, 3, "\u22120.0004"),
        (-1.1e-9, 3, "0.000"),
        (-123456.0, 2, "\u22121.2e+05"),
        (12043.0, 0, "12,043"),
    ],
)
def test_rounding_never_claims_an_exact_zero_or_one(value: float, decimals: int, text: str) -> None:
    assert fixed(value, decimals) == text


def test_percent_never_claims_all_or_nothing() -> None:
    shown = [percent(v).replace("\u202f", " ") for v in (1.0, 0.9996, 0.0, 0.00195, 0.85, -0.1)]
    assert shown == ["100 %", "99.96 %", "0 %", "0.2 %", "85 %", "\u221210 %"]


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((3.1, 15.2), (0.0, 1.0), (-0.4, 1.2), (1e-9, 2e-9), (5.0, 5.0)):
        ticks, _ = ticks_between(low, high, 5)
        assert 1 <= len(ticks) <= 11
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_a_node_remembers_where_it_was_read() -> None:
    node = Node({"a/b": [{"c~d": 1.5}]}, "run/x.json#").get("a/b", 0, "c~d")
    assert (node.number, node.at) == (1.5, "run/x.json#/a~1b/0/c~0d")
    assert Node({"a": 1}).get("b", "c", 3).value is None
    assert Node(10**400).number is None
    assert Node(True).number is None
