"""R2, MSE and cosines over rows of true and predicted states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.moments.scatter import Array, Rows
from featstore.errors import FitError

Figures = dict[str, float | int | None]
Reasons = dict[str, str]

#: Keys of :meth:`ScoreAccumulator.result`.
ROW_KEYS = ("r2", "r2_median_dim", "r2_without_top_dims", "mse", "cosine", "cosine_centered")

#: Share of target dimensions that ``r2_without_top_dims`` leaves out, at least one.
TOP_DIMS_SHARE = 0.01

#: A centred row shorter than this part of the mean is rounding of the mean itself, not a direction.
ROUNDING = 1e-6


def checked_rows(name: str, value: Rows, width: int) -> Rows:
    """Rows of a given width as float32 or float64.

    Args:
        name: For the message.
        value: ``(n, width)`` of any number type.
        width: Expected width.

    Raises:
        FitError: Another shape.
    """
    rows = np.asarray(value)
    if rows.ndim != 2 or rows.shape[1] != width:
        raise FitError(f"{name} has shape {rows.shape}; expected (n, {width})")
    return rows if rows.dtype in (np.float32, np.float64) else rows.astype(np.float32)


def _row_dots(p: Rows, q: Rows) -> Array:
    dots: Array = np.einsum("ij,ij->i", p, q, dtype=np.float64)
    return dots


def _cosines(y: Rows, y_hat: Rows, size: Array, floor: float) -> tuple[Array, NDArray[np.bool_]]:
    """Cosine per row, 0 where one side has no direction, and where both have one; ``size`` is that of ``y``."""
    size_hat = np.sqrt(_row_dots(y_hat, y_hat))
    defined = (size > floor) & (size_hat > floor)
    norm = np.where(defined, size * size_hat, 1.0)
    return np.where(defined, _row_dots(y, y_hat) / norm, 0.0), defined


@dataclass(frozen=True, eq=False)
class TrueRows:
    """What true rows alone give, the same for every map that is scored on them; see :func:`true_rows`.

    Attributes:
        y: (m, dy) the rows.
        mean: float64 (dy,) what they are centred by.
        centred: float64 (m, dy).
        sst: float64 (dy,) squares of the centred rows, summed by dimension.
        size: float64 (m,) norm of every row.
        centred_size: float64 (m,) norm of every centred row.
    """

    y: Rows
    mean: Array
    centred: Array
    sst: Array
    size: Array
    centred_size: Array


def true_rows(y: Rows, mean: Array) -> TrueRows:
    """Measure true rows once for all maps.

    Args:
        y: (m, dy).
        mean: float64 (dy,), mean target state over the train rows.

    Raises:
        FitError: The width differs.
    """
    rows = checked_rows("y", y, len(mean))
    with np.errstate(invalid="ignore", over="ignore"):
        centred: Array = np.subtract(rows, mean, dtype=np.float64)
        sst = np.einsum("ij,ij->j", centred, centred, dtype=np.float64)
        return TrueRows(rows, mean, centred, sst, *(np.sqrt(_row_dots(part, part)) for part in (rows, centred)))


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
            raise FitError(
                f"mean_train_y must be a finite vector, not shape {self.mean.shape}"
                "; give the mean target state over the train rows"
            )
        self.n = 0
        self._floor = ROUNDING * float(np.linalg.norm(self.mean))
        self._sse, self._sst = np.zeros(len(self.mean)), np.zeros(len(self.mean))
        self._cosine = self._cosine_centered = 0.0
        self._with_cosine = self._with_centered = 0

    def update(self, y: Rows, y_hat: Rows, known: TrueRows | None = None) -> None:
        """Add rows.

        Args:
            y: (m, dy) true target states.
            y_hat: (m, dy) predicted ones.
            known: :func:`true_rows` of ``y`` and the mean, if they are known already.

        Raises:
            FitError: The shapes do not fit each other or the mean, or ``known`` is of another mean.
        """
        y, y_hat = checked_rows("y", y, len(self.mean)), checked_rows("y_hat", y_hat, len(self.mean))
        if len(y) != len(y_hat):
            raise FitError(f"y has {len(y)} rows and y_hat {len(y_hat)}; give a prediction for every true row")
        known = true_rows(y, self.mean) if known is None else known
        if known.mean is not self.mean and not np.array_equal(known.mean, self.mean):
            raise FitError("the true rows were measured about another mean; measure them about that of the train rows")
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            # Infinite predictions give NaN sums here and None in result().
            error = y - y_hat
            self._sse += np.einsum("ij,ij->j", error, error, dtype=np.float64)
            self._sst += known.sst
            cosine, defined = _cosines(y, y_hat, known.size, 0.0)
            guess = np.subtract(y_hat, self.mean, dtype=np.float64)
            centred, centred_defined = _cosines(known.centred, guess, known.centred_size, self._floor)
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
        varies = self._sst > self.n * (ROUNDING * self.mean) ** 2
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
