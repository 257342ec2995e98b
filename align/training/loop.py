"""The gradient loop: epochs over shuffled pairs, validation after each, early stopping, the best epoch kept.

What is scored and kept is a running average of the weights, not their last value: a step size that gets somewhere
within few epochs leaves the weights jittering about the optimum, and the average takes the jitter out.

On several processes all of them run this; the main one alone scores, reports and writes, and all stop where it stops.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.moments.scan import Scan
from align.moments.scatter import Array
from align.scoring.rows import Epoch, score_all
from align.training import losses
from align.training.building import as_aligner, build_module, target_unit
from align.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from align.training.engine import Engine, Objective, accelerator_for, precision_of
from align.training.feed import pairs_digest, rows_on
from align.training.plan import TrainingPlan
from align.training.probe import CkaProbe, validation_losses
from align.training.progress import Progress
from featstore.errors import FitError
from featstore.runtime.console import jsonable
from featstore.store.read.loader import PairBatches

#: Polynomial-decay averaging (Shamir and Zhang 2013): the average is over about the last ninth of all steps so far.
_AVERAGING = 8
#: Steps between two looks at the losses; each makes the host wait for the device.
_UNREAD = 16


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
    plan: TrainingPlan,
    pair: LayerPair,
    moments: Scan,
    train: PairBatches,
    val: PairBatches,
    *,
    skip: Array | None = None,
    on_epoch: Callable[[Epoch], None],
    on_map: Callable[[Aligner], None] = lambda _: None,
    on_step: Callable[[dict[str, Any]], None] = lambda _: None,
    tick: Callable[[float], None] = lambda _: None,
    checkpoint: Path | None = None,
    resume: bool = False,
    store: str = "",
) -> Trained:
    """Train one map with AdamW.

    Args:
        plan: What the map is before training, what is minimised, in which steps and where.
        pair: Which layers.
        moments: Of this pair: means, skip map, preconditioner and units come from the train part.
        train: Train pairs.
        val: Validation pairs.
        skip: float64 ``(d_source, d_target)``, the map that a ``lora`` or ``mlp`` is added to; None for the one that
            the plan names.
        on_epoch: Called on the main process after every epoch, epoch 0 (before training) included.
        on_map: Called just before with the epoch's map; not for epochs that a resumed training only tells again.
        on_step: Called on the main process every ``cka_every`` steps with ``{"event": "step", "epoch", "step", "lr",
            "loss", "cka", "cka_seconds"}``: steps counted from the beginning of training, the mean loss of the last
            steps (100 at most), and debiased CKA on 256 fixed validation rows (null where undefined).
        tick: Called on the main process with the number of pairs done since the last call.
        checkpoint: Directory of this training's state, its own; None for no checkpoints.
        resume: Go on from the state there, if there is one. Its epochs and events go to ``on_epoch`` and ``on_step``
            again, so that a log can be written anew.
        store: Fingerprint of the store; a state made from another is refused.

    Returns:
        The same on every process.

    Raises:
        FitError: The loss became NaN or infinite (the message names the step), or the type or rank does not fit.
        SpecError: Unknown precision, or the device is not there.
        StoreStateError: The state is of another training.
        CorruptDataError: The state is damaged.
    """
    training = Training(plan, pair, moments, train, val, skip, on_epoch, on_map, on_step, tick, checkpoint, store)
    return training.run(resume=resume)


class Training:
    """One call of :func:`train_map`, whose arguments it takes."""

    def __init__(
        self,
        plan: TrainingPlan,
        pair: LayerPair,
        moments: Scan,
        train: PairBatches,
        val: PairBatches,
        skip: Array | None,
        on_epoch: Callable[[Epoch], None],
        on_map: Callable[[Aligner], None],
        on_step: Callable[[dict[str, Any]], None],
        tick: Callable[[float], None],
        checkpoint: Path | None,
        store: str,
    ) -> None:
        self.pair, self.moments, self.train, self.val = pair, moments, train, val
        self.on_epoch, self.on_map, self.on_step = on_epoch, on_map, on_step
        self.tick, self.checkpoint = tick, checkpoint
        self.shape, self.schedule = plan.shape, plan.schedule
        accelerator = accelerator_for(plan.place)
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        schedule = plan.schedule
        self.size, self.lr = schedule.batch_size, schedule.lr
        #: Micro-batches of a step, on all processes.
        self.together = schedule.accumulate * self.world
        self.steps = max(-(-len(train) // (self.size * self.together)), 1)
        #: Rows of the micro-batches of every step but an epoch's last.
        self._whole = [self.size] * self.together
        self.objective = Objective(
            plan.goal.weights,
            torch.as_tensor(moments.means[1], dtype=torch.float32, device=self.device),
            target_unit(moments),
            plan.goal.temperature,
        )
        self.engine = Engine(
            accelerator,
            build_module(plan.shape, moments, skip).to(self.device),
            self.objective,
            lr=self.lr,
            clip=schedule.clip,
            steps=self.steps * schedule.epochs,
            averaging=_AVERAGING,
        )
        self.probe = CkaProbe(val, schedule.seed, self.device) if self.main and schedule.cka_every else None
        self.progress = Progress()
        self.best = as_aligner(self.engine.average, pair, moments, plan.shape, self.lr)
        self.identity = {
            "type": plan.shape.type,
            "pair": pair.key,
            "store": store,
            **plan.identity,
            "precision": precision_of(plan.place),
            "batches a step": self.together,
            "given skip": None if skip is None else hashlib.sha256(skip.tobytes()).hexdigest()[:16],
            "memory": train.memory,
            "train pairs": pairs_digest(train),
            "validation pairs": pairs_digest(val),
        }

    def run(self, *, resume: bool) -> Trained:
        """Train to the end.

        Args:
            resume: Go on from the state in the checkpoint's directory, if there is one.
        """
        found = read_checkpoint(self.checkpoint, self.identity) if self.checkpoint is not None and resume else None
        if found is None:
            self._evaluate(time.perf_counter(), None, {})
            self._save()
        else:
            self._restore(found)
        progress = self.progress
        while progress.reason is None:
            self._epoch()
            self._save()
        return Trained(
            self.best, progress.best_epoch, progress.epoch - 1, progress.reason, self.engine.module.shipped_parameters()
        )

    def _epoch(self) -> None:
        """The rest of an epoch, its validation, and whether to go on."""
        start = time.perf_counter() - self.progress.seconds
        self.take_steps(start)
        means = self.progress.means
        self._decide(self._evaluate(start, means.pop("total"), means))

    def take_steps(self, start: float) -> None:
        """The rest of an epoch's steps.

        Args:
            start: When the epoch began, by :func:`time.perf_counter`.

        Raises:
            FitError: A loss, a gradient or a weight is not finite.
        """
        progress = self.progress
        batches = self.train.shuffled(
            self.size,
            self.schedule.seed,
            progress.epoch,
            start=progress.step * self.together,
            rank=self.rank,
            world=self.world,
        )
        with closing(rows_on(self.device, batches)) as own:
            while progress.step < self.steps:
                sizes = self._sizes(progress.step)
                self.engine.step(own, len(sizes[self.rank :: self.world]), sum(sizes))
                progress.step, progress.taken = progress.step + 1, progress.taken + 1
                self._look(start)
                if self.main:
                    self.tick(sum(sizes))

    def _sizes(self, step: int) -> list[int]:
        """Rows of every micro-batch of a step of an epoch, of all processes."""
        if step < self.steps - 1:
            return self._whole
        first, total = step * self.together, -(-len(self.train) // self.size)
        return [
            min(self.size, len(self.train) - number * self.size)
            for number in range(first, min(first + self.together, total))
        ]

    def _look(self, start: float) -> None:
        """After a step: read figures, report, write the state, each when it is due."""
        schedule, progress = self.schedule, self.progress
        last = progress.step == self.steps
        report = bool(schedule.cka_every) and progress.taken % schedule.cka_every == 0
        save = self.checkpoint is not None and progress.taken % schedule.checkpoint_every == 0 and not last
        if report or save or last or self.engine.unread >= _UNREAD:
            self._read()
        if report and self.probe is not None:
            cka, seconds = self.probe(self.engine.average)
            event = {
                "event": "step",
                "epoch": progress.epoch,
                "step": progress.taken,
                "lr": self.engine.lr,
                "loss": progress.recent_loss,
                "cka": cka,
                "cka_seconds": seconds,
            }
            progress.events.append(event)
            self.on_step(dict(event))
        if save:
            if not self.engine.sound():
                raise self._exploded("a weight", math.nan, progress.step)
            progress.seconds = time.perf_counter() - start
            self._save()

    def _read(self) -> None:
        """Add the figures of the steps since the last call to the sums; the first that is not finite ends training."""
        progress = self.progress
        read = self.engine.read()
        for step, figures in enumerate(read, progress.step - len(read)):
            *parts, norm = figures
            for what, value in (("the loss", parts[0]), ("the gradient's norm", norm)):
                if not math.isfinite(value):
                    raise self._exploded(what, value, step + 1)
            sizes = self._sizes(step)
            named = dict(zip(self.objective.names, parts, strict=True))
            if "infonce" in named:
                named["infonce_chance"] = sum(losses.infonce_chance(n) * n for n in sizes) / sum(sizes)
            progress.add(named, norm, sum(sizes))

    def _exploded(self, what: str, value: float, step: int) -> FitError:
        epoch = self.progress.epoch
        kept = f"; its state is in {self.checkpoint}" if self.checkpoint is not None else ""
        return FitError(
            f"{self.pair.key}: {what} became {value} at epoch {epoch}, step {step}; the last good epoch was "
            f"{epoch - 1}: use a smaller --lr than {self.lr:g}{kept}"
        )

    def _evaluate(self, start: float, loss: float | None, parts: dict[str, float]) -> float:
        """Score the average, keep it if it is the best, tell the epoch's record; the validation loss."""
        progress, epoch = self.progress, 0 if loss is None else self.progress.epoch
        aligner = as_aligner(self.engine.average, self.pair, self.moments, self.shape, self.lr)
        val_loss, failed = math.nan, None
        if self.main:
            try:
                val_loss = self._record(epoch, aligner, start, loss, parts)
            except BaseException as error:  # noqa: BLE001 - raised again when the others know
                failed = error
        val_loss = self.engine.tell(val_loss)
        if failed is not None:
            raise failed
        if math.isnan(val_loss):
            raise FitError(f"{self.pair.key}: the main process stopped at epoch {epoch}; its message says why")
        if val_loss < progress.best_loss:
            self.best, progress.best_epoch, progress.best_loss = aligner, epoch, val_loss
        if epoch == 0:
            progress.reference = val_loss
        return val_loss

    def _record(self, epoch: int, aligner: Aligner, start: float, loss: float | None, parts: dict[str, float]) -> float:
        schedule, progress = self.schedule, self.progress
        with np.errstate(over="ignore", invalid="ignore"):
            figures, reasons = score_all(self.val, {"map": aligner}, seed=schedule.seed)["map"]
        r2 = (figures or {}).get("r2")
        if r2 is None:
            remedy = f"use a smaller --lr than {self.lr:g}" if epoch else "look at the rows of the validation split"
            why = reasons.get("r2", "no map")
            raise FitError(f"{self.pair.key}: validation R2 is undefined at epoch {epoch} ({why}); {remedy}")
        objective = self.objective
        val_parts = validation_losses(
            self.engine.average,
            self.val,
            batch_size=self.size,
            seed=schedule.seed,
            centre=objective.centre,
            unit=objective.unit,
            temperature=objective.temperature,
        )
        record = Epoch(
            epoch,
            loss,
            1 - float(r2),
            figures or {},
            self.engine.lr,
            time.perf_counter() - start,
            parts,
            val_parts,
            progress.recent_loss if epoch else None,
            progress.norms / self.steps if epoch else None,
        )
        progress.records.append(jsonable(asdict(record)))
        self.on_map(aligner)
        self.on_epoch(record)
        return record.val_loss

    def _decide(self, val_loss: float) -> None:
        """After an epoch: stop, or make ready for the next."""
        schedule, progress, epoch = self.schedule, self.progress, self.progress.epoch
        # Patience starts anew from here, not from the best epoch: slow progress counts once it adds up to min_delta.
        if val_loss < progress.reference - schedule.min_delta:
            progress.reference, progress.waited = val_loss, 0
        else:
            progress.waited += 1
        if progress.waited >= schedule.patience:
            progress.reason = (
                f"stopped at epoch {epoch}: no improvement of {schedule.min_delta:g} in {progress.waited} epochs; "
                f"best was epoch {progress.best_epoch}"
            )
        elif epoch == schedule.epochs:
            progress.reason = f"ran all {schedule.epochs} epochs"
        progress.next_epoch()

    def _save(self) -> None:
        """Write the state; on the main process alone."""
        if self.checkpoint is None or not self.main:
            return
        best = {f"best.{name}": tensor for name, tensor in self.best.tensors.items()}
        write_checkpoint(self.checkpoint, {**self.engine.state(), **best}, asdict(self.progress), self.identity)

    def _restore(self, found: Checkpoint) -> None:
        """Go on from a state, and tell again what was told by then, in the same order."""
        self.progress = found.counters(Progress)
        if self.progress.step > self.steps or len(self.progress.records) != self.progress.epoch:
            raise found.damaged("its progress names steps or epochs that this training does not have")
        own = {name: tensor for name, tensor in found.tensors.items() if not name.startswith("best.")}
        try:
            self.engine.restore(own, self.progress.taken)
            records = [Epoch(**record) for record in self.progress.records]
            events = [(event["epoch"], dict(event)) for event in self.progress.events]
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise found.damaged(f"it does not fit this training ({' '.join(str(error).split())})") from error
        best = {name: found.array(f"best.{name}", tensor.shape) for name, tensor in self.best.tensors.items()}
        self.best = replace(self.best, tensors=best)
        if not self.main:
            return
        for record in records:
            for epoch, event in events:
                if epoch == record.epoch:
                    self.on_step(event)
            self.on_epoch(record)
        for epoch, event in events:
            if epoch == self.progress.epoch:
                self.on_step(event)
        done = (len(self.progress.records) - 1) * len(self.train)
        self.tick(done + self.progress.rows)
