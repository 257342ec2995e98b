"""Where training starts: the best linear codec of those that a layout allows, chosen on validation windows.

A group's coordinates are the mean of its tokens' leading principal coordinates; a target position is mapped from the
coordinates of the group in which it lies, by ridge regression.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align import solvers
from align.compress.layout import Layout, candidates, containing, group_ends, groups_of, to_bfloat16
from align.compress.windows import Rows, Window, Windows
from align.moments.scatter import Array, Moments, Scatter, about, means, merge, moments_of
from align.solvers.linalg import trace
from featstore.errors import FitError

#: Most principal coordinates of the source that the encoder sees.
INPUTS = 512
#: Source tokens, about, from which means, directions and the linear codec are taken; training sees all of them.
START_TOKENS = 65_536
# Added to every variance before dividing by its root, as a part of the mean variance: directions that hardly vary are
# rounding, and would be noise of unit size.
_FLOOR = 0.05


@dataclass(frozen=True)
class Start:
    """The best linear codec.

    Attributes:
        layout: How it uses its latents.
        basis: float32 ``(d_source, n)``, principal directions over their scale.
        mean_source: float64 ``(d_source,)``.
        mean_target: float64 ``(d_target,)``, over all ordinary unmasked train positions.
        readout: float32 ``(K, d_target)``.
        unit: Root mean variance of the target's train states.
        val_r2: At all validation positions.
    """

    layout: Layout
    basis: Rows
    mean_source: Array
    mean_target: Array
    readout: Rows
    unit: float
    val_r2: float


def source_basis(train: Windows, inputs: int = INPUTS) -> tuple[Rows, Array]:
    """Principal directions of the source's train states over their scale, and the mean.

    Args:
        train: Train windows.
        inputs: Directions at most.

    Returns:
        float32 ``(d_source, n)`` and float64 ``(d_source,)``.
    """
    total: Moments | None = None
    nothing = np.zeros(1)
    origin: Array | None = None
    for window in train.some(START_TOKENS):
        origin = window.x.mean(axis=0, dtype=np.float64) if origin is None else origin
        new = moments_of(window.x, np.zeros((len(window.x), 1), np.float32), origin, nothing)
        total = new if total is None else merge(total, new)
    if total is None:
        raise FitError("there are no train windows; choose a split with more documents, or --store with more text")
    mean, _ = means(total)
    spectrum = solvers.Spectrum.of(about(total, mean, nothing).gx)
    n = min(inputs, len(mean))
    variance = spectrum.values[::-1][:n] / total.n
    scale = 1 / np.sqrt(variance + max(_FLOOR * spectrum.mean / total.n, np.finfo(np.float64).tiny))
    return (spectrum.vectors[:, ::-1][:, :n] * scale).astype(np.float32), mean


def project(x: Rows, mean: Array | Rows, basis: Rows) -> Rows:
    """Coordinates of states.

    Args:
        x: float32 ``(n, d_source)``.
        mean: ``(d_source,)``.
        basis: float32 ``(d_source, k)``.

    Returns:
        float32 ``(n, k)``.
    """
    coordinates: NDArray[np.float32] = (x - mean.astype(np.float32)).dot(basis).astype(np.float32, copy=False)
    return coordinates


def choose_start(train: Windows, val: Windows, latents: int, latent_dim: int, inputs: int = INPUTS) -> Start:
    """Choose a layout and fit its readout.

    Args:
        train: Train windows.
        val: Validation windows.
        latents: M.
        latent_dim: R.
        inputs: Most principal coordinates of the source.

    Raises:
        FitError: M or R is below 1, R is above the source width, or the target does not vary.
    """
    if latent_dim > train.width_x:
        raise FitError(
            f"latent_dim {latent_dim} is above the source's width {train.width_x}: a state has no more coordinates; "
            "use more latents instead"
        )
    layouts = candidates(latents, latent_dim, float(np.mean(train.sizes()[0])))
    basis, mean_source = source_basis(train, inputs)
    if layouts[0].most_coordinates > basis.shape[1]:
        raise FitError(
            f"latent_dim {latent_dim} is above the {basis.shape[1]} principal coordinates in use"
            "; choose a smaller latent dimension"
        )
    mean_target = _mean_target(train)
    sums = [tuple(_Sums(layout.most_coordinates, mean_target) for _ in range(2)) for layout in layouts]
    for side, windows in enumerate((train, val)):
        for window in windows.some(START_TOKENS):
            z = project(window.x, mean_source, basis[:, :latent_dim])
            for layout, own in zip(layouts, sums, strict=True):
                own[side].add(linear_features(layout, z, window), window.y)
    best: Start | None = None
    for layout, own in zip(layouts, sums, strict=True):
        fit, check = (part.scatter() for part in own)
        variance = trace(fit.gy) / fit.n / len(mean_target)
        if not variance > 0:
            raise FitError("the target's train states do not vary; there is nothing to reconstruct")
        choice = solvers.select_ridge(fit, check)
        r2 = 1 - solvers.mse_of(choice.weight, check) * check.n * len(mean_target) / trace(check.gy)
        if best is None or r2 > best.val_r2:
            weight = choice.weight.astype(np.float32)
            best = Start(layout, basis, mean_source, mean_target, weight, float(np.sqrt(variance)), r2)
    if best is None:
        raise FitError(
            f"no layout for {latents} latents of {latent_dim}; choose fewer latents, or a smaller latent dimension"
        )
    return best


class _Sums:
    """Second moments of features and targets, the features about zero: they are about the train mean already."""

    def __init__(self, features: int, mean_target: Array) -> None:
        self._mean = mean_target
        self._n = 0
        self._gx: Array = np.zeros((features, features))
        self._c: Array = np.zeros((features, len(mean_target)))
        self._square: Array = np.zeros(len(mean_target))

    def add(self, features: Rows, y: Rows) -> None:
        centred = y - self._mean.astype(np.float32)
        self._gx += features.T @ features
        self._c += features.T @ centred
        self._square += np.einsum("ij,ij->j", centred, centred, dtype=np.float64)
        self._n += len(y)

    def scatter(self) -> Scatter:
        # Of gy a ridge fit takes the trace alone; the whole of it would cost more than everything else.
        return Scatter(self._n, np.zeros(len(self._gx)), self._mean, self._gx, np.diag(self._square), self._c)


def _mean_target(train: Windows) -> Array:
    total, n = np.zeros(train.width_y), 0
    for window in train.some(START_TOKENS):
        total += window.y.sum(axis=0, dtype=np.float64)
        n += len(window.y)
    return total / n


def linear_features(layout: Layout, z: Rows, window: Window) -> Rows:
    """The coordinates that the linear codec maps each target position from.

    Args:
        layout: How latents are used.
        z: float32 ``(T_x, K or more)``, principal coordinates of the window's source tokens.
        window: The window.

    Returns:
        float32 ``(T_y, K)``.
    """
    groups = groups_of(layout, len(z))
    k = layout.most_coordinates
    sizes = (groups.stop - groups.first)[:, None].astype(np.float32)
    pooled: Rows = (np.add.reduceat(z[:, :k], groups.first, axis=0) / sizes).astype(np.float32)
    sent = to_bfloat16(np.where(np.arange(k) < groups.coordinates[:, None], pooled, np.float32(0)))
    return sent[containing(group_ends(layout, groups, window.ends_x), window.ends_y)]
