"""Looking at a map between two steps: CKA on a fixed sample of validation rows, losses on all of them."""

from __future__ import annotations

import math
import time
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align.solvers.row_effects import in_order
from align.training import losses
from align.training.modules import TrainedMap
from align.training.plan import LOSSES
from featstore.store.read.loader import PairBatches

#: Validation rows of the sample.
SAMPLE = 256


class _BetweenDocuments:
    """Gram matrices without pairs within documents and without row effects (:mod:`align.solvers.row_effects`).

    The rows are few and always the same, so the effects come from one matrix, made once: the inverse of the normal
    equations, in whatever order rows and documents are.

    Args:
        document: int64 ``(n,)``, which document each row is of.
        device: Where the rows are.
    """

    def __init__(self, document: NDArray[np.int64], device: torch.device) -> None:
        between = document[:, None] != document
        # Of two documents the equations are singular, and any solution will do.
        inverse = np.linalg.pinv(np.diag(between.sum(axis=1)).astype(np.float64) + between, hermitian=True)
        self._between, self._inverse = (torch.from_numpy(each).to(device) for each in (between, inverse))

    def __call__(self, rows: Tensor) -> Tensor:
        """The residual kernel of rows (n, d), float64 (n, n)."""
        # About their mean first, which changes nothing but the rounding.
        centred = rows.double() - rows.double().mean(dim=0)
        gram = (centred @ centred.T) * self._between
        effects = self._inverse @ gram.sum(dim=0)
        return (gram - effects - effects[:, None]) * self._between


class CkaProbe:
    """Debiased linear CKA between a map's predictions and their targets, over documents, on the same rows every time.

    The targets' side is computed once; a figure costs the predictions of :data:`SAMPLE` rows and one product of them.

    Args:
        val: Validation pairs.
        seed: Of the choice of rows.
        device: Where the map is.
    """

    def __init__(self, val: PairBatches, seed: int, device: torch.device) -> None:
        n = min(SAMPLE, len(val))
        keep = np.zeros(len(val), dtype=bool)
        keep[np.random.default_rng(seed).choice(len(val), n, replace=False)] = True
        chosen = PairBatches(val.source, val.target, val.pairs.where(keep), val.memory)
        blocks = list(chosen.blocks(n))
        self._x = torch.from_numpy(np.concatenate([block.x for block in blocks])).to(device)
        self._target: Tensor | None = None
        document = chosen.pairs.document.astype(np.int64)
        if in_order(document)[1].reason is None:
            self._residual = _BetweenDocuments(document, device)
            self._target = self._residual(torch.from_numpy(np.concatenate([block.y for block in blocks])).to(device))

    def __call__(self, module: TrainedMap) -> tuple[float | None, float]:
        """The CKA and what it cost.

        Args:
            module: The map, on the probe's device.

        Returns:
            The figure, None where a side does not vary or no rows of different documents are left; and seconds.
        """
        start = time.perf_counter()
        if self._target is None:
            return None, 0.0
        with torch.no_grad():
            own = self._residual(module(self._x))
            target = self._target
            products = torch.stack([(own * target).sum(), (own * own).sum(), (target * target).sum()])
        cross, one, other = products.tolist()
        scale = math.sqrt(one * other) if one > 0 and other > 0 else 0.0
        value = cross / scale if scale > 0 and math.isfinite(scale) else math.nan
        return value if math.isfinite(value) else None, time.perf_counter() - start


def validation_losses(
    module: TrainedMap,
    val: PairBatches,
    *,
    batch_size: int,
    seed: int,
    centre: Tensor,
    unit: float,
    temperature: float,
) -> dict[str, float]:
    """Every component of the loss on all validation rows.

    The batches are the same at every call, rows of many documents mixed as in training: InfoNCE among neighbouring
    tokens is another, harder task, and its figure would not compare with the train loss.

    Args:
        module: The map, on the device of ``centre``.
        val: Validation pairs.
        batch_size: Rows of a batch.
        seed: Of their order.
        centre: (dy,) the target's train mean.
        unit: Of the MSE.
        temperature: Of InfoNCE.

    Returns:
        ``mse``, ``cosine``, ``infonce``, ``infonce_top1``, ``infonce_chance`` and ``infonce_gain``, means over rows.
    """
    weights = dict.fromkeys(LOSSES, 1.0)
    sums: dict[str, Tensor] = {}
    chance, device = 0.0, centre.device
    # Training counts epochs from 1.
    with torch.no_grad(), closing(val.shuffled(batch_size, seed, 0)) as batches:
        for batch in batches:
            x, y = (torch.from_numpy(rows).to(device) for rows in batch)
            _, parts = losses.combined(module(x), y, weights, centre=centre, temperature=temperature, unit=unit)
            for name, part in parts.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=device)) + part * len(batch)
            chance += losses.infonce_chance(len(batch)) * len(batch)
    means = {name: float(total) / len(val) for name, total in sums.items()}
    chance /= len(val)
    return {**means, "infonce_chance": chance, "infonce_gain": chance - means["infonce"]}
