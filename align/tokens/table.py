"""The token baseline of a target layer: fitted from a store in one pass, and kept as a table of predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.moments.scatter import Array
from align.tokens.layer_zero import LayerZero
from align.tokens.shrinkage import Regressors, Shrunken, fit_shrunken, regressors_of
from align.tokens.sums import TRAIN, VALIDATION, TokenSums, Vocabulary
from featstore.errors import FitError
from featstore.store import Store
from featstore.store.moments.stored import CUT_ROWS, has_rows
from featstore.store.read.pairs import Pairs
from featstore.text import splits

#: Bytes that sums by token may take while a table is fitted, float64 for either split.
SUMS_MEMORY = 2 << 30
#: Bytes of predictions that a run keeps and writes, for all its target layers together.
TABLES_MEMORY = 2 << 30
#: What predictions of rare tokens shrink towards.
LAYER_0, TRAIN_MEAN = "layer 0", "train mean"


@dataclass(frozen=True, eq=False)
class TokenTable:
    """What a target's state is predicted to be from the source's current token alone.

    Attributes:
        ids: int64 ``(m,)``, ascending: tokens with a prediction of their own.
        states: float32 ``(m, dy)``, their predictions.
        mean: float32 ``(dy,)``, mean target state over train rows.
        facts: How it was fitted; what ``metrics.json`` says under ``token``.
        others: Predicts tokens that are not in the table, int64 ``(m,)`` to float64 ``(m, dy)``; None for ``mean``.
    """

    ids: NDArray[np.int64]
    states: NDArray[np.float32]
    mean: NDArray[np.float32]
    facts: dict[str, Any] = field(default_factory=dict)
    others: Callable[[NDArray[np.int64]], Array] | None = None

    def predict(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Predict the target's states at tokens.

        Args:
            ids: Integers ``(n,)``, source token ids.

        Returns:
            float32 ``(n, dy)``.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        result = np.tile(self.mean, (len(wanted), 1))
        place = np.minimum(np.searchsorted(self.ids, wanted), max(len(self.ids) - 1, 0))
        own = self.ids[place] == wanted if len(self.ids) else np.zeros(len(wanted), dtype=bool)
        result[own] = self.states[place[own]]
        if self.others is not None and not own.all():
            missing, which = np.unique(wanted[~own], return_inverse=True)
            result[~own] = self.others(missing).astype(np.float32)[which]
        return result


class SourceTokens:
    """What the tables of one source have in common: its tokens' layer 0, and the regression's decomposition of it.

    Args:
        store: Complete store.
        model: The source.
    """

    def __init__(self, store: Store, model: str) -> None:
        self.missing = LayerZero.missing(store, model)
        self.zero = None if self.missing is not None else LayerZero(store, model)
        self.regressors: Regressors | None = None


def fit_table(
    store: Store,
    pairs: Pairs,
    layer: int,
    *,
    source: SourceTokens | None = None,
    memory: int = SUMS_MEMORY,
    keep: int = TABLES_MEMORY,
    tick: Callable[[float], None] = lambda _: None,
) -> TokenTable:
    """Fit the baseline of a target layer from one pass over its train and validation rows.

    Args:
        store: Complete store with rows of that layer.
        pairs: Of the models, all splits, mask applied.
        layer: Of the target.
        source: What the tables of these pairs' source have in common; None for a table alone.
        memory: Bytes that sums by token may take; rarer tokens are then predicted from layer 0 alone.
        keep: Bytes of predictions to keep, of the tokens of validation and test text, the most frequent first.
        tick: Called with the number of rows read since the last call.

    Raises:
        FitError: No train or validation rows, or a state that is not finite.
        StoreStateError: The store holds no rows of that layer.
    """
    source = SourceTokens(store, pairs.source) if source is None else source
    why = source.missing
    if source.zero is not None:
        try:
            return _fit(store, pairs, layer, source, None, memory, keep, tick)
        except FitError as error:
            why = str(error)
    return _fit(store, pairs, layer, None, why, memory, keep, tick)


def _fit(
    store: Store,
    pairs: Pairs,
    layer: int,
    source: SourceTokens | None,
    why: str | None,
    memory: int,
    keep: int,
    tick: Callable[[float], None],
) -> TokenTable:
    reader, zero = store.rows(pairs.target, layer), None if source is None else source.zero
    sides = {TRAIN: pairs.where(pairs.split == splits.TRAIN), VALIDATION: pairs.where(pairs.split == splits.VALIDATION)}
    vocabulary = Vocabulary.of(
        sides[TRAIN].token, sides[VALIDATION].token, entry_bytes=8 * int(reader.width), memory=memory
    )
    sums = TokenSums(vocabulary, store.origin(pairs.target, layer), zero)
    for split, side in sides.items():
        for start in range(0, len(side), CUT_ROWS):
            cut = slice(start, min(start + CUT_ROWS, len(side)))
            sums.add(split, side.token[cut], reader[side.row_target[cut]])
            reader.release()
            tick(cut.stop - cut.start)
    if source is not None and zero is not None and source.regressors is None:
        source.regressors = regressors_of(sums, zero)
    fitted = fit_shrunken(sums, zero, None if source is None else source.regressors)
    ids = _kept(store, pairs.source, keep // (4 * int(reader.width)))
    states = np.empty((len(ids), int(reader.width)), dtype=np.float32)
    for start in range(0, len(ids), CUT_ROWS):
        states[start : start + CUT_ROWS] = fitted.of(ids[start : start + CUT_ROWS])
    mean = fitted.mean.astype(np.float32)
    return TokenTable(ids, states, mean, _facts(fitted, pairs, zero, why), fitted.prior.of if fitted.prior else None)


def _kept(store: Store, model: str, most: int) -> NDArray[np.int64]:
    """The source tokens of validation and test text, paired or not; of too many the most frequent, ascending."""
    tokens = store.tokens(model)
    scored = store.corpus.window_split[tokens.window] != splits.TRAIN
    ids, count = np.unique(tokens.id[scored].astype(np.int64), return_counts=True)
    return np.sort(ids[np.argsort(-count, kind="stable")[:most]])


def _facts(fitted: Shrunken, pairs: Pairs, zero: LayerZero | None, why: str | None) -> dict[str, Any]:
    vocabulary = fitted.sums.vocabulary
    train = vocabulary.rows[TRAIN]
    own = vocabulary.ids[vocabulary.own]
    test = pairs.token[pairs.split == splits.TEST]
    return {
        "k": fitted.k,
        "ridge": fitted.ridge,
        "backoff": TRAIN_MEAN if zero is None else LAYER_0,
        "why": why,
        "tokens": len(own),
        "train_tokens": int((train > 0).sum()),
        "train_rows": int(train.sum()),
        "train_rows_in_table": int(train[vocabulary.own].sum()),
        "test_rows": len(test),
        "test_rows_in_table": int(np.isin(test, own).sum()),
    }


class TokenTables:
    """The tables of a run, each fitted once: layer pairs with the same target share it.

    Args:
        store: Complete store.
        tables: How many there will be, at most; they share :data:`TABLES_MEMORY`.
    """

    def __init__(self, store: Store, tables: int) -> None:
        self._store, self._keep, self._several = store, TABLES_MEMORY // max(tables, 1), tables > 1
        self._sources: dict[tuple[str, str], SourceTokens] = {}
        self._fitted: dict[str, TokenTable | str] = {}

    @property
    def fitted(self) -> dict[str, TokenTable]:
        """The tables that there are, by :func:`table_key`."""
        return {key: table for key, table in self._fitted.items() if isinstance(table, TokenTable)}

    def of(self, pairs: Pairs, layer: int) -> TokenTable | str:
        """The table of a target layer, or the reason why there is none.

        Args:
            pairs: Of the models, all splits, mask applied; the same ones at every call for these models.
            layer: Of the target.
        """
        key = table_key(pairs.source, pairs.target, layer)
        if key not in self._fitted:
            self._fitted[key] = self._fit(pairs, layer)
        return self._fitted[key]

    def _fit(self, pairs: Pairs, layer: int) -> TokenTable | str:
        if not has_rows(self._store, pairs.target, layer):
            return "needs rows of the target; the store holds moments only"
        try:
            return fit_table(self._store, pairs, layer, source=self._source(pairs), keep=self._keep)
        except FitError as error:
            return str(error)

    def _source(self, pairs: Pairs) -> SourceTokens | None:
        """Kept where another table may need it, for the last source alone: a decomposition is as large as a map."""
        key = pairs.source, pairs.target
        if self._several and key not in self._sources:
            self._sources = {key: SourceTokens(self._store, pairs.source)}
        return self._sources.get(key)


def table_key(source: str, target: str, layer: int) -> str:
    """Name of a table.

    Args:
        source: Model whose tokens it is by.
        target: Model whose states it predicts.
        layer: Of the target.
    """
    return f"{source}->{target}:{layer}"
