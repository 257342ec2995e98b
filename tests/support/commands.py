"""The three commands within the test process: as users type them, without the seconds a new interpreter takes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest


def command_line(command: str, *args: object) -> list[str]:
    """The words that run one of the three commands in a subprocess."""
    return [sys.executable, "-m", command, *map(str, args)]


def command_environment(**more: str) -> dict[str, str]:
    """The environment of a command: offline, narrow output never wrapped, plain text."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"} | more


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout; anything else there is an error."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        value = json.loads(self.out, parse_constant=_refuse)
        assert isinstance(value, dict)
        return value

    @property
    def refusal(self) -> str:
        """The one line on stderr of a command that was used wrongly."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        return self.err


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def strict_json(text: str) -> Any:
    """Parse what is JSON by the letter: no NaN, no infinity."""
    return json.loads(text, parse_constant=_refuse)


def call(capsys: pytest.CaptureFixture[str], command: str, *args: object) -> Outcome:
    """Run `featstore`, `align` or `evaluate` in this process."""
    capsys.readouterr()
    code = _in_process(command, args)
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


def _in_process(command: str, args: Sequence[object]) -> int:
    """The exit code of a command that is run in this process."""
    main = importlib.import_module(f"{command}.cli").main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command, *map(str, args)])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def called(command: str, *args: object) -> Outcome:
    """Run a command in this process where there is no `capsys`: in a fixture that several tests share."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _in_process(command, args)
    return Outcome(code, out.getvalue(), err.getvalue())
