"""How `scripts/test` reads its words, up to where it would install and run."""

from __future__ import annotations

import subprocess

import pytest

from tests.support import ROOT


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts" / "test", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("align/solver", "align/solvers"),
        ("solvers", "align/solvers"),
        ("tests/featstore/txt", "featstore/text"),
        ("test_stich.py::test_x", "evaluate/stitching/test_stitch.py"),
    ],
)
def test_a_room_that_is_not_there_gets_one_line_with_the_nearest(word: str, near: str) -> None:
    done = script("--quick", word, "-x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"no tests at {word!r}" in done.stderr
    assert near in done.stderr


def test_help_names_the_tiers() -> None:
    done = script("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--quick" in done.stdout
    assert "align/solvers" in done.stdout
