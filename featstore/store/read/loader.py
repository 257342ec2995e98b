"""Minibatches of pairs in an order that is a function of (seed, epoch), not of who reads or from where.

Random rows of a store larger than memory would each cost a page from disk, so randomness comes in three steps. *Shards*
take turns in a random order, a few at a time; the *blocks* of neighbouring rows within them are shuffled and laid end
to end; this sequence is cut into *buffers* that fit in memory, and the pairs within a buffer are shuffled. A buffer is
a whole number of batches, so batch b lies in one buffer, and any process can compute which pairs it holds without
reading a row: that is all there is to a resume in mid-epoch and to several processes.

A thread reads the next buffer while the current one is used up. Buffers hold rows as they are stored, in bfloat16 half
the size of what comes out, so that twice as many pairs mix; a batch is widened to float32 on its way out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featstore.errors import SpecError
from featstore.store.read.columns import RowSet
from featstore.store.read.pairs import Pairs
from featstore.store.read.rows import RowReader
from featstore.store.read.selection import row_numbers
from featstore.store.read.tables import TableReader

#: Rows of a block and of a shard as far as the order is concerned: the hot layout's inner chunk (four of the archive's)
#: and the default shard. Not the store's own, or the order would change with the layout and from layer to layer.
BLOCK_ROWS = 1024
SHARD_ROWS = 16_384
#: Shards whose blocks mix. Neighbouring rows are of one article: a buffer of one shard's size, which is what a gigabyte
#: holds of two 8B models, would be a handful of articles.
SHARDS_TOGETHER = 8
#: What a loader may hold of the store's rows at a time.
MEMORY = 1 << 30
#: Rows copied at a time while a buffer is filled.
_PIECE_ROWS = 256
#: Float32 rows that are picked from memory in one go; small beside what a loader may hold.
_TOGETHER_BYTES = 1 << 22
#: Pair and row numbers, orders and sort keys for each pair of a buffer.
_INDEX_BYTES = 96

Reader = RowReader | TableReader


@dataclass(frozen=True)
class PairBatch:
    """Paired rows, and which pairs they are: one object, so that x and y cannot come apart.

    Attributes:
        number: Place of the batch in its epoch.
        pairs: int64 ``(m,)`` pair numbers.
        x: float32 ``(m, d_source)``.
        y: float32 ``(m, d_target)``.
    """

    number: int
    pairs: NDArray[np.int64]
    x: NDArray[np.float32]
    y: NDArray[np.float32]

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """``x, y = batch``."""
        return iter((self.x, self.y))

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class EpochOrder:
    """The order of the pairs in one epoch, of which any buffer can be asked for.

    Attributes:
        first: int64 ``(blocks,)``, first pair number of each block, in the order of the epoch.
        end: int64 ``(blocks,)``, how many pairs of the epoch lie before the end of each block.
        buffer_pairs: Pairs of a buffer; the last may have fewer.
        seed: Of the run.
        epoch: Number of the epoch.
    """

    first: NDArray[np.int64]
    end: NDArray[np.int64]
    buffer_pairs: int
    seed: int
    epoch: int

    @classmethod
    def of(cls, rows: NDArray[np.int64] | RowSet, buffer_pairs: int, seed: int, epoch: int) -> EpochOrder:
        """Shuffle blocks.

        Args:
            rows: int64 ``(m,)``, source row of every pair, in document order.
            buffer_pairs: Pairs of a buffer.
            seed: Of the run.
            epoch: Number of the epoch.
        """
        if isinstance(rows, RowSet):
            held = rows.counts(BLOCK_ROWS)
            block = np.flatnonzero(held)
            length = held[block]
            first, begins = np.cumsum(length) - length, block * BLOCK_ROWS
        else:
            starts = np.ones(len(rows), dtype=bool)
            starts[1:] = rows[1:] // BLOCK_ROWS != rows[:-1] // BLOCK_ROWS
            first = np.flatnonzero(starts)
            length, begins = np.diff(first, append=len(rows)), rows[first]
        rng = np.random.default_rng((seed, epoch))
        shards, shard = np.unique(begins // SHARD_ROWS, return_inverse=True)
        turn = rng.permutation(len(shards))[shard] // SHARDS_TOGETHER
        order = np.lexsort((rng.random(len(first)), turn))  # by turn, at random within it
        return cls(first[order], np.cumsum(length[order]), buffer_pairs, seed, epoch)

    def __len__(self) -> int:
        return int(self.end[-1]) if len(self.end) else 0

    def buffer(self, number: int) -> NDArray[np.int64]:
        """The pair numbers of one buffer, in the order in which they are used.

        Args:
            number: Of the buffer.
        """
        place = np.arange(number * self.buffer_pairs, min((number + 1) * self.buffer_pairs, len(self)))
        block = np.searchsorted(self.end, place, side="right")
        # Counted from each block's end, since a buffer may begin within a block.
        pairs = self.first[block] + place - np.concatenate(([0], self.end))[block]
        # Not (seed, epoch, number): numpy reads a trailing zero as nothing, and buffer 0 would share the blocks' seed.
        shuffled: NDArray[np.int64] = np.random.default_rng((self.seed, self.epoch, number + 1)).permutation(pairs)
        return shuffled


@dataclass(frozen=True)
class _Layer:
    """One layer's rows on their way into a buffer.

    Attributes:
        rows: Where they are read.
        index: Place in ``rows`` of every token, where the layer is a table; else None.
    """

    rows: RowReader
    index: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, reader: Reader) -> _Layer:
        # Past the table reader: what shall be read in order is the table, not the tokens.
        return cls(reader.table, reader.index) if isinstance(reader, TableReader) else cls(reader)

    @property
    def held(self) -> np.dtype[Any]:
        """What a buffer holds: rows as stored, or float32 where they would need their scales to be understood."""
        return np.dtype(np.float32) if self.rows.form.row_scaled else self.rows.form.storage

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in a buffer."""
        return self.rows.width * self.held.itemsize

    @property
    def scratch(self) -> int:
        """Bytes that come and go while a buffer is filled: a chunk (raw, checked, decoded) and the rows in hand.

        Counted with the chunks of the hot layout, the larger, in both: the order must not depend on which it is.
        """
        size = self.rows.form.storage.itemsize
        return self.rows.width * BLOCK_ROWS * (4 * size + 8 * self.rows.form.row_scaled)

    def fill(self, numbers: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Read rows in the order of the store, each chunk once, into the places where they are wanted.

        Args:
            numbers: int64 ``(m,)`` row numbers in the order wanted.
            out: ``(m, width)`` of type :attr:`held`.
        """
        if self.index is not None:
            numbers = self.index[numbers]
        numbers = row_numbers(numbers, self.rows.rows, self.rows.path)
        size = self.rows.layout.chunk_rows
        order = np.argsort(numbers, kind="stable")
        chunk = numbers[order] // size
        for places in np.split(order, np.flatnonzero(np.diff(chunk)) + 1):
            if self.rows.form.row_scaled:
                out[places] = self.rows[numbers[places]]
            else:
                number = int(numbers[places[0]]) // size
                rows = self.rows.chunk(number)
                # A few at a time, so that the second copy, to where they are wanted, comes from the processor's cache.
                for part in np.split(places, range(_PIECE_ROWS, len(places), _PIECE_ROWS)):
                    out[part] = rows[numbers[part] - number * size]

    def widen(self, held: NDArray[Any]) -> NDArray[np.float32]:
        """float32 copy of rows in a buffer.

        Args:
            held: ``(m, width)``.
        """
        return held.copy() if self.rows.form.row_scaled else self.rows.form.decode(held)


@dataclass(frozen=True)
class PairBatches:
    """Paired rows of two layers, in document order or in shuffled batches.

    Attributes:
        source: Rows of the source layer. Of several, x is their concatenation.
        target: Rows of the target layer or layers.
        pairs: Which rows, already selected by split and mask.
        memory: Bytes that rows may take up at a time, in each process; buffers are kept from one epoch to the next.
    """

    source: Reader | Sequence[Reader]
    target: Reader | Sequence[Reader]
    pairs: Pairs
    memory: int = MEMORY

    def __len__(self) -> int:
        return len(self.pairs)

    def blocks(self, size: int = 8192) -> Iterator[PairBatch]:
        """All pairs once, in document order.

        Args:
            size: Pairs a block; fewer where memory is short.

        Raises:
            SpecError: The memory does not hold a single pair.
        """
        # The block before is still in the hands of whoever asked for it.
        size = min(size, (self.memory - self._scratch) // (self._held_bytes + 3 * self._wide_bytes))
        if size < 1:
            raise self._too_little(1, self._scratch + self._held_bytes + 3 * self._wide_bytes)
        for number, start in enumerate(range(0, len(self), size)):
            pairs = np.arange(start, min(start + size, len(self)))
            held = self._empty(len(pairs))
            self._fill(pairs, held)
            for layer in self._layers:
                layer.rows.release()
            yield self._batch(number, pairs, held)

    def order(self, batch_size: int, seed: int, epoch: int) -> EpochOrder:
        """The order of an epoch; a buffer is as many batches as memory holds twice.

        Args:
            batch_size: Pairs a batch, at least 1.
            seed: Of the run.
            epoch: Counted from 1.

        Raises:
            SpecError: The batch size is not positive, or memory does not hold two batches.
        """
        if batch_size < 1:
            raise SpecError(f"batch size {batch_size}: must be at least 1")
        # Beside the buffers: the batch before, and the one in the making.
        beside = self._scratch + batch_size * (self._held_bytes + 3 * self._wide_bytes)
        most = (self.memory - beside) // (2 * batch_size * self._held_bytes)
        if most < 1:
            raise self._too_little(batch_size, beside + 2 * batch_size * self._held_bytes)
        return EpochOrder.of(self.pairs.row_source, most * batch_size, seed, epoch)

    def shuffled(
        self, batch_size: int, seed: int, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1
    ) -> Generator[PairBatch]:
        """All pairs once in the order of an epoch, in batches of which only the epoch's last may be short.

        Of ``world`` processes each takes every ``world``-th batch, and reads the rows of no other. Closing the iterator
        ends its thread.

        Args:
            batch_size: Pairs a batch, at least 1.
            seed: Of the run.
            epoch: Counted from 1.
            start: Batch of the epoch to begin with; nothing before it is read.
            rank: Which of the processes this is; its first batch is ``start + rank``.
            world: How many there are.

        Raises:
            SpecError: A number is out of range, or memory does not hold two batches.
            CorruptDataError: While iterating: the store is damaged; the message names the file.
        """
        if start < 0:
            raise SpecError(f"start {start}: batches are counted from 0")
        if not 0 <= rank < world:
            raise SpecError(f"rank {rank} of {world}: ranks are counted from 0")
        order = self.order(batch_size, seed, epoch)
        return self._stream(order, batch_size, range(start + rank, -(-len(order) // batch_size), world))

    def _stream(self, order: EpochOrder, size: int, wanted: range) -> Generator[PairBatch]:
        """Batches from two buffers in turn: one is used up while the other is filled.

        Where one buffer holds all pairs of a lone process, they are read once for all epochs.
        """
        if wanted.step == 1 and len(order) <= order.buffer_pairs:
            yield from self._from_resident(order.buffer(0), size, wanted)
            return
        per_buffer = order.buffer_pairs // size
        most = min(-(-per_buffer // wanted.step), len(wanted)) * size
        slots = self._take_slots(most, 1 if len(order) <= order.buffer_pairs else 2)

        def load(buffer: int, batches: list[int], slot: list[NDArray[Any]]) -> _Loaded:
            numbers = order.buffer(buffer)
            places = [(b - buffer * per_buffer) * size for b in batches]
            pairs = np.concatenate([numbers[at : at + size] for at in places])
            self._fill(pairs, slot)
            return _Loaded(batches, pairs, slot)

        groups = groupby(wanted, key=lambda batch: batch // per_buffer)
        jobs = (partial(load, buffer, list(own), slots[i % 2]) for i, (buffer, own) in enumerate(groups))
        try:
            with closing(_one_ahead(jobs)) as loaded:
                for part in loaded:
                    for i, number in enumerate(part.batches):
                        at = slice(i * size, min((i + 1) * size, len(part.pairs)))
                        yield self._batch(number, part.pairs[at], [rows[at] for rows in part.held])
        finally:
            self._spare[:] = slots

    def _from_resident(self, numbers: NDArray[np.int64], size: int, wanted: range) -> Generator[PairBatch]:
        """Batches of pairs that are in memory, some at a time: a thread picks and widens while others are used."""
        together = max(min(_TOGETHER_BYTES, self.memory // 64) // (size * self._wide_bytes), 1)

        def pick(batches: range) -> PairBatch:
            pairs = numbers[batches.start * size : batches.stop * size]
            return self._batch(batches.start, pairs, [rows[pairs] for rows in self._resident])

        jobs = (partial(pick, wanted[i : i + together]) for i in range(0, len(wanted), together))
        with closing(_one_ahead(jobs)) as picked:
            for some in picked:
                for i in range(0, len(some), size):
                    at = slice(i, i + size)
                    yield PairBatch(some.number + i // size, some.pairs[at], some.x[at], some.y[at])

    @cached_property
    def _resident(self) -> list[NDArray[Any]]:
        """All pairs in document order, read when they are first asked for."""
        held = self._empty(len(self))
        self._fill(np.arange(len(self)), held)
        return held

    @cached_property
    def _spare(self) -> list[list[NDArray[Any]]]:
        """Buffers of an epoch that has ended: new memory is paged in anew, which took as long as filling it."""
        return []

    def _take_slots(self, pairs: int, count: int) -> list[list[NDArray[Any]]]:
        spare = list(self._spare)
        # Out of reach of an iteration that begins before this one ends.
        self._spare.clear()
        if len(spare) == count and all(len(slot[0]) == pairs for slot in spare):
            return spare
        return [self._empty(pairs) for _ in range(count)]

    @cached_property
    def _sides(self) -> tuple[list[_Layer], list[_Layer]]:
        source, target = (
            [_Layer.of(reader) for reader in (side if isinstance(side, Sequence) else (side,))]
            for side in (self.source, self.target)
        )
        return source, target

    @property
    def _layers(self) -> list[_Layer]:
        return [layer for side in self._sides for layer in side]

    @property
    def _held_bytes(self) -> int:
        """Bytes of a pair in a buffer."""
        return sum(layer.row_bytes for layer in self._layers) + _INDEX_BYTES

    @property
    def _wide_bytes(self) -> int:
        """Bytes of a pair in float32."""
        return 4 * sum(layer.rows.width for layer in self._layers)

    @property
    def _scratch(self) -> int:
        return max(layer.scratch for layer in self._layers)

    def _too_little(self, size: int, least: int) -> SpecError:
        return SpecError(
            f"--memory {self.memory}: too little to read {size} pair{'s' * (size > 1)} at a time; "
            f"that takes {least} bytes" + " (or use a smaller --batch-size)" * (size > 1)
        )

    def _empty(self, pairs: int) -> list[NDArray[Any]]:
        """A buffer: an array for every layer of the source, then of the target."""
        return [np.empty((pairs, layer.rows.width), layer.held) for layer in self._layers]

    def _fill(self, pairs: NDArray[np.int64], held: list[NDArray[Any]]) -> None:
        """Read pairs into the beginning of a buffer, in the order given."""
        source, target = self._sides
        numbers = [self.pairs.row_source[pairs]] * len(source) + [self.pairs.row_target[pairs]] * len(target)
        for layer, rows, out in zip(self._layers, numbers, held, strict=True):
            layer.fill(rows, out[: len(pairs)])

    def _batch(self, number: int, pairs: NDArray[np.int64], held: list[NDArray[Any]]) -> PairBatch:
        """What a buffer holds of some pairs, in float32 of its own: the buffer will be filled again."""
        wide = [layer.widen(rows) for layer, rows in zip(self._layers, held, strict=True)]
        count = len(self._sides[0])
        x, y = (part[0] if len(part) == 1 else np.concatenate(part, axis=1) for part in (wide[:count], wide[count:]))
        return PairBatch(number, pairs, x, y)


@dataclass(frozen=True)
class _Loaded:
    """A filled buffer: its batches' numbers, their pairs one after another, and the rows in the same order."""

    batches: list[int]
    pairs: NDArray[np.int64]
    held: list[NDArray[Any]]


_T = TypeVar("_T")


def _one_ahead(jobs: Iterable[Callable[[], _T]]) -> Generator[_T]:
    """Results of jobs in order; while one is in use, the next is done by a thread.

    What a job raises is raised here, and no further job is begun. However the iteration ends, the thread ends with it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="pair-loader") as thread:
        ahead: Future[_T] | None = None
        for job in jobs:
            ready = [] if ahead is None else [ahead.result()]
            ahead = thread.submit(job)
            yield from ready
        if ahead is not None:
            yield ahead.result()
