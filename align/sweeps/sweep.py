"""Many runs over one store: the cells of a grid on several workers, resumable, in one table at the end.

A cell is a run directory of its own. Whoever works on one holds its lock, which goes with the process, so two workers
(one of them thought dead) never write to the same directory. A training that a killed one left goes on from its last
checkpoint; anything else of it is done again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align.execution.choice import executor
from align.execution.executor import Executor
from align.execution.options import Execution
from align.runs.plots import plot_rate_distortion
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

__all__ = ["Cell", "Grid", "cells", "describe", "parse_grid", "run_cell", "sweep"]

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
        where = execution or Execution()
        if where.scheduler is None and where.workers is None:
            where = replace(where, workers=min(os.cpu_count() or 1, len(todo)))
        with executor(where, quiet=quiet) as workers:
            _run_all(workers, todo, out, record, quiet=quiet)
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


def _run_all(executor: Executor, todo: Sequence[Cell], out: Path, record: _Record, *, quiet: bool) -> None:
    tasks = {executor.submit(run_cell, cell.settings, str(out), cell.name): cell for cell in todo}
    with progress("sweep", len(tasks), "runs", quiet=quiet) as tick:
        for task in executor.as_completed(tasks):
            cell = tasks[task]
            # Workers that died over a cell again and again are an error of that cell as well.
            error = task.exception()
            if error is None:
                record.done(cell, "done", task.result())
            else:
                record.failed(cell, error)
            tick(1)


def run_cell(settings: Settings, out: str, name: str) -> float:
    """What a worker does: one run, alone in its directory.

    Args:
        settings: Of the run.
        out: Directory of the sweep.
        name: Of the cell.

    Returns:
        Seconds it took.

    Raises:
        FeatstoreError: Anything wrong with the store, the models, the layers or the fit.
    """
    from threadpoolctl import threadpool_limits

    from align.runs.train import train

    run = Path(out) / name
    start = time.perf_counter()
    with _ONE_AT_A_TIME, threadpool_limits(1), locked(check_folder(Path(out), _LOCKS) / name):
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


def _begun(settings: Settings, run: Path) -> bool:
    """Whether a directory holds the beginning of this very training, and a state to go on from."""
    if not (settings.by_gradient and (run / "run.yaml").is_file() and any(run.glob("checkpoints/*"))):
        return False
    try:
        return not (run / "adapter.json").exists() and load_settings(run / "run.yaml") == settings
    except FeatstoreError:
        # Cut off while it was written.
        return False
