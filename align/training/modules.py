"""Linear maps that are trained by gradient, in torch, and exported as plain float32 arrays.

Both modules predict ``y_hat = (x - mean_source) @ weight + mean_target``. They differ in how
``weight`` is written:

- :class:`LowRankMap`: ``skip + (alpha / r) A B`` with a fixed ``skip`` (LoRA, Hu et al. 2021);
- :class:`LinearMap`: every element free.

Hidden states are anisotropic: a few directions carry a thousand times the variance of the rest, so
plain gradient steps crawl along the small ones. A fixed preconditioner P (see
:func:`align.solvers.whitening`) reparameterises the factor next to the source as ``P @ A``: the
same maps, a round error surface. ``input_scale`` and ``output_scale`` do the same for the units, so
that one learning rate serves layers of any norm. The export multiplies all of it out.

Under mixed precision the preconditioner and the skip stay in float32, and only what comes after them
is rounded to bfloat16: raw states are a sum of few huge directions and many small ones, and eight bits
of each element would bury the small ones in the rounding of the huge ones before P could enlarge them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from align.training.plan import Shape
from featstore.errors import FitError

Exported = dict[str, NDArray[np.float32]]


def frozen(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor of what is not trained.

    Args:
        name: Named in errors.
        value: What becomes the tensor.
        shape: What it must have.

    Raises:
        FitError: The value has the wrong shape or is not finite.
    """
    array = np.array(value, dtype=np.float32)
    if array.shape != shape:
        raise FitError(f"{name} has shape {array.shape}; expected {shape}")
    if not np.isfinite(array).all():
        raise FitError(f"{name} holds NaN or infinity; load the map again, or fit it with a smaller learning rate")
    return torch.from_numpy(array)


def double(tensor: Tensor) -> NDArray[np.float64]:
    """A tensor as a float64 array.

    Args:
        tensor: On any device.
    """
    array: NDArray[np.float64] = tensor.detach().cpu().double().numpy()
    return array


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which products are not rounded to bfloat16, whatever mixed precision is on.

    Args:
        x: Says on which kind of device.
    """
    return torch.autocast(x.device.type, enabled=False)


class TrainedMap(nn.Module):
    """The frozen part that all trained maps share: means, preconditioner and units.

    Args:
        dx: Source width.
        dy: Target width.
        mean_source: (dx,) train mean; none for zero.
        mean_target: (dy,) train mean; none for zero.
        preconditioner: (dx, dx) P; none for the identity.
        input_scale: Unit of the source states; 1 with a whitening P.
        output_scale: Unit of the target states.

    Raises:
        FitError: An input has the wrong shape or is not finite.
    """

    mean_source: Tensor
    mean_target: Tensor
    preconditioner: Tensor | None

    def __init__(
        self,
        dx: int,
        dy: int,
        *,
        mean_source: ArrayLike | None,
        mean_target: ArrayLike | None,
        preconditioner: ArrayLike | None,
        input_scale: float,
        output_scale: float,
    ) -> None:
        super().__init__()
        if min(dx, dy) < 1:
            raise FitError(f"widths must be at least 1, not {dx} and {dy}; give the widths of the two models")
        for name, value in (("input_scale", input_scale), ("output_scale", output_scale)):
            if not (math.isfinite(value) and value > 0):
                raise FitError(f"{name} must be finite and positive, not {value}; give one such as 1")
        self.dx, self.dy = dx, dy
        self.input_scale, self.output_scale = float(input_scale), float(output_scale)
        mean_source = np.zeros(dx) if mean_source is None else mean_source
        mean_target = np.zeros(dy) if mean_target is None else mean_target
        self.register_buffer("mean_source", frozen("mean_source", mean_source, (dx,)))
        self.register_buffer("mean_target", frozen("mean_target", mean_target, (dy,)))
        matrix = None if preconditioner is None else frozen("preconditioner", preconditioner, (dx, dx))
        self.register_buffer("preconditioner", matrix)

    def export(self) -> Exported:
        """The tensors of a file of maps, float32, with preconditioner and units multiplied out."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int | float]:
        """What a card says of the module beside its tensors."""
        return {}

    def whitened(self, x: Tensor) -> Tensor:
        """Centred source states times P, in float32; without P just centred.

        Args:
            x: (..., dx).

        Returns:
            (..., dx).
        """
        centred = x - self.mean_source
        if self.preconditioner is None:
            return centred
        with full_precision(x):
            return centred @ self.preconditioner

    def _unscaled(self, factor: Tensor) -> NDArray[np.float64]:
        """A factor (dx, k) next to the source, in the units of the states and in float64."""
        array = double(factor)
        if self.preconditioner is not None:
            array = double(self.preconditioner) @ array
        return array / self.input_scale

    def trainable_parameters(self) -> int:
        """How many numbers the optimiser moves."""
        return sum(p.numel() for p in self.parameters())

    def shipped_parameters(self) -> int:
        """How many numbers applying the map needs; the preconditioner is multiplied out."""
        return self.dx + self.dy + self.trainable_parameters()


