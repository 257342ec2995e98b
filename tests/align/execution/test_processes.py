"""Worker processes over pipes: what passes, what is done again, and who ends with whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.execution.processes import DEATHS, Processes
from align.execution.threads import Threads
from featstore.errors import SpecError, StoreStateError, WorkersError
from tests.support import ROOT
from tests.support.sockets import tree_of


def doubled(array: Any) -> Any:
    return 2 * array


def fails(kind: str) -> None:
    raise {"ours": StoreStateError("not whole"), "other": ZeroDivisionError("by zero")}[kind]


def unsendable() -> Any:
    return threading.Lock()


def dies(notes: str, times: int) -> int:
    """Kills its process the first times; says how often it began."""
    with Path(notes).open("a") as file:
        file.write("x")
    begun = len(Path(notes).read_text())
    if begun <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return begun


def paths() -> tuple[list[str], str]:
    return sys.path, str(Path.cwd())


def waits_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.01)


@pytest.mark.parametrize("kind", [Threads, Processes])
def test_results_and_errors_come_back(kind: Any) -> None:
    big = np.random.default_rng(0).normal(size=(700, 1000))
    with kind(2) as executor:
        assert executor.width == 2
        # Ordinary, large, empty, Fortran-ordered, strided; several in one result.
        for array in (np.arange(3), big, np.empty((0, 4)), np.asfortranarray(big[:5]), big[::2, ::3]):
            np.testing.assert_array_equal(executor.submit(doubled, array).result(), 2 * array)
        found = executor.submit(doubled, big).result()
        # What came over a pipe is as good as what was made here.
        found += 1
        ours = executor.submit(fails, "ours")
        with pytest.raises(StoreStateError, match=r"^not whole$"):
            ours.result()
        assert str(executor.submit(fails, "other").exception()) == "by zero"
        tasks = {executor.submit(doubled, n): n for n in range(9)}
        assert {tasks[task]: task.result() for task in executor.as_completed(tasks)} == {n: 2 * n for n in range(9)}


def test_what_cannot_be_sent_is_an_error_of_its_task_alone() -> None:
    with Processes(1) as one:
        first = one.submit(os.getpid).result()
        with pytest.raises(TypeError, match="pickle"):
            one.submit(doubled, threading.Lock()).result()
        with pytest.raises(TypeError, match="a worker cannot send <unlocked"):
            one.submit(unsendable).result()
        with pytest.raises(Exception, match="lambda"):
            one.submit(lambda: 0).result()
        assert one.submit(os.getpid).result() == first


def test_an_error_says_where_it_was_raised() -> None:
    with Processes(1) as one:
        error = one.submit(fails, "other").exception()
    assert error is not None
    assert "in fails" in "".join(error.__notes__)


def test_modules_are_looked_for_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of somebody else, in which a command is started, is no place to import from."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('a module of the folder was imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with Processes(1) as one:
        theirs, where = one.submit(paths).result()
        np.testing.assert_array_equal(one.submit(doubled, np.arange(3)).result(), [0, 2, 4])
    assert theirs == sys.path
    assert where == str(tmp_path)


@pytest.mark.parametrize("times", [1, DEATHS - 1])
def test_a_worker_that_dies_is_replaced_and_its_task_begun_again(tmp_path: Path, times: int) -> None:
    with Processes(2) as two:
        assert two.submit(dies, str(tmp_path / "notes"), times).result() == times + 1
        assert two.submit(doubled, 2).result() == 4


def test_a_task_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    with Processes(1) as one:
        error = one.submit(dies, str(tmp_path / "notes"), 100).exception()
        assert one.submit(doubled, 2).result() == 4
    assert isinstance(error, WorkersError)
    assert str(error) == (
        "workers died over the same task again and again (killed by signal 9): out of memory? Allow less memory or run "
        "fewer workers"
    )
    assert len((tmp_path / "notes").read_text()) == DEATHS


def test_closing_ends_what_runs_and_cancels_what_waits(tmp_path: Path) -> None:
    with Processes(2) as two:
        pids = {two.submit(os.getpid).result() for _ in range(8)}
        tasks = [two.submit(waits_for, str(tmp_path / "never")) for _ in range(4)]
        while not all(task.running() for task in tasks[:2]):
            time.sleep(0.01)
    assert all(task.cancelled() or task.exception() is not None for task in tasks)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_fewer_than_one_is_refused() -> None:
    with pytest.raises(SpecError, match="0 worker processes: at least one is needed"):
        Processes(0)


SCRIPT = """
    import sys
    from align.execution.processes import Processes
    from tests.align.execution.test_processes import waits_for

    # No guard of __main__: workers do not import it.
    with Processes(2) as two:
        tasks = [two.submit(waits_for, sys.argv[1]) for _ in range(2)]
        while not all(task.running() for task in tasks):
            pass
        print("running", flush=True)
        tasks[0].result()
"""


def test_workers_end_with_the_process_that_asks_however_it_ends(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "never")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        end = time.monotonic() + 60
        while len(tree_of(process.pid)) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        below = tree_of(process.pid)
        assert len(below) == 3
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    while any(map(alive, below)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(alive, below))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
