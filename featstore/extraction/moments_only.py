"""Moments without rows: two models read the same windows side by side, and only sums reach the disk.

The states are rounded to the store's format and cut into the same pieces as rows read from a store would be, so the
moments are, bit for bit, those of an extraction that kept its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.extraction.forward import BatchReader, pack, unpacked
from featstore.extraction.job import Job
from featstore.extraction.pilot import Pilot, read_pilot, write_pilot
from featstore.extraction.rows import open_reader
from featstore.runtime.console import Tick, err, human_bytes, progress
from featstore.runtime.processes import Ranks
from featstore.store import Store
from featstore.store.format.elements import Format
from featstore.store.moments.stored import (
    CUT_ROWS,
    SPLITS,
    Site,
    SitePair,
    StoredMoments,
    all_blocks,
    commit_blocks,
    groups,
    missing_blocks,
)
from featstore.store.moments.sums import BlockSums
from featstore.store.read.first import first_rows
from featstore.store.read.pairs import last_at_each_end, match_ends
from featstore.store.write.index import write_pairs, write_sinks
from featstore.store.write.writer import StoreWriter
from featstore.text.plan import PlannedModel

Rows = dict[int, NDArray[np.float32]]


def sum_moments(writer: StoreWriter, job: Job, *, quiet: bool = False) -> None:
    """Write norms, masks, pair indexes and moments of every two models; no rows.

    Args:
        writer: The store's writer; root, models, text and tokens are there.
        job: From :func:`featstore.extraction.job.prepare`, with every model of the store.
        quiet: No progress.

    Raises:
        SpecError: ``--moments-memory`` is too little for a single block.
        NoSpaceError: The disk cannot hold them.
        NonFiniteStateError: A model produced NaN or infinity.
    """
    for first, second in combinations(job.infos, 2):
        _sum_pair(writer, job, first, second, quiet=quiet)


def _norms_unit(name: str) -> str:
    return f"models/{name}/norms"


def _norms_basis(job: Job, name: str) -> str:
    return f"{job.plan.models[name].hash} {job.layers[name]}"


def _sum_pair(writer: StoreWriter, job: Job, first: str, second: str, *, quiet: bool) -> None:
    names = (first, second)
    new = [n for n in names if (writer.entry(_norms_unit(n)) or {}).get("basis") != _norms_basis(job, n)]
    store = writer.view
    wanted = [set(all_blocks(store, names)) for _ in SPLITS]
    if not new:
        stored = _masked(writer, names)
        wanted = [set(missing_blocks(writer, stored, split)) for split in range(len(SPLITS))]
        if not any(wanted):
            return
    readers = {name: open_reader(writer, job, name, Ranks(), quiet=quiet) for name in names}
    for name in names:
        if read_pilot(writer, name, job.layers[name]) is None:
            write_pilot(writer, readers[name], job.layers[name], job.encoding.form)
    # Every split has sums of its own.
    needed = [block for block in all_blocks(store, names) if any(block in split for split in wanted)]
    passes = list(groups(store, needed, job.moments_memory // len(SPLITS)))
    if not quiet and len(passes) > 1:
        memory = human_bytes(job.moments_memory)
        err.print(
            f"{len(needed)} blocks in {len(passes)} passes over the text; more --moments-memory than {memory} "
            "needs fewer"
        )
    total = sum(job.plan.models[name].rows for name in names) * len(passes)
    with progress(f"moments {first} {second}", total, "tok", quiet=quiet) as tick:
        for blocks in passes:
            by_split = [[block for block in blocks if block in split] for split in wanted]
            _pass(writer, job, readers, by_split, new, tick)
            new = []


def _masked(writer: StoreWriter, names: tuple[str, str]) -> StoredMoments:
    """Derive masks and pairs from the norms and tokens that are there."""
    for name in names:
        write_sinks(writer, name)
    write_pairs(writer, *names, "end")
    return StoredMoments(writer.view, *names)


def _pass(
    writer: StoreWriter,
    job: Job,
    readers: dict[str, BatchReader],
    blocks: list[list[SitePair]],
    new: list[str],
    tick: Tick,
) -> None:
    """Sum each split's blocks over the whole text; the norms of new models are gathered on the way."""
    first, second = readers
    store = writer.view
    sites = {site for split in blocks for block in split for site in block}
    origins = {site: store.origin(*site) for site in sites}
    sums = [BlockSums(origins, split, block_rows=CUT_ROWS) for split in blocks]
    joined = _Joined.of(job, first, second)
    masks = {name: _Mask(store, job, name) for name in readers}
    streams = {name: _Stream(_groups_of(writer, job, reader, masks[name], tick)) for name, reader in readers.items()}
    done, windows = 0, len(job.plan.corpus.window_document)
    while done < windows:
        for stream in streams.values():
            stream.reach(done + 1)
        end = min(stream.end for stream in streams.values())
        _add(sums, joined, streams, masks, done, end)
        for stream in streams.values():
            stream.forget(end)
        done = end
    for name in new:
        masks[name].commit(writer)
    stored = _masked(writer, (first, second))
    for split, part in enumerate(sums):
        commit_blocks(writer, stored, split, part.blocks())


