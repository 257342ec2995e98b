"""Sums of target states by source token, over blocks of rows and in bounded memory.

The squared error of any prediction p_t that depends on the token t alone follows from them:
``sum |y|^2 - 2 sum_t p_t . S_t + sum_t m_t |p_t|^2``, where S_t sums the m_t states at token t. A vocabulary of 256,000
and states of width 4096 would take 8 GiB a split; tokens whose sums do not fit are summed together, as the product with
what is known of each token (:attr:`TokenSums.product`), from which a linear map is fitted just as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from align.moments.scatter import Array, Rows
from featstore.errors import FitError

#: The two splits that are summed, by their place in every pair of arrays here.
TRAIN, VALIDATION = 0, 1

#: Gives float64 ``(m, dx)`` for int64 ``(m,)`` token ids: what is known of a token without its context.
Features = Callable[[NDArray[np.int64]], Array]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The source tokens of the train and validation rows, and which of them have sums of their own.

    Attributes:
        ids: int64 ``(u,)``, ascending.
        rows: int64 ``(2, u)``, rows of each token in the train and in the validation split.
        own: bool ``(u,)``, tokens with sums of their own; each has train rows.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    own: NDArray[np.bool_]

    @classmethod
    def of(cls, train: ArrayLike, val: ArrayLike, *, entry_bytes: int, memory: int) -> Vocabulary:
        """Count tokens, and choose the most frequent ones that fit into memory.

        Args:
            train: Integers, the source token of every train row.
            val: The same of the validation rows.
            entry_bytes: Bytes of one token's sum over one split.
            memory: Bytes that all sums may take. Of equally frequent tokens the smaller id comes first.
        """
        both = [np.asarray(tokens, dtype=np.int64) for tokens in (train, val)]
        ids = np.unique(np.concatenate(both))
        rows = np.stack([np.bincount(np.searchsorted(ids, tokens), minlength=len(ids)) for tokens in both])
        rows = rows.astype(np.int64).reshape(2, len(ids))
        order = np.argsort(-rows[TRAIN], kind="stable")
        cost = np.cumsum((rows[:, order] > 0).sum(axis=0) * entry_bytes)
        own = np.zeros(len(ids), dtype=bool)
        own[order[cost <= memory]] = True
        return cls(ids, rows, own & (rows[TRAIN] > 0))

    def __len__(self) -> int:
        return len(self.ids)


class TokenSums:
    """Sums of target states by source token, about a fixed origin.

    Args:
        vocabulary: Tokens, counted beforehand.
        origin: float64 ``(dy,)``, subtracted from every state: sums of large common means would lose digits.
        features: What is known of a token, ``(dx,)`` each; None for nothing.

    Attributes:
        vocabulary: As given.
        origin: As given.
        squares: float64 ``(2,)``, ``sum |y - origin|^2`` of the train and of the validation rows.
        rest: float64 ``(2, dy)``, sums over the rows of tokens without sums of their own.
        product: For either split ``sum x_t (y - origin)'`` over these rows, float64 ``(dx, dy)``; None without
            features, or where every train token has its own sums.
    """

    def __init__(self, vocabulary: Vocabulary, origin: ArrayLike, features: Features | None = None) -> None:
        self.vocabulary = vocabulary
        self.origin: Array = np.asarray(origin, dtype=np.float64)
        width = self.origin.size
        self._slot: list[NDArray[np.int64]] = []
        self._sums: list[Array] = []
        for rows in vocabulary.rows:
            kept = vocabulary.own & (rows > 0)
            self._slot.append(np.where(kept, np.cumsum(kept) - 1, -1))
            self._sums.append(np.zeros((int(kept.sum()), width)))
        self.squares, self.rest = np.zeros(2), np.zeros((2, width))
        self._features = features
        self.product: list[Array | None] = [None, None]

    def add(self, split: int, tokens: ArrayLike, y: Rows) -> None:
        """Add rows.

        Args:
            split: :data:`TRAIN` or :data:`VALIDATION`.
            tokens: Integers ``(m,)``, the source token of each row.
            y: ``(m, dy)`` target states.

        Raises:
            FitError: A state is not finite, or a token was not counted.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.vocabulary.ids, ids), len(self.vocabulary) - 1)
        if len(ids) != len(y) or not np.array_equal(self.vocabulary.ids[place], ids):
            raise FitError("rows came with tokens that were not counted beforehand; count the tokens of all rows first")
        away: Array = np.subtract(y, self.origin, dtype=np.float64)
        squares = float(np.einsum("ij,ij->", away, away))
        if not np.isfinite(squares):
            raise FitError("a target state is not finite; look for damaged rows with `featstore verify`")
        self.squares[split] += squares
        if not len(place):
            return
        # Rows of one token in the order in which they came; nothing is copied beside each other for that.
        which, token = np.unique(place, return_inverse=True)
        order = np.argsort(token, kind="stable")
        starts = np.append(0, np.cumsum(np.bincount(token)))
        sums = csr_array((np.ones(len(order)), order, starts), shape=(len(which), len(order))) @ away
        slot = self._slot[split][which]
        own = slot >= 0
        self._sums[split][slot[own]] += sums[own]
        if own.all():
            return
        self.rest[split] += sums[~own].sum(axis=0)
        if self._features is not None:
            product = self._features(self.vocabulary.ids[which[~own]]).T @ sums[~own]
            before = self.product[split]
            self.product[split] = product if before is None else before + product

    def of(self, split: int, place: NDArray[np.int64]) -> Array:
        """The sums of some tokens; zeros where a token has none of its own.

        Args:
            split: :data:`TRAIN` or :data:`VALIDATION`.
            place: int64 ``(m,)``, places in the vocabulary.

        Returns:
            float64 ``(m, dy)``.
        """
        slot = self._slot[split][place]
        result = np.zeros((len(slot), self.origin.size))
        result[slot >= 0] = self._sums[split][slot[slot >= 0]]
        return result

    def total(self, split: int) -> Array:
        """The sum over all rows of a split, float64 ``(dy,)``.

        Args:
            split: :data:`TRAIN` or :data:`VALIDATION`.
        """
        total: Array = self._sums[split].sum(axis=0) + self.rest[split]
        return total
