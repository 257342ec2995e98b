"""What a worker does for a scan: reads a run of rows cut by cut, takes them about their origins, adds up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array
from align.similarity.scan.documents import Between, DocumentAdder, close
from align.similarity.scan.partials import Adder, Partial, Rows, UnusableRow, columns_of
from align.similarity.scan.planning import Run, Selection, Site, Span
from align.solvers.row_effects import Documents, in_order, one_after_another
from featstore.errors import FeatstoreError, NonFiniteStateError, StoreAccessError, StoreStateError
from featstore.store import Store, open_store
from featstore.store.read.pairs import Pairs

#: Rows that are summed in float32 for a mean, before they are added up in float64.
_MEAN_ROWS = 256


def sum_run(selection: Selection, run: Run, means: Sequence[Sequence[Array]] = ()) -> Partial | Between:
    """Sum a run of one block.

    Args:
        selection: Of which pairs.
        run: Which layers, which of the pairs.
        means: Of sums by document, float64 ``(width,)`` of every layer of every group, in their own units.

    Raises:
        StoreAccessError: The store cannot be reached from here.
        StoreStateError: Another store is there.
        NonFiniteStateError: A row that cannot be multiplied.
        CorruptDataError: Damaged data.
    """
    with _reading(selection):
        store, pairs = opened_by_worker(selection)
        if run.span is None:
            return _summed(store, pairs, run)
        return _summed_by_document(store, *by_document(selection), run, run.span, means)


def sum_rows(selection: Selection, sites: Sequence[Site], start: int, stop: int, cut: int) -> Array:
    """Sum rows about their origins, for their means.

    Args:
        selection: Of which pairs.
        sites: Of which layers.
        start: First pair, of those in the order of their documents.
        stop: Pair after the last.
        cut: Pairs that are read at a time.

    Returns:
        float64 ``(widths,)``, the layers end to end.

    Raises:
        As :func:`sum_run`.
    """
    with _reading(selection), ONE_THREAD:
        store, _ = opened_by_worker(selection)
        pairs, _ = by_document(selection)
        found = []
        for site in sites:
            origin = origin_of(store, site).astype(np.float32)
            total = np.zeros(len(origin))
            room, ones = np.empty((min(cut, stop - start), len(origin)), np.float32), np.ones(_MEAN_ROWS, np.float32)
            for at in range(start, stop, cut):
                states = _states(store, site, _numbers(pairs, site)[at : min(at + cut, stop)])
                rows = room[: len(states)]
                with np.errstate(invalid="ignore", over="ignore"):
                    np.subtract(states, origin, out=rows)
                    for first in range(0, len(rows), _MEAN_ROWS):
                        part = rows[first : first + _MEAN_ROWS]
                        total += ones[: len(part)] @ part
                if not np.isfinite(total).all():
                    bad = np.flatnonzero(~np.isfinite(np.einsum("ij,ij->i", rows, rows)))
                    raise _unusable(store, pairs, site, at + int(bad[0] if len(bad) else 0))
            found.append(total)
        return np.concatenate(found)


@contextmanager
def _reading(selection: Selection) -> Iterator[None]:
    """Says which store a worker could not read."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FeatstoreError):
            raise
        raise StoreAccessError(f"a worker cannot read {selection.path} ({error}); make it readable there") from error


class _Reader:
    """Rows of a run's groups, side by side and about their origins, in room that is used again."""

    def __init__(
        self, store: Store, pairs: Pairs, run: Run, most: int, origins: Sequence[Sequence[Sequence[Rows]]]
    ) -> None:
        self.widths = [[store.model(site.model).width for site in group] for group in run.groups]
        self._store, self._pairs, self._run, self._origins = store, pairs, run, origins
        self._room = [np.empty((most, sum(of)), np.float32) for of in self.widths]

    def __call__(self, start: int, stop: int) -> list[Rows]:
        rows = [z[: stop - start] for z in self._room]
        for z, group, of, origins in zip(rows, self._run.groups, self.widths, self._origins, strict=True):
            for site, columns, parts in zip(group, columns_of(of), origins, strict=True):
                states = _states(self._store, site, _numbers(self._pairs, site)[start:stop])
                with np.errstate(invalid="ignore", over="ignore"):
                    np.subtract(states, parts[0], out=z[:, columns])
                    for part in parts[1:]:
                        np.subtract(z[:, columns], part, out=z[:, columns])
        return rows

    def checked(self, start: int, add: Callable[[], None]) -> None:
        """Adds rows from ``start`` on, and names one that cannot be multiplied."""
        try:
            add()
        except UnusableRow as bad:
            site = self._run.groups[bad.group][bad.index]
            raise _unusable(self._store, self._pairs, site, start + bad.row) from None


def _unusable(store: Store, pairs: Pairs, site: Site, pair: int) -> NonFiniteStateError:
    number = int(_numbers(pairs, site)[pair])
    return NonFiniteStateError(
        f"row {number} of layer {site.layer} of {site.model!r} (pair {pair}) in {store.path} holds NaN, infinity or a "
        "value too large to square; extract that layer again"
    )


