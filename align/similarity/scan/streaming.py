"""All layers against all layers over a whole store: what CKA needs, summed by workers in bounded memory.

Layers are packed into groups of bounded width. A *block* is a group with itself or with another; a *run* is a long
stretch of paired rows. One task sums one block over one run, in float32 products of a bounded number of rows that are
added up in float64: its result is small against the rows it read. Results of a block are added in the order of its
runs, one after the other, so which worker did what, or did it twice because another died, does not touch the bits. No
more tasks are under way at a time than fit into the memory allowed, and a block whose runs are all in is reduced to
four scalars for each pair of layers.

With G groups the rows of a layer are read G times; groups are as wide as the memory permits.

Sums by document (:mod:`align.similarity.scan.documents`) take the rows about the mean of all. A pass before finds it:
it reads every layer once more, and multiplies nothing. Runs end where documents end. A document that is longer than a
product of rows has runs of its own, whose sums stand beside the total until the last of them is in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.execution.executor import Executor
from align.moments.scan import need_rows
from align.similarity.scan.checkpoint import Kept, identity_of, misfit, read_blocks, write_block
from align.similarity.scan.documents import Between, close, nothing_between, terms_between
from align.similarity.scan.partials import Partial, columns_of, nothing, terms_of
from align.similarity.scan.planning import MEMORY, Plan, Run, Selection, Site, plan
from align.similarity.scan.terms import Terms, check_estimator, joined
from align.similarity.scan.worker import ONE_THREAD, by_document, opened, origin_of, sum_rows, sum_run
from align.solvers.row_effects import Documents
from featstore.errors import CorruptDataError, PairingError, SpecError, WorkersError
from featstore.runtime.console import Tick, progress
from featstore.store import Store
from featstore.store.read.pairs import Pairs

#: Rows of a batch of the minibatch estimator.
BATCH = 256
#: Seconds between two writes of a block's unfinished sums.
CHECKPOINT_SECONDS = 30.0
#: What reading a number costs, in multiplications of numbers.
_READING = 16.0
#: Before the names of the sums of a document that is not whole yet, in a checkpoint.
_OPEN = "open_"


def stream(
    selection: Selection,
    sites: Sequence[Site],
    *,
    executor: Executor,
    checkpoint: Path | None = None,
    estimator: str = "debiased",
    correct_features: bool = False,
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
        executor: What runs the tasks.
        checkpoint: Directory of the state from which a killed scan goes on; its files stay until
            :func:`align.similarity.scan.checkpoint.discard`. None to keep none.
        estimator: ``debiased`` sums by document, the others over all rows; ``minibatch`` sums HSIC_1 over batches
            beside these. They are dealt by a seeded permutation from up to 16,384 pairs in a row, not from neighbours:
            a batch of one document would see how its text resembles itself. Not from the whole store either, which
            would read all of it for every few batches.
        correct_features: Sum for every feature alone as well; of ``debiased``.
        memory: Bytes that all results, rows and sums may take at a time, on all workers together. The pairs' row
            numbers and the mapped store come on top.
        batch: Rows of a batch.
        seed: Of the batches.
        ranks: Whether to compute effective ranks: an eigenvalue problem for each layer.
        quiet: No progress.
        label: For the progress display.

    Raises:
        PairingError: No pairs of these models, or fewer than four, or fewer than a batch.
        SpecError: Unknown estimator, too little memory, no layers or one twice.
        WorkersError: Workers died again and again, or their scheduler went away.
        StoreStateError: A layer without rows, another store where the workers look, or a checkpoint of another scan.
        CorruptDataError: Layers of unequal length, damaged data or checkpoint.
        NonFiniteStateError: A row that cannot be multiplied; the message names the first one.
        StoreAccessError: A worker cannot reach the store.
    """
    size = batch if check_estimator(estimator) == "minibatch" else None
    if not sites or len(set(sites)) < len(sites):
        raise SpecError("there are no layers to compare, or one is named twice; name each once")
    store, pairs = opened(selection)
    _check(store, pairs, selection, sites, size)
    pairs, documents = by_document(selection) if estimator == "debiased" else (pairs, None)
    widths = [store.model(site.model).width for site in sites]
    cuts = plan(widths, len(pairs), memory=memory, batch=size, documents=documents)
    identity = {
        **identity_of(store, pairs, selection, sites, cuts, documents),
        "batch": size,
        "seed": size and seed,
        "ranks": ranks,
        **({"features": True} if correct_features else {}),
    }
    with ONE_THREAD, progress(label, len(pairs), "rows", quiet=quiet) as tick:
        scan = _Scan(executor, selection, tuple(sites), store, cuts, checkpoint, identity, documents, correct_features)
        with scan.under_way():
            found = scan.carry_out(size, seed, tick, ranks=ranks)
    return joined(found, cuts.groups, batched=size is not None, documents=documents, widths=widths)