class LowRankMap(TrainedMap):
    """``y_hat = (x - mean_source) @ (skip + (alpha/r) A B) + mean_target`` with trainable A and B.

    A starts as N(0, 1/dx), B as zero, so training starts exactly at the skip map.

    Args:
        dx: Source width.
        dy: Target width.
        rank: r, 1 to min(dx, dy).
        skip: (dx, dy) fixed map; none for zero.
        mean_source: (dx,) train mean; none for zero.
        mean_target: (dy,) train mean; none for zero.
        alpha: LoRA's scale; none for ``rank``, that is a factor of 1.
        preconditioner: (dx, dx) P; the effective A is P @ A.
        input_scale: Unit of the source states, say their root mean variance; 1 with a whitening P.
        output_scale: Unit of the target states.
        seed: Fixes A.

    Raises:
        FitError: The rank does not fit, or an input has the wrong shape or is not finite.
    """

    skip: Tensor | None

    def __init__(
        self,
        dx: int,
        dy: int,
        rank: int,
        *,
        skip: ArrayLike | None = None,
        mean_source: ArrayLike | None = None,
        mean_target: ArrayLike | None = None,
        alpha: float | None = None,
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
        if not 1 <= rank <= min(dx, dy):
            raise FitError(f"rank {rank} does not fit widths {dx} and {dy}: use 1 to {min(dx, dy)}")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise FitError(f"alpha must be finite and positive, not {alpha}; give one such as 16")
        self.register_buffer("skip", None if skip is None else frozen("skip", skip, (dx, dy)))
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.randn(dx, rank, generator=generator) / math.sqrt(dx))
        self.B = nn.Parameter(torch.zeros(rank, dy))

    def lora(self) -> tuple[Tensor, Tensor]:
        """The effective A (dx, r) and B (r, dy) in the units of the states."""
        a = self.A if self.preconditioner is None else self.preconditioner @ self.A
        return a / self.input_scale, self.B * self.output_scale

    def sizes(self) -> dict[str, int | float]:
        """Rank and scale."""
        return {"rank": self.rank, "alpha": self.alpha}

    def forward(self, x: Tensor) -> Tensor:
        """Map source states.

        Args:
            x: (..., dx).

        Returns:
            (..., dy).
        """
        with full_precision(x):
            # P @ A costs dx^2 r once; x @ P would cost dx^2 for every row.
            a, b = self.lora()
            centred = x - self.mean_source
            narrow = centred @ a
            fixed = self.mean_target if self.skip is None else centred @ self.skip + self.mean_target
        return narrow @ b * (self.alpha / self.rank) + fixed

    def shipped_parameters(self) -> int:
        """Elements of both means, of A and B, and of skip where there is one."""
        return super().shipped_parameters() + (0 if self.skip is None else self.skip.numel())

    def export(self) -> Exported:
        """The tensors of a file of maps, float32.

        Returns:
            ``weight`` (dx, dy), ``mean_source``, ``mean_target``, ``lora_A`` (dx, r), ``lora_B``
            (r, dy) and ``skip`` (zeros if there is none). ``weight`` is ``skip + (alpha/r) lora_A @
            lora_B`` of these very arrays, summed in float64 and rounded once.
        """
        lora_a = self._unscaled(self.A).astype(np.float32)
        lora_b = (double(self.B) * self.output_scale).astype(np.float32)
        skip = np.zeros((self.dx, self.dy)) if self.skip is None else double(self.skip)
        product = lora_a.astype(np.float64) @ lora_b.astype(np.float64)
        return {
            "weight": (skip + self.alpha / self.rank * product).astype(np.float32),
            "mean_source": double(self.mean_source).astype(np.float32),
            "mean_target": double(self.mean_target).astype(np.float32),
            "lora_A": lora_a,
            "lora_B": lora_b,
            "skip": skip.astype(np.float32),
        }