def _summed(store: Store, pairs: Pairs, run: Run) -> Partial:
    # Stored in float32: nothing is rounded but the difference.
    origins = [[[origin_of(store, site).astype(np.float32)] for site in group] for group in run.groups]
    reader = _Reader(store, pairs, run, min(run.cut, run.stop - run.start), origins)
    adder = Adder(reader.widths[0], reader.widths[1] if len(reader.widths) > 1 else None, run.cut)
    # The scheduler runs as many tasks as there are cores.
    with ONE_THREAD:
        for start in range(run.start, run.stop, run.cut):
            stop = min(start + run.cut, run.stop)
            rows = reader(start, stop)
            reader.checked(start, lambda rows=rows: adder.add(rows))  # type: ignore[misc]
            if run.batch is not None:
                order = np.random.default_rng((run.seed, start // run.cut)).permutation(stop - start)
                adder.add_batches(rows, run.batch, order)
    return adder.total


def _summed_by_document(
    store: Store, pairs: Pairs, documents: Documents, run: Run, span: Span, means: Sequence[Sequence[Array]]
) -> Between:
    reader = _Reader(
        store, pairs, run, min(run.cut, run.stop - run.start), [[_parts(mean) for mean in of] for of in means]
    )
    second = reader.widths[1] if len(reader.widths) > 1 else None
    adder = DocumentAdder(reader.widths[0], second, documents, run.cut, alone=run.alone)
    with ONE_THREAD:
        if span.document is not None:
            for start in range(span.start, span.stop, run.cut):
                rows = reader(start, min(start + run.cut, span.stop))
                reader.checked(start, lambda rows=rows: adder.add_piece(rows))  # type: ignore[misc]
            if span.first and span.last:
                close(adder.total, reader.widths, documents, span.document)
            return adder.total
        ends = np.cumsum(documents.sizes)
        first, last = (int(at) for at in np.searchsorted(ends, [span.start, span.stop - 1], side="right"))
        for a, b in adder.cuts(first, last + 1, run.cut):
            start = int(ends[a] - documents.sizes[a])
            rows = reader(start, int(ends[b - 1]))
            reader.checked(start, lambda rows=rows, a=a, b=b: adder.add(rows, a, b))  # type: ignore[misc]
    return adder.total


def _parts(mean: Array) -> list[Rows]:
    """A mean as two float32 numbers: of rows less both, nothing is left in common but rounding."""
    first = mean.astype(np.float32)
    return [first, (mean - first).astype(np.float32)]


def _numbers(pairs: Pairs, site: Site) -> NDArray[np.int64]:
    return pairs.row_source if site.source else pairs.row_target


def _states(store: Store, site: Site, numbers: NDArray[np.int64]) -> Rows:
    reader = store.rows(site.model, site.layer)
    # Rows in a row are read without being sorted, and need no copy where the file holds float32.
    if numbers[-1] - numbers[0] + 1 == len(numbers) and (np.diff(numbers) == 1).all():
        return reader[int(numbers[0]) : int(numbers[-1]) + 1]
    return reader[numbers]


def origin_of(store: Store, site: Site) -> Array:
    """The store's origin of a layer, as float32 has it.

    Args:
        store: The store.
        site: The layer.

    Returns:
        float64 ``(width,)``.
    """
    return store.origin(site.model, site.layer).astype(np.float32).astype(np.float64)


def opened(selection: Selection) -> tuple[Store, Pairs]:
    """The store and the pairs that were selected.

    Args:
        selection: Which.

    Raises:
        StoreStateError: Another store is there.
        PairingError: No such pairs.
    """
    store = open_store(selection.path)
    if store.fingerprint != selection.fingerprint:
        raise StoreStateError(f"{selection.path} is not the store that was asked for, or has changed since; run again")
    pairs = store.pairs(selection.source, selection.target, selection.policy)
    return store, pairs.select(keep_sinks=selection.keep_sinks, roles=selection.roles)


@lru_cache(maxsize=4)
def opened_by_worker(selection: Selection) -> tuple[Store, Pairs]:
    """A worker's own store and pairs, opened once for all its tasks."""
    try:
        return opened(selection)
    except (StoreAccessError, StoreStateError):
        raise
    except (FeatstoreError, OSError) as error:
        raise StoreAccessError(
            f"a worker cannot open {selection.path} ({error}); it must be at the same place on every machine"
        ) from error


@lru_cache(maxsize=4)
def by_document(selection: Selection) -> tuple[Pairs, Documents]:
    """The pairs in the order of their documents, and these.

    Args:
        selection: Which pairs.
    """
    _, pairs = opened_by_worker(selection)
    together = one_after_another(pairs.document)
    if together is not None:
        return pairs, together
    # Documents of one id may lie apart, such as answers to one prompt.
    order, documents = in_order(pairs.document)
    if (np.diff(order) != 1).any():
        names = ("row_source", "row_target", "split", "document", "sink", "role")
        pairs = replace(pairs, **{name: getattr(pairs, name)[order] for name in names})
    return pairs, documents


class OneThread:
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
ONE_THREAD = OneThread()
