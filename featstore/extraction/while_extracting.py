"""Moments beside rows: each shard of a model is summed with the models before it as soon as it is stored.

The rows are read from the page cache, where they were written a moment ago; those of the models before it once. Each
process sums the shards it writes. What a kill interrupts is summed from the rows that are there.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from featstore.extraction.job import Job
from featstore.extraction.paired import PlannedPairs, first_rows_of
from featstore.runtime.processes import Ranks
from featstore.store.moments.pieces import PieceSums
from featstore.store.moments.stored import SPLITS, Site, all_blocks
from featstore.store.moments.sums import Rows
from featstore.store.moments.writing import pieces_of, sums_aside
from featstore.store.read.files import LocalFiles
from featstore.store.read.rows import RowReader
from featstore.store.read.store import Store, open_files
from featstore.store.read.vectors import read_chunk
from featstore.store.write.row_writer import RowArrays
from featstore.store.write.writer import StoreWriter


class WhileExtracting:
    """Sums of one model's shards with those of every model before it.

    Args:
        writer: The store's writer; tokens and pilots of all these models are committed, and the rows of those before.
        job: From :func:`featstore.extraction.job.prepare`.
        second: The model that is being extracted.
        ranks: This process among several.
    """

    def __init__(self, writer: StoreWriter, job: Job, second: str, ranks: Ranks) -> None:
        before = models_before(writer, job, second)
        self._rows = job.plan.models[second].rows
        self._shard_rows = job.encoding.shard_rows
        count, size = pieces_of(writer.view, second)
        self._per_shard = self._shard_rows // size
        shards = ranks.share(-(-self._rows // self._shard_rows))
        self._waiting = [p for p in range(count) if shards is None or p // self._per_shard in shards]
        self._sums: list[tuple[PieceSums, _WrittenRows]] = []
        for first in before:
            wanted = dict.fromkeys(range(len(SPLITS)), all_blocks(writer.view, (first, second)))
            memory = job.moments_memory // len(before)
            sums = sums_aside(writer, (first, second), wanted, memory, ranks)
            self._sums.append((sums, _WrittenRows(writer, job, first, second, size)))

    def stored(self, row: int) -> None:
        """Sum what is new.

        Args:
            row: The rows of this process before this one are stored, of every layer.
        """
        while self._waiting:
            piece = self._waiting[0]
            if min((piece // self._per_shard + 1) * self._shard_rows, self._rows) > row:
                return
            for sums, source in self._sums:
                if sums.missing(piece):
                    sums.add(piece, source)
            del self._waiting[0]

    def finish(self) -> None:
        """Sum what is left of this process's shards, and leave the sums to the process that stores them."""
        self.stored(self._rows)
        for sums, _ in self._sums:
            sums.flush()


def models_before(writer: StoreWriter, job: Job, second: str) -> list[str]:
    """The models whose rows are stored when those of another are, and with which that one is summed meanwhile.

    None where moments are not asked for, and none where the store was complete: what is added to it may change its
    sinks, and so what there is to sum.

    Args:
        writer: The store's writer; its root is there.
        job: From :func:`featstore.extraction.job.prepare`.
        second: The model that is being extracted.
    """
    if job.moments != "add" or (job.recorded and job.recorded.complete):
        return []
    names, order = list(job.infos), writer.view.models
    return [name for name in names[: names.index(second)] if order.index(name) < order.index(second)]


class _WrittenRows:
    """Rows and norms of two models as they are stored, before the store says how many there are."""

    def __init__(self, writer: StoreWriter, job: Job, first: str, second: str, size: int) -> None:
        self._writer, self._job, self._second, self._size = writer, job, second, size
        self._pairs = PlannedPairs.of(job, first, second)
        self._first_row = {name: first_rows_of(job.plan.models[name]) for name in (first, second)}
        store = writer.view
        self._limit = {
            name: {int(k): job.sink_threshold * v for k, v in store.median_norms(name).items()}
            for name in (first, second)
        }

    def numbers(self, piece: int, split: int) -> Mapping[str, NDArray[np.int64]]:
        """As :class:`featstore.store.moments.pieces.PairedRows`."""
        numbers, splits = self._pairs.between(self._second, piece * self._size, (piece + 1) * self._size)
        keep = splits == split
        numbers = {name: rows[keep] for name, rows in numbers.items()}
        keep = np.ones(int(keep.sum()), dtype=bool)
        for name, rows in numbers.items():
            keep &= ~self._sinks(name, rows)
        return {name: rows[keep] for name, rows in numbers.items()}

    def _sinks(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        sink = self._first_row[name][rows]
        for layer, limit in self._limit[name].items():
            if len(rows):
                sink |= self._norms(name, layer, rows) > limit
        return sink

    def _norms(self, name: str, layer: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if layer not in self._job.row_layers(name):
            return self._store().norms(name, layer)[rows]
        size = self._job.encoding.shard_rows
        first = int(rows[0]) // size
        folder = self._writer.path / "models" / name / "norm" / str(layer) / "c"
        held = [
            read_chunk(folder / str(shard), np.dtype("<f4"), size) for shard in range(first, int(rows[-1]) // size + 1)
        ]
        return np.concatenate(held)[rows - first * size]

    def rows(self, site: Site, numbers: NDArray[np.int64]) -> Rows:
        """As :class:`featstore.store.moments.pieces.PairedRows`."""
        model, layer = site
        if layer not in self._job.row_layers(model):
            return self._store().rows(model, layer)[numbers]
        job, base = self._job, self._writer.path / "models" / model
        rows, width = job.plan.models[model].rows, job.infos[model].hidden
        form, layout, size = job.encoding.form, job.encoding.layout, job.encoding.shard_rows
        arrays = RowArrays(rows, width, (layer,), size, form, layout)
        scale = self._store().vector(f"models/{model}/column_scale/{layer}") if form.column_scaled else None
        document = arrays.documents(model, layer, rows)[f"models/{model}/resid/{layer}"]
        return RowReader(base / "resid" / str(layer), document, base / "row_scale" / str(layer), scale)[numbers]

    def _store(self) -> Store:
        """The store as it is now, for arrays that are written whole."""
        return open_files(LocalFiles(self._writer.path), allow_incomplete=True)
