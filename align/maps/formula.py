"""How a map is applied: which tensors it consists of, and what becomes of a row.

A kind of formula is written once and shared by every type of map that has it: rotations, ridge maps and LoRA are all
one matrix between two means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Tensors = Mapping[str, Rows]


@dataclass(frozen=True)
class Formula:
    """A kind of map.

    Attributes:
        kind: Its name in a run's card.
        axes: Tensors by name with a letter for each axis: s source width, t target width; any other letter stands for
            the length of the vector that has it alone. Empty for a kind whose tensors only its own module can check.
        apply: Tensors and float32 rows ``(n, d_source)`` to rows ``(n, d_target)``; None for a kind that reads windows.
        optional: Tensors that may be missing.
        on_tensors: ``module:function`` of the same on torch tensors in float32, through which gradients flow; None for
            a kind that is written for arrays alone.
    """

    kind: str
    axes: Mapping[str, str]
    apply: Callable[[Tensors, Rows], Rows] | None
    optional: frozenset[str] = frozenset()
    on_tensors: str | None = None

    def sizes(self, shapes: Mapping[str, tuple[int, ...]], source: int, target: int) -> dict[str, int]:
        """The length of every axis.

        Args:
            shapes: Of all tensors that are not optional.
            source: Source width.
            target: Target width.
        """
        free = {axes: math.prod(shapes[name]) for name, axes in self.axes.items() if len(axes) == 1 and name in shapes}
        return {**free, "s": source, "t": target}


def _linear(tensors: Tensors, x: Rows) -> Rows:
    mapped = (x - tensors["mean_source"]) @ tensors["weight"] + tensors["mean_target"]
    return mapped.astype(np.float32, copy=False)


#: ``y_hat = (x - mean_source) @ weight + mean_target``.
LINEAR = Formula(
    "linear",
    {"weight": "st", "mean_source": "s", "mean_target": "t"},
    _linear,
    on_tensors="align.maps.on_tensors:linear",
)
