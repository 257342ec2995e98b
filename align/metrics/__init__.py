"""Scores of predicted target states against true ones: arrays in, figures out.

A figure that cannot be computed is ``None`` (or NaN for a single CKA) with a reason beside it; bad
data never raises and never warns. The keys are those of a block of ``metrics.json``
(docs/results.md).
"""

from align.metrics.documents import DocumentSums, add_intervals, paired_difference, r2_interval, r2_of
from align.metrics.partial import TOKEN, add_partial, partial_r2
from align.metrics.ranking import RETRIEVAL_KEYS, retrieval
from align.metrics.rows import ROW_KEYS, TOP_DIMS_SHARE, Figures, Reasons, ScoreAccumulator
from align.metrics.same_token import SAME_TOKEN_KEYS, retrieval_same_token
from align.metrics.scorer import CKA_KEYS, KEYS, Scorer, score
from align.metrics.similarity import (
    biased_cka,
    biased_cka_from_moments,
    debiased_cka,
    debiased_cka_from_moments,
    debiased_ckas,
    hsic0_linear,
    hsic1_linear,
)

__all__ = [
    "CKA_KEYS",
    "KEYS",
    "RETRIEVAL_KEYS",
    "ROW_KEYS",
    "SAME_TOKEN_KEYS",
    "TOKEN",
    "TOP_DIMS_SHARE",
    "DocumentSums",
    "Figures",
    "Reasons",
    "ScoreAccumulator",
    "Scorer",
    "add_intervals",
    "add_partial",
    "biased_cka",
    "biased_cka_from_moments",
    "debiased_cka",
    "debiased_cka_from_moments",
    "debiased_ckas",
    "hsic0_linear",
    "hsic1_linear",
    "paired_difference",
    "partial_r2",
    "r2_interval",
    "r2_of",
    "retrieval",
    "retrieval_same_token",
    "score",
]
