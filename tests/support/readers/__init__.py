"""Other people's readers, each a program of its own in whose process ``featstore`` cannot be imported.

A program takes a file of JSON, ``{"stores": {name: path}, "arrays": {name: [path within the store, ...]}}``, and a path
for what it read: a numpy archive with ``<store>:<path>`` for every array.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from tests.support import ROOT

HERE = Path(__file__).parent
#: Put before every program: what imports one of our packages fails, wherever it is installed.
ALONE = """
import sys

OURS = ("featstore", "align", "evaluate")


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"{name} is not here", name=name)


sys.meta_path.insert(0, Absent())
try:
    import featstore
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("featstore is here")
"""
#: Where packages from npm are kept between runs of the tests.
NPM_CACHE = ROOT / ".cache" / "npm"
AFTER = "\nassert not any(name.partition('.')[0] in OURS for name in sys.modules)\n"


def read_with(
    program: str, into: Path, stores: Mapping[str, Path], arrays: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """Run a reader.

    Args:
        program: Name of a file beside this one, without ``.py``.
        into: An empty directory, where the program also runs.
        stores: Paths by name.
        arrays: For readers that cannot list.

    Returns:
        What it read, by ``<store>:<path>``, and what it printed.
    """
    task, out = into / "task.json", into / "read.npz"
    task.write_text(json.dumps({"stores": {k: str(v) for k, v in stores.items()}, "arrays": dict(arrays or {})}))
    code = ALONE + (HERE / f"{program}.py").read_text(encoding="utf-8") + AFTER
    # -I: neither this directory, nor PYTHONPATH, nor the user's packages.
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(task), str(out)],
        cwd=into,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with np.load(out) as read:
        return dict(read), done.stdout


def digest_of(path: Path) -> str:
    """A short name of a file's content."""
    return sha256(path.read_bytes()).hexdigest()[:16]


def put(made: Path, place: Path) -> None:
    """Move a directory to where it is kept, unless another process was first."""
    aside = place.with_name(f"{place.name}.{os.getpid()}")
    shutil.move(made, aside)
    try:
        aside.rename(place)
    except OSError:
        shutil.rmtree(aside)
