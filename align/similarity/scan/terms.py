"""What is left of a scan of all layers, and the CKA that follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from align.metrics import biased_cka_from_moments, debiased_cka_from_moments
from align.metrics.similarity import cka_of_sums
from align.moments.scatter import Array, Moments
from align.solvers.row_effects import Documents
from featstore.errors import SpecError

#: Over pairs of rows of different documents, of different rows, over all pairs, and of different rows within batches.
ESTIMATORS = ("debiased", "debiased-rows", "biased", "minibatch")


def effective_rank(scatter: Array) -> float:
    """Exp of the entropy of the eigenvalues as shares of their sum (Roy and Vetterli, EUSIPCO 2007).

    Args:
        scatter: float64 ``(d, d)``, centred sums X'X.

    Returns:
        NaN where nothing varies.
    """
    # Rounding leaves eigenvalues on either side of zero.
    values = np.maximum(np.linalg.eigvalsh(scatter), 0.0)
    total = values.sum()
    return float(np.exp(entr(values / total).sum())) if total > 0 else float("nan")


@dataclass(frozen=True, eq=False)
class Terms:
    """What is left of a scan: sums about the means of all rows, for every two of S layers.

    Attributes:
        n: Rows.
        fro: float64 ``(S, S)``, squared Frobenius norm of the cross-covariance sums ``X'Y``.
        d: float64 ``(S, S)``, sums of ``|x|^2 |y|^2``.
        a: float64 ``(S,)``, sums of ``|x|^2``.
        mean: float64 ``(S,)``, norm of the mean row.
        effective_rank: float64 ``(S,)``, exp of the entropy of the covariance's eigenvalues as shares (Roy and
            Vetterli, EUSIPCO 2007); NaN where a layer does not vary, or ranks were not asked for.
        batched: float64 ``(S, S)``, sums of HSIC_1 over batches; None unless asked for.
        batches: How many.
        batch_rows: Rows that are in one of them; fewer than n by what made no whole batch.
        hsic: float64 ``(S, S)``, sums of products over pairs of rows of different documents without row effects; None
            of a scan that knew no documents. Then ``d`` is NaN.
        size: float64 ``(S,)``, the size of the terms that ``hsic`` of a layer with itself is the difference of.
        corrected: float64 ``(S,)``, ``hsic`` of a layer with itself over pairs of different features, as many as all
            have; NaN where it was not asked for, or of a single feature.
        undefined: Why nothing is left to compare over documents.
    """

    n: int
    fro: Array
    d: Array
    a: Array
    mean: Array
    effective_rank: Array
    batched: Array | None
    batches: int
    batch_rows: int
    hsic: Array | None = None
    size: Array | None = None
    corrected: Array | None = None
    undefined: str | None = None

    @property
    def participation_ratio(self) -> Array:
        """float64 ``(S,)``: the squared sum of the covariance's eigenvalues over the sum of their squares."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio: Array = np.square(self.a) / np.diag(self.fro)
        ratio[np.isnan(self.effective_rank)] = math.nan
        return ratio

    def moments(self, first: int, second: int) -> Moments:
        """Moments of width one that have the same traces and norms as those of two layers.

        CKA with linear kernels does not see more of two layers than these, so its scores and their reasons are those
        of the layers.

        Args:
            first: Place of a layer.
            second: Place of another, or the same.
        """

        def one(value: float) -> Array:
            return np.array([value], dtype=np.float64)

        r, c = first, second
        gx, gy, cross = (one(math.sqrt(self.fro[pair]))[None] for pair in ((r, r), (c, c), (r, c)))
        zero = np.zeros(1)
        return Moments(
            n=self.n, origin_x=one(self.mean[r]), origin_y=one(self.mean[c]), sx=zero, sy=zero, gx=gx, gy=gy, c=cross,
            a=float(self.a[r]), b=float(self.a[c]), d=float(self.d[r, c]), aa=float(self.d[r, r]),
            bb=float(self.d[c, c]), ux=zero, uy=zero, vx=zero, vy=zero,
        )  # fmt: skip


