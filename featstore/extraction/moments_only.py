"""Moments without rows: two models read the same windows side by side, and only sums reach the disk.

The states are rounded to the store's format and cut into the same pieces as rows read from a store would be, so the
moments are, bit for bit, those of an extraction that kept its rows. Several processes sum pieces of their own; norms,
from which the sinks follow, lie aside piece by piece until all are there.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.errors import StoreStateError
from featstore.extraction.forward import BatchReader, pack, unpacked
from featstore.extraction.job import Job
from featstore.extraction.paired import PlannedPairs, first_rows_of
from featstore.extraction.pilot import Pilot, read_pilot, write_pilot
from featstore.extraction.rows import open_reader
from featstore.runtime.console import progress
from featstore.runtime.processes import Ranks
from featstore.runtime.writing import replacing_by_name
from featstore.store import Store
from featstore.store.format.elements import Format
from featstore.store.moments.stored import SPLITS, Site, SitePair, StoredMoments, all_blocks
from featstore.store.moments.writing import missing_blocks, pieces_of, sums_aside, write_moments
from featstore.store.write.index import write_pairs, write_sinks
from featstore.store.write.writer import StoreWriter

#: By layer.
Rows = dict[int, NDArray[np.float32]]
Norms = dict[int, NDArray[np.float32]]


def sum_moments(writer: StoreWriter, job: Job, ranks: Ranks, *, quiet: bool = False) -> None:
    """Write norms, masks, pair indexes and moments of every two models; no rows.

    Args:
        writer: The store's writer; root, models, text and tokens are there.
        job: From :func:`featstore.extraction.job.prepare`, with every model of the store.
        ranks: This process among several; all of them must call this, the first writes into the store.
        quiet: No progress.

    Raises:
        SpecError: ``--moments-memory`` is too little for a single block.
        NoSpaceError: The disk cannot hold them.
        NonFiniteStateError: A model produced NaN or infinity.
    """
    for first, second in combinations(job.infos, 2):
        _sum_pair(writer, job, (first, second), ranks, quiet=quiet)


def _norms_unit(name: str) -> str:
    return f"models/{name}/norms"


def _norms_basis(job: Job, name: str) -> str:
    return f"{job.plan.models[name].hash} {job.layers[name]}"


def _sum_pair(writer: StoreWriter, job: Job, names: tuple[str, str], ranks: Ranks, *, quiet: bool) -> None:
    # What is missing is asked by every process before one of them changes it.
    ranks.wait()
    new = [n for n in names if (writer.entry(_norms_unit(n)) or {}).get("basis") != _norms_basis(job, n)]
    ranks.wait()
    wanted = {split: all_blocks(StoreWriter(writer.path).view, names) for split in range(len(SPLITS))}
    if not new:
        if ranks.first:
            _masked(writer, names)
        ranks.wait()
        wanted = _missing(StoreWriter(writer.path), names)
        if not any(wanted.values()):
            return
    readers = {name: open_reader(writer, job, name, ranks, quiet=quiet) for name in names}
    for name in names:
        if ranks.first and read_pilot(writer, name, job.layers[name]) is None:
            write_pilot(writer, readers[name], job.layers[name], job.encoding.form)
    ranks.wait()
    # Each process looks at what is there now.
    mine = writer if ranks.first else StoreWriter(writer.path)
    sums = sums_aside(mine, names, wanted, job.moments_memory, ranks)
    count, size = pieces_of(mine.view, names[1])
    norms = _NormsAside(sums.folder / "norms", new)
    share = ranks.share(count)
    todo = [p for p in (range(count) if share is None else share) if sums.missing(p) or not norms.has(p)]
    ends = [_windows_of_piece(job, names[1], piece, size) for piece in todo]
    streams = {name: _Stream(_groups_of(mine, job, reader, ends)) for name, reader in readers.items()}
    source = _StreamedRows(mine.view, job, names, size, streams)
    total = sum(int(np.diff(job.plan.models[name].row_start[[w, e]])[0]) for name in names for w, e in ends)
    with progress(f"moments {' '.join(names)}", total, "tok", quiet=quiet) as tick:
        for piece, (window, end) in zip(todo, ends, strict=True):
            for stream in streams.values():
                stream.forget(window)
                stream.reach(end)
            norms.put(piece, {name: source.norms(name, window, end) for name in new})
            sums.add(piece, source)
            tick(sum(int(np.diff(job.plan.models[name].row_start[[window, end]])[0]) for name in names))
    sums.flush()
    ranks.wait()
    if ranks.first:
        for name in new:
            arrays = norms.gathered(name, job, [_windows_of_piece(job, names[1], p, size) for p in range(count)])
            writer.vectors(_norms_unit(name), arrays, basis=_norms_basis(job, name))
        _masked(writer, names)
        write_moments(writer, *names, memory=job.moments_memory, quiet=quiet)


def _masked(writer: StoreWriter, names: tuple[str, str]) -> None:
    """Derive masks and pairs from the norms and tokens that are there."""
    for name in names:
        write_sinks(writer, name)
    write_pairs(writer, *names, "end")


def _missing(writer: StoreWriter, names: tuple[str, str]) -> dict[int, list[SitePair]]:
    stored = StoredMoments(writer.view, *names)
    return {split: missing_blocks(writer, stored, split) for split in range(len(SPLITS))}


def _windows_of_piece(job: Job, second: str, piece: int, size: int) -> tuple[int, int]:
    """The windows that hold a piece's rows: the first, and the one after the last."""
    starts = job.plan.models[second].row_start
    last = min((piece + 1) * size, int(starts[-1])) - 1
    first, end = np.searchsorted(starts, [piece * size, last], side="right").tolist()
    return first - 1, end


