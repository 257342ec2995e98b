"""Muon for the matrices of the blocks, AdamW for everything else: what learns most in few steps.

Muon (K. Jordan, 2024) replaces the momentum of a matrix by the orthogonal matrix nearest to it, found by a few
Newton-Schulz steps, so that every direction of the matrix moves alike. torch's own is in bfloat16, which many
processors emulate; this one is in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Coefficients of the quintic step and their number, from Jordan's description.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_MOMENTUM = 0.95


def orthogonalised(matrices: Tensor) -> Tensor:
    """Move each matrix close to U V' of its singular value decomposition.

    Args:
        matrices: (n, rows, columns) floating.

    Returns:
        The same shape and dtype; singular values lie between about 0.7 and 1.2.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * (square @ square)) @ x
    return x.mT if tall else x


class Muon:
    """Orthogonalised Nesterov momentum; matrices of one shape are worked on together.

    Attributes:
        param_groups: One group, as torch's optimisers have them: ``params`` and the learning rate ``lr``.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], learning_rate: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(matrices), "lr": learning_rate}]
        self._momentum = {matrix: torch.zeros_like(matrix) for matrix in matrices}

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        [group] = self.param_groups
        by_shape = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[tuple(matrix.shape)].append(matrix)
        for (rows, columns), matrices in by_shape.items():
            directions = orthogonalised(torch.stack([self._ahead(matrix) for matrix in matrices]))
            size = group["lr"] * max(1.0, rows / columns) ** 0.5
            for matrix, direction in zip(matrices, directions, strict=True):
                matrix.sub_(direction, alpha=size)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for matrix in self._momentum:
            matrix.grad = None

    def _ahead(self, matrix: nn.Parameter) -> Tensor:
        gradient, momentum = matrix.grad, self._momentum[matrix]
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(momentum, _MOMENTUM)


def optimisers(model: nn.Module, *, matrices: float, others: float) -> list[Muon | torch.optim.Optimizer]:
    """Both optimisers for a Llama model.

    Args:
        model: Its matrices within blocks are told from the embedding by their names.
        matrices: Learning rate of Muon.
        others: Learning rate of AdamW, for the embedding and the gains of the norms.
    """
    inner = [tensor for name, tensor in model.named_parameters() if ".layers." in name and tensor.ndim == 2]
    outer = [tensor for name, tensor in model.named_parameters() if not (".layers." in name and tensor.ndim == 2)]
    return [Muon(inner, matrices), torch.optim.AdamW(outer, lr=others, betas=(0.9, 0.95), weight_decay=0.0)]
