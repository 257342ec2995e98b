"""The formulas of maps on torch tensors, through which gradients flow; tests hold them to those on arrays.

A record names its function here by reference, so that asking about a type does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

Tensors = Mapping[str, torch.Tensor]


def linear(t: Tensors, x: torch.Tensor) -> torch.Tensor:
    """One matrix between two means.

    Args:
        t: ``weight`` (d_source, d_target), ``mean_source`` and ``mean_target``.
        x: float32 ``(..., d_source)``.

    Returns:
        float32 ``(..., d_target)``.
    """
    return (x - t["mean_source"]) @ t["weight"] + t["mean_target"]


def hidden_layer(t: Tensors, x: torch.Tensor) -> torch.Tensor:
    """A hidden layer beside a fixed map; the formula is that of :mod:`align.maps.types.mlp`.

    Args:
        t: The tensors of that formula.
        x: float32 ``(..., d_source)``.

    Returns:
        float32 ``(..., d_target)``.
    """
    centred = x - t["mean_source"]
    hidden = functional.silu(centred @ t["hidden_weight"] + t["hidden_bias"])
    mapped = hidden @ t["output_weight"] + (t["output_bias"] + t["mean_target"])
    return mapped + centred @ t["skip"] if "skip" in t else mapped
