"""What a source token is before it meets its context: its state at layer 0, as a store holds it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from align.moments.scatter import Array
from featstore.errors import FitError
from featstore.store import Store
from featstore.store.read.tables import TableReader

#: Rows of a token that are averaged where its state also depends on its position (GPT-2), spread over all of them.
AVERAGED = 64
#: Bytes of states that are kept once they were read.
_KEPT = 1 << 30


class LayerZero:
    """The layer 0 state of every token that a model read.

    Where layer 0 is a table of token ids it is looked up. Where it was stored row by row, it may depend on the position
    too, and a token's state is the mean over up to :data:`AVERAGED` of its rows, of any split: they are the source's
    own and say nothing of the target. Attention sinks are left out unless a token is nothing else.

    Args:
        store: Complete store with rows of layer 0, see :meth:`missing`.
        model: Model name.
    """

    def __init__(self, store: Store, model: str) -> None:
        self._reader, self._model = store.rows(model, 0), model
        tokens = store.tokens(model)
        ids = tokens.id.astype(np.int64)
        plain = ~tokens.sink
        plain |= ~np.isin(ids, ids[plain])
        rows = np.flatnonzero(plain)
        self._rows = rows[np.argsort(ids[rows], kind="stable")]
        self._ids, self._start, self._count = np.unique(ids[self._rows], return_index=True, return_counts=True)
        most = 1 if isinstance(self._reader, TableReader) else AVERAGED
        self._averaged = np.minimum(self._count, most)
        self.width = int(self._reader.width)
        keeps = len(self._ids) * self.width * 4 <= _KEPT
        self._kept = np.zeros((len(self._ids), self.width), dtype=np.float32) if keeps else None
        self._known = np.zeros(len(self._ids), dtype=bool)

    @staticmethod
    def missing(store: Store, model: str) -> str | None:
        """Why a store has no layer 0 of a model; None where it has.

        Args:
            store: Complete store.
            model: Model name.
        """
        if 0 not in store.model(model).layers:
            return f"the store holds no layer 0 of {model!r}"
        return None if store.has_rows(model, 0) else f"the store holds moments of layer 0 of {model!r}, and no rows"

    def __call__(self, ids: NDArray[np.int64]) -> Array:
        """The states of tokens.

        Args:
            ids: int64 ``(m,)``, all of the store's text.

        Returns:
            float64 ``(m, width)``.

        Raises:
            FitError: The store's text lacks a token, or a state is not finite.
        """
        place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        if not np.array_equal(self._ids[place], ids):
            raise FitError(
                f"token {int(ids[self._ids[place] != ids][0])} does not occur in the store's text"
                "; ask for tokens that do"
            )
        if self._kept is None:
            return self._read(place)
        new = np.unique(place[~self._known[place]])
        if len(new):
            self._kept[new] = self._read(new)
            self._known[new] = True
        return self._kept[place].astype(np.float64)

    def _read(self, place: NDArray[np.int64]) -> Array:
        count = self._averaged[place]
        edges = np.cumsum(count) - count
        step = np.arange(int(count.sum())) - np.repeat(edges, count)
        # The i-th of c rows out of n: evenly spread, and all of them where c = n.
        nth = step * np.repeat(self._count[place], count) // np.repeat(count, count)
        rows = self._rows[np.repeat(self._start[place], count) + nth]
        states = np.empty((len(place), self.width))
        for start in range(0, len(place), 256):
            own = slice(start, min(start + 256, len(place)))
            first, last = edges[own][0], edges[own][-1] + count[own][-1]
            read = self._reader[rows[first:last]].astype(np.float64)
            states[own] = np.add.reduceat(read, edges[own] - first, axis=0) / count[own][:, None]
        if not np.isfinite(states).all():
            raise FitError(
                f"a state of layer 0 of {self._model!r} is not finite; look for damaged rows with `featstore verify`"
            )
        return states
