"""What ``sweep.json`` holds: the cells of a grid and how far each is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from featstore.runtime.records import (
    EMPTY,
    Amount,
    Fault,
    Interval,
    Number,
    Record,
    Size,
    Table,
    read,
    write,
)
from featstore.runtime.schema import shown

#: How far a cell is.
STATUSES = ("waiting", "done", "skipped", "failed")


class SweepGrid(Record):
    """What varies.

    Attributes:
        types: Types of map.
        ranks: Ranks.
        formats: Formats of the store.
        layers: Source layers, as typed.
        latents: Latents of a window.
        latent_dims: Numbers of a latent.
    """

    types: tuple[str, ...] = ()
    ranks: tuple[Size, ...] = ()
    formats: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    latents: tuple[Size, ...] = ()
    latent_dims: tuple[Size, ...] = ()


class SweepFigures(Record):
    """R2 of one layer pair of a cell.

    Attributes:
        val_r2: On validation rows.
        r2: On test rows.
        r2_ci95: Its 95 % interval over documents.
    """

    val_r2: Number | None = None
    r2: Number | None = None
    r2_ci95: Interval | None = None


class SweepCell(Record):
    """One run of a sweep.

    Attributes:
        name: Of the cell, and of its run directory.
        run: The run directory.
        settings: Its `run.yaml`.
        status: ``waiting``, ``done``, ``skipped`` (it was there) or ``failed``.
        seconds: That it took.
        error: Why it failed.
        pairs: By layer pair.
    """

    always: ClassVar[tuple[str, ...]] = ("name", "status")

    name: str = ""
    run: str | None = None
    settings: Table[Any] = EMPTY
    status: str = STATUSES[0]
    seconds: Amount | None = None
    error: str | None = None
    pairs: Table[SweepFigures] = EMPTY

    def faults(self) -> Iterator[Fault]:
        """A status that is none, or a name that is no directory's."""
        if self.status not in STATUSES:
            yield ("status",), f"is {shown(self.status)}, expected one of {', '.join(STATUSES)}"
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\0"):
            yield ("name",), f"is {shown(self.name)}, expected the name of a directory"


class Sweep(Record):
    """Contents of ``sweep.json``: the runs of a grid.

    Attributes:
        store: The store that formats are converted from.
        out: The sweep's directory.
        grid: What varies.
        cells: One run each, in the order of the grid.
        failed: Names of the cells that failed.
    """

    file: ClassVar[str] = "sweep.json"
    made_by: ClassVar[str] = "align sweep"
    always: ClassVar[tuple[str, ...]] = ("cells",)

    store: str | None = None
    out: str | None = None
    grid: SweepGrid = SweepGrid()
    cells: tuple[SweepCell, ...] = ()
    failed: tuple[str, ...] = ()


def read_sweep(where: Path | str) -> Sweep:
    """Read ``sweep.json``.

    Args:
        where: Its directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(Sweep, where)


def write_sweep(directory: Path, sweep: Sweep) -> Path:
    """Write ``sweep.json`` into a directory and return its path."""
    return write(sweep, directory)
