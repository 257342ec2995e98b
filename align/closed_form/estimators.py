"""The closed-form maps as scikit-learn estimators: rows in, mapped rows out.

Pipelines, clones, grid searches and ``set_output`` work. The mathematics is that of :mod:`align.solvers` on the sums of
:mod:`align.moments.scatter`; here are only rows, parameters and the choice of what is held out.

>>> import numpy as np
>>> from align import ProcrustesAligner
>>> x = np.random.default_rng(0).normal(size=(200, 3))
>>> y = x @ np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]) + 2.0
>>> aligner = ProcrustesAligner().fit(x[:150], y[:150])
>>> round(aligner.score(x[150:], y[150:]), 6)
1.0
>>> aligner.set_output(transform="pandas").transform(x[:2]).columns.tolist()
['procrustesaligner0', 'procrustesaligner1', 'procrustesaligner2']
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    MultiOutputMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted, validate_data

from align.moments.scatter import Array, Moments, Scatter, about, centered, means, merge, moments_of, raw
from align.solvers import (
    RidgePath,
    Spectrum,
    procrustes,
    reduced_rank,
    select_reduced_rank,
    select_ridge,
    select_truncated_procrustes,
    truncated_procrustes,
)
from featstore.errors import FitError

#: Part of the rows on which a strength is chosen.
HELD_OUT = 0.1
#: Rank of a low-rank map where none is given and the widths allow it.
RANK = 32


class _Aligner(ClassNamePrefixFeaturesOutMixin, MultiOutputMixin, TransformerMixin, RegressorMixin, BaseEstimator):
    """What all estimators share: checked rows to moments, and the fitted map applied.

    ``get_feature_names_out`` names the mapped dimensions after the class (``affinealigner0``, ...), and ``set_output``
    lets :meth:`transform` return a pandas or polars frame with these names.
    """

    def fit(self, X: ArrayLike, Y: ArrayLike, groups: ArrayLike | None = None) -> Self:
        """Fit the map.

        Args:
            X: (n, dx) source rows. float32 is multiplied in float32 and summed in float64.
            Y: (n, dy) target rows; (n,) counts as one column.
            groups: (n,) the document of every row. What is chosen on held-out rows is then chosen on whole groups:
                the last ones in order of appearance, together about a tenth of the rows. Without it, on the last
                tenth of the rows.

        Raises:
            ValueError: Rows are not finite, or numbers of rows differ.
            FitError: A parameter does not fit the rows, or there are too few rows or groups to hold any out.
        """
        x, y = validate_data(
            self, X, Y, multi_output=True, y_numeric=True, dtype=[np.float64, np.float32], ensure_min_samples=2
        )
        self._flat = y.ndim == 1
        y = check_array(y.reshape(len(x), -1), dtype=[np.float64, np.float32])
        origins = x.mean(axis=0, dtype=np.float64), y.mean(axis=0, dtype=np.float64)
        if not self._chooses():
            total, parts = moments_of(x, y, *origins), None
        else:
            held = _held_out(len(x), groups)
            kept, val = (moments_of(x[rows], y[rows], *origins) for rows in (~held, held))
            total, parts = merge(kept, val), (kept, val)
        #: Mean target row of the train rows: what R2 is measured about.
        self.center_target_: Array = means(total)[1]
        self._fit(total, parts)
        return self

    def _chooses(self) -> bool:
        """Whether anything is chosen on held-out rows."""
        raise NotImplementedError

    def _fit(self, total: Moments, parts: tuple[Moments, Moments] | None) -> None:
        """Choose on ``parts`` (fit rows, held-out rows) if there are any, fit on ``total``, set the attributes."""
        raise NotImplementedError

    def _set(self, weight: Array, scatter: Scatter) -> None:
        self.weight_: Array = weight
        self.mean_source_: Array = scatter.mean_x
        self.mean_target_: Array = scatter.mean_y

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Map rows: ``(X - mean_source_) @ weight_ + mean_target_``.

        Args:
            X: (n, dx) source rows.

        Returns:
            (n, dy), of the dtype numpy gives float64 times X; a frame if ``set_output`` asked for one.

        Raises:
            ValueError: Other widths, or not finite.
            sklearn.exceptions.NotFittedError: Not fitted yet.
        """
        return self._map(X)

    def _map(self, X: ArrayLike) -> NDArray[np.float64]:
        """The rows that :meth:`transform` gives, whatever container ``set_output`` asked for."""
        check_is_fitted(self)
        x = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        mapped: NDArray[np.float64] = (x - self.mean_source_) @ self.weight_ + self.mean_target_
        return mapped

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """As :meth:`transform`, but always an array; (n,) if the targets were.

        Args:
            X: (n, dx) source rows.

        Raises:
            ValueError: Other widths, or not finite.
        """
        mapped = self._map(X)
        return mapped[:, 0] if self._flat else mapped

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: None = None) -> float:
        """Pooled R2 about the train mean: 1 - SSE/SST, each summed over all rows and dimensions.

        scikit-learn's default averages R2 over dimensions, so a dimension without signal counts as much as one that
        carries everything, and takes SST about the mean of the rows scored. Here predicting the train mean
        scores 0 on rows with the train mean, and the figure is that of ``metrics.json``.

        Args:
            X: (n, dx) source rows.
            y: (n, dy) or (n,) true targets; by the name that scikit-learn gives them.
            sample_weight: Not supported.

        Returns:
            At most 1; NaN if the targets do not vary about the train mean.

        Raises:
            FitError: Sample weights were given, or the targets have another width.
        """
        if sample_weight is not None:
            raise FitError("sample_weight is not supported: leave it out, every row counts the same")
        mapped = self._map(X)
        true = check_array(y, ensure_2d=False, dtype=np.float64)
        check_consistent_length(mapped, true)
        true = true.reshape(len(mapped), -1)
        if true.shape != mapped.shape:
            raise FitError(f"targets have width {true.shape[1]}; the map was fitted to {mapped.shape[1]}")
        total = float(((true - self.center_target_) ** 2).sum())
        return 1.0 - float(((true - mapped) ** 2).sum()) / total if total > 0 else float("nan")

    @property
    def _n_features_out(self) -> int:
        # ClassNamePrefixFeaturesOutMixin names so many dimensions.
        return int(self.weight_.shape[1])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _held_out(n: int, groups: ArrayLike | None) -> NDArray[np.bool_]:
    """Which rows to choose on: whole groups, or the last tenth."""
    want = max(round(HELD_OUT * n), 1)
    if groups is None:
        return np.arange(n) >= n - want
    given = np.asarray(groups)
    if given.shape != (n,):
        raise FitError(f"groups have shape {given.shape}; the rows need ({n},)")
    _, first, inverse = np.unique(given, return_index=True, return_inverse=True)
    if len(first) < 2:
        raise FitError("all rows are of one group, so none can be held out: give lam, or more groups")
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    place = order[inverse]
    sizes = np.bincount(place)
    # From the last group backwards until there are enough; the first always stays.
    count = int(np.searchsorted(np.cumsum(sizes[::-1]), want)) + 1
    held: NDArray[np.bool_] = place >= len(sizes) - min(count, len(sizes) - 1)
    return held


