"""Many runs over one store: the cells of a grid on several workers, resumable, in one table at the end.

A cell is a run directory of its own. Closed forms over the same rows are made together, by one worker, because most of
what they need is the same; the others one by one. Whoever works on a cell holds its lock, which goes with the process,
so two workers (one of them thought dead) never write to the same directory. A training that a killed one left goes on
from its last checkpoint; anything else of it is done again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align.execution.choice import executor
from align.execution.executor import Executor
from align.execution.options import Execution
from align.runs.plots import plot_rate_distortion
from align.runs.together import share, train_together
from align.settings import Settings, load_settings
from align.sweeps.compare import compare_runs
from align.sweeps.grid import Cell, Grid, cells, parse_grid
from align.sweeps.recorded import Sweep, write_sweep
from align.sweeps.table import describe as describe_comparison
from featstore.errors import CorruptDataError, FeatstoreError, SpecError, StoreStateError
from featstore.runtime.console import check_directory, jsonable, progress
from featstore.runtime.visible import inline
from featstore.runtime.writing import check_folder, locked, remove_folder
from featstore.store import open_store

__all__ = ["Cell", "Grid", "cells", "describe", "groups", "parse_grid", "run_cell", "run_together", "sweep"]

_LOCKS = ".locks"
# Drawing and the threads of BLAS are the process's own: of a worker's threads one trains at a time.
_ONE_AT_A_TIME = threading.Lock()


def sweep(
    settings: Settings,
    grid: Grid,
    out: Path,
    *,
    execution: Execution | None = None,
    reference: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Carry out every run of a grid, or what is left of it, and compare them all.

    Finished cells are skipped; a cell that fails is recorded and the others go on. ``sweep.json`` is up to date
    whenever this is interrupted.

    Args:
        settings: What all runs share.
        grid: What varies.
        out: Directory of the run directories, of ``stores/<format>.zarr`` and of ``sweep.json``.
        execution: Where the cells run. Workers of a scheduler have to reach the store and ``out`` under the same paths.
            None, or no number of workers, for processes of this machine: one per core, or per cell if these are fewer.
        reference: Cell, or baseline such as ``token``, that the others are compared with; None for the first finished
            cell of the grid that has the layer pair.
        quiet: No progress.

    Returns:
        What ``sweep.json`` holds: ``grid``, ``store``, ``cells`` (``{"name", "run", "settings", "status": "done",
        "skipped", "failed" or "waiting", "seconds", "error", "pairs": {key: {"val_r2", "r2", "r2_ci95"}}}``),
        ``failed`` (names); and under ``comparison`` what :func:`align.sweeps.compare.compare_runs` says of all finished
        cells, under ``plots`` the names of the files drawn of them.

    Raises:
        SpecError: An invalid run, a directory that holds a run of other settings, a reference that is no finished cell
            and no baseline, or no scheduler answers.
        WorkersError: The scheduler went away.
        FeatstoreError: The store cannot be read.
    """
    check_directory(out)
    out = out.resolve()
    if "://" not in settings.store:
        # Workers of another process have another working directory.
        settings = replace(settings, store=str(Path(settings.store).resolve()))
    wanted = cells(settings, grid)
    store = open_store(settings.store)
    held = {store.model(name).attributes.get("format") for name in store.models}
    placed = [
        cell
        if cell.form is None or held == {cell.form}
        else replace(cell, settings=replace(cell.settings, store=str(out / "stores" / f"{cell.form}.zarr")))
        for cell in wanted
    ]
    for name in (_LOCKS, "stores"):
        check_folder(out, name, make=False)
    for cell in placed:
        _refuse_another(cell, out)
    record = _Record(settings, grid, placed, out)
    todo = [cell for cell in placed if not _finished(cell.settings, out / cell.name)]
    for cell in placed:
        if cell not in todo:
            record.done(cell, "skipped", None)
    todo = _convert(todo, settings.store, record, quiet=quiet)
    if todo:
        where, tasks = execution or Execution(), len(groups(todo))
        if where.scheduler is None and where.workers is None:
            where = replace(where, workers=min(os.cpu_count() or 1, tasks))
        # A scheduler's workers are on machines that nobody here knows.
        threads = 1 if where.workers is None else _blas_threads(min(where.workers, tasks))
        with executor(where, quiet=quiet) as workers:
            _run_all(workers, todo, out, record, threads, quiet=quiet)
    finished = [out / cell.name for cell in placed if _finished(cell.settings, out / cell.name)]
    # A cell by its name, which is that of its directory.
    of_cell = str(out / reference) if reference in {cell.name for cell in placed} else reference
    comparison = compare_runs(finished, of_cell)
    return {
        **record.value(),
        "comparison": comparison,
        "plots": plot_rate_distortion(comparison["rate_distortion"], out),
    }


