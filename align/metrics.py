"""Scores of predicted target states against true ones: arrays in, figures out.

A figure that cannot be computed is ``None`` (or NaN for a single CKA) with a reason beside it; bad
data never raises and never warns. The keys are those of a block of ``metrics.json``
(docs/architecture.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.moments import Array, Moments, Rows, means, moments_of, moved, paired_with_itself
from featstore.errors import FitError

Figures = dict[str, float | int | None]
Reasons = dict[str, str]

#: Keys of :meth:`ScoreAccumulator.result`.
ROW_KEYS = ("r2", "r2_median_dim", "r2_without_top_dims", "mse", "cosine", "cosine_centered")
RETRIEVAL_KEYS = (
    "retrieval_top1",
    "retrieval_top5",
    "retrieval_mrr",
    "retrieval_median_rank",
    "retrieval_chance",
)
#: Every key of a block, in the order of docs/architecture.md.
KEYS = (*ROW_KEYS, "cka_debiased", *RETRIEVAL_KEYS, "retrieval_gallery", "n")

#: Share of target dimensions that ``r2_without_top_dims`` leaves out, at least one.
TOP_DIMS_SHARE = 0.01

# A centred row shorter than this part of the mean is rounding of the mean itself, not a direction.
_ROUNDING = 1e-6


def _rows(name: str, value: Rows, width: int) -> Rows:
    rows = np.asarray(value)
    if rows.ndim != 2 or rows.shape[1] != width:
        raise FitError(f"{name} has shape {rows.shape}; expected (n, {width})")
    return rows if rows.dtype in (np.float32, np.float64) else rows.astype(np.float32)


def _row_dots(p: Rows, q: Rows) -> Array:
    dots: Array = np.einsum("ij,ij->i", p, q, dtype=np.float64)
    return dots


def _cosines(y: Rows, y_hat: Rows, floor: float) -> tuple[Array, NDArray[np.bool_]]:
    """Cosine per row, 0 where one side has no direction, and where both have one."""
    size, size_hat = np.sqrt(_row_dots(y, y)), np.sqrt(_row_dots(y_hat, y_hat))
    defined = (size > floor) & (size_hat > floor)
    norm = np.where(defined, size * size_hat, 1.0)
    return np.where(defined, _row_dots(y, y_hat) / norm, 0.0), defined


class ScoreAccumulator:
    """R2, MSE and cosines over blocks of rows, in float64 sums.

    ``r2`` is pooled, 1 - SSE/SST, with SST about the *train* mean, so that predicting the train
    mean scores 0 on any split. ``r2_median_dim`` is the median over dimensions that vary.
    ``r2_without_top_dims`` leaves out the hundredth part of the dimensions (at least one) with the
    largest SST on the scored rows: one massive dimension can carry a pooled R2 alone. ``mse`` is
    per element. ``cosine_centered`` takes both sides about the train mean. A row whose prediction
    (or truth) has no direction counts as cosine 0; if that holds for all rows the figure is None.

    Args:
        mean_train_y: (dy,) mean target state over the train rows.

    Raises:
        FitError: The mean is not a finite vector.
    """

    def __init__(self, mean_train_y: ArrayLike) -> None:
        self.mean: Array = np.asarray(mean_train_y, dtype=np.float64)
        if self.mean.ndim != 1 or not self.mean.size or not np.isfinite(self.mean).all():
            raise FitError(f"mean_train_y must be a finite vector, not shape {self.mean.shape}")
        self.n = 0
        self._floor = _ROUNDING * float(np.linalg.norm(self.mean))
        self._sse, self._sst = np.zeros(len(self.mean)), np.zeros(len(self.mean))
        self._cosine = self._cosine_centered = 0.0
        self._with_cosine = self._with_centered = 0

    def update(self, y: Rows, y_hat: Rows) -> None:
        """Add rows.

        Args:
            y: (m, dy) true target states.
            y_hat: (m, dy) predicted ones.

        Raises:
            FitError: The shapes do not fit each other or the mean.
        """
        y, y_hat = _rows("y", y, len(self.mean)), _rows("y_hat", y_hat, len(self.mean))
        if len(y) != len(y_hat):
            raise FitError(f"y has {len(y)} rows and y_hat {len(y_hat)}")
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            # Infinite predictions give NaN sums here and None in result().
            error = y - y_hat
            true, guess = (np.subtract(r, self.mean, dtype=np.float64) for r in (y, y_hat))
            self._sse += np.einsum("ij,ij->j", error, error, dtype=np.float64)
            self._sst += np.einsum("ij,ij->j", true, true, dtype=np.float64)
            cosine, defined = _cosines(y, y_hat, 0.0)
            centred, centred_defined = _cosines(true, guess, self._floor)
        self._cosine += float(cosine.sum())
        self._cosine_centered += float(centred.sum())
        self._with_cosine += int(defined.sum())
        self._with_centered += int(centred_defined.sum())
        self.n += len(y)

    def result(self) -> Figures:
        """The figures ``r2 ... cosine_centered`` and ``n``; None where one cannot be computed."""
        return self._figures()[0]

    def reasons(self) -> Reasons:
        """Why a figure of :meth:`result` is None, by key."""
        return self._figures()[1]

    def _figures(self) -> tuple[Figures, Reasons]:
        figures: Figures = {**dict.fromkeys(ROW_KEYS), "n": self.n}
        if self.n == 0:
            return figures, dict.fromkeys(ROW_KEYS, "no rows")
        if not (np.isfinite(self._sse).all() and np.isfinite(self._sst).all()):
            return figures, dict.fromkeys(ROW_KEYS, "a true or predicted state is not finite")
        reasons: Reasons = {}
        # Below this a dimension is constant but for the rounding of its own mean.
        varies = self._sst > self.n * (_ROUNDING * self.mean) ** 2
        if varies.any():
            figures["r2"] = 1.0 - float(self._sse.sum() / self._sst.sum())
            figures["r2_median_dim"] = float(np.median(1.0 - self._sse[varies] / self._sst[varies]))
        else:
            for key in ("r2", "r2_median_dim"):
                reasons[key] = "the target equals the train mean in every row"
        top = max(1, math.ceil(TOP_DIMS_SHARE * len(self._sst)))
        rest = np.argsort(self._sst, kind="stable")[: len(self._sst) - top]
        if varies[rest].any():
            ratio = self._sse[rest].sum() / self._sst[rest].sum()
            figures["r2_without_top_dims"] = 1.0 - float(ratio)
        else:
            reasons["r2_without_top_dims"] = f"nothing varies beside the {top} largest dimensions"
        figures["mse"] = float(self._sse.sum()) / (self.n * len(self._sse))
        for key, total, count in (
            ("cosine", self._cosine, self._with_cosine),
            ("cosine_centered", self._cosine_centered, self._with_centered),
        ):
            if count:
                figures[key] = total / self.n
            else:
                reasons[key] = "no row has a direction on both sides"
        return figures, reasons


def _centred(m: Moments) -> Moments:
    return moved(m, *means(m))


def _hsic1_centred(m: Moments) -> tuple[float, float]:
    """HSIC_1 of moments about the mean, and the size of the terms it is the difference of."""
    n = m.n
    fro, diagonal = float(np.sum(m.c * m.c)), n / (n - 2) * m.d
    product = m.a * m.b / ((n - 1) * (n - 2))
    return (fro - diagonal + product) / (n * (n - 3)), (fro + diagonal + product) / (n * (n - 3))


def hsic1_linear(m: Moments) -> float:
    """Unbiased HSIC_1 (Song et al. 2012) with linear kernels, from moments about any origin.

    [ |C|_F^2 - n/(n-2) D + AB/((n-1)(n-2)) ] / (n(n-3)) about the mean. May be negative. NaN below
    4 rows.

    Args:
        m: Moments of the pairs; ``paired_with_itself(m, "x")`` for a self term.
    """
    return _hsic1_centred(_centred(m))[0] if m.n >= 4 else math.nan


def hsic0_linear(m: Moments) -> float:
    """Biased HSIC_0 = |Xc'Yc|_F^2 / (n-1)^2 with linear kernels; NaN below 2 rows.

    Args:
        m: Moments of the pairs about any origin.
    """
    return float(np.sum(_centred(m).c ** 2)) / (m.n - 1) ** 2 if m.n >= 2 else math.nan


def _constant_side(m: Moments) -> str | None:
    """Name the side whose rows are equal to the float32 rounding of their mean."""
    for name, origin, spread in (("first", m.origin_x, m.a), ("second", m.origin_y, m.b)):
        eps = float(np.finfo(np.float32).eps)
        if spread <= m.n * eps * eps * float(origin @ origin):
            return f"the {name} set of states does not vary"
    return None


def debiased_cka_from_moments(m: Moments) -> tuple[float, str | None]:
    """CKA with unbiased HSIC_1 and linear kernels; about 0 for independent data of any width.

    Never clamped: it may be slightly negative or, at small n, exceed 1 by noise.

    Args:
        m: Moments of the pairs about any origin.

    Returns:
        ``(value, None)``, or ``(nan, reason)`` below 4 rows or where a side has no similarity
        structure (self-HSIC zero or below, to rounding).
    """
    if m.n < 4:
        return math.nan, f"debiased CKA needs at least 4 rows, not {m.n}"
    m = _centred(m)
    if reason := _constant_side(m):
        return math.nan, reason
    selves = []
    for name, side in (("first", "x"), ("second", "y")):
        value, size = _hsic1_centred(paired_with_itself(m, side))
        # A self-HSIC is never negative in exact arithmetic; at this size only rounding is left.
        if not value > 1e-12 * size:
            return math.nan, f"self-HSIC of the {name} set of states is not positive"
        selves.append(value)
    return _hsic1_centred(m)[0] / math.sqrt(selves[0] * selves[1]), None


def biased_cka_from_moments(m: Moments) -> tuple[float, str | None]:
    """CKA with the biased HSIC_0 and linear kernels: near 1 for *any* data when n is below d.

    Args:
        m: Moments of the pairs about any origin.

    Returns:
        ``(value, None)``, or ``(nan, reason)`` below 2 rows or where a side does not vary.
    """
    if m.n < 2:
        return math.nan, f"CKA needs at least 2 rows, not {m.n}"
    m = _centred(m)
    if reason := _constant_side(m):
        return math.nan, reason
    norms = float(np.linalg.norm(m.gx)) * float(np.linalg.norm(m.gy))
    return float(np.sum(m.c * m.c)) / norms, None


def _moments_near_mean(x: Rows, y: Rows) -> Moments:
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise FitError("a true or predicted state is not finite")
    return moments_of(x, y, *(np.mean(r, axis=0, dtype=np.float64) for r in (x, y)))


def debiased_cka(x: Rows, y: Rows) -> tuple[float, str | None]:
    """:func:`debiased_cka_from_moments` of rows in memory.

    Args:
        x: (n, dx).
        y: (n, dy), the i-th row paired with the i-th of ``x``.

    Raises:
        FitError: Shapes do not fit or a row is not finite.
    """
    if len(x) < 4:
        return math.nan, f"debiased CKA needs at least 4 rows, not {len(x)}"
    return debiased_cka_from_moments(_moments_near_mean(x, y))


def biased_cka(x: Rows, y: Rows) -> tuple[float, str | None]:
    """:func:`biased_cka_from_moments` of rows in memory.

    Args:
        x: (n, dx).
        y: (n, dy), the i-th row paired with the i-th of ``x``.

    Raises:
        FitError: Shapes do not fit or a row is not finite.
    """
    if len(x) < 2:
        return math.nan, f"CKA needs at least 2 rows, not {len(x)}"
    return biased_cka_from_moments(_moments_near_mean(x, y))


def retrieval(y: Rows, y_hat: Rows, *, centre: ArrayLike) -> Figures:
    """Find each true row among all true rows by the cosine of its prediction, both centred.

    Ties count as if broken at random: the median rank takes the middle of the tied ranks, top-k and
    MRR their expectation. So a prediction that does not depend on its input scores exactly chance:
    top-1 1/N, median rank (N + 1)/2.

    Args:
        y: (N, dy) the gallery.
        y_hat: (N, dy) the i-th row is the query for the i-th of the gallery.
        centre: (dy,) subtracted from both; the train mean.

    Returns:
        ``retrieval_top1 ... retrieval_chance`` and ``retrieval_gallery`` = N; all but the last None
        where the gallery has fewer than two rows or all its rows look the same.

    Raises:
        FitError: Shapes do not fit.
    """
    mean = np.asarray(centre, dtype=np.float64)
    y, y_hat = _rows("y", y, mean.size), _rows("y_hat", y_hat, mean.size)
    if len(y) != len(y_hat):
        raise FitError(f"y has {len(y)} rows and y_hat {len(y_hat)}")
    return _retrieval(y, y_hat, mean)[0]


def _retrieval(y: Rows, y_hat: Rows, mean: Array) -> tuple[Figures, str | None]:
    n, floor = len(y), _ROUNDING * float(np.linalg.norm(mean))
    figures: Figures = {**dict.fromkeys(RETRIEVAL_KEYS), "retrieval_gallery": n}
    if n < 2:
        return figures, f"retrieval needs at least 2 rows, not {n}"
    if not (np.isfinite(y).all() and np.isfinite(y_hat).all()):
        return figures, "a true or predicted state is not finite"
    gallery, queries = _unit(y - mean, floor), _unit(y_hat - mean, floor)
    if float(np.abs(gallery - gallery[0]).max()) < _ROUNDING:
        return figures, "all target rows of the gallery point the same way"
    similarity = queries @ gallery.T
    # Equal rows need not give bitwise equal products; 1e-12 is far below any real difference.
    difference = similarity - np.diag(similarity)[:, None]
    better = (difference > 1e-12).sum(axis=1)
    ties = (np.abs(difference) <= 1e-12).sum(axis=1)
    figures["retrieval_top1"] = float(np.clip((1 - better) / ties, 0, 1).mean())
    figures["retrieval_top5"] = float(np.clip((5 - better) / ties, 0, 1).mean())
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])
    reciprocal = (harmonic[better + ties] - harmonic[better]) / ties
    figures["retrieval_mrr"] = float(reciprocal.mean())
    figures["retrieval_median_rank"] = float(np.median(better + (ties + 1) / 2))
    figures["retrieval_chance"] = 1 / n
    return figures, None


def _unit(rows: Array, floor: float) -> Array:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > floor, rows / np.where(norms > floor, norms, 1.0), 0.0)


class _Sample:
    """Keeps a subset of a stream of known length: which rows depends on the seed alone."""

    def __init__(self, total: int, size: int, rng: np.random.Generator) -> None:
        self._wanted = np.sort(rng.choice(total, size=min(size, total), replace=False))
        self._kept: list[tuple[Rows, Rows]] = []

    def update(self, start: int, y: Rows, y_hat: Rows) -> None:
        low, high = np.searchsorted(self._wanted, [start, start + len(y)])
        take = self._wanted[low:high] - start
        # Fancy indexing copies, so the caller's buffers can be reused.
        self._kept.append((y[take], y_hat[take]))

    def rows(self) -> tuple[Rows, Rows]:
        y, y_hat = zip(*self._kept, strict=True)
        return np.concatenate(y), np.concatenate(y_hat)


class Scorer:
    """Every figure of a ``metrics.json`` block over a stream of blocks.

    Row figures use all rows; CKA and retrieval use two fixed random subsets, the same however the
    rows are cut into blocks and the same for every aligner scored with this seed.

    Args:
        mean_train_y: (dy,) mean target state over the train rows.
        total: How many rows will come.
        gallery: Rows of the retrieval gallery, at most.
        cka_rows: Rows for CKA, at most.
        seed: Chooses the subsets.

    Raises:
        FitError: The mean is not a finite vector, or a count is negative.
    """

    def __init__(
        self,
        mean_train_y: ArrayLike,
        total: int,
        *,
        gallery: int = 512,
        cka_rows: int = 16_384,
        seed: int = 0,
    ) -> None:
        if min(total, gallery, cka_rows) < 0:
            raise FitError(f"counts cannot be negative: {total}, {gallery}, {cka_rows}")
        self._rows = ScoreAccumulator(mean_train_y)
        self._total = total
        rng_gallery, rng_cka = np.random.default_rng(seed).spawn(2)
        self._gallery = _Sample(total, gallery, rng_gallery)
        self._cka = _Sample(total, cka_rows, rng_cka)

    def update(self, y: Rows, y_hat: Rows) -> None:
        """Add the next rows, in order.

        Args:
            y: (m, dy) true target states.
            y_hat: (m, dy) predicted ones.

        Raises:
            FitError: Shapes do not fit, or more rows come than announced.
        """
        start = self._rows.n
        if start + len(y) > self._total:
            raise FitError(f"{start + len(y)} rows came, {self._total} were announced")
        self._rows.update(y, y_hat)
        for sample in (self._gallery, self._cka):
            sample.update(start, np.asarray(y), np.asarray(y_hat))

    def result(self) -> tuple[Figures, Reasons]:
        """The block with all of :data:`KEYS`, and a reason for each None."""
        found, reasons = self._rows.result(), self._rows.reasons()
        if self._rows.n == 0:
            found["retrieval_gallery"] = 0
            missing = ("cka_debiased", *RETRIEVAL_KEYS)
            reasons.update(dict.fromkeys(missing, "no rows"))
        else:
            gallery, reason = _retrieval(*self._gallery.rows(), self._rows.mean)
            found.update(gallery)
            if reason:
                reasons.update(dict.fromkeys(RETRIEVAL_KEYS, reason))
            try:
                cka, reason = debiased_cka(*self._cka.rows())
            except FitError as error:
                cka, reason = math.nan, str(error)
            if reason:
                reasons["cka_debiased"] = reason
            else:
                found["cka_debiased"] = cka
        return {key: found.get(key) for key in KEYS}, reasons


def score(
    y: Rows,
    y_hat: Rows,
    mean_train_y: ArrayLike,
    *,
    gallery: int = 512,
    cka_rows: int = 16_384,
    seed: int = 0,
) -> tuple[Figures, Reasons]:
    """Every figure of a ``metrics.json`` block from rows in memory; see :class:`Scorer`.

    Args:
        y: (n, dy) true target states.
        y_hat: (n, dy) predicted ones.
        mean_train_y: (dy,) mean target state over the train rows.
        gallery: Rows of the retrieval gallery, at most.
        cka_rows: Rows for CKA, at most.
        seed: Chooses the subsets.

    Returns:
        The figures by key, and a reason for each that is None.

    Raises:
        FitError: Shapes do not fit.
    """
    scorer = Scorer(mean_train_y, len(y), gallery=gallery, cka_rows=cka_rows, seed=seed)
    for start in range(0, len(y), 8192):
        scorer.update(y[start : start + 8192], y_hat[start : start + 8192])
    return scorer.result()


def document_bootstrap(
    values_by_document: ArrayLike,
    statistic: Callable[[Array], Array] | tuple[int, int],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """A 95 % percentile interval of a statistic of sums, resampling whole documents.

    Tokens of one document depend on each other, so resampling tokens would give intervals far too
    narrow. Draws in which the statistic is undefined (a zero denominator) are left out.

    Args:
        values_by_document: (n_documents, k) sums over each document, say nats and tokens.
        statistic: Takes resampled totals (draws, k) and returns (draws,); or ``(i, j)`` for column
            i over column j.
        draws: Resamples.
        seed: Fixes them.

    Returns:
        The 2.5 % and 97.5 % quantiles; ``(nan, nan)`` below two documents or where no draw is
        defined.

    Raises:
        FitError: The values are not a finite matrix, or there are no draws.
    """
    values = np.asarray(values_by_document, dtype=np.float64)
    if values.ndim != 2 or not np.isfinite(values).all() or draws < 1:
        raise FitError(f"need a finite (documents, k) matrix and draws: {values.shape}, {draws}")
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    # Counts in slices: 1000 draws of all Wikitext documents at once would take gigabytes.
    totals = [
        rng.multinomial(n, np.full(n, 1 / n), size=min(100, draws - start)) @ values for start in range(0, draws, 100)
    ]
    resampled = np.concatenate(totals)
    with np.errstate(divide="ignore", invalid="ignore"):
        if callable(statistic):
            found = np.asarray(statistic(resampled), dtype=np.float64)
        else:
            found = resampled[:, statistic[0]] / resampled[:, statistic[1]]
    found = found[np.isfinite(found)]
    if not found.size:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
