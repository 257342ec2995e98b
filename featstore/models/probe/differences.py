"""How far two runs of a model are apart, and what of that is rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

#: Relative difference of a token's states that another order of the same sums may cause. A float32 sum over thousands
#: of terms keeps six digits, and a recurrence that starts anew can differ in the fourth; half precision keeps two, and
#: loses one of them over some dozens of blocks.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF = 0.1
#: The same where nothing but other tokens of a pass of the same shape has changed: only sums over the tokens of an
#: expert have another order. Models of the BERT kind that read ahead move their states by no more than 0.04.
_HALF_SAME_SHAPE = 0.01


def rounding(model: nn.Module, *dtypes: torch.dtype, same_shape: bool = False) -> float:
    """The largest relative difference that counts as rounding.

    Args:
        model: What computed; the number type of its weights counts, whatever type its results have.
        dtypes: Of what is compared.
        same_shape: Whether both passes had the same shape.
    """
    computed = {*dtypes, next(model.parameters()).dtype}
    if computed <= _ROUNDING.keys():
        return max(_ROUNDING[dtype] for dtype in computed)
    return _HALF_SAME_SHAPE if same_shape else _HALF


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """Relative distance of vectors, ``|a - b| / |a|``, over tokens: the largest, in half precision the median.

    In half precision a router may send a token to another expert because of rounding alone; what a fault does, it does
    to most tokens.

    Args:
        first: ``(..., width)``.
        second: The same shape.

    Returns:
        Infinity where a value is not finite.
    """
    a, b = first.float(), second.float()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    size = a.norm(dim=-1)
    distance = (a - b).norm(dim=-1) / torch.where(size > 0, size, 1.0)
    found = distance.flatten()
    return float(found.max() if first.dtype in _ROUNDING else found.median())


def furthest(first: Mapping[int, torch.Tensor], second: Mapping[int, torch.Tensor]) -> float:
    """The largest of :func:`apart` over layers.

    Args:
        first: ``{layer: (..., width)}``.
        second: The same layers and shapes.
    """
    return max(apart(first[layer], second[layer]) for layer in first)


def spread(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest absolute difference; 0 is the same to the bit (0 and -0 alike).

    Args:
        first: Any shape.
        second: The same.

    Returns:
        Infinity where a value is not finite.
    """
    a, b = first.float(), second.float()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    return float((a - b).abs().max())