class _Scan:
    """The process that hands out tasks and adds up their results."""

    def __init__(
        self, executor: Executor, selection: Selection, sites: tuple[Site, ...], store: Store, cuts: Plan,
        directory: Path | None, identity: dict[str, Any], documents: Documents | None, alone: bool,
    ) -> None:  # fmt: skip
        self.executor, self.selection, self.sites, self.cuts = executor, selection, sites, cuts
        self.widths = [store.model(site.model).width for site in sites]
        self.origins = [origin_of(store, site) for site in sites]
        self.directory, self.identity, self.documents, self.alone = directory, identity, documents, alone
        self.kept = {} if directory is None else read_blocks(directory, identity)
        # Twice as many as there are threads keep all of them busy; a scheduler may get its workers later.
        self.slots = min(cuts.slots, 2 * max(executor.width, 4))
        #: What was handed in, in order, each task behind what it is of.
        self.waiting = deque[tuple[Any, ...]]()
        self.written = monotonic()
        for block, kept in self.kept.items():
            if directory is not None and block < len(cuts.blocks):
                self._check_kept(directory, block, kept)
        areas = [self._area(block) for block in range(len(cuts.blocks))]
        # To find the means, every number is read once and added up.
        reading = 0.0 if documents is None else _READING * sum(self.widths)
        self.shares = [area / (sum(areas) + reading) for area in areas]

    def carry_out(self, batch: int | None, seed: int, tick: Tick, *, ranks: bool) -> list[dict[str, NDArray[Any]]]:
        """The terms of every block."""
        spans = self.cuts.spans
        # What is on disk counts as done.
        for block, kept in self.kept.items():
            tick(sum(span.stop - span.start for span in spans[: kept.runs]) * self.shares[block])
        found = {block: kept.arrays for block, kept in self.kept.items() if kept.complete}
        if self.documents is not None:
            self._find_means(tick, needed=len(found) < len(self.cuts.blocks))
        tasks, waiting = self._tasks(batch, seed), self.waiting
        total: Partial | Between | None = None
        open_: Between | None = None
        while True:
            while len(waiting) < self.slots and (task := next(tasks, None)) is not None:
                block, number, run = task
                means = [[self.origins[i] for i in group] for group in self._groups(block)]
                future = self.executor.submit(sum_run, self.selection, run, means if run.span else ())
                waiting.append((block, number, future))
            if not waiting:
                return [found[block] for block in range(len(self.cuts.blocks))]
            block, number, future = waiting.popleft()
            if total is None:
                total, open_ = self._begun(block)
            part = future.result()
            span = spans[number]
            if span.first and span.last:
                total.include(part)
            else:
                open_ = self._opened_document(block) if open_ is None else open_
                open_.include(part)
                if span.last and self.documents is not None and span.document is not None:
                    close(open_, self._widths(block), self.documents, span.document)
                    total.include(open_)  # type: ignore[arg-type]
                    open_ = None
            # A future that is held keeps its result in a worker's memory.
            del future, part
            if number + 1 == len(spans):
                found[block] = self._finished(block, total, ranks=ranks)
                total = None
                self._write(block, Kept(len(spans), True, found[block]))
            elif monotonic() - self.written >= CHECKPOINT_SECONDS:
                beside = {} if open_ is None else {f"{_OPEN}{name}": value for name, value in open_.arrays.items()}
                self._write(block, Kept(number + 1, False, {**total.arrays, **beside}))
            tick((span.stop - span.start) * self.shares[block])

    def _check_kept(self, directory: Path, block: int, kept: Kept) -> None:
        """Refuse a state whose arrays are not those that this block has at that point.

        Raises:
            CorruptDataError: They are others.
        """
        if kept.runs > len(self.cuts.spans) or kept.complete != (kept.runs == len(self.cuts.spans)):
            raise misfit(directory, block, f"it has {kept.runs} runs of {len(self.cuts.spans)}")
        p, *others = map(len, self._groups(block))
        if kept.complete:
            square, single = {"fro"}, set[str]()
            square |= {"batched", "d"} if self.documents is None else {"hsic"}
            if not others:
                single = {"a", "mean", "effective_rank"} | (set() if self.documents is None else {"size", "alone"})
            q = others[0] if others else p
            shapes = dict.fromkeys(square, (p, q)) | dict.fromkeys(single, (p,)) | {"counts": (3,)}
        else:
            fresh = self._fresh(block).arrays
            shapes = {name: array.shape for name, array in fresh.items()}
            if any(name.startswith(_OPEN) for name in kept.arrays):
                shapes |= {f"{_OPEN}{name}": array.shape for name, array in self._opened_document(block).arrays.items()}
        held = {name: array.shape for name, array in kept.arrays.items()}
        if held != shapes:
            wrong = next(name for name in sorted({*held, *shapes}) if held.get(name) != shapes.get(name))
            raise misfit(directory, block, f"{wrong!r} is {held.get(wrong)}, expected {shapes.get(wrong)}")
        if any(array.dtype.kind not in "fiub" for array in kept.arrays.values()):
            raise misfit(directory, block, "its arrays are no numbers")

    def _fresh(self, block: int) -> Partial | Between:
        """The sums of a block before any row."""
        if self.documents is not None:
            return self._opened_document(block)
        p, *q = self._widths(block)
        return nothing(p, q[0] if q else None)

    def _find_means(self, tick: Tick, *, needed: bool) -> None:
        """The means of all layers in place of the store's origins; rows about them sum to zero."""
        share = max(1 - sum(self.shares), 0.0)
        if not needed:
            tick(share * self.cuts.n)
            return
        spans, total = iter(self.cuts.spans), np.zeros(sum(self.widths))
        waiting = self.waiting
        while True:
            while len(waiting) < self.slots and (span := next(spans, None)) is not None:
                future = self.executor.submit(
                    sum_rows, self.selection, self.sites, span.start, span.stop, self.cuts.cut
                )
                waiting.append((span.stop - span.start, future))
            if not waiting:
                break
            rows, future = waiting.popleft()
            total += future.result()
            tick(rows * share)
        for place, columns in enumerate(columns_of(self.widths)):
            self.origins[place] = self.origins[place] + total[columns] / self.cuts.n

    def _widths(self, block: int) -> list[list[int]]:
        return [[self.widths[i] for i in group] for group in self._groups(block)]

    def _finished(self, block: int, total: Partial | Between, *, ranks: bool) -> dict[str, NDArray[Any]]:
        origins = [self.origins[i] for i in self._groups(block)[0]]
        if isinstance(total, Partial):
            return terms_of(total, self._widths(block), origins, ranks=ranks)
        documents = self.documents or Documents(np.ones(total.counts[0], np.int64))
        return terms_between(total, self._widths(block), origins, documents, ranks=ranks)

    def _tasks(self, batch: int | None, seed: int) -> Iterator[tuple[int, int, Run]]:
        for block in range(len(self.cuts.blocks)):
            groups = tuple(tuple(self.sites[i] for i in group) for group in self._groups(block))
            begun = self.kept[block].runs if block in self.kept else 0
            for number, span in enumerate(self.cuts.spans):
                if number >= begun:
                    by_document = None if self.documents is None else span
                    alone = self.alone and len(groups) == 1
                    yield (
                        block,
                        number,
                        Run(groups, span.start, span.stop, self.cuts.cut, batch, seed, by_document, alone),
                    )

    def _groups(self, block: int) -> list[tuple[int, ...]]:
        return [self.cuts.groups[g] for g in dict.fromkeys(self.cuts.blocks[block])]

    def _area(self, block: int) -> float:
        p, *q = (sum(self.widths[i] for i in group) for group in self._groups(block))
        return p * q[0] if q else p * p / 2

    def _begun(self, block: int) -> tuple[Partial | Between, Between | None]:
        """The sums of a block so far, and of the document that is not whole yet."""
        kept = self.kept.pop(block).arrays if block in self.kept else None
        if kept is None:
            return self._fresh(block), None
        if self.documents is None:
            return Partial(**kept), None
        beside = {name.removeprefix(_OPEN): kept.pop(name) for name in list(kept) if name.startswith(_OPEN)}
        return Between(**kept), Between(**beside) if beside else None

    def _opened_document(self, block: int) -> Between:
        p, *q = self._widths(block)
        return nothing_between(p, q[0] if q else None, alone=self.alone)

    def _write(self, block: int, kept: Kept) -> None:
        if self.directory is not None:
            write_block(self.directory, block, kept, self.identity)
            self.written = monotonic()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Around the whole scan: tasks that nobody waits for any more do not begin, and lost workers are one line."""
        try:
            yield
        except WorkersError as error:
            kept = "" if self.directory is None else f"; what is summed so far is kept in {self.directory}"
            raise WorkersError(f"{error}{kept}") from error
        finally:
            with suppress(WorkersError):
                for *_, task in self.waiting:
                    task.cancel()


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
