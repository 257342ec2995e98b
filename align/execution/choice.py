"""The executor that options ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from align.execution.executor import Executor
from align.execution.options import Execution
from align.execution.processes import Processes
from align.execution.threads import Threads


@contextmanager
def executor(execution: Execution, *, quiet: bool = False) -> Iterator[Executor]:
    """Threads of this process, processes of this machine, or the workers of a scheduler; ended with the block.

    Only the last has anything to do with a network.

    Args:
        execution: What was asked for.
        quiet: Say nothing of a scheduler.

    Raises:
        SpecError: No scheduler answers, or its certificates cannot be used.
    """
    if execution.scheduler is not None:
        from align.execution.cluster import connected

        with connected(execution, quiet=quiet) as cluster:
            yield cluster
    elif execution.workers is not None:
        with Processes(execution.workers) as processes:
            yield processes
    else:
        with Threads() as threads:
            yield threads
