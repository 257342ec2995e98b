"""Every command that writes: its files have the rights that the umask leaves, and a place that refuses is one line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import command_environment


def run(folder: Path, *flags: str, umask: int = 0o022) -> dict[str, Any]:
    """How every command ended, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.every_command", *flags, str(folder)],
        env=command_environment(FEATSTORE_CACHE=str(folder / "cache")),
        capture_output=True,
        text=True,
        check=False,
        umask=umask,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """What every command makes under a umask that gives nobody else anything."""
    folder = tmp_path_factory.mktemp("every")
    return folder, run(folder, umask=0o077)


def test_nothing_is_readable_by_others_under_a_closed_umask(made):
    folder, ended = made
    assert {name: end["err"] for name, end in ended.items() if end["code"]} == {}
    written = [path for path in folder.rglob("*") if path != folder]
    kinds = {".json", ".png", ".svg", ".html", ".safetensors", ".jsonl", ".yaml"}
    assert kinds <= {path.suffix for path in written}
    assert {".writer.lock", ".lock"} <= {path.name for path in written}
    assert any(path.name.startswith("events.out.tfevents") for path in written)
    assert [str(path) for path in written if path.stat().st_mode & 0o077] == []
    assert {stat.S_IMODE(path.stat().st_mode) for path in written if path.is_file()} == {0o600}
    assert [str(path) for path in written if path.name.endswith(".part")] == []


def test_places_that_take_no_files_are_refused_in_one_line_without_the_rights_of_root(made):
    folder, _ = made
    for name, end in run(folder, "--refused").items():
        *before, last = end["err"].splitlines()
        assert end["code"] == 2, (name, end["err"])
        assert last.partition(":")[0] in ("featstore", "align", "evaluate"), (name, end["err"])
        assert ";" in last, (name, last)
        assert "Traceback" not in end["err"], (name, end["err"])
        full = "full after" in name
        # Before anything is computed where that can be known: nothing else is said.
        assert full or before == [], (name, end["err"])
    assert [path for path in folder.rglob("*.part") if os.access(path, os.R_OK)] == []
