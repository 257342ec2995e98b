"""A map's figures from moments alone: what a store that kept no rows can still say of a map.

With e = y - y_hat and rows about the map's own means, the squared error of target dimension j is
``sum e_j^2 = (Y'Y)_jj - 2 (W'X'Y)_jj + (W'X'X W)_jj``: R2 in all its forms and the mean squared error follow. A cosine
or a rank depends on single rows, and so do the norms of mapped rows, unless the map keeps norms up to a factor: then
CKA, which no rotation changes, is that of the unmapped states. Moments know no documents: the CKA that follows from
them is ``debiased-rows`` or ``biased``, of mapped states and of layers as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from align.maps.fitted import Aligner
from align.metrics import (
    CKA_KEYS,
    KEYS,
    RETRIEVAL_KEYS,
    SAME_TOKEN_KEYS,
    Figures,
    Reasons,
    ScoreAccumulator,
    biased_cka_from_moments,
    debiased_cka_from_moments,
)
from align.moments.scatter import Array, Moments, about, merge
from align.solvers.linalg import diagonal
from featstore.errors import StoreStateError
from featstore.store.moments.stored import SPLITS, Site, StoredMoments

NEEDS_ROWS = "needs rows; the store holds moments only"
#: Moments are sums over all rows, in which documents cannot be told apart any more.
NEEDS_DOCUMENTS = "needs rows, of which documents are known; the store holds moments only"
#: How far ``W W'`` may be from a multiple of the identity, relative to it: rounding of float32 weights, no more.
_ROTATION_TOLERANCE = 1e-5


def score_moments(moments: Moments, aligners: Mapping[str, Aligner | str]) -> dict[str, tuple[Figures | None, Reasons]]:
    """Score several maps on the rows that some moments sum over.

    Args:
        moments: Of the split's pairs, source as x and target as y.
        aligners: Maps by name, or the reason why there is none.

    Returns:
        As :func:`align.scoring.rows.score_all`: by name the figures and the reasons of those that are null.
    """
    rows = _Rows(moments)
    return {
        name: (None, {name: aligner}) if isinstance(aligner, str) else rows.score(aligner)
        for name, aligner in aligners.items()
    }


def layer_similarity(
    stored: StoredMoments, sites: Sequence[Site], estimator: str
) -> tuple[Array, dict[tuple[int, int], str]]:
    """CKA between all of some layers over the pairs of all splits.

    Args:
        stored: Of the two models; covers all pairs of the sites.
        sites: Layers of either model.
        estimator: ``debiased-rows`` or ``biased``.

    Returns:
        ``(values, reasons)``: a symmetric float64 ``(sites, sites)`` matrix, NaN where undefined, and the reason by
        position.

    Raises:
        StoreStateError: Moments are missing.
    """
    compute = biased_cka_from_moments if estimator == "biased" else debiased_cka_from_moments
    values = np.full((len(sites), len(sites)), math.nan)
    reasons: dict[tuple[int, int], str] = {}
    for r, x in enumerate(sites):
        for c in range(r, len(sites)):
            parts = [part for split in range(len(SPLITS)) if (part := stored.read(x, sites[c], split)) is not None]
            if len(parts) < len(SPLITS):
                raise StoreStateError(
                    f"{stored.store.path} lacks moments of {x} and {sites[c]}; make them with `featstore moments`"
                )
            values[r, c], reason = compute(merge(*parts))
            values[c, r] = values[r, c]
            if reason:
                reasons[r, c] = reason
    return values, reasons


class _Rows:
    """Rows of which the moments are all we have."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    @cached_property
    def _cka(self) -> tuple[float, str | None]:
        return debiased_cka_from_moments(self.moments)

    def score(self, aligner: Aligner) -> tuple[Figures, Reasons]:
        m = self.moments
        tensors = {name: value.astype(np.float64) for name, value in aligner.tensors.items()}
        weight, mean = tensors["weight"], tensors["control_mean"]
        own = about(m, tensors["mean_source"], tensors["mean_target"])
        error = diagonal(own.gy) - 2 * np.einsum("ij,ij->j", weight, own.c)
        error = error + np.einsum("ij,ij->j", weight, own.gx @ weight)
        away = mean - m.origin_y
        spread = diagonal(m.gy) - 2 * away * m.sy + m.n * away**2
        # Both are sums of squares, below zero by rounding alone.
        sums = _Sums(mean, m.n, np.maximum(error, 0.0), np.maximum(spread, 0.0))
        figures, reasons = sums.result(), sums.reasons()
        if m.n:
            reasons |= dict.fromkeys(("cosine", "cosine_centered", *RETRIEVAL_KEYS, *SAME_TOKEN_KEYS), NEEDS_ROWS)
            reasons["cka_debiased"] = NEEDS_DOCUMENTS
            value, reason = self._mapped_cka(weight)
            if reason is None:
                figures["cka_debiased_rows"] = value
            else:
                reasons["cka_debiased_rows"] = reason
        else:
            reasons |= dict.fromkeys((*CKA_KEYS, *RETRIEVAL_KEYS, *SAME_TOKEN_KEYS), "no rows")
        galleries = ("retrieval_gallery", "retrieval_same_token_gallery", "retrieval_same_token_tokens")
        return {**dict.fromkeys(KEYS), **figures, **dict.fromkeys(galleries, 0)}, reasons

    def _mapped_cka(self, weight: Array) -> tuple[float, str | None]:
        square = weight @ weight.T
        scale = float(np.trace(square)) / len(square)
        if scale == 0:
            return math.nan, "the second set of states does not vary"
        if np.abs(square - scale * np.eye(len(square))).max() > _ROTATION_TOLERANCE * scale:
            return math.nan, f"{NEEDS_ROWS}, from which it follows for rotations alone"
        return self._cka


class _Sums(ScoreAccumulator):
    """The figures that follow from squared errors already summed."""

    def __init__(self, mean: Array, n: int, sse: Array, sst: Array) -> None:
        super().__init__(mean)
        self.n, self._sse, self._sst = n, sse, sst
