"""docs/results.md is what the records of the results say; whoever changes them makes it anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import align.maps.card
import align.notebook.changes
import align.notebook.leaderboard
import align.results
import align.runs.logged
import align.sweeps.recorded
import evaluate.reproduce.recorded
import evaluate.results
from featstore.runtime.records import Record
from tests.support import ROOT

RECORDS = (
    align.maps.card,
    align.notebook.changes,
    align.notebook.leaderboard,
    align.runs.logged,
    align.sweeps.recorded,
    evaluate.reproduce.recorded,
)
PAGE = ROOT / "docs" / "results.md"


def schema(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "schema"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_page_is_what_the_records_say(tmp_path: Path) -> None:
    done = schema("--check")
    assert done.returncode == 0, done.stderr
    stale = tmp_path / "results.md"
    for text in (None, PAGE.read_text().replace("`r2_median_dim`", "`r2_median`")):
        if text is not None:
            stale.write_text(text)
        done = schema("--check", "--out", stale)
        assert (done.returncode, done.stderr) == (1, f"{stale} is not what the records say; run scripts/schema\n")
    assert schema("--out", stale).returncode == 0
    assert stale.read_text() == PAGE.read_text()


def test_every_record_and_member_is_on_the_page() -> None:
    page = PAGE.read_text()
    kinds = {
        value
        for module in (*RECORDS, align.results, evaluate.results)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Record) and value is not Record
    }
    assert len(kinds) > 30
    for kind in kinds:
        assert f"### {kind.__name__}\n" in page or f"Record: `{kind.__name__}`" in page, kind
        for name in kind.model_fields:
            assert f"| `{name}`" in page, f"{kind.__name__}.{name}"
