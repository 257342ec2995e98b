"""Carries out steps: what is done stays done, what fails is written down, and the others go on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluate.reproduce.programme import Step
from evaluate.reproduce.recorded import DONE, FAILED, RUNNING, WAITING, Steps, read_steps, write_steps
from featstore.errors import AdapterError, CorruptDataError, SpecError
from featstore.runtime.console import err, human_seconds
from featstore.runtime.subcommands import StageError, run_stage

#: What was run, how long it took, what failed.
RECORD = Steps.file


class Record:
    """``steps.json``: every step's command, state, seconds and error.

    Args:
        out: The programme's directory.

    Raises:
        SpecError: The file is there and is not one of this program.
    """

    def __init__(self, out: Path) -> None:
        self._path, self._out = out / RECORD, out
        self._steps: dict[str, dict[str, Any]] = {}
        if not self._path.exists():
            return
        try:
            found = read_steps(self._path)
        except (AdapterError, CorruptDataError) as error:
            raise SpecError(f"{self._path} is not a record of steps ({error}); remove it to begin again") from error
        self._steps = {name: entry.content() for name, entry in found.steps.items()}

    def check(self, step: Step) -> None:
        """Refuse to take results of another command for this step's.

        Args:
            step: About to be looked at.

        Raises:
            SpecError: The step was run with other arguments in this directory.
        """
        before = self._steps.get(step.name)
        touched = before is not None and before["status"] in (DONE, RUNNING)
        if before is not None and touched and before["command"] != self._command(step):
            raise SpecError(
                f"{self._out} holds step {step.name!r} of another command ({' '.join(before['command'])}); "
                "choose another --out, or give the same options again"
            )

    def is_done(self, step: Step) -> bool:
        """Whether it has been carried out and what it made is there."""
        # A fit's last file says that it is whole, even where nobody lived to write that down.
        enough = (DONE, RUNNING) if step.fits else (DONE,)
        return self.of(step)["status"] in enough and all((self._out / made).is_file() for made in step.makes)

    def of(self, step: Step) -> dict[str, Any]:
        """A step's part: ``command``, ``status``, ``seconds``, ``error``."""
        empty = {"command": self._command(step), "status": WAITING, "seconds": None, "error": None}
        return self._steps.get(step.name, empty)

    def note(self, step: Step, status: str, *, seconds: float | None = None, error: str | None = None) -> None:
        """Write down how a step ended."""
        entry = {"command": self._command(step), "status": status, "seconds": seconds, "error": error}
        self._steps[step.name] = entry
        write_steps(self._out, Steps.parse({"steps": self._steps}))

    def _command(self, step: Step) -> list[str]:
        # Free of the directory's own place, so that it can be moved and gone on with.
        here = f"{self._out}{os.sep}"
        return [step.tool, *(f"OUT/{a.removeprefix(here)}" if a.startswith(here) else a for a in step.arguments)]


def carry_out(
    steps: Sequence[Step],
    record: Record,
    out: Path,
    *,
    run: Callable[..., Any] = run_stage,
    workers: int = 1,
) -> dict[str, str]:
    """Run every step that is not done.

    A step that fails is noted, those that need it are not run, and the others go on. Several at a time share the
    processor's cores, and begin in the order of the programme as far as what they need is done.

    Args:
        steps: In their order.
        record: Of the same directory.
        out: The programme's directory.
        run: Runs a command; raises :class:`StageError` where it fails. With several workers it is called from several
            threads.
        workers: Steps at a time.

    Returns:
        Why steps are not done, by name; empty where all are.

    Raises:
        SpecError: The directory holds results of other commands.
        KeyboardInterrupt: Interrupted; what is done stays done.
    """
    for each in steps:
        record.check(each)
    programme = _Programme(steps, record, out)
    with sharing(workers), ThreadPoolExecutor(workers) as pool:
        running: dict[Future[Any], tuple[Step, float]] = {}
        while True:
            while len(running) < workers and (step := programme.next()) is not None:
                command, begun = _resumed(step, out), time.perf_counter()
                # One at a time runs here, where an interruption arrives.
                made = _here(run, command) if workers == 1 else pool.submit(run, command.tool, *command.arguments)
                running[made] = (step, begun)
            if not running:
                return programme.missing
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                programme.ended(*running.pop(done), done)


class _Programme:
    """Which step comes next, and what came of those that were run."""

    def __init__(self, steps: Sequence[Step], record: Record, out: Path) -> None:
        self._record, self._out = record, out
        self._left = [(number, step) for number, step in enumerate(steps, 1) if not record.is_done(step)]
        self._count, self._running = len(steps), set[str]()
        self._begun = time.perf_counter()
        self.missing: dict[str, str] = {}
        """Why steps are not done, by name."""

    def next(self) -> Step | None:
        """The first step whose needs are met, noted as running; None where all that is left has to wait."""
        waiting = self._running | {step.name for _, step in self._left}
        for place, (number, step) in enumerate(self._left):
            lacking = [name for name in step.needs if name in self.missing]
            if not lacking and waiting & set(step.needs):
                continue
            del self._left[place]
            if lacking:
                self.missing[step.name] = f"it needs {lacking[0]!r}, which is not done"
                self._record.note(step, WAITING, error=self.missing[step.name])
                return self.next()
            # What an interruption has cost is not known, so a resumed programme counts from its resumption.
            spent = human_seconds(time.perf_counter() - self._begun)
            err.print(f"step {number} of {self._count}: {step.name}, {spent} so far")
            self._record.note(step, RUNNING)
            self._running.add(step.name)
            return step
        return None

    def ended(self, step: Step, begun: float, done: Future[Any]) -> None:
        """Write down how a step ended."""
        self._running.discard(step.name)
        try:
            done.result()
        except StageError as error:
            self.missing[step.name] = str(error)
        else:
            absent = [made for made in step.makes if not (self._out / made).is_file()]
            if absent:
                self.missing[step.name] = f"it left no {absent[0]}"
        if step.name in self.missing:
            self._record.note(step, FAILED, error=self.missing[step.name])
        else:
            self._record.note(step, DONE, seconds=time.perf_counter() - begun)


def _here(run: Callable[..., Any], step: Step) -> Future[Any]:
    """A command run in this thread."""
    done: Future[Any] = Future()
    try:
        done.set_result(run(step.tool, *step.arguments))
    except StageError as error:
        done.set_exception(error)
    return done


@contextmanager
def sharing(workers: int) -> Iterator[None]:
    """Give every command that is started in the context its share of the cores.

    Args:
        workers: Commands at a time; of a single one nothing is changed.
    """
    if workers == 1:
        yield
        return
    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0))
    # Bars of two commands would overwrite each other.
    shares = {"OMP_NUM_THREADS": str(max(1, (cores or 1) // workers)), "TERM": "dumb"}
    before = {name: os.environ.get(name) for name in shares}
    os.environ.update(shares)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _resumed(step: Step, out: Path) -> Step:
    """The same step, or the command that goes on with a training that was interrupted: only these leave checkpoints."""
    run = out / Path(step.makes[0]).parent
    if not (step.fits and (run / "run.yaml").is_file() and any(run.glob("checkpoints/*"))):
        return step
    return replace(step, arguments=("train", "--resume", "--out", str(run)))
