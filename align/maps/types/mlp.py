"""One hidden layer beside a fixed map, trained by gradient.

The formula, with z = x - mean_source::

    y_hat = z @ skip + silu(z @ hidden_weight + hidden_bias) @ output_weight + output_bias + mean_target
"""

from __future__ import annotations

import numpy as np

from align.maps.formula import Formula, Rows, Tensors
from align.maps.registry import MapType


def _apply(tensors: Tensors, x: Rows) -> Rows:
    centred = x - tensors["mean_source"]
    hidden = centred @ tensors["hidden_weight"] + tensors["hidden_bias"]
    # silu(h) = h / (1 + exp(-h)); far below zero exp overflows to infinity, and the quotient is rightly 0.
    with np.errstate(over="ignore"):
        hidden /= 1 + np.exp(-hidden)
    mapped = hidden @ tensors["output_weight"] + (tensors["output_bias"] + tensors["mean_target"])
    if "skip" in tensors:
        mapped += centred @ tensors["skip"]
    return mapped.astype(np.float32, copy=False)


_AXES = {
    "skip": "st",
    "mean_source": "s",
    "mean_target": "t",
    "hidden_weight": "sh",
    "hidden_bias": "h",
    "output_weight": "ht",
    "output_bias": "t",
}

TYPE = MapType(
    name="mlp",
    order=60,
    summary="a hidden layer beside --skip, trained by gradient",
    title="MLP",
    options=frozenset({"hidden", "skip", "scale"}),
    module="align.training.mlp:hidden_layer",
    formula=Formula(
        "mlp", _AXES, _apply, optional=frozenset({"skip"}), on_tensors="align.maps.on_tensors:hidden_layer"
    ),
    # No closed form knows what a hidden layer can do; it has to beat the best affine map to be worth having.
    judged_by="affine",
)
