"""A model over its planned batches, its rows to the store.

What is missing decides what is computed: whole planned batches that touch a missing shard, and of those the layers that
lack it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.errors import StoreStateError
from featstore.extraction.forward import BatchReader, HostCopier, HostCopy, pack, unpacked
from featstore.extraction.job import Job
from featstore.extraction.pilot import Pilot, read_pilot, recorded_weights, write_pilot
from featstore.extraction.proof import tested
from featstore.extraction.while_extracting import WhileExtracting, models_before
from featstore.models.fingerprint import Weights
from featstore.models.weights import weights_fingerprint, weights_of
from featstore.runtime.background import Background
from featstore.runtime.console import Tick, err, progress
from featstore.runtime.processes import Ranks
from featstore.store.write.row_writer import RowArrays, RowWriter
from featstore.store.write.table import table_unit, write_table
from featstore.store.write.writer import StoreWriter

#: Single tokens of one forward pass that fills a layer 0 table.
_TABLE_BATCH = 8192


def open_reader(writer: StoreWriter, job: Job, name: str, ranks: Ranks, *, quiet: bool) -> BatchReader:
    """Load a model onto this process's device and put it on its plan.

    Args:
        writer: The store's writer.
        job: From :func:`featstore.extraction.job.prepare`.
        name: Model.
        ranks: This process among several.
        quiet: Do not say so.

    Raises:
        StoreStateError: The store has states of other weights under this name.
    """
    spec, compute = job.infos[name].spec, job.compute
    if not quiet:
        err.print(f"loading {name} ({spec.ref}){job.infos[name].peculiarities}")
    proven = tested(job.infos[name], compute, name, device=ranks.device(compute.device))
    weights = weights_of(spec, proven.stream.model, quiet=quiet)
    _refuse_other_weights(writer, job, name, weights)
    return BatchReader(proven.stream, job.plan, name, weights)


def refuse_other_weights(writer: StoreWriter, job: Job, *, quiet: bool) -> None:
    """Compare the weights on disk with those that a store was made with, before anything is loaded or written.

    Args:
        writer: The store's writer.
        job: From :func:`featstore.extraction.job.prepare`.
        quiet: No progress.

    Raises:
        StoreStateError: The store has states of other weights under a model's name.
    """
    for name, info in job.infos.items():
        # What was recorded before there were fingerprints of whole files is compared once the model is loaded.
        if recorded_weights(writer, name, job.layers[name]).whole:
            _refuse_other_weights(writer, job, name, Weights(weights_fingerprint(info.spec, quiet=quiet)))


def _refuse_other_weights(writer: StoreWriter, job: Job, name: str, weights: Weights) -> None:
    if recorded_weights(writer, name, job.layers[name]).differ(weights):
        raise StoreStateError(
            f"model {name!r} ({job.infos[name].spec.ref}) has other weights than those that {writer.path} was made "
            "with; use the same model, or choose another name or --store"
        )


def extract_rows(writer: StoreWriter, job: Job, name: str, ranks: Ranks, *, quiet: bool) -> None:
    """Store the rows of one model that are missing and this process's to write.

    Args:
        writer: The store's writer.
        job: From :func:`featstore.extraction.job.prepare`.
        name: Model.
        ranks: This process among several; all of them must call this.
        quiet: No progress.

    Raises:
        NoSpaceError: The disk is full.
        NonFiniteStateError: The model produced NaN or infinity.
    """
    planned = job.plan.models[name]
    arrays = RowArrays(
        rows=planned.rows,
        width=job.infos[name].hidden,
        layers=job.row_layers(name),
        shard_rows=job.encoding.shard_rows,
        form=job.encoding.form,
        layout=job.encoding.layout,
    )
    share = ranks.share(arrays.shards)
    rows = RowWriter(writer, name, arrays, share)
    pilot = read_pilot(writer, name, job.layers[name])
    basis = (writer.entry(table_unit(name)) or {}).get("basis")
    lacks_table = 0 in job.layers[name] and 0 not in arrays.layers and basis != planned.hash
    if pilot is not None and rows.complete and not lacks_table and ranks.world == 1:
        if models_before(writer, job, name):
            WhileExtracting(writer, job, name, ranks).finish()
        return
    reader = open_reader(writer, job, name, ranks, quiet=quiet)
    if ranks.first and pilot is None:
        write_pilot(writer, reader, job.layers[name], arrays.form)
    ranks.wait()
    pilot = read_pilot(writer, name, job.layers[name])
    if pilot is None:
        raise StoreStateError(f"the pilot of {name} is missing from {writer.path}; run the same command again")
    rows.use(pilot.column_scale)
    if lacks_table and ranks.first:
        _write_table(writer, reader, rows.arrays, pilot)
    summing = WhileExtracting(writer, job, name, ranks) if models_before(writer, job, name) else None
    groups = [g for g in job.plan.groups(name) if rows.missing(*planned.row_start[list(g)].tolist())]
    total = sum(int(planned.row_start[end] - planned.row_start[first]) for first, end in groups)
    with progress(f"extract {name}", total, "tok", quiet=quiet) as tick:
        # A layer 0 that is a table is there when all processes are.
        walk(reader, rows, groups, pilot, tick, None if lacks_table and ranks.world > 1 else summing)
    ranks.wait()
    if summing is not None:
        summing.finish()
    if ranks.first:
        rows.count_rows()


def walk(
    reader: BatchReader,
    rows: RowWriter,
    groups: list[tuple[int, int]],
    pilot: Pilot,
    tick: Tick,
    summing: WhileExtracting | None = None,
) -> None:
    """Read groups of windows and hand their rows to a thread that puts them in place and commits.

    Args:
        reader: The model on its plan.
        rows: Where they go; says which are missing.
        groups: ``(first window, window after the last)``, ascending.
        pilot: What the pilot froze.
        tick: Called with the number of tokens done.
        summing: Told which rows are stored.

    Raises:
        NoSpaceError: The disk is full.
        NonFiniteStateError: The model produced NaN or infinity.
    """
    starts, form = reader.planned.row_start, rows.arrays.form
    copier = HostCopier(reader.device)
    scales = {k: torch.from_numpy(v.copy()).to(reader.device) for k, v in pilot.column_scale.items()}
    with Background() as queue:
        for first, end in groups:
            for batch in reader.plan.batches(reader.name, first, end):
                spans = [(int(starts[w]), int(starts[w + 1])) for w in batch]
                layers = sorted({k for span in spans for k in rows.missing(*span)})
                if layers:
                    states = reader.states(batch, layers)
                    copy = copier.start([pack(states[k], form, scales.get(k)) for k in layers])
                    where = [reader.where(batch, k) for k in layers]
                    queue.submit(partial(_put, rows, copy, layers, spans, where))
                tick(reader.tokens_in(batch))
            queue.submit(partial(rows.advance, int(starts[end])))
            if summing is not None:
                queue.submit(partial(summing.stored, int(starts[end])))


def _put(
    rows: RowWriter,
    copy: HostCopy,
    layers: list[int],
    spans: list[tuple[int, int]],
    where: list[Callable[[int], str]],
) -> None:
    try:
        for layer, tensors, locate in zip(layers, copy.wait(), where, strict=True):
            encoded = unpacked(rows.arrays.form, tensors, locate)
            at = 0
            for first, end in spans:
                rows.put(first, layer, encoded.part(at, at + end - first))
                at += end - first
    finally:
        copy.release()


def _write_table(writer: StoreWriter, reader: BatchReader, arrays: RowArrays, pilot: Pilot) -> None:
    """Layer 0 depends on the token alone: one row for every id that occurs."""
    ids: NDArray[np.int32] = np.unique(reader.planned.ids)
    scale = pilot.column_scale.get(0)
    device_scale = None if scale is None else torch.from_numpy(scale.copy()).to(reader.device)
    parts = []
    for at in range(0, len(ids), _TABLE_BATCH):
        some = ids[at : at + _TABLE_BATCH]
        packed = pack(reader.embeddings(some), arrays.form, device_scale)
        tensors = [tensor.cpu() for tensor in packed.tensors()]
        parts.append(unpacked(arrays.form, tensors, partial(_token, reader.name, some)))
    write_table(writer, reader.name, ids, parts, arrays, basis=reader.planned.hash)


def _token(name: str, ids: NDArray[np.int32], place: int) -> str:
    return f"model {name!r}, layer 0, token id {ids[place]}"
