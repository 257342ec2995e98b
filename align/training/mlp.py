"""A map with one hidden layer beside a fixed linear one, trained by gradient.

The formula, of the forward pass and of the exported tensors alike, with ``silu(z) = z / (1 + exp(-z))``::

    y_hat = (x - mean_source) @ skip
          + silu((x - mean_source) @ hidden_weight + hidden_bias) @ output_weight + output_bias
          + mean_target

Training starts exactly at the skip, since ``output_weight`` and ``output_bias`` start as zero: what the hidden layer
adds is what a linear map leaves over, and early stopping can give it up again.

Inside, ``hidden_weight = P H / (input_scale sqrt(dx))`` and ``output_weight = output_scale W / sqrt(h)`` with trained H
and W, H from N(0, 1). P whitens the source as for the linear maps (:mod:`align.training.modules`). Elements of order
one behind a fixed ``1 / sqrt(fan-in)`` make AdamW's step, which moves every element by about the learning rate, turn a
wide layer no faster than a narrow one (Jacot, Gabriel and Hongler 2018, section 2.1): one learning rate serves all
widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from align.training.modules import Exported, TrainedMap, double, frozen, full_precision
from align.training.plan import Shape
from featstore.errors import FitError


class HiddenLayerMap(TrainedMap):
    """The map of the module's formula.

    Args:
        dx: Source width.
        dy: Target width.
        hidden: h, width of the hidden layer, at least 1.
        skip: (dx, dy) fixed map; none for zero.
        mean_source: (dx,) train mean; none for zero.
        mean_target: (dy,) train mean; none for zero.
        preconditioner: (dx, dx) P.
        input_scale: Unit of the source states, say their root mean variance; 1 with a whitening P.
        output_scale: Unit of the target states.
        seed: Fixes H.

    Raises:
        FitError: The hidden width is below 1, or an input has the wrong shape or is not finite.
    """

    skip: Tensor | None

    def __init__(
        self,
        dx: int,
        dy: int,
        hidden: int,
        *,
        skip: ArrayLike | None = None,
        mean_source: ArrayLike | None = None,
        mean_target: ArrayLike | None = None,
        preconditioner: ArrayLike | None = None,
        input_scale: float = 1.0,
        output_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            dx,
            dy,
            mean_source=mean_source,
            mean_target=mean_target,
            preconditioner=preconditioner,
            input_scale=input_scale,
            output_scale=output_scale,
        )
        if hidden < 1:
            raise FitError(f"--hidden {hidden}: a hidden layer needs at least 1 unit")
        self.hidden = hidden
        self.register_buffer("skip", None if skip is None else frozen("skip", skip, (dx, dy)))
        generator = torch.Generator().manual_seed(seed)
        self.H = nn.Parameter(torch.randn(dx, hidden, generator=generator))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.W = nn.Parameter(torch.zeros(hidden, dy))
        self.output_bias = nn.Parameter(torch.zeros(dy))

    def sizes(self) -> dict[str, int | float]:
        """Width of the hidden layer."""
        return {"hidden": self.hidden}

    def forward(self, x: Tensor) -> Tensor:
        """Map source states.

        Args:
            x: (..., dx).

        Returns:
            (..., dy).
        """
        with full_precision(x):
            fixed = self.mean_target
            if self.skip is not None:
                fixed = (x - self.mean_source) @ self.skip + fixed
        units = self.whitened(x) @ self.H * (1 / (self.input_scale * math.sqrt(self.dx))) + self.hidden_bias
        added = functional.silu(units) @ self.W * (self.output_scale / math.sqrt(self.hidden))
        return added + (self.output_bias * self.output_scale + fixed)

    def shipped_parameters(self) -> int:
        """Elements of both means, of the trained tensors, and of skip where there is one."""
        return super().shipped_parameters() + (0 if self.skip is None else self.skip.numel())

    def export(self) -> Exported:
        """The tensors of a file of maps, float32.

        Returns:
            ``skip`` (dx, dy; only where there is one), ``mean_source``, ``mean_target``, ``hidden_weight`` (dx, h),
            ``hidden_bias`` (h,), ``output_weight`` (h, dy) and ``output_bias`` (dy,), with which the module's formula
            is this map.
        """
        tensors = {} if self.skip is None else {"skip": double(self.skip)}
        tensors |= {
            "mean_source": double(self.mean_source),
            "mean_target": double(self.mean_target),
            "hidden_weight": self._unscaled(self.H) / math.sqrt(self.dx),
            "hidden_bias": double(self.hidden_bias),
            "output_weight": double(self.W) * (self.output_scale / math.sqrt(self.hidden)),
            "output_bias": double(self.output_bias) * self.output_scale,
        }
        return {name: array.astype(np.float32) for name, array in tensors.items()}


def hidden_layer(shape: Shape, dx: int, dy: int, skip: ArrayLike | None, common: Mapping[str, Any]) -> HiddenLayerMap:
    """A hidden layer before training.

    Args:
        shape: Its ``hidden`` and ``seed`` count.
        dx: Source width.
        dy: Target width.
        skip: (dx, dy) fixed map; none for zero.
        common: Means, preconditioner and units, as :class:`TrainedMap` takes them.

    Raises:
        FitError: The hidden width is below 1.
    """
    return HiddenLayerMap(dx, dy, shape.hidden, skip=skip, seed=shape.seed, **common)
