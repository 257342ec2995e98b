"""Carries out steps: what is done stays done, what fails is written down, and the others go on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
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
) -> dict[str, str]:
    """Run every step that is not done.

    A step that fails is noted, those that need it are not run, and the others go on.

    Args:
        steps: In their order.
        record: Of the same directory.
        out: The programme's directory.
        run: Runs a command; raises :class:`StageError` where it fails.

    Returns:
        Why steps are not done, by name; empty where all are.

    Raises:
        SpecError: The directory holds results of other commands.
        KeyboardInterrupt: Interrupted; what is done stays done.
    """
    for step in steps:
        record.check(step)
    missing: dict[str, str] = {}
    seconds = 0.0
    for number, step in enumerate(steps, 1):
        if record.is_done(step):
            continue
        lacking = [name for name in step.needs if name in missing]
        if lacking:
            missing[step.name] = f"it needs {lacking[0]!r}, which is not done"
            record.note(step, WAITING, error=missing[step.name])
            continue
        err.print(f"step {number} of {len(steps)}: {step.name}, {human_seconds(seconds)} so far")
        start = time.perf_counter()
        record.note(step, RUNNING)
        try:
            run(step.tool, *_resumed(step, out).arguments)
        except StageError as error:
            missing[step.name] = str(error)
            record.note(step, FAILED, error=missing[step.name])
        else:
            absent = [made for made in step.makes if not (out / made).is_file()]
            if absent:
                missing[step.name] = f"it left no {absent[0]}"
                record.note(step, FAILED, error=missing[step.name])
            else:
                record.note(step, DONE, seconds=time.perf_counter() - start)
        # What an interruption has cost is not known, so a resumed training counts from its resumption.
        seconds += time.perf_counter() - start
    return missing


def _resumed(step: Step, out: Path) -> Step:
    """The same step, or the command that goes on with a training that was interrupted: only these leave checkpoints."""
    run = out / Path(step.makes[0]).parent
    if not (step.fits and (run / "run.yaml").is_file() and any(run.glob("checkpoints/*"))):
        return step
    return replace(step, arguments=("train", "--resume", "--out", str(run)))
