"""Minibatches of pairs in an order that is a function of (seed, epoch) alone.

Random rows of a store larger than memory would each cost a page from disk. Instead blocks of neighbouring pairs are
shuffled, a buffer of blocks is read in order, and rows are shuffled within the buffer. Source and target rows are drawn
by one index, so they cannot come apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import SpecError
from featstore.pairs import Pairs
from featstore.rows import RowReader

#: Neighbouring pairs that travel together: about one inner chunk of the hot layout.
BLOCK_PAIRS = 1024
BUFFER_BLOCKS = 64


@dataclass(frozen=True)
class PairBatches:
    """Paired rows of two layers, in blocks or in shuffled batches.

    Attributes:
        source: Rows of the source layer.
        target: Rows of the target layer.
        pairs: Which rows, already selected by split and mask.
        buffer_blocks: Blocks held in memory while shuffling.
    """

    source: RowReader
    target: RowReader
    pairs: Pairs
    buffer_blocks: int = BUFFER_BLOCKS

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, index: NDArray[np.integer[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Paired rows by pair number.

        Args:
            index: Pair numbers.

        Returns:
            float32 ``(m, d_source)`` and ``(m, d_target)``.
        """
        return self.source[self.pairs.row_source[index]], self.target[self.pairs.row_target[index]]

    def blocks(self, size: int = 8192) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """All pairs once, in document order.

        Args:
            size: Pairs a block.
        """
        for start in range(0, len(self.pairs), size):
            yield self.take(np.arange(start, min(start + size, len(self.pairs))))

    def order(self, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
        """Pair numbers of an epoch, one buffer at a time.

        Args:
            seed: Of the run.
            epoch: Counted from 1.
        """
        n = len(self.pairs)
        count = -(-n // BLOCK_PAIRS)
        rng = np.random.default_rng((seed, epoch))
        shuffled = rng.permutation(count)
        for at in range(0, count, self.buffer_blocks):
            part = [
                np.arange(b * BLOCK_PAIRS, min((b + 1) * BLOCK_PAIRS, n))
                for b in shuffled[at : at + self.buffer_blocks]
            ]
            yield rng.permutation(np.concatenate(part))

    def shuffled(
        self, batch_size: int, seed: int, epoch: int
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """All pairs once in the order of an epoch, in batches.

        A buffer's last batch is filled up from the next buffer; only the epoch's very last batch may be short.

        Args:
            batch_size: Pairs a batch, at least 1.
            seed: Of the run.
            epoch: Counted from 1.

        Raises:
            SpecError: The batch size is not positive.
        """
        if batch_size < 1:
            raise SpecError(f"batch size {batch_size}: must be at least 1")
        left: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        for numbers in self.order(seed, epoch):
            x, y = self.take(np.sort(numbers))
            place = np.argsort(np.argsort(numbers))
            if len(left):
                x_left, y_left = self.take(left)
                x, y = np.concatenate([x_left, x[place]]), np.concatenate([y_left, y[place]])
                numbers = np.concatenate([left, numbers])
            else:
                x, y = x[place], y[place]
            whole = len(numbers) // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield x[start : start + batch_size], y[start : start + batch_size]
            left = numbers[whole:]
        if len(left):
            yield self.take(left)