def _centred(parts: tuple[Moments, Moments]) -> tuple[Scatter, Scatter]:
    train = centered(parts[0])
    return train, about(parts[1], train.mean_x, train.mean_y)


class ProcrustesAligner(_Aligner):
    """A scaled rotation between the spaces: :func:`align.solvers.procrustes`.

    Args:
        scale: Also fit one factor, by least squares on all rows; without it norms must be those of the targets.
        components: Rotate only so many leading principal axes of either side
            (:func:`align.solvers.truncated_procrustes`); ``"auto"`` chooses how many on held-out rows; None for all.

    Attributes:
        weight_: (dx, dy) the map, with its factor.
        scale_: The factor; 1 without ``scale``.
        components_: The number of axes, or None.
        mean_source_: (dx,) subtracted from source rows.
        mean_target_: (dy,) added to mapped rows.
        center_target_: (dy,) mean target row of the train rows.
        n_features_in_: dx.
    """

    def __init__(self, scale: bool = True, components: int | str | None = None) -> None:
        self.scale = scale
        self.components = components

    def _chooses(self) -> bool:
        if isinstance(self.components, str) and self.components != "auto":
            raise FitError(f"components {self.components!r}: use a number, 'auto' or None")
        return self.components == "auto"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # Few axes, if so many were asked for, leave most of the target out.
        tags.regressor_tags.poor_score = self.components is not None and self.components != "auto"
        return tags

    def _fit(self, total: Moments, parts: tuple[Moments, Moments] | None) -> None:
        rows = centered(total)
        self.components_: int | None = None if self.components is None else _count(self.components)
        if parts is not None:
            self.components_ = select_truncated_procrustes(*_centred(parts), scale=self.scale).components
        if self.components_ is None:
            weight, self.scale_ = procrustes(rows.c, rows.gx, scale=self.scale)
        else:
            weight, self.scale_ = truncated_procrustes(rows.c, rows.gx, rows.gy, self.components_, scale=self.scale)
        self._set(self.scale_ * weight, rows)


def _count(components: int | str) -> int | None:
    return None if isinstance(components, str) else int(components)