def describe(result: dict[str, Any]) -> str:
    """A sweep for people: the table of its runs, then what failed.

    Args:
        result: From :func:`sweep`.
    """
    lines = [describe_comparison(result["comparison"])] if result["comparison"]["rows"] else []
    counts = {status: sum(cell["status"] == status for cell in result["cells"]) for status in ("done", "skipped")}
    lines.append(f"{counts['done']} runs made, {counts['skipped']} were there, {len(result['failed'])} failed")
    lines += [
        f"failed: {cell['name']}: {inline(cell['error'])}" for cell in result["cells"] if cell["status"] == "failed"
    ]
    lines += [f"drawn: {result['out']}/{name}" for name in result["plots"]]
    return "\n".join([*lines, f"sweep: {result['out']}"])


class _Record:
    """``sweep.json`` as it grows."""

    def __init__(self, settings: Settings, grid: Grid, all_cells: Sequence[Cell], out: Path) -> None:
        self._out = out
        self._head = {"store": settings.store, "out": str(out), "grid": asdict(grid)}
        self._cells: dict[str, dict[str, Any]] = {
            cell.name: {
                "name": cell.name,
                "run": str(out / cell.name),
                "settings": asdict(cell.settings),
                "status": "waiting",
                "seconds": None,
                "error": None,
                "pairs": {},
            }
            for cell in all_cells
        }
        self._write()

    def done(self, cell: Cell, status: str, seconds: float | None) -> None:
        """Note a finished cell."""
        rows = compare_runs([self._out / cell.name])["rows"]
        pairs = {row["pair"]: {name: row[name] for name in ("val_r2", "r2", "r2_ci95")} for row in rows}
        self._cells[cell.name] |= {"status": status, "seconds": seconds, "pairs": pairs}
        self._write()

    def failed(self, cell: Cell, error: BaseException) -> None:
        """Note why a cell has no run."""
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, FeatstoreError) else f"{type(error).__name__}: "
        self._cells[cell.name] |= {"status": "failed", "error": f"{kind}{text}"}
        self._write()

    def value(self) -> dict[str, Any]:
        """The file's content."""
        failed = [name for name, cell in self._cells.items() if cell["status"] == "failed"]
        value: dict[str, Any] = jsonable({**self._head, "cells": list(self._cells.values()), "failed": failed})
        return value

    def _write(self) -> None:
        write_sweep(self._out, Sweep.parse(self.value()))


def _finished(settings: Settings, run: Path) -> bool:
    """Whether a directory holds the run that these settings make."""
    if not all((run / name).is_file() for name in ("metrics.json", "adapter.json", "run.yaml")):
        return False
    return load_settings(run / "run.yaml") == settings


def _refuse_another(cell: Cell, out: Path) -> None:
    run = check_folder(out, cell.name, make=False)
    if (run / "adapter.json").is_file() and not _finished(cell.settings, run):
        raise SpecError(f"{run} holds a run of other settings; choose another --out, or remove that directory")
    if run.exists() and not (run / "run.yaml").is_file() and any(p.name[0] != "." for p in run.iterdir()):
        # A cell that is done again begins with an empty directory; what is in this one is not ours to remove.
        raise SpecError(f"{run} holds something that is no run; choose another --out, or remove that directory")


def _convert(todo: Sequence[Cell], store: str, record: _Record, *, quiet: bool) -> list[Cell]:
    """Make the stores in other formats; the cells of one that cannot be made fail, and the rest is returned."""
    from featstore.store.conversion.convert import convert

    failed: dict[str, FeatstoreError] = {}
    for cell in todo:
        if cell.form is None or cell.settings.store == store or cell.settings.store in failed:
            continue
        try:
            # Returns at once where it is there already, and goes on where it was interrupted.
            convert(Path(store), Path(cell.settings.store), form=cell.form, quiet=quiet)
        except FeatstoreError as error:
            failed[cell.settings.store] = error
    for cell in todo:
        if cell.settings.store in failed:
            record.failed(cell, failed[cell.settings.store])
    return [cell for cell in todo if cell.settings.store not in failed]