def _add(
    sums: list[BlockSums[Site]],
    joined: _Joined,
    streams: dict[str, _Stream],
    masks: dict[str, _Mask],
    start: int,
    end: int,
) -> None:
    rows, splits = joined.between(start, end)
    keep = np.ones(len(splits), dtype=bool)
    for name, numbers in rows.items():
        keep &= ~masks[name].sink[numbers]
    for split, part in enumerate(sums):
        chosen = keep & (splits == split)
        part.add({(name, layer): streams[name].take(layer, rows[name][chosen]) for name, layer in part.nodes})


@dataclass(frozen=True)
class _Joined:
    """All pairs of two models, sorted by window."""

    window: NDArray[np.int64]
    rows: dict[str, NDArray[np.int64]]
    split: NDArray[np.uint8]

    @classmethod
    def of(cls, job: Job, first: str, second: str) -> _Joined:
        sides = []
        for name in (first, second):
            planned = job.plan.models[name]
            sides.append(last_at_each_end(_windows(planned), planned.byte_end, planned.special, planned.exact))
        text = job.plan.corpus
        keys, row_a, row_b = match_ends(sides[0], sides[1], "end", text.window_offset, text.window_stop, text.text)
        split = text.document_split[text.window_document[keys >> 32]]
        return cls(keys >> 32, {first: row_a, second: row_b}, split)

    def between(self, start: int, end: int) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.uint8]]:
        """Row numbers by model, and splits, of the pairs in windows start..end."""
        part = slice(*np.searchsorted(self.window, [start, end]))
        return {name: rows[part] for name, rows in self.rows.items()}, self.split[part]


def _windows(planned: PlannedModel) -> NDArray[np.int32]:
    """The window of every row: int32 ``(n,)``."""
    return np.repeat(np.arange(len(planned.row_start) - 1, dtype=np.int32), np.diff(planned.row_start))


class _Mask:
    """Norms and sinks of one model, filled as its rows come by."""

    def __init__(self, store: Store, job: Job, name: str) -> None:
        planned = job.plan.models[name]
        self.norms = {layer: np.zeros(planned.rows, np.float32) for layer in job.layers[name]}
        self.sink = first_rows(_windows(planned), planned.byte_end, planned.special)
        self._limit = {int(k): job.sink_threshold * v for k, v in store.median_norms(name).items()}
        self._name, self._basis = name, _norms_basis(job, name)

    def put(self, layer: int, first: int, norms: NDArray[np.float32]) -> None:
        place = slice(first, first + len(norms))
        self.norms[layer][place] = norms
        self.sink[place] |= norms > self._limit[layer]

    def commit(self, writer: StoreWriter) -> None:
        arrays = {f"models/{self._name}/norm/{layer}": norms for layer, norms in self.norms.items()}
        writer.vectors(_norms_unit(self._name), arrays, basis=self._basis)


def _groups_of(
    writer: StoreWriter, job: Job, reader: BatchReader, mask: _Mask, tick: Tick
) -> Iterator[tuple[int, int, Rows]]:
    """Group by group: the window after it, its first row, and its states in document order, rounded as if stored."""
    name, layers = reader.name, job.layers[reader.name]
    form, pilot = job.encoding.form, read_pilot(writer, name, layers) or Pilot({})
    starts = reader.planned.row_start
    for first, end in job.plan.groups(name):
        base = int(starts[first])
        states = {k: np.empty((int(starts[end]) - base, job.infos[name].hidden), np.float32) for k in layers}
        for batch in job.plan.batches(name, first, end):
            for layer, values in reader.states(batch, layers).items():
                rows, norms = _rounded(values, form, pilot.column_scale.get(layer), reader, batch, layer)
                at = 0
                for w in batch:
                    count = int(starts[w + 1] - starts[w])
                    place = int(starts[w])
                    states[layer][place - base : place - base + count] = rows[at : at + count]
                    mask.put(layer, place, norms[at : at + count])
                    at += count
            tick(reader.tokens_in(batch))
        yield end, base, states


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
    """States of one model that have been read and not yet been summed."""

    def __init__(self, groups: Iterator[tuple[int, int, Rows]]) -> None:
        self.end = 0
        self._groups = groups
        self._held: list[tuple[int, int, Rows]] = []

    def reach(self, window: int) -> None:
        """Read on until the states of all windows before this one are there."""
        while self.end < window:
            self._held.append(next(self._groups))
            self.end = self._held[-1][0]

    def take(self, layer: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows by number, ascending, all of them held."""
        parts = []
        for _, base, states in self._held:
            inside = rows[(rows >= base) & (rows < base + len(states[layer]))]
            parts.append(states[layer][inside - base])
        return np.concatenate(parts)

    def forget(self, window: int) -> None:
        """Drop groups that end at or before a window."""
        self._held = [group for group in self._held if group[0] > window]