class LinearMap(TrainedMap):
    """``y_hat = (x - mean_source) @ weight + mean_target`` with every element trained, from zero.

    It starts as the mean prediction; its optimum is the ridge solution's, so a run that loses to
    :func:`align.solvers.select_ridge` has a wrong learning rate.

    Args:
        dx: Source width.
        dy: Target width.
        mean_source: (dx,) train mean; none for zero (``linear``).
        mean_target: (dy,) train mean; none for zero.
        preconditioner: (dx, dx) P; the effective weight is P @ W.
        input_scale: Unit of the source states; 1 with a whitening P.
        output_scale: Unit of the target states.

    Raises:
        FitError: An input has the wrong shape or is not finite.
    """

    def __init__(
        self,
        dx: int,
        dy: int,
        *,
        mean_source: ArrayLike | None = None,
        mean_target: ArrayLike | None = None,
        preconditioner: ArrayLike | None = None,
        input_scale: float = 1.0,
        output_scale: float = 1.0,
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
        self.W = nn.Parameter(torch.zeros(dx, dy))

    def forward(self, x: Tensor) -> Tensor:
        """Map source states.

        Args:
            x: (..., dx).

        Returns:
            (..., dy).
        """
        return self.whitened(x) @ self.W * (self.output_scale / self.input_scale) + self.mean_target

    def export(self) -> Exported:
        """The tensors of a file of maps, float32: ``weight``, ``mean_source``, ``mean_target``."""
        return {
            "weight": (self._unscaled(self.W) * self.output_scale).astype(np.float32),
            "mean_source": double(self.mean_source).astype(np.float32),
            "mean_target": double(self.mean_target).astype(np.float32),
        }


def low_rank(shape: Shape, dx: int, dy: int, skip: ArrayLike | None, common: Mapping[str, Any]) -> LowRankMap:
    """A low-rank update before training.

    Args:
        shape: Its ``rank``, ``alpha`` and ``seed`` count.
        dx: Source width.
        dy: Target width.
        skip: (dx, dy) fixed map; none for zero.
        common: Means, preconditioner and units, as :class:`TrainedMap` takes them.

    Raises:
        FitError: The rank does not fit.
    """
    return LowRankMap(dx, dy, shape.rank, skip=skip, alpha=shape.alpha, seed=shape.seed, **common)


def full(shape: Shape, dx: int, dy: int, skip: ArrayLike | None, common: Mapping[str, Any]) -> LinearMap:
    """A matrix of which every element is trained, before training.

    Args:
        shape: Has no option that counts here.
        dx: Source width.
        dy: Target width.
        skip: None; this map is added to nothing.
        common: Means, preconditioner and units, as :class:`TrainedMap` takes them.
    """
    del shape, skip
    return LinearMap(dx, dy, **common)
