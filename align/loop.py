"""The gradient loop: epochs over shuffled pairs, validation after each, early stopping, the best epoch kept.

What is scored and kept is a running average of the weights, not their last value: a step size that gets somewhere
within few epochs leaves the weights jittering about the optimum, and the average takes the jitter out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from align import losses, solvers
from align.aligners import Aligner
from align.fit import Scan, skip_weight
from align.layers import LayerPair
from align.modules import LinearMap, LowRankMap
from align.moments import Array, Scatter, about, centered, raw
from align.scoring import Epoch, score_all
from align.settings import LoopSettings
from featstore.errors import FitError
from featstore.store.loader import PairBatches

#: Polynomial-decay averaging (Shamir and Zhang 2013): the average is over about the last ninth of all steps so far.
_AVERAGING = 8


@dataclass(frozen=True)
class Trained:
    """A trained map and how it came about.

    Attributes:
        aligner: The best epoch's map.
        best_epoch: Its number.
        last_epoch: The last one that was run.
        reason: Why training stopped, in words.
        shipped: Parameters of the module as shipped with its factors.
    """

    aligner: Aligner
    best_epoch: int
    last_epoch: int
    reason: str
    shipped: int


def train_map(
    type_: str,
    pair: LayerPair,
    moments: Scan,
    train: PairBatches,
    val: PairBatches,
    settings: LoopSettings,
    *,
    on_epoch: Callable[[Epoch], None],
    tick: Callable[[float], None] = lambda _: None,
) -> Trained:
    """Train one map with AdamW.

    Args:
        type_: ``lora``, ``linear`` or ``affine``.
        pair: Which layers.
        moments: Of this pair: means, skip map, preconditioner and units come from the train part.
        train: Train pairs.
        val: Validation pairs.
        settings: How.
        on_epoch: Called after every epoch, epoch 0 (before training) included.
        tick: Called with the number of pairs done since the last call.

    Raises:
        FitError: The loss became NaN (the message names the step), or the type or rank does not fit.
        SpecError: The loss weights do not parse.
    """
    weights = losses.parse_loss(settings.loss)
    device = torch.device(settings.device)
    module = build_module(type_, moments, settings).to(device)
    # Only the weights are averaged; means, skip and preconditioner are shared.
    average = copy.deepcopy(module, {id(buffer): buffer for buffer in module.buffers()})
    mean_y = torch.as_tensor(moments.means[1], dtype=torch.float32, device=device)
    unit = float(np.trace(centered(moments.train).gy) / moments.train.n / len(mean_y))
    steps = max(-(-len(train) // settings.batch_size), 1) * settings.epochs
    optimiser = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad], lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=settings.lr, total_steps=steps + 1, pct_start=min(0.1, 10 / steps), anneal_strategy="cos"
    )

    def evaluate(epoch: int, loss: float | None, parts: dict[str, float], start: float) -> tuple[Epoch, Aligner]:
        aligner = _as_aligner(average, pair, moments, settings)
        with np.errstate(over="ignore", invalid="ignore"):
            figures, reasons = score_all(val, {"map": aligner}, seed=settings.seed)["map"]
        r2 = (figures or {}).get("r2")
        if r2 is None:
            remedy = f"use a smaller --lr than {settings.lr:g}" if epoch else "look at the rows of the validation split"
            raise FitError(
                f"{pair.key}: validation R2 is undefined at epoch {epoch} ({reasons.get('r2', 'no map')}); {remedy}"
            )
        record = Epoch(
            epoch, loss, 1 - float(r2), figures or {}, schedule.get_last_lr()[0], time.perf_counter() - start, parts
        )
        on_epoch(record)
        return record, aligner

    first, best = evaluate(0, None, {}, time.perf_counter())
    best_epoch, best_loss, waited, taken = 0, first.val_loss, 0, 0
    # Patience starts anew from here, not from the best epoch: slow progress counts once it adds up to min_delta.
    reference = first.val_loss
    reason = f"ran all {settings.epochs} epochs"
    for epoch in range(1, settings.epochs + 1):
        start = time.perf_counter()
        sums: dict[str, float] = {}
        rows = 0
        for step, (x, y) in enumerate(_batches(train, settings, epoch, device), 1):
            total, parts = losses.combined(
                module(x), y, weights, centre=mean_y, temperature=settings.temperature, unit=unit
            )
            value = float(total.detach())
            if not np.isfinite(value):
                raise FitError(
                    f"{pair.key}: the loss became {value} at epoch {epoch}, step {step}; the last good epoch was "
                    f"{epoch - 1}: use a smaller --lr than {settings.lr:g}"
                )
            optimiser.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            taken += 1
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), module.parameters(), strict=True):
                    mean.lerp_(weight, (_AVERAGING + 1) / (_AVERAGING + taken))
            figures = {"total": value, **{name: float(part) for name, part in parts.items()}}
            if "infonce" in figures:
                figures["infonce_chance"] = losses.infonce_chance(len(x))
            for name, figure in figures.items():
                sums[name] = sums.get(name, 0.0) + figure * len(x)
            rows += len(x)
            tick(len(x))
        averaged = {name: value / rows for name, value in sums.items()}
        record, aligner = evaluate(epoch, averaged.pop("total"), averaged, start)
        if record.val_loss < best_loss:
            best, best_epoch, best_loss = aligner, epoch, record.val_loss
        if record.val_loss < reference - settings.min_delta:
            reference, waited = record.val_loss, 0
            continue
        waited += 1
        if waited >= settings.patience:
            reason = (
                f"stopped at epoch {epoch}: no improvement of {settings.min_delta:g} in {waited} epochs; "
                f"best was epoch {best_epoch}"
            )
            break
    return Trained(best, best_epoch, record.epoch, reason, module.shipped_parameters())


def build_module(type_: str, moments: Scan, settings: LoopSettings) -> LowRankMap | LinearMap:
    """A map before training, with means, units and preconditioner from the train moments.

    Args:
        type_: ``lora``, ``linear`` or ``affine``.
        moments: Of the layer pair.
        settings: Rank, skip, preconditioner, seed.

    Raises:
        FitError: The type has no gradient form, or the rank does not fit.
    """
    mean_x, mean_y = moments.means
    centred = type_ != "linear"
    train = centered(moments.train) if centred else raw(moments.train)
    val = about(moments.val, mean_x, mean_y) if centred else raw(moments.val)
    n, dx, dy = train.n, len(mean_x), len(mean_y)
    skip = skip_weight(settings.skip, train, val) if type_ == "lora" else None
    common: dict[str, Any] = {
        "mean_source": mean_x if centred else None,
        "mean_target": mean_y if centred else None,
        "output_scale": float(np.sqrt(np.trace(train.gy) / (n * dy))),
        "preconditioner": _preconditioner(train, val, skip) if settings.precondition else None,
        "input_scale": 1.0 if settings.precondition else float(np.sqrt(np.trace(train.gx) / (n * dx))),
    }
    if type_ == "lora":
        return LowRankMap(dx, dy, settings.rank, skip=skip, alpha=settings.alpha, seed=settings.seed, **common)
    if type_ in ("linear", "affine"):
        return LinearMap(dx, dy, **common)
    raise FitError(f"type {type_!r} is not trained by gradient; choose lora, linear or affine")


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


def _batches(
    train: PairBatches, settings: LoopSettings, epoch: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with closing(train.shuffled(settings.batch_size, settings.seed, epoch)) as batches:
        for batch in batches:
            yield torch.from_numpy(batch.x).to(device), torch.from_numpy(batch.y).to(device)


def _as_aligner(module: LowRankMap | LinearMap, pair: LayerPair, moments: Scan, settings: LoopSettings) -> Aligner:
    tensors = dict(module.export())
    tensors["control_mean_source"], tensors["control_mean"] = (mean.astype(np.float32) for mean in moments.means)
    options: dict[str, Any] = {"solver": "adamw", "lr": settings.lr}
    if isinstance(module, LowRankMap):
        options |= {"rank": module.rank, "alpha": module.alpha, "skip": settings.skip}
    return Aligner(pair, tensors, options, module.trainable_parameters())
