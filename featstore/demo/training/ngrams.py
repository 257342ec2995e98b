"""Counts of neighbouring tokens: where training begins, and the losses that a trained model has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: What Kneser-Ney smoothing takes off every count and gives to the back-off; 0.75 is customary.
_DISCOUNT = 0.75


def unigram_loss(train: Sequence[NDArray[np.int64]], test: Sequence[NDArray[np.int64]], pieces: int) -> float:
    """Nats per token when every token has the share it has in the train documents (one added to every count).

    Args:
        train: Tokens of each document, (tokens,).
        test: The same; the first token of a document is not predicted.
        pieces: Size of the vocabulary.
    """
    counts = np.bincount(np.concatenate([document[1:] for document in train]), minlength=pieces) + 1.0
    targets = np.concatenate([document[1:] for document in test])
    return float(-np.log(counts[targets] / counts.sum()).mean())


def bigram_table(train: Sequence[NDArray[np.int64]], pieces: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """An interpolated Kneser-Ney bigram (Chen & Goodman 1999, section 2.7) as a table.

    Args:
        train: Tokens of each document, (tokens,).
        pieces: Size of the vocabulary.

    Returns:
        (pieces, pieces) float32, the probability of each token (column) after each token (row), and (pieces,) int64,
        how often each token had one after it. A token that never had one is followed as any token is.
    """
    pairs = np.concatenate([document[:-1] * pieces + document[1:] for document in train])
    counts = np.bincount(pairs, minlength=pieces * pieces).reshape(pieces, pieces)
    # In how many contexts a piece was seen, one added so that no piece is impossible.
    contexts = (counts > 0).sum(0) + 1.0
    totals = counts.sum(1)
    followers = (counts > 0).sum(1)
    back_off = np.where(totals > 0, _DISCOUNT * followers / np.maximum(totals, 1), 1.0)
    table = np.maximum(counts - np.float32(_DISCOUNT), 0, dtype=np.float32)
    table /= np.maximum(totals, 1)[:, None].astype(np.float32)
    table += back_off[:, None].astype(np.float32) * (contexts / contexts.sum()).astype(np.float32)
    return table, totals


def bigram_loss(table: NDArray[np.float32], test: Sequence[NDArray[np.int64]]) -> float:
    """Nats per token of a bigram.

    Args:
        table: From :func:`bigram_table`.
        test: Tokens of each document, (tokens,); the first is not predicted.
    """
    before = np.concatenate([document[:-1] for document in test])
    after = np.concatenate([document[1:] for document in test])
    return float(-np.log(table[before, after]).mean(dtype=np.float64))
