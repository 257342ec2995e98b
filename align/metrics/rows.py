"""R2, MSE and cosines over rows of true and predicted states."""

from __future__ import annotations

import math

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
        self._floor = ROUNDING * float(np.linalg.norm(self.mean))
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
        y, y_hat = checked_rows("y", y, len(self.mean)), checked_rows("y_hat", y_hat, len(self.mean))
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
