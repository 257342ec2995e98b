"""The former build beside this one: its sources from the repository's history, run in processes of their own.

Two builds of one package cannot be imported into one process. Each contender is therefore a command, and both run with
the interpreter and libraries of the caller, so that nothing but our own code differs.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: The build that the speed of this one is compared with.
FORMER = "0ed1a41"
REPOSITORY = Path(__file__).resolve().parent.parent


def former_build(commit: str = FORMER, under: Path | None = None) -> Path:
    """The folder that holds the sources of a commit, made on the first call.

    Args:
        commit: Of this repository's history.
        under: Where to put it; the temporary directory when not given.

    Raises:
        SystemExit: The history does not hold the commit, as in a shallow clone.
    """
    folder = (under or Path(tempfile.gettempdir())) / f"build-{commit}-{os.getuid()}"
    if (folder / "pyproject.toml").is_file():
        return folder
    archive = subprocess.run(["git", "-C", str(REPOSITORY), "archive", commit], capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"commit {commit} is not in this clone's history; fetch it whole (git fetch --unshallow)")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as sources:
        sources.extractall(folder, filter="data")
    return folder


@dataclass(frozen=True)
class Spent:
    """What one process took.

    Attributes:
        seconds: By the clock.
        cpu: Seconds of all its threads, user and system, its children's included.
        peak: The largest resident set of it or of one of its children, bytes.
        output: What it wrote to standard output.
    """

    seconds: float
    cpu: float
    peak: int
    output: str


def run_build(build: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Spent:
    """Run this interpreter on a build's sources: ``["-m", "align", "train", ...]`` or ``["-c", "..."]``.

    Args:
        build: Folder with the packages, :data:`REPOSITORY` for this build.
        arguments: Of the interpreter.
        environment: Variables to set beside the caller's.

    Raises:
        SystemExit: The process failed; its last lines are shown.
    """
    own = {**os.environ, "PYTHONPATH": str(build), "HF_HUB_OFFLINE": "1", **(environment or {})}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err, env=own, cwd=build)
        # wait4 counts this child alone; RUSAGE_CHILDREN would keep the largest of all that came before.
        _, status, used = os.wait4(process.pid, 0)
        spent = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            tail = "".join(err.readlines()[-15:])
            raise SystemExit(f"{' '.join(arguments)} of {build.name} ended with {process.returncode}:\n{tail}")
        return Spent(spent, used.ru_utime + used.ru_stime, used.ru_maxrss * _RSS_UNIT, out.read())


#: Linux counts kibibytes, macOS bytes.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