def joined(
    blocks: Sequence[Mapping[str, NDArray[Any]]],
    groups: Sequence[Sequence[int]],
    *,
    batched: bool = False,
    documents: Documents | None = None,
    widths: Sequence[int] = (),
) -> Terms:
    """The terms of all layers from those of each two groups.

    Args:
        blocks: From :func:`align.similarity.scan.partials.terms_of`, or with documents from
            :func:`align.similarity.scan.documents.terms_between`, of the groups (0, 0), (0, 1), ..., (1, 1), ... over
            the same rows.
        groups: Places of the layers of each group.
        batched: Whether batches were made.
        documents: Of the rows, where the sums are by document.
        widths: With them, of every layer.
    """
    count = sum(map(len, groups))
    square = {name: np.zeros((count, count)) for name in ("fro", "d", "batched", "hsic") if name in blocks[0]}
    single = {name: np.zeros(count) for name in ("a", "mean", "effective_rank", "size", "alone") if name in blocks[0]}
    for (p, q), block in zip(combinations_with_replacement(groups, 2), blocks, strict=True):
        for name, values in square.items():
            values[np.ix_(p, q)] = block[name]
            values[np.ix_(q, p)] = block[name].T
        if p is q:
            for name, value in single.items():
                value[list(p)] = block[name]
    n, batches, rows = (int(value) for value in blocks[0]["counts"])
    d = square.get("d", np.full((count, count), math.nan))
    terms = Terms(
        n, square["fro"], d, single["a"], single["mean"], single["effective_rank"],
        batched=None, batches=batches, batch_rows=rows,
    )  # fmt: skip
    if documents is not None:
        own, wide = np.diag(square["hsic"]), np.asarray(widths, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            corrected = np.where(wide > 1, (own - single["alone"]) * wide / (wide - 1), math.nan)
        terms = replace(
            terms, hsic=square["hsic"], size=single["size"], corrected=corrected, undefined=documents.reason
        )
    for place in range(count):
        # Of rounding there is a spectrum, too.
        if biased_cka_from_moments(terms.moments(place, place))[1] is not None:
            terms.effective_rank[place] = math.nan
    return replace(terms, batched=square["batched"]) if batched else terms


def check_estimator(name: str) -> str:
    """Validate ``--estimator``.

    Args:
        name: As typed.

    Raises:
        SpecError: Unknown.
    """
    if name not in ESTIMATORS:
        raise SpecError(f"estimator {name!r}: choose one of {', '.join(ESTIMATORS)}")
    return name


def similarity(
    terms: Terms, estimator: str = "debiased", *, correct_features: bool = False
) -> tuple[Array, dict[tuple[int, int], str]]:
    """CKA of every two layers.

    ``debiased``, ``debiased-rows`` and ``biased`` are exact over all rows. ``minibatch`` averages HSIC_1 over batches,
    numerator and denominators apart, and divides then (Nguyen, Raghu and Kornblith, ICLR 2021).

    Args:
        terms: What a scan found.
        estimator: One of :data:`ESTIMATORS`.
        correct_features: As for :func:`align.metrics.debiased_cka`; of ``debiased`` alone. A layer with itself is 1.

    Returns:
        ``(values, reasons)``: a symmetric float64 ``(S, S)`` matrix, NaN where undefined, and the reason by position in
        the upper triangle. Never clamped.

    Raises:
        SpecError: Unknown estimator, or a scan without what it takes.
    """
    check_estimator(estimator)
    if (estimator == "debiased") != (terms.hsic is not None) and estimator != "biased":
        raise SpecError(f"this scan was not made for {estimator!r}; scan with that estimator")
    if estimator == "minibatch" and terms.batched is None:
        raise SpecError("this scan made no batches; scan with the estimator 'minibatch'")
    values = np.full(terms.fro.shape, math.nan)
    reasons: dict[tuple[int, int], str] = {}
    for r in range(len(terms.a)):
        for c in range(r, len(terms.a)):
            value, reason = _of_two(terms, r, c, estimator, correct_features=correct_features)
            values[r, c] = values[c, r] = value
            if reason is not None:
                reasons[r, c] = reason
    return values, reasons


def _of_two(terms: Terms, r: int, c: int, estimator: str, *, correct_features: bool) -> tuple[float, str | None]:
    moments = terms.moments(r, c)
    if estimator == "biased":
        return biased_cka_from_moments(moments)
    if estimator == "debiased":
        return _between(terms, r, c, correct_features=correct_features)
    value, reason = debiased_cka_from_moments(moments)
    # Layers without structure over all rows have none in batches; rounding may seem to be some.
    return _of_batches(terms, r, c) if reason is None and estimator == "minibatch" else (value, reason)


def _between(terms: Terms, r: int, c: int, *, correct_features: bool) -> tuple[float, str | None]:
    hsic, size, corrected = terms.hsic, terms.size, terms.corrected
    if hsic is None or size is None or corrected is None:
        return math.nan, "no sums were made by document"
    # Layers that do not vary are found as they are everywhere.
    if reason := terms.undefined or biased_cka_from_moments(terms.moments(r, c))[1]:
        return math.nan, reason
    own, of = [hsic[r, r], hsic[c, c]], "self-HSIC"
    if correct_features and r != c:
        own, of = [corrected[r], corrected[c]], "self-HSIC over pairs of different features"
    return cka_of_sums(float(hsic[r, c]), own, [size[r], size[c]], of)


def _of_batches(terms: Terms, r: int, c: int) -> tuple[float, str | None]:
    sums = terms.batched
    if sums is None:
        return math.nan, "no batches were made"
    for name, place in (("first", r), ("second", c)):
        if not sums[place, place] > 0:
            return math.nan, f"mean self-HSIC over batches of the {name} set of states is not positive"
    return float(sums[r, c] / math.sqrt(sums[r, r] * sums[c, c])), None