class _NormsAside:
    """Norms of a piece's windows, a file for every piece until all are there.

    Args:
        folder: Where; made.
        models: Whose norms are not stored yet.
    """

    def __init__(self, folder: Path, models: list[str]) -> None:
        self._folder, self._models = folder, models

    def has(self, piece: int) -> bool:
        """Whether a piece's norms are there, or nobody needs them."""
        return not self._models or self._path(piece).is_file()

    def put(self, piece: int, norms: Mapping[str, Norms]) -> None:
        """Write a piece's norms by model and layer."""
        if not self._models:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        flat: dict[str, Any] = {
            f"{name}/{layer}": values for name, own in norms.items() for layer, values in own.items()
        }
        with replacing_by_name(self._path(piece)) as aside, aside.open("wb") as handle:
            np.savez(handle, **flat)

    def gathered(self, name: str, job: Job, windows: list[tuple[int, int]]) -> dict[str, NDArray[np.float32]]:
        """The arrays of a model's norms, by path, from all pieces.

        Raises:
            StoreStateError: A piece's file is not whole.
        """
        planned = job.plan.models[name]
        found = {layer: np.zeros(planned.rows, np.float32) for layer in job.layers[name]}
        for piece, (window, end) in enumerate(windows):
            place = slice(int(planned.row_start[window]), int(planned.row_start[end]))
            try:
                with np.load(self._path(piece)) as held:
                    for layer, values in found.items():
                        values[place] = held[f"{name}/{layer}"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                self._path(piece).unlink(missing_ok=True)
                raise StoreStateError(
                    f"norms of {name} that lay aside are damaged; run the same command again"
                ) from error
        return {f"models/{name}/norm/{layer}": values for layer, values in found.items()}

    def _path(self, piece: int) -> Path:
        return self._folder / f"{piece:06d}.npz"


class _StreamedRows:
    """Rows of two models while they are in memory, and which of them are sinks."""

    def __init__(self, store: Store, job: Job, names: tuple[str, str], size: int, streams: dict[str, _Stream]) -> None:
        self._pairs, self._second, self._size = PlannedPairs.of(job, *names), names[1], size
        self._job, self._streams = job, streams
        self._first_row = {name: first_rows_of(job.plan.models[name]) for name in names}
        self._limit = {
            name: {int(k): job.sink_threshold * v for k, v in store.median_norms(name).items()} for name in names
        }

    def norms(self, name: str, window: int, end: int) -> Norms:
        """Norms of the rows of windows window..end, by layer."""
        rows = np.arange(*self._job.plan.models[name].row_start[[window, end]])
        return {layer: self._streams[name].norms(layer, rows) for layer in self._job.layers[name]}

    def numbers(self, piece: int, split: int) -> Mapping[str, NDArray[np.int64]]:
        """As :class:`featstore.store.moments.pieces.PairedRows`."""
        numbers, splits = self._pairs.between(self._second, piece * self._size, (piece + 1) * self._size)
        keep = splits == split
        for name, rows in numbers.items():
            sink = self._first_row[name][rows]
            for layer, limit in self._limit[name].items():
                sink |= self._streams[name].norms(layer, rows) > limit
            keep &= ~sink
        return {name: rows[keep] for name, rows in numbers.items()}

    def rows(self, site: Site, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """As :class:`featstore.store.moments.pieces.PairedRows`."""
        return self._streams[site[0]].take(site[1], numbers)


@dataclass(frozen=True)
class _Group:
    """A group of windows that was read: the window after it, its first row, states and norms in document order."""

    end: int
    base: int
    states: Rows
    norms: Norms


def _groups_of(writer: StoreWriter, job: Job, reader: BatchReader, wanted: list[tuple[int, int]]) -> Iterator[_Group]:
    """The groups that hold some of the windows wanted, with their states rounded as if stored."""
    name, layers = reader.name, job.layers[reader.name]
    form, pilot = job.encoding.form, read_pilot(writer, name, layers) or Pilot({})
    starts = reader.planned.row_start
    for first, end in job.plan.groups(name):
        if not any(window < end and first < stop for window, stop in wanted):
            continue
        base, count = int(starts[first]), int(starts[end] - starts[first])
        group = _Group(
            end,
            base,
            {k: np.empty((count, job.infos[name].hidden), np.float32) for k in layers},
            {k: np.empty(count, np.float32) for k in layers},
        )
        for batch in job.plan.batches(name, first, end):
            for layer, values in reader.states(batch, layers).items():
                rows, norms = _rounded(values, form, pilot.column_scale.get(layer), reader, batch, layer)
                at = 0
                for w in batch:
                    place = slice(int(starts[w]) - base, int(starts[w + 1]) - base)
                    stop = at + place.stop - place.start
                    group.states[layer][place], group.norms[layer][place] = rows[at:stop], norms[at:stop]
                    at = stop
        yield group


def _rounded(
    values: torch.Tensor,
    form: Format,
    scale: NDArray[np.float32] | None,
    reader: BatchReader,
    batch: NDArray[np.int64],
    layer: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States as they would come back from a store, and their norms."""
    on_device = None if scale is None else torch.from_numpy(scale.copy()).to(values.device)
    tensors = [tensor.cpu() for tensor in pack(values, form, on_device).tensors()]
    encoded = unpacked(form, tensors, reader.where(batch, layer))
    return form.decode(encoded.stored, encoded.row_scale, scale), encoded.norms


class _Stream:
    """States of one model that have been read and may still be summed."""

    def __init__(self, groups: Iterator[_Group]) -> None:
        self._groups = groups
        self._held: list[_Group] = []

    def reach(self, window: int) -> None:
        """Read on until the states of all windows before this one that are wanted are there."""
        while not self._held or self._held[-1].end < window:
            group = next(self._groups, None)
            if group is None:
                return
            self._held.append(group)

    def take(self, layer: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows by number, ascending, all of them held."""
        return self._gathered(rows, [group.states[layer] for group in self._held])

    def norms(self, layer: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Norms of rows by number, ascending, all of them held."""
        return self._gathered(rows, [group.norms[layer] for group in self._held])

    def _gathered(self, rows: NDArray[np.int64], values: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        parts = []
        for group, held in zip(self._held, values, strict=True):
            inside = slice(*np.searchsorted(rows, [group.base, group.base + len(held)]))
            parts.append(held[rows[inside] - group.base])
        return np.concatenate(parts)

    def forget(self, window: int) -> None:
        """Drop groups that end at or before a window."""
        self._held = [group for group in self._held if group.end > window]
