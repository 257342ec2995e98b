"""Whole windows from a store: the states of both models at their ordinary tokens, and which of them are pairs.

Roles select what is reconstructed, not what is read: the source's tokens of the other roles, the prompt, stay.

Rows are read window by window through the store's readers; a bounded number of bytes of them is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align.layers import LayerPair
from featstore.errors import FitError
from featstore.store import Store
from featstore.store.read.loader import MEMORY
from featstore.store.read.pairs import Pairs
from featstore.text.roles import parse_roles, role_names

Rows = NDArray[np.float32]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Window:
    """One window's states, tokens in order, without special tokens and (unless kept) attention sinks.

    With roles selected ``y`` holds the target tokens of these roles alone.

    Attributes:
        number: Of the window in the store.
        x: float32 ``(T_x, d_source)``.
        y: float32 ``(T_y, d_target)``.
        tokens_x: int32 ``(T_x,)``, id of every source token.
        ends_x: int32 ``(T_x,)``, byte end of every source token within the window, non-decreasing.
        ends_y: int32 ``(T_y,)`` of every target token.
        paired_x: int64 ``(m,)``, the pairs' places in ``x``.
        paired_y: int64 ``(m,)``, their places in ``y``.
    """

    number: int
    x: Rows
    y: Rows
    tokens_x: NDArray[np.int32]
    ends_x: NDArray[np.int32]
    ends_y: NDArray[np.int32]
    paired_x: NDArray[np.int64]
    paired_y: NDArray[np.int64]


class Windows:
    """The windows of one split that have source and target tokens.

    Args:
        store: Complete store with rows of both layers.
        pair: Which layers; several source layers lie side by side.
        pairs: Pairs of these models in this direction, all splits; those of a window are the positions at which tables
            compare.
        split: 0 train, 1 validation, 2 test.
        keep_sinks: Lift the sink mask.
        roles: Roles of the target tokens; None for all. Of the source all tokens are read, whose states are good.
        memory: Bytes of rows that may be kept.

    Attributes:
        numbers: int64, the windows.
        left_out: Windows of the split that lack source or target tokens.
        roles: Roles of the target tokens; None for all.
        width_x: d_source.
        width_y: d_target.

    Raises:
        FitError: There is no window in the split.
    """

    def __init__(
        self,
        store: Store,
        pair: LayerPair,
        pairs: Pairs,
        split: int,
        *,
        keep_sinks: bool = False,
        roles: Collection[str] | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.store, self.pair, self.split = store, pair, split
        self._readers = [store.rows(pair.source, layer) for layer in pair.source_layers]
        self._target = store.rows(pair.target, pair.target_layer)
        self.width_x = sum(reader.width for reader in self._readers)
        self.width_y = self._target.width
        wanted = np.flatnonzero(store.corpus.window_split == split)
        self._tokens = [store.tokens(name) for name in (pair.source, pair.target)]
        self._rows: list[dict[int, NDArray[np.int64]]] = []
        self.roles, numbers = role_names(roles), parse_roles(roles)
        for tokens, wanted_roles in zip(self._tokens, (None, numbers), strict=True):
            mask = ~tokens.special & (True if keep_sinks else ~tokens.sink)
            if wanted_roles is not None:
                mask &= np.isin(tokens.role, wanted_roles)
            keep = np.flatnonzero(mask).astype(np.int64)
            # Rows lie in the order of their windows.
            edges = np.searchsorted(tokens.window[keep], [wanted, wanted + 1])
            self._rows.append({int(n): keep[a:b] for n, a, b in zip(wanted, *edges, strict=True)})
        some = [n for n in wanted.tolist() if all(len(side[n]) for side in self._rows)]
        self.numbers = np.array(some, dtype=np.int64)
        self.left_out = len(wanted) - len(some)
        if not some:
            raise FitError(
                f"{pair.key}: the {SPLITS[split]} split has no window with tokens of both models; "
                "extract more documents"
            )
        own = pairs.where(pairs.split == split)
        window = self._tokens[0].window[own.row_source]
        edges = np.searchsorted(window, [self.numbers, self.numbers + 1])
        self._places = {
            int(n): self._paired(int(n), own.row_source[a:b], own.row_target[a:b])
            for n, a, b in zip(self.numbers, *edges, strict=True)
        }
        self._memory, self._kept = memory, OrderedDict[int, Window]()
        self._held = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def _paired(
        self, number: int, rows_x: NDArray[np.int64], rows_y: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where a window's pairs are; a pair of a token that is masked here has no place."""
        place_x, place_y = (_places(side[number], own) for side, own in zip(self._rows, (rows_x, rows_y), strict=True))
        both = (place_x >= 0) & (place_y >= 0)
        return place_x[both], place_y[both]

    def paired(self) -> int:
        """Pairs of all windows, without reading rows."""
        return sum(len(place) for place, _ in self._places.values())

    def paired_tokens(self) -> NDArray[np.int32]:
        """The source token of every pair, window by window, without reading rows."""
        ids = self._tokens[0].id
        parts = [ids[self._rows[0][int(n)][self._places[int(n)][0]]] for n in self.numbers]
        return np.concatenate(parts)

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and target tokens of every window, in the order of ``numbers``, without reading rows."""
        counts = [np.array([len(side[int(n)]) for n in self.numbers], dtype=np.int64) for side in self._rows]
        return counts[0], counts[1]

    def read(self, number: int) -> Window:
        """One window.

        Args:
            number: One of ``numbers``.
        """
        found = self._kept.get(number)
        if found is not None:
            self._kept.move_to_end(number)
            return found
        rows_x, rows_y = (side[number] for side in self._rows)
        parts = [reader[rows_x] for reader in self._readers]
        x = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        ends_x, ends_y = (tokens.byte_end[rows] for tokens, rows in zip(self._tokens, (rows_x, rows_y), strict=True))
        tokens_x = self._tokens[0].id[rows_x]
        window = Window(number, x, self._target[rows_y], tokens_x, ends_x, ends_y, *self._places[number])
        size = window.x.nbytes + window.y.nbytes
        if size <= self._memory:
            self._kept[number] = window
            self._held += size
            while self._held > self._memory:
                _, old = self._kept.popitem(last=False)
                self._held -= old.x.nbytes + old.y.nbytes
        return window

    def __iter__(self) -> Iterator[Window]:
        return (self.read(int(number)) for number in self.numbers)

    def some(self, tokens: int) -> Iterator[Window]:
        """Windows spread evenly over the split, as many as hold about so many source tokens.

        Args:
            tokens: Source tokens; all windows if there are no more.
        """
        total = int(self.sizes()[0].sum())
        count = len(self) if total <= tokens else max(1, len(self) * tokens // total)
        return (self.read(int(self.numbers[i * len(self) // count])) for i in range(count))

    def shuffled(self, size: int, seed: int, epoch: int, steps: int) -> Iterator[list[Window]]:
        """Batches in an order that is a function of seed and epoch: rounds over all windows, each in a new order.

        Args:
            size: Windows of a batch; the last of a round may have fewer.
            seed: Of the run.
            epoch: Number of the epoch.
            steps: Batches.
        """
        rng = np.random.default_rng((seed, epoch))
        done = 0
        while done < steps:
            order = rng.permutation(self.numbers)
            for start in range(0, len(order), size):
                if done == steps:
                    return
                yield [self.read(int(number)) for number in order[start : start + size]]
                done += 1


def _places(rows: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each wanted row is among ascending rows; -1 where it is not."""
    place = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
    return np.where(rows[place] == wanted, place, -1).astype(np.int64)
