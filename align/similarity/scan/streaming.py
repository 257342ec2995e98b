"""All layers against all layers over a whole store: what CKA needs, summed by Dask in bounded memory.

Layers are packed into groups of bounded width. A *block* is a group with itself or with another; a *run* is a long
stretch of paired rows. One task sums one block over one run, in float32 products of a bounded number of rows that are
added up in float64: its result is small against the rows it read. Results of a block are added in the order of its
runs, one after the other, so which worker did what, or did it twice because another died, does not touch the bits. No
more tasks are under way at a time than fit into the memory allowed, and a block whose runs are all in is reduced to
four scalars for each pair of layers.

With G groups the rows of a layer are read G times; groups are as wide as the memory permits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.moments.scan import need_rows
from align.moments.scatter import Array
from align.similarity.scan.checkpoint import Kept, identity_of, read_blocks, write_block
from align.similarity.scan.partials import Adder, Partial, Rows, UnusableRow, columns_of, nothing, terms_of
from align.similarity.scan.planning import MEMORY, Plan, Run, Selection, Site, plan
from align.similarity.scan.terms import Terms, check_estimator, joined
from featstore.errors import (
    CorruptDataError,
    FeatstoreError,
    NonFiniteStateError,
    PairingError,
    SpecError,
    StoreAccessError,
    StoreStateError,
)
from featstore.runtime.console import Tick, progress
from featstore.store import Store, open_store
from featstore.store.read.pairs import Pairs

#: Rows of a batch of the minibatch estimator.
BATCH = 256
#: Seconds between two writes of a block's unfinished sums.
CHECKPOINT_SECONDS = 30.0


def stream(
    selection: Selection,
    sites: Sequence[Site],
    *,
    client: Any,
    checkpoint: Path | None = None,
    estimator: str = "debiased",
    memory: int = MEMORY,
    batch: int = BATCH,
    seed: int = 0,
    ranks: bool = True,
    quiet: bool = False,
    label: str = "cka",
) -> Terms:
    """Sum all that CKA needs of every two layers, over all pairs of a selection.

    The same selection, sites, memory and batches give the same bits on any number of workers.

    Args:
        selection: Pairs to use.
        sites: Layers of either side, no two the same.
        client: Dask client.
        checkpoint: Directory of the state from which a killed scan goes on; its files stay until
            :func:`align.similarity.scan.checkpoint.discard`. None to keep none.
        estimator: ``minibatch`` sums HSIC_1 over batches beside the rest. They are dealt by a seeded permutation from
            up to 16,384 pairs in a row, not from neighbours: a batch of one document would see how its text resembles
            itself. Not from the whole store either, which would read all of it for every few batches.
        memory: Bytes that all results, rows and sums may take at a time, on all workers together. The pairs' row
            numbers and the mapped store come on top.
        batch: Rows of a batch.
        seed: Of the batches.
        ranks: Whether to compute effective ranks: an eigenvalue problem for each layer.
        quiet: No progress.
        label: For the progress display.

    Raises:
        PairingError: No pairs of these models, or fewer than four, or fewer than a batch.
        SpecError: Unknown estimator, too little memory, no layers or one twice, or workers or scheduler were lost.
        StoreStateError: A layer without rows, another store where the workers look, or a checkpoint of another scan.
        CorruptDataError: Layers of unequal length, damaged data or checkpoint.
        NonFiniteStateError: A row that cannot be multiplied; the message names the first one.
        StoreAccessError: A worker cannot reach the store.
    """
    size = batch if check_estimator(estimator) == "minibatch" else None
    if not sites or len(set(sites)) < len(sites):
        raise SpecError("there are no layers to compare, or one is named twice; name each once")
    store, pairs = _opened(selection)
    _check(store, pairs, selection, sites, size)
    cuts = plan([store.model(site.model).width for site in sites], len(pairs), memory=memory, batch=size)
    identity = {
        **identity_of(store, pairs, selection, sites, cuts),
        "batch": size,
        "seed": size and seed,
        "ranks": ranks,
    }
    with _ONE_THREAD, progress(label, len(pairs), "rows", quiet=quiet) as tick:
        scan = _Scan(client, selection, tuple(sites), store, cuts, checkpoint, identity)
        found = scan.carry_out(size, seed, tick, ranks=ranks)
    return joined(found, cuts.groups, batched=size is not None)


class _Scan:
    """The process that hands out tasks and adds up their results."""

    def __init__(
        self, client: Any, selection: Selection, sites: tuple[Site, ...], store: Store, cuts: Plan,
        directory: Path | None, identity: dict[str, Any],
    ) -> None:  # fmt: skip
        self.client, self.selection, self.sites, self.cuts = client, selection, sites, cuts
        self.widths = [store.model(site.model).width for site in sites]
        self.origins = [_origin(store, site) for site in sites]
        self.directory, self.identity = directory, identity
        self.kept = {} if directory is None else read_blocks(directory, identity)
        # Twice as many as there are threads keep all of them busy; a scheduler may get its workers later.
        self.slots = min(cuts.slots, 2 * max(sum(client.nthreads().values()), 4))
        self.written = monotonic()
        areas = [self._area(block) for block in range(len(cuts.blocks))]
        self.shares = [area / sum(areas) for area in areas]

    def carry_out(self, batch: int | None, seed: int, tick: Tick, *, ranks: bool) -> list[dict[str, NDArray[Any]]]:
        """The terms of every block."""
        runs = self.cuts.runs
        # What is on disk counts as done.
        for block, kept in self.kept.items():
            tick(sum(stop - start for start, stop in runs[: kept.runs]) * self.shares[block])
        found = {block: kept.arrays for block, kept in self.kept.items() if kept.complete}
        tasks, waiting = self._tasks(batch, seed), deque[tuple[int, int, Any]]()
        total: Partial | None = None
        while True:
            while len(waiting) < self.slots and (task := next(tasks, None)) is not None:
                block, number, run = task
                # In order: what is waited for comes first.
                order = -(block * len(runs) + number)
                with self._asking():
                    future = self.client.submit(sum_run, self.selection, run, pure=False, priority=order)
                waiting.append((block, number, future))
            if not waiting:
                return [found[block] for block in range(len(self.cuts.blocks))]
            block, number, future = waiting.popleft()
            total = self._begun(block) if total is None else total
            with self._asking():
                part = future.result()
            total.include(part)
            # A future that is held keeps its result in a worker's memory.
            del future, part
            start, stop = runs[number]
            if number + 1 == len(runs):
                groups = self._groups(block)
                widths = [[self.widths[i] for i in group] for group in groups]
                found[block] = terms_of(total, widths, [self.origins[i] for i in groups[0]], ranks=ranks)
                total = None
                self._write(block, Kept(len(runs), True, found[block]))
            elif monotonic() - self.written >= CHECKPOINT_SECONDS:
                self._write(block, Kept(number + 1, False, dict(total.arrays)))
            tick((stop - start) * self.shares[block])

    def _tasks(self, batch: int | None, seed: int) -> Iterator[tuple[int, int, Run]]:
        for block in range(len(self.cuts.blocks)):
            groups = tuple(tuple(self.sites[i] for i in group) for group in self._groups(block))
            begun = self.kept[block].runs if block in self.kept else 0
            for number, (start, stop) in enumerate(self.cuts.runs):
                if number >= begun:
                    yield block, number, Run(groups, start, stop, self.cuts.cut, batch, seed)

    def _groups(self, block: int) -> list[tuple[int, ...]]:
        return [self.cuts.groups[g] for g in dict.fromkeys(self.cuts.blocks[block])]

    def _area(self, block: int) -> float:
        p, *q = (sum(self.widths[i] for i in group) for group in self._groups(block))
        return p * q[0] if q else p * p / 2

    def _begun(self, block: int) -> Partial:
        if block in self.kept:
            return Partial(**self.kept.pop(block).arrays)
        p, *q = ([self.widths[i] for i in group] for group in self._groups(block))
        return nothing(p, q[0] if q else None)

    def _write(self, block: int, kept: Kept) -> None:
        if self.directory is not None:
            write_block(self.directory, block, kept, self.identity)
            self.written = monotonic()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Around what asks the scheduler: says in a line what became of it."""
        from distributed import KilledWorker
        from distributed.client import ClosedClientError
        from distributed.comm import CommClosedError

        kept = "" if self.directory is None else f"; what is summed so far is kept in {self.directory}"
        try:
            yield
        except KilledWorker as error:
            raise SpecError(
                f"workers died over the same rows again and again ({error}): out of memory? Allow less memory or "
                f"run fewer workers{kept}"
            ) from error
        except (CancelledError, ClosedClientError, CommClosedError, TimeoutError) as error:
            raise SpecError(f"the Dask scheduler went away ({error!r}); start it and run again{kept}") from error