class LinearAligner(_Aligner):
    """Ridge regression without intercept: :func:`align.solvers.select_ridge` on raw moments.

    Args:
        lam: Strength relative to the mean eigenvalue of X'X about the mean row, so that columns of large mean do not
            make it stronger; None chooses it on held-out rows and refits on all.

    Attributes:
        weight_: (dx, dy) the map.
        lam_: The strength.
        mean_source_: (dx,) zeros.
        mean_target_: (dy,) zeros.
        center_target_: (dy,) mean target row of the train rows.
        n_features_in_: dx.
    """

    def __init__(self, lam: float | None = None) -> None:
        self.lam = lam

    def _chooses(self) -> bool:
        return self.lam is None

    def _fit(self, total: Moments, parts: tuple[Moments, Moments] | None) -> None:
        self._ridge(raw(total), None if parts is None else (raw(parts[0]), raw(parts[1])))

    def _ridge(self, rows: Scatter, parts: tuple[Scatter, Scatter] | None) -> None:
        self.lam_ = float(self.lam or 0.0) if parts is None else select_ridge(*parts).lam
        self._set(RidgePath(Spectrum.of(rows.gx, rows.unit), rows.c).weight(self.lam_), rows)


class AffineAligner(LinearAligner):
    """Ridge regression with intercept: :func:`align.solvers.select_ridge` on centred moments.

    Args:
        lam: Strength relative to the mean eigenvalue of the centred X'X; None chooses it on held-out rows and refits
            on all.

    Attributes:
        weight_: (dx, dy) the map.
        lam_: The strength.
        mean_source_: (dx,) subtracted from source rows.
        mean_target_: (dy,) added to mapped rows.
        center_target_: (dy,) the same as ``mean_target_``.
        n_features_in_: dx.
    """

    def _fit(self, total: Moments, parts: tuple[Moments, Moments] | None) -> None:
        self._ridge(centered(total), None if parts is None else _centred(parts))


class ReducedRankAligner(_Aligner):
    """A map of low rank on top of a fixed one: :class:`align.solvers.ReducedRank`.

    Args:
        rank: 1 to min(dx, dy); None for 32, or for min(dx, dy) where that is less.
        lam: Relative ridge strength; None chooses it on held-out rows and refits on all.
        skip: The fixed map: ``none``, ``procrustes``, ``ridge`` (its own strength is chosen on held-out rows) or
            ``identity``.
        scale: Whether the skip ``procrustes`` is multiplied by its least-squares factor.

    Attributes:
        weight_: (dx, dy) the whole map, skip included.
        rank_: The rank.
        factors_: (dx, rank) and (rank, dy), whose product is the low-rank part.
        lam_: The strength.
        mean_source_: (dx,) subtracted from source rows.
        mean_target_: (dy,) added to mapped rows.
        center_target_: (dy,) the same as ``mean_target_``.
        n_features_in_: dx.
    """

    def __init__(
        self, rank: int | None = None, lam: float | None = None, skip: str = "none", scale: bool = True
    ) -> None:
        self.rank = rank
        self.lam = lam
        self.skip = skip
        self.scale = scale

    def _chooses(self) -> bool:
        return self.lam is None or self.skip == "ridge"

    def _fit(self, total: Moments, parts: tuple[Moments, Moments] | None) -> None:
        rows = centered(total)
        self.rank_: int = min(RANK, *rows.c.shape) if self.rank is None else self.rank
        skip_lam = 0.0
        if parts is not None:
            train, val = _centred(parts)
            spectrum = Spectrum.of(train.gx)
            if self.skip == "ridge":
                skip_lam = select_ridge(train, val, spectrum=spectrum).lam
            if self.lam is None:
                skip = self._skip(train, skip_lam)
                self.lam_ = select_reduced_rank(train, val, self.rank_, skip=skip, spectrum=spectrum).lam
        if self.lam is not None:
            self.lam_ = float(self.lam)
        skip = self._skip(rows, skip_lam)
        self.factors_ = reduced_rank(rows.gx, rows.c, self.rank_, self.lam_, skip)
        low: Array = self.factors_[0] @ self.factors_[1]
        self._set(low if skip is None else skip + low, rows)

    def _skip(self, rows: Scatter, lam: float) -> Array | None:
        if self.skip == "none":
            return None
        if self.skip == "procrustes":
            weight, factor = procrustes(rows.c, rows.gx, scale=self.scale)
            return factor * weight
        if self.skip == "ridge":
            return RidgePath(rows.gx, rows.c).weight(lam)
        if self.skip != "identity":
            raise FitError(f"skip {self.skip!r}: choose one of none, procrustes, ridge, identity")
        dx, dy = rows.c.shape
        if dx != dy:
            raise FitError(f"skip 'identity' needs equal widths, not {dx} and {dy}; use 'procrustes'")
        return np.eye(dx)
