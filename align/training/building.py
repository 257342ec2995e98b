"""A map before training from the train moments, and the aligner that a trained one becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from align import solvers
from align.closed_form.skip import skip_weight
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.moments.scan import Scan
from align.moments.scatter import Array, Scatter, about, centered, raw
from align.settings import LoopSettings
from align.training.mlp import HiddenLayerMap
from align.training.modules import LinearMap, LowRankMap, TrainedMap
from featstore.errors import FitError


def build_module(type_: str, moments: Scan, settings: LoopSettings, skip: Array | None = None) -> TrainedMap:
    """A map before training, with means, units and preconditioner from the train moments.

    Args:
        type_: ``lora``, ``mlp``, ``linear`` or ``affine``.
        moments: Of the layer pair.
        settings: Rank, hidden width, skip, preconditioner, seed.
        skip: The skip map itself, instead of the one that the settings name.

    Raises:
        FitError: The type has no gradient form, or the rank or the skip does not fit.
    """
    mean_x, mean_y = moments.means
    centred = type_ != "linear"
    train = centered(moments.train) if centred else raw(moments.train)
    val = about(moments.val, mean_x, mean_y) if centred else raw(moments.val)
    n, dx, dy = train.n, len(mean_x), len(mean_y)
    if skip is None and type_ in ("lora", "mlp"):
        skip = skip_weight(settings.skip, train, val)
    common: dict[str, Any] = {
        "mean_source": mean_x if centred else None,
        "mean_target": mean_y if centred else None,
        "output_scale": float(np.sqrt(np.trace(train.gy) / (n * dy))),
        "preconditioner": _preconditioner(train, val, skip) if settings.precondition else None,
        "input_scale": 1.0 if settings.precondition else float(np.sqrt(np.trace(train.gx) / (n * dx))),
    }
    if type_ == "lora":
        return LowRankMap(dx, dy, settings.rank, skip=skip, alpha=settings.alpha, seed=settings.seed, **common)
    if type_ == "mlp":
        return HiddenLayerMap(dx, dy, settings.hidden, skip=skip, seed=settings.seed, **common)
    if type_ in ("linear", "affine"):
        return LinearMap(dx, dy, **common)
    raise FitError(f"type {type_!r} is not trained by gradient from pairs; choose lora, mlp, linear or affine")


def _preconditioner(train: Scatter, val: Scatter, skip: Array | None) -> Array:
    """Whiten the source as far as validation says its directions can be trusted.

    The damping is the ridge strength that validation chooses for what the skip map leaves over. Where small directions
    carry noise they are then learnt late, and early stopping leaves them alone, as ridge would; where they carry
    signal they are whitened fully.
    """
    if skip is not None:
        train, val = (_left_over(side, skip) for side in (train, val))
    spectrum = solvers.Spectrum.of(train.gx)
    damping = solvers.select_ridge(train, val, spectrum=spectrum).lam
    return solvers.whitening(spectrum, train.n, eps=damping)


def _left_over(rows: Scatter, skip: Array) -> Scatter:
    """The moments of ``x`` and ``y - x @ skip``."""
    predicted = rows.gx @ skip
    mixed = skip.T @ rows.c
    return replace(rows, c=rows.c - predicted, gy=rows.gy - mixed - mixed.T + skip.T @ predicted)


def target_unit(moments: Scan) -> float:
    """Mean squared error an element of predicting the train mean: the unit of the MSE.

    Args:
        moments: Of the layer pair.
    """
    train = centered(moments.train)
    return float(np.trace(train.gy) / train.n / len(train.mean_y))


def as_aligner(module: TrainedMap, pair: LayerPair, moments: Scan, settings: LoopSettings) -> Aligner:
    """What is saved of a trained map.

    Args:
        module: The map; on several processes that of any, since they hold the same.
        pair: Which layers.
        moments: Give the controls' means.
        settings: How it was trained; batch size and learning rate are numbers.
    """
    tensors = dict(module.export())
    tensors["control_mean_source"], tensors["control_mean"] = (mean.astype(np.float32) for mean in moments.means)
    options: dict[str, Any] = {"solver": "adamw", "lr": settings.lr}
    kind = "mlp" if isinstance(module, HiddenLayerMap) else "linear"
    if isinstance(module, LowRankMap):
        options |= {"rank": module.rank, "alpha": module.alpha, "skip": settings.skip}
    elif isinstance(module, HiddenLayerMap):
        options |= {"hidden": module.hidden, "skip": settings.skip}
    return Aligner(pair, tensors, options, module.trainable_parameters(), kind)