def sum_run(selection: Selection, run: Run) -> Partial:
    """What a worker does: reads a run of rows cut by cut, takes them about their origins, adds up.

    Args:
        selection: Of which pairs.
        run: Which layers, which of the pairs.

    Raises:
        StoreAccessError: The store cannot be reached from here.
        StoreStateError: Another store is there.
        NonFiniteStateError: A row that cannot be multiplied.
        CorruptDataError: Damaged data.
    """
    try:
        store, pairs = _opened_by_worker(selection)
        return _summed(store, pairs, run)
    except OSError as error:
        if isinstance(error, FeatstoreError):
            raise
        raise StoreAccessError(f"a worker cannot read {selection.path} ({error}); make it readable there") from error


def _summed(store: Store, pairs: Pairs, run: Run) -> Partial:
    widths = [[store.model(site.model).width for site in group] for group in run.groups]
    adder = Adder(widths[0], widths[1] if len(widths) > 1 else None, run.cut)
    most = min(run.cut, run.stop - run.start)
    room = [np.empty((most, sum(of)), np.float32) for of in widths]
    # Stored in float32: nothing is rounded but the difference.
    origins = {site: _origin(store, site).astype(np.float32) for group in run.groups for site in group}
    # The scheduler runs as many tasks as there are cores.
    with _ONE_THREAD:
        for start in range(run.start, run.stop, run.cut):
            stop = min(start + run.cut, run.stop)
            rows = [z[: stop - start] for z in room]
            for z, group, of in zip(rows, run.groups, widths, strict=True):
                for site, columns in zip(group, columns_of(of), strict=True):
                    states = _states(store, site, _numbers(pairs, site)[start:stop])
                    with np.errstate(invalid="ignore", over="ignore"):
                        np.subtract(states, origins[site], out=z[:, columns])
            try:
                adder.add(rows)
            except UnusableRow as bad:
                site = run.groups[bad.group][bad.index]
                number = int(_numbers(pairs, site)[start + bad.row])
                raise NonFiniteStateError(
                    f"row {number} of layer {site.layer} of {site.model!r} (pair {start + bad.row}) in {store.path} "
                    "holds NaN, infinity or a value too large to square; extract that layer again"
                ) from None
            if run.batch is not None:
                order = np.random.default_rng((run.seed, start // run.cut)).permutation(stop - start)
                adder.add_batches(rows, run.batch, order)
    return adder.total


def _numbers(pairs: Pairs, site: Site) -> NDArray[np.int64]:
    return pairs.row_source if site.source else pairs.row_target


def _states(store: Store, site: Site, numbers: NDArray[np.int64]) -> Rows:
    reader = store.rows(site.model, site.layer)
    # Rows in a row are read without being sorted, and need no copy where the file holds float32.
    if numbers[-1] - numbers[0] + 1 == len(numbers) and (np.diff(numbers) == 1).all():
        return reader[int(numbers[0]) : int(numbers[-1]) + 1]
    return reader[numbers]


def _origin(store: Store, site: Site) -> Array:
    return store.origin(site.model, site.layer).astype(np.float32).astype(np.float64)


def _opened(selection: Selection) -> tuple[Store, Pairs]:
    store = open_store(selection.path)
    if store.fingerprint != selection.fingerprint:
        raise StoreStateError(f"{selection.path} is not the store that was asked for, or has changed since; run again")
    pairs = store.pairs(selection.source, selection.target, selection.policy)
    return store, pairs.select(keep_sinks=selection.keep_sinks, roles=selection.roles)


@lru_cache(maxsize=4)
def _opened_by_worker(selection: Selection) -> tuple[Store, Pairs]:
    """A worker's own store and pairs, opened once for all its tasks."""
    try:
        return _opened(selection)
    except (StoreAccessError, StoreStateError):
        raise
    except (FeatstoreError, OSError) as error:
        raise StoreAccessError(
            f"a worker cannot open {selection.path} ({error}); it must be at the same place on every machine"
        ) from error


def _check(store: Store, pairs: Pairs, selection: Selection, sites: Sequence[Site], batch: int | None) -> None:
    """Refuse what the workers would stumble over."""
    least, what = (4, "CKA needs at least 4") if batch is None else (batch, f"one batch has {batch}")
    if len(pairs) < least:
        raise PairingError(
            f"{len(pairs)} pairs of {selection.source} and {selection.target}: {what}; extract more text"
        )
    need_rows(store, [[(site.model, site.layer) for site in sites]], "a scan of all rows")
    for site in sites:
        rows, expected = store.rows(site.model, site.layer).rows, store.model(site.model).rows
        if rows != expected:
            raise CorruptDataError(
                f"layer {site.layer} of {site.model!r} in {store.path} has {rows} rows, its model {expected}; "
                "extract that layer again"
            )


class _OneThread:
    """Holds BLAS to one thread from the first who enters to the last who leaves, on any threads of this process."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._limit: Any = None

    def __enter__(self) -> None:
        from threadpoolctl import threadpool_limits

        with self._lock:
            self._inside += 1
            self._limit = self._limit or threadpool_limits(1)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._limit is not None:
                self._limit.restore_original_limits()
                self._limit = None


#: The number of threads decides how BLAS cuts a product, and with that its last bits. The limit is the process's own,
#: while tasks come and go on several threads: one that ends must not lift it under another.
_ONE_THREAD = _OneThread()
