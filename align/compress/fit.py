"""Training a resampler: epochs over windows, validation after each, early stopping, the best epoch kept.

What is scored and kept is a running average of the weights, as for the maps of :mod:`align.training.loop`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.compress.pack import pack
from align.compress.plan import WindowsPlan
from align.compress.resampler import Resampler, tensors_of
from align.compress.score import Trained, score_windows
from align.compress.start import choose_start
from align.compress.windows import Windows
from align.scoring.rows import Epoch
from align.training.checkpoint import read_checkpoint, write_checkpoint
from featstore.errors import FitError
from featstore.runtime.provenance import digest

#: Steps of an epoch at least: a small store's windows are gone over several times before a validation.
EPOCH_STEPS = 48
WEIGHT_DECAY = 0.02
#: Polynomial-decay averaging (Shamir and Zhang 2013), as in :mod:`align.training.loop`.
_AVERAGING = 8


@dataclass(frozen=True)
class Compressed:
    """A trained resampler and how it came about.

    Attributes:
        module: The best epoch's, in evaluation mode.
        mean_target: float32 ``(d_target,)``, the train mean over pairs, which scores 0.
        mean_source: float32 ``(d_source,)``, the same of the source.
        best_epoch: Its number.
        last_epoch: The last one that was run.
        reason: Why training stopped, in words.
        trainable: Numbers that the optimiser moved.
    """

    module: Resampler
    mean_target: Any
    mean_source: Any
    best_epoch: int
    last_epoch: int
    reason: str
    trainable: int


def steps_of(windows: int, batch_size: int) -> int:
    """Steps of an epoch: whole rounds over the windows, as many as make :data:`EPOCH_STEPS`.

    Args:
        windows: Train windows.
        batch_size: Windows in a batch.
    """
    per_round = -(-windows // batch_size)
    return per_round * -(-EPOCH_STEPS // per_round)


def fit_windows(
    train: Windows,
    val: Windows,
    means: tuple[Any, Any],
    plan: WindowsPlan,
    *,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
    tick: Callable[[float], None] = lambda _: None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Compressed:
    """Train a resampler with AdamW on the mean squared error at every target position.

    Args:
        train: Train windows.
        val: Validation windows.
        means: Train means of source and target over pairs (:attr:`align.moments.scan.Scan.means`); the second scores
            0.
        plan: Latents, and how they are trained.
        on_epoch: Called after every epoch, epoch 0 (the linear codec that training starts from) included; after a
            resume only for epochs that are run.
        tick: Called with the number of windows done since the last call; an epoch has
            ``steps_of(len(train), plan.batch_size)`` batches.
        checkpoint: Directory of :mod:`align.training.checkpoint` in which the state after every epoch is kept; None for
            nowhere.
        resume: Go on from the state in ``checkpoint`` where there is one: to the same numbers as without a stop.

    Raises:
        FitError: The loss became NaN (the message names epoch and step), or latents, states or validation do not allow
            a fit.
        StoreStateError: The checkpoint is of another training.
        CorruptDataError: The checkpoint is damaged.
    """
    run = _Run(train, val, means, plan, on_epoch, tick, checkpoint)
    return run.go((run.resume() if resume else None) or run.begin())


@dataclass
class _Progress:
    """The scalars of a run in progress; JSON."""

    epoch: int = 0
    taken: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    # Patience starts anew from here, not from the best epoch: slow progress counts once it adds up to min_delta.
    reference: float = math.inf
    waited: int = 0


class _Run:
    """One training run: module, average, optimiser, and how far it is."""

    def __init__(
        self,
        train: Windows,
        val: Windows,
        means: tuple[Any, Any],
        plan: WindowsPlan,
        on_epoch: Callable[[Epoch], None],
        tick: Callable[[float], None],
        checkpoint: Path | None,
    ) -> None:
        self.train, self.val, self.plan = train, val, plan
        self.mean_x, self.mean_y = (np.asarray(mean, dtype=np.float32) for mean in means)
        self.on_epoch, self.tick, self.checkpoint = on_epoch, tick, checkpoint
        self.device = torch.device(plan.device)
        self.peak = plan.lr
        self.size = plan.batch_size
        self.steps = steps_of(len(train), plan.batch_size)
        self.key = train.pair.key
        start = choose_start(train, val, plan.latents, plan.latent_dim)
        self.module = Resampler(
            start.layout,
            basis=start.basis,
            mean_source=start.mean_source.astype(np.float32),
            mean_target=start.mean_target.astype(np.float32),
            readout=start.readout,
            unit=start.unit,
            seed=plan.seed,
        ).to(self.device)
        # Only the weights are averaged; basis and means are shared.
        self.average = copy.deepcopy(self.module, {id(buffer): buffer for buffer in self.module.buffers()}).eval()
        self.best = self.average.export()
        self.optimiser = torch.optim.AdamW(
            self.module.parameters(), lr=self.peak, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.99)
        )
        self.identity = {
            **plan.identity,
            "pair": self.key,
            "store": train.store.fingerprint,
            "windows": digest([windows.numbers.tolist() for windows in (train, val)]),
            "tokens": [int(n) for windows in (train, val) for sizes in windows.sizes() for n in [sizes.sum()]],
            **({} if train.roles is None else {"roles": list(train.roles)}),
        }

    def begin(self) -> _Progress:
        progress = _Progress()
        self._evaluate(progress, None, time.perf_counter())
        return progress

    def go(self, progress: _Progress) -> Compressed:
        plan = self.plan
        reason = f"ran all {plan.epochs} epochs"
        while True:
            if progress.waited >= plan.patience:
                reason = (
                    f"stopped at epoch {progress.epoch}: no improvement of {plan.min_delta:g} in "
                    f"{progress.waited} epochs; best was epoch {progress.best_epoch}"
                )
                break
            if progress.epoch >= plan.epochs:
                break
            began = time.perf_counter()
            progress.epoch += 1
            loss = self._epoch(progress)
            self._evaluate(progress, loss, began)
        module = Resampler.from_tensors(self.best, self.module.options)
        trainable = sum(p.numel() for p in self.module.parameters())
        return Compressed(module, self.mean_y, self.mean_x, progress.best_epoch, progress.epoch, reason, trainable)

    def rate(self, taken: int) -> float:
        """Learning rate of a step: linear warmup over a tenth of the steps, at most 32, then half a cosine."""
        total = self.steps * self.plan.epochs
        warm = max(1, min(32, total // 10))
        if taken < warm:
            return self.peak * (taken + 1) / warm
        return self.peak * 0.5 * (1 + math.cos(math.pi * (taken - warm) / max(total - warm, 1)))

    def _epoch(self, progress: _Progress) -> float:
        """One epoch; returns the mean train loss."""
        total, positions = 0.0, 0
        with _seeded(self.plan.seed, progress.epoch, self.device):
            self.module.train()
            batches = self.train.shuffled(self.size, self.plan.seed, progress.epoch, self.steps)
            for step, windows in enumerate(batches, 1):
                packed = pack(self.module.layout, [(w.x, w.ends_x, w.ends_y) for w in windows])
                guess = self.module(tensors_of(packed, self.device))
                errors = []
                for i, window in enumerate(windows):
                    y = torch.from_numpy(window.y).to(self.device)
                    true = (y - self.module.mean_target) / self.module.unit
                    errors.append((guess[i, : len(y)] - true).square().sum())
                count = sum(len(window.y) for window in windows)
                loss: Tensor = torch.stack(errors).sum() / (count * guess.shape[-1])
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise FitError(
                        f"{self.key}: the loss became {value} at epoch {progress.epoch}, step {step}; the last good "
                        f"epoch was {progress.epoch - 1}: use a smaller --lr than {self.peak:g}"
                    )
                self._step(loss, progress)
                total += value * count
                positions += count
                self.tick(len(windows))
        return total / positions

    def _step(self, loss: Tensor, progress: _Progress) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(progress.taken)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.plan.clip)
        self.optimiser.step()
        progress.taken += 1
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.module.parameters(), strict=True):
                mean.lerp_(weight, (_AVERAGING + 1) / (_AVERAGING + progress.taken))

    def _evaluate(self, progress: _Progress, loss: float | None, began: float) -> None:
        """Validate, keep the best epoch, tell, and write the checkpoint."""
        with np.errstate(over="ignore", invalid="ignore"):
            codec = {"map": Trained(self.average)}
            figures, reasons = score_windows(self.val, codec, self.mean_y, seed=self.plan.seed)["map"]
        r2 = figures["r2"]
        if r2 is None:
            remedy = f"use a smaller --lr than {self.peak:g}" if progress.epoch else "look at the validation split"
            raise FitError(
                f"{self.key}: validation R2 is undefined at epoch {progress.epoch} ({reasons.get('r2')}); {remedy}"
            )
        val_loss = 1 - float(r2)
        if val_loss < progress.best_loss:
            progress.best_loss, progress.best_epoch, self.best = val_loss, progress.epoch, self.average.export()
        if progress.epoch == 0 or val_loss < progress.reference - self.plan.min_delta:
            progress.reference, progress.waited = val_loss, 0
        else:
            progress.waited += 1
        lr = self.rate(max(progress.taken - 1, 0))
        parts = {} if loss is None else {"mse": loss}
        self.on_epoch(Epoch(progress.epoch, loss, val_loss, figures, lr, time.perf_counter() - began, parts))
        if self.checkpoint is not None:
            self._save(self.checkpoint, progress)

    def _save(self, directory: Path, progress: _Progress) -> None:
        tensors = {f"best.{name}": value for name, value in self.best.items()}
        for prefix, module in (("module", self.module), ("average", self.average)):
            tensors |= {f"{prefix}.{name}": p.detach().cpu().numpy() for name, p in module.named_parameters()}
        for name, p in self.module.named_parameters():
            for key, value in self.optimiser.state.get(p, {}).items():
                tensors[f"optimiser.{key}.{name}"] = value.detach().cpu().numpy()
        write_checkpoint(directory, tensors, asdict(progress), self.identity)

    def resume(self) -> _Progress | None:
        """Take over everything from the checkpoint; None where there is none."""
        found = None if self.checkpoint is None else read_checkpoint(self.checkpoint, self.identity)
        if found is None:
            return None
        progress = found.counters(_Progress)
        with torch.no_grad():
            for prefix, module in (("module", self.module), ("average", self.average)):
                for name, p in module.named_parameters():
                    p.copy_(torch.from_numpy(found.array(f"{prefix}.{name}", tuple(p.shape))))
        for name, p in self.module.named_parameters():
            state = {
                key: torch.from_numpy(found.array(place, () if key == "step" else tuple(p.shape)))
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (place := f"optimiser.{key}.{name}") in found.tensors
            }
            if state:
                # AdamW keeps its step counter on the CPU.
                moved = {key: value if key == "step" else value.to(self.device) for key, value in state.items()}
                self.optimiser.state[p] = moved
        self.best = {name: found.array(f"best.{name}", tensor.shape) for name, tensor in self.best.items()}
        return progress


@contextmanager
def _seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Dropout as a function of seed and epoch, and the caller's generators left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.default_rng((seed, epoch, 1)).integers(2**31)))
        yield
