"""Makes the map of a layer pair as planned: solved for, shared between layers, or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.closed_form.fit import Solver, fit_shared_procrustes
from align.closed_form.fit_all import fit_all, worth_threads
from align.closed_form.shared import Shared, fit_shared
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.moments.scan import Scan
from align.moments.scatter import Array, centered
from align.runs.facts import Training
from align.runs.job import Data, Direction
from align.runs.judge import Candidate, Judge
from align.runs.plan import MapPlan, Sharing
from align.runs.rundir import RunDirectory
from align.scoring.rows import Epoch, batches_of
from align.solvers import procrustes
from featstore.runtime.console import err, progress
from featstore.text.splits import TRAIN, VALIDATION

if TYPE_CHECKING:
    from align.training.plan import TrainingPlan
    from align.training.tracking import Tracker

#: What both models say of an epoch's map (`--eval-models`).
EpochEvaluation = Callable[[Aligner], Mapping[str, Any]]


@dataclass(frozen=True)
class Reporting:
    """Where a run reports what happens on the way.

    Attributes:
        files: The run directory.
        tracker: External logging; None for a run without training.
        models: Asked about the map of every epoch; None for nobody.
        resume: Whether to resume an interrupted run.
        quiet: No progress.
    """

    files: RunDirectory
    tracker: Tracker | None
    models: EpochEvaluation | None
    resume: bool
    quiet: bool

    def epoch(self, pair: LayerPair, epoch: Epoch, aligner: Aligner | None = None) -> None:
        """Report an epoch.

        Args:
            pair: Which layers.
            epoch: What it measured.
            aligner: Its map, to be asked about; None where it is no longer at hand.
        """
        said = self.models(aligner) if self.models is not None and aligner is not None else None
        self.files.epoch(pair, epoch, said)
        if self.tracker is not None:
            self.tracker.epoch(pair.key, epoch)

    def step(self, pair: LayerPair, event: Mapping[str, Any]) -> None:
        """Report a step.

        Args:
            pair: Which layers.
            event: What it measured.
        """
        self.files.step(pair, event)
        if self.tracker is not None:
            self.tracker.step(pair.key, event)

    def stop(self, pair: LayerPair, *, epoch: int, best_epoch: int, reason: str) -> None:
        """Report why training ended.

        Args:
            pair: Which layers.
            epoch: The last one.
            best_epoch: The one that is kept.
            reason: In words.
        """
        self.files.stop(pair, epoch=epoch, best_epoch=best_epoch, reason=reason)
        if not self.quiet:
            err.print(f"  {reason}")


class Maker:
    """Makes the maps of one direction.

    Args:
        plan: How they come about.
        data: Where rows come from.
        direction: Which models and pairs.
        wanted: Its layer pairs.
        moments: Of each, by key.
        solver: What is shared between pairs of one source is computed once.
        judge: Scores a closed form on validation.
        reporting: Where to report.
        device: Where closed forms are solved.
        alone: Whether no other run shares the solver; several pairs are then solved side by side.
    """

    def __init__(
        self,
        plan: MapPlan,
        data: Data,
        direction: Direction,
        wanted: Sequence[LayerPair],
        moments: Mapping[str, Scan],
        solver: Solver,
        judge: Judge,
        reporting: Reporting,
        *,
        device: str = "cpu",
        alone: bool = True,
    ) -> None:
        self._plan, self._data, self._direction, self._moments = plan, data, direction, moments
        self._solver, self._judge, self._reporting = solver, judge, reporting
        self._solved: dict[str, Aligner] = {}
        self._base: _Base | None = None
        if plan.sharing is not None and plan.sharing.whole:
            self._solved = fit_shared_procrustes(wanted, moments, plan.sharing.scale)
        elif plan.sharing is not None:
            self._base = _Base(plan.sharing, fit_shared(moments, plan.sharing.base, scale=plan.sharing.scale))
        elif plan.training is None and alone and worth_threads(wanted, moments, device):
            fitted = fit_all({"": plan.fit}, wanted, moments, device=device)
            self._solved = {key: maps[""] for key, maps in fitted.items()}

    def candidate(self, pair: LayerPair) -> Candidate:
        """The map of a layer pair and how it came about.

        Args:
            pair: One of the direction's.

        Raises:
            FeatstoreError: It cannot be fitted or trained.
        """
        return self._closed(pair) if self._plan.training is None else self._trained(pair, self._plan.training)

    def _closed(self, pair: LayerPair) -> Candidate:
        if self._base is not None:
            aligner = self._on_base(self._base, pair)
            words = f"one {self._base.sharing.base} map for all layer pairs, and a projection of low rank"
        else:
            aligner, words = self._solve(pair), "closed form"
            if self._plan.sharing is not None:
                words = f"one rotation for {len(self._solved)} layer pairs"
        val = self._judge.scores(pair, self._direction.pairs, VALIDATION, {"map": aligner})["map"]
        figures, _ = val
        r2 = (figures or {}).get("r2")
        loss = 1 - float(r2 if r2 is not None else "nan")
        self._reporting.epoch(pair, Epoch(0, None, loss, figures or {}, 0.0, 0.0))
        return Candidate(aligner, words, self._plan.fit, rotation=self._rotation(pair, aligner), val=val)

    def _solve(self, pair: LayerPair) -> Aligner:
        if pair.key in self._solved:
            return self._solved[pair.key]
        return self._solver.fit(self._plan.fit, pair, self._moments[pair.key])

    def _on_base(self, base: _Base, pair: LayerPair) -> Aligner:
        return self._solver.fit_on(base.map.of(pair.key), pair, self._moments[pair.key], base.sharing.rank)

    def _trained(self, pair: LayerPair, plan: TrainingPlan) -> Candidate:
        # Only here: torch takes two seconds to import, and a closed form needs none of it.
        from align.training.loop import train_map

        reporting, pairs, epochs = self._reporting, self._direction.pairs, plan.schedule.epochs
        store, moments, base = self._data.store, self._moments[pair.key], self._base
        sides = (pairs.where(pairs.split == split) for split in (TRAIN, VALIDATION))
        train, val = (batches_of(store, pair, side, self._data.memory) for side in sides)
        maps: list[Aligner] = []

        def on_epoch(epoch: Epoch) -> None:
            reporting.epoch(pair, epoch, maps.pop() if maps else None)

        with progress(f"train {pair.key}", len(train) * epochs, "pairs", quiet=reporting.quiet) as tick:
            done = train_map(
                plan,
                pair,
                moments,
                train,
                val,
                skip=None if base is None else base.map.of(pair.key),
                on_map=maps.append,
                on_epoch=on_epoch,
                on_step=lambda event: reporting.step(pair, event),
                tick=tick,
                checkpoint=reporting.files.checkpoint(pair),
                resume=reporting.resume,
                store=store.fingerprint,
            )
        reporting.stop(pair, epoch=done.last_epoch, best_epoch=done.best_epoch, reason=done.reason)
        fit = self._plan.fit
        optimum = self._solver.fit(fit, pair, moments) if base is None else self._on_base(base, pair)
        training = Training(done.best_epoch, done.last_epoch, epochs)
        # Of several processes the others report no epoch, and judge nothing.
        parts = reporting.files.last_epoch(pair)["train_parts"] if reporting.files.writes else {}
        best = optimum, self._plan.optimum
        return Candidate(done.aligner, done.reason, fit, best, training, parts, self._rotation(pair, done.aligner))

    def _rotation(self, pair: LayerPair, aligner: Aligner) -> Array | None:
        """The rotation without a factor that a map is, or is added to; None where there is none."""
        if not self._plan.bare:
            return None
        if self._base is not None:
            return self._base.map.of(pair.key)
        if "skip" not in self._plan.type.options:
            return aligner.tensors["weight"].astype("float64")
        if "skip" in aligner.tensors:
            return aligner.tensors["skip"].astype("float64")
        train = centered(self._moments[pair.key].train)
        return procrustes(train.c, train.gx)[0]


@dataclass(frozen=True)
class _Base:
    """A map that the layers share, to which each adds a projection of its own."""

    sharing: Sharing
    map: Shared
