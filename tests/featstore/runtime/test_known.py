"""The ledger keeps what was named, stays small, and is believed only where it is the user's own."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from featstore.runtime import known
from featstore.runtime.known import Named, ledger_path, recall, remember

HUB = Named("hub", "owner/model", "main")
PATH = Named("path", "/models/a")


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    return ledger_path()


def test_what_was_named_is_recalled(ledger: Path) -> None:
    assert recall() == (frozenset(), None)
    assert remember([HUB]) is None
    assert remember([PATH, HUB]) is None
    assert recall() == (frozenset({HUB, PATH}), None)
    assert json.loads(ledger.read_text("utf-8")) == {
        "references": [["path", "/models/a", ""], ["hub", "owner/model", "main"]]
    }


def test_what_is_the_last_already_is_not_written_again(ledger: Path) -> None:
    remember([HUB])
    before = ledger.stat().st_ino
    remember([HUB])
    assert ledger.stat().st_ino == before


def test_it_stays_small(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_MOST", 5)
    remember(Named("hub", f"o/{number}", "main") for number in range(9))
    assert {one.reference for one in recall()[0]} == {f"o/{number}" for number in range(4, 9)}
    monkeypatch.setattr(known, "_MOST", 1000)
    monkeypatch.setattr(known, "_SIZE", 400)
    remember(Named("hub", f"o/{number}", "main") for number in range(20))
    assert ledger.stat().st_size <= 400
    assert Named("hub", "o/19", "main") in recall()[0]
    remember([Named("hub", "x" * 5000)])
    assert not any(len(one.reference) > 5 for one in recall()[0])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"references": 3}',
        b'{"references": [["hub", 3, ""]]}',
        b'{"references": [["hub"]]}',
        b"\xff",
    ],
)
def test_a_damaged_one_vouches_for_nothing_and_is_left_alone(ledger: Path, content: bytes) -> None:
    ledger.parent.mkdir(parents=True)
    ledger.write_bytes(content)
    found, trouble = recall()
    assert found == frozenset()
    assert trouble == f"{ledger} is not a ledger of references; remove it"
    assert remember([HUB]) == trouble
    assert ledger.read_bytes() == content


def test_one_that_is_too_large_is_not_read_whole(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember([HUB])
    monkeypatch.setattr(known, "_SIZE", 10)
    assert recall()[0] == frozenset()


def test_one_that_others_may_write_is_not_believed(ledger: Path) -> None:
    remember([HUB])
    for rights in (0o666, 0o660):
        ledger.chmod(rights)
        assert recall() == (frozenset(), f"{ledger} is not yours alone to write")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_one_that_another_user_wrote_is_not_believed(ledger: Path) -> None:
    remember([HUB])
    os.chown(ledger, 12345, -1)
    assert recall() == (frozenset(), f"{ledger} is not yours alone to write")


def test_a_link_or_a_pipe_in_its_place_is_not_followed(ledger: Path, tmp_path: Path) -> None:
    remember([HUB])
    ledger.rename(tmp_path / "elsewhere")
    ledger.symlink_to(tmp_path / "elsewhere")
    found, trouble = recall()
    assert found == frozenset()
    assert trouble is not None
    ledger.unlink()
    os.mkfifo(ledger)  # reading one without a writer would wait for ever
    assert recall()[0] == frozenset()


def test_a_place_that_takes_none_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "file"))
    trouble = remember([HUB])
    assert trouble is not None
    assert str(tmp_path / "file") in trouble
    assert "\n" not in trouble


def test_commands_that_end_together_all_keep_theirs(ledger: Path) -> None:
    code = """
import sys
from featstore.runtime.known import Named, remember
for number in range(20):
    remember([Named("hub", f"{sys.argv[1]}/{number}")])
"""
    started = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(recall()[0]) == 60
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600
