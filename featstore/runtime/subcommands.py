"""This project's commands as their user would type them, each in a process of its own.

What is made of several commands prints every one before it runs, so that any of them can be repeated by hand.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from typing import Any

from featstore.errors import FeatstoreError
from featstore.runtime.console import err


class StageError(FeatstoreError, RuntimeError):
    """A command failed; the message names it. What it had to say is on stderr already."""


def run_stage(tool: str, *arguments: str) -> dict[str, Any]:
    """Run a command; its progress and messages go to this process's stderr.

    Args:
        tool: ``featstore``, ``align`` or ``evaluate``.
        arguments: What follows it, without ``--json``.

    Returns:
        What it printed with ``--json``.

    Raises:
        StageError: It ended with an error.
        KeyboardInterrupt: It was interrupted.
    """
    shown = shlex.join((tool, *arguments))
    err.rule(align="left")
    err.print(f"$ {shown}")
    command = (sys.executable, "-m", tool, *arguments, "--json")
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise StageError(f"stage failed with exit code {done.returncode}: {shown}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