def _run_all(
    executor: Executor, todo: Sequence[Cell], out: Path, record: _Record, threads: int, *, quiet: bool
) -> None:
    tasks: dict[Any, list[Cell]] = {}
    for group in groups(todo):
        settings, names = [cell.settings for cell in group], [cell.name for cell in group]
        if len(group) == 1:
            tasks[executor.submit(run_cell, settings[0], str(out), names[0], threads)] = group
        else:
            tasks[executor.submit(run_together, settings, str(out), names, threads)] = group
    with progress("sweep", len(todo), "runs", quiet=quiet) as tick:
        for task in executor.as_completed(tasks):
            group = tasks[task]
            # Workers that died over a cell again and again are an error of that cell as well.
            error = task.exception()
            result = [error] * len(group) if error is not None else task.result()
            for cell, outcome in zip(group, result if isinstance(result, list) else [result], strict=True):
                if isinstance(outcome, BaseException):
                    record.failed(cell, outcome)
                else:
                    record.done(cell, "done", outcome)
                tick(1)


def groups(todo: Sequence[Cell]) -> list[list[Cell]]:
    """Which cells are made together: closed forms over the same rows, which share most of their work.

    Args:
        todo: Cells.

    Returns:
        The cells, in their order; those that go together where the first of them stands.
    """
    found: dict[object, list[Cell]] = {}
    for cell in todo:
        base = share(cell.settings)
        # By its text, since settings are compared and not hashed.
        found.setdefault(("alone", cell.name) if base is None else repr(base), []).append(cell)
    return list(found.values())


def run_cell(settings: Settings, out: str, name: str, threads: int = 1) -> float:
    """What a worker does: one run, alone in its directory.

    Args:
        settings: Of the run.
        out: Directory of the sweep.
        name: Of the cell.
        threads: Of BLAS.

    Returns:
        Seconds it took.

    Raises:
        FeatstoreError: Anything wrong with the store, the models, the layers or the fit.
    """
    from threadpoolctl import threadpool_limits

    from align.runs.train import train

    run = Path(out) / name
    start = time.perf_counter()
    with _ONE_AT_A_TIME, threadpool_limits(threads), locked(check_folder(Path(out), _LOCKS) / name):
        # Whoever held the lock may have finished meanwhile.
        if not _finished(settings, run):
            resume = _begun(settings, run)
            if not resume:
                # What a killed worker left of another kind is no run.
                remove_folder(Path(out), name)
            try:
                train(settings, run, resume=resume, quiet=True)
            except (StoreStateError, CorruptDataError):
                if not resume:
                    raise
                # A state that cannot be gone on with costs time, not the cell.
                remove_folder(Path(out), name)
                train(settings, run, quiet=True)
    return time.perf_counter() - start


def run_together(settings: list[Settings], out: str, names: list[str], threads: int) -> list[float | Exception]:
    """What a worker does with closed forms over the same rows: several runs, each in a directory of its own.

    Args:
        settings: Of the runs.
        out: Directory of the sweep.
        names: Of the cells.
        threads: Of BLAS.

    Returns:
        By cell the seconds it took, a share of those that all of them took together, or why there is no run.
    """
    from threadpoolctl import threadpool_limits

    start = time.perf_counter()
    with ExitStack() as held:
        held.enter_context(_ONE_AT_A_TIME)
        held.enter_context(threadpool_limits(threads))
        # In one order, whoever holds some of them: or two workers could wait for each other.
        for name in sorted(names):
            held.enter_context(locked(check_folder(Path(out), _LOCKS) / name))
        todo = [(own, name) for own, name in zip(settings, names, strict=True) if not _finished(own, Path(out) / name)]
        for _, name in todo:
            remove_folder(Path(out), name)
        failed = train_together([(own, Path(out) / name) for own, name in todo]) if todo else []
    each = (time.perf_counter() - start) / max(len(todo), 1)
    errors = {name: error for (_, name), error in zip(todo, failed, strict=True) if error is not None}
    return [errors.get(name, each) for name in names]


def _blas_threads(workers: int) -> int:
    """Threads of BLAS for each of some workers of this machine: as many as this process has, divided among them."""
    from threadpoolctl import threadpool_info

    own = [int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max(1, max(own, default=1) // workers)


def _begun(settings: Settings, run: Path) -> bool:
    """Whether a directory holds the beginning of this very training, and a state to go on from."""
    if not (settings.by_gradient and (run / "run.yaml").is_file() and any(run.glob("checkpoints/*"))):
        return False
    try:
        return not (run / "adapter.json").exists() and load_settings(run / "run.yaml") == settings
    except FeatstoreError:
        # Cut off while it was written.
        return False
