"""A map before training from the train moments, and the one that it becomes once trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from align import solvers
from align.closed_form.skip import factor_of, skip_weight
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.maps.registry import listed, map_type, map_types, resolve
from align.moments.scan import Scan
from align.moments.scatter import Array, Scatter, about, centered, raw
from align.solvers.linalg import trace
from align.training.modules import TrainedMap
from align.training.plan import Shape
from featstore.errors import FitError


def build_module(shape: Shape, moments: Scan, skip: Array | None = None) -> TrainedMap:
    """A map before training, with means, units and preconditioner from the train moments.

    Args:
        shape: Type, rank, hidden width, skip, preconditioner, seed.
        moments: Of the layer pair.
        skip: The skip map itself, instead of the one that the shape names.

    Raises:
        FitError: The type has no gradient form, or the rank or the skip does not fit.
    """
    type_ = {known.name: known for known in map_types()}.get(shape.type)
    if type_ is None or type_.module is None:
        # Those first that have no other way.
        trained = sorted((known for known in map_types() if known.module), key=lambda known: known.closed is not None)
        names = listed([known.name for known in trained], "or")
        raise FitError(f"type {shape.type!r} is not trained by gradient from pairs; choose {names}")
    mean_x, mean_y = moments.means
    centred = type_.centred
    train = centered(moments.train) if centred else raw(moments.train)
    val = about(moments.val, mean_x, mean_y) if centred else raw(moments.val)
    n, dx, dy = train.n, len(mean_x), len(mean_y)
    if skip is None and "skip" in type_.options:
        skip = skip_weight(shape.skip, train, val, scale=shape.scale)
    common: dict[str, Any] = {
        "mean_source": mean_x if centred else None,
        "mean_target": mean_y if centred else None,
        "output_scale": float(np.sqrt(trace(train.gy) / (n * dy))),
        "preconditioner": _preconditioner(train, val, skip) if shape.precondition else None,
        "input_scale": 1.0 if shape.precondition else float(np.sqrt(np.trace(train.gx) / (n * dx))),
    }
    module: TrainedMap = resolve(type_.module)(shape, dx, dy, skip, common)
    return module


def _preconditioner(train: Scatter, val: Scatter, skip: Array | None) -> Array:
    """Whiten the source as far as validation says its directions can be trusted.

    The damping is the ridge strength that validation chooses for what the skip map leaves over. Where small directions
    carry noise they are then learnt late, and early stopping leaves them alone, as ridge would; where they carry
    signal they are whitened fully.
    """
    if skip is not None:
        train, val = (_left_over(side, skip) for side in (train, val))
    spectrum = solvers.Spectrum.of(train.gx, train.unit)
    damping = solvers.select_ridge(train, val, spectrum=spectrum).lam
    return solvers.whitening(spectrum, train.n, eps=damping)


def _left_over(rows: Scatter, skip: Array) -> Scatter:
    """The moments of ``x`` and ``y - x @ skip``."""
    predicted = rows.gx @ skip
    if rows.gy.ndim == 1:
        gy = rows.gy + np.einsum("ij,ij->j", skip, predicted - 2 * rows.c)
    else:
        mixed = skip.T @ rows.c
        gy = rows.gy - mixed - mixed.T + skip.T @ predicted
    return replace(rows, c=rows.c - predicted, gy=gy)


def target_unit(moments: Scan) -> float:
    """Mean squared error an element of predicting the train mean: the unit of the MSE.

    Args:
        moments: Of the layer pair.
    """
    train = centered(moments.train)
    return trace(train.gy) / train.n / len(train.mean_y)


def as_aligner(module: TrainedMap, pair: LayerPair, moments: Scan, shape: Shape, lr: float) -> Aligner:
    """What is saved of a trained map.

    Args:
        module: The map; on several processes that of any, since they hold the same.
        pair: Which layers.
        moments: Give the controls' means.
        shape: What the map was before training.
        lr: Peak learning rate.
    """
    type_, tensors = map_type(shape.type), dict(module.export())
    tensors["control_mean_source"], tensors["control_mean"] = (mean.astype(np.float32) for mean in moments.means)
    options: dict[str, Any] = {"solver": "adamw", "lr": lr, **module.sizes()}
    if "skip" in type_.options:
        options["skip"] = shape.skip
        if shape.skip == "procrustes":
            options["skip_scale"] = factor_of(tensors["skip"].astype(np.float64)) if shape.scale else 1.0
    return Aligner(pair, tensors, options, module.trainable_parameters(), type_.formula.kind)
