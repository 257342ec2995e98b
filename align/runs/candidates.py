"""How the map of a layer pair comes about: solved for, shared between layers, or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.closed_form.fit import Fit, Solver, fit_low_rank_on, fit_shared_procrustes
from align.closed_form.fit_all import fit_all
from align.closed_form.shared import Shared, fit_shared
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.moments.scan import Scan
from align.runs.findings import Training
from align.runs.job import Direction, Job
from align.runs.judge import Candidate, Judge
from align.runs.rundir import RunDirectory
from align.scoring.rows import Epoch, batches_of
from featstore.runtime.console import err, progress
from featstore.text.corpus import TRAIN, VALIDATION

if TYPE_CHECKING:
    from align.training.tracking import Tracker

#: What both models say of an epoch's map (`--eval-models`).
EpochEvaluation = Callable[[Aligner], Mapping[str, Any]]


@dataclass(frozen=True)
class Reporting:
    """Where what happens on the way is told.

    Attributes:
        files: The run directory.
        tracker: External logging; None for a run without training.
        models: Asked about the map of every epoch; None for nobody.
        resume: Whether an interrupted run goes on.
        quiet: No progress.
    """

    files: RunDirectory
    tracker: Tracker | None
    models: EpochEvaluation | None
    resume: bool
    quiet: bool

    def epoch(self, pair: LayerPair, epoch: Epoch, aligner: Aligner | None = None) -> None:
        """Tell of an epoch.

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
        """Tell of a step.

        Args:
            pair: Which layers.
            event: What it measured.
        """
        self.files.step(pair, event)
        if self.tracker is not None:
            self.tracker.step(pair.key, event)

    def stop(self, pair: LayerPair, *, epoch: int, best_epoch: int, reason: str) -> None:
        """Tell why training ended.

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
        job: The run.
        direction: Which models and pairs.
        wanted: Its layer pairs.
        moments: Of each, by key.
        solver: What is shared between pairs of one source is computed once.
        judge: Scores a closed form on validation.
        reporting: Where to tell of it.
        device: Where closed forms are solved.
    """

    def __init__(
        self,
        job: Job,
        direction: Direction,
        wanted: Sequence[LayerPair],
        moments: Mapping[str, Scan],
        solver: Solver,
        judge: Judge,
        reporting: Reporting,
        *,
        device: str = "cpu",
    ) -> None:
        self._job, self._direction, self._moments = job, direction, moments
        self._solver, self._judge, self._reporting = solver, judge, reporting
        settings = self._settings = job.settings
        self._rotations: dict[str, Aligner] = {}
        self._shared: Shared | None = None
        self._closed: dict[str, dict[str, Aligner]] = {}
        if settings.shared and settings.type == "procrustes":
            self._rotations = fit_shared_procrustes(wanted, moments, settings.scale)
        elif settings.shared:
            base = settings.loop.skip if settings.type == "lora" else "ridge"
            self._shared = fit_shared(moments, base, scale=True)
        elif not settings.by_gradient:
            self._closed = fit_all({"": self._closed_form()}, wanted, moments, device=device)

    def candidate(self, pair: LayerPair) -> Candidate:
        """The map of a layer pair and how it came about.

        Args:
            pair: One of the direction's.

        Raises:
            FeatstoreError: It cannot be fitted or trained.
        """
        return self._trained(pair) if self._settings.by_gradient else self._solved(pair)

    def _closed_form(self) -> Fit:
        settings, loop = self._settings, self._settings.loop
        skip = loop.skip if settings.type == "reduced-rank" else "none"
        components = settings.components
        number = int(components) if components is not None and components.isdecimal() else components
        return Fit(settings.type, scale=settings.scale, rank=loop.rank, skip=skip, components=number)

    def _solved(self, pair: LayerPair) -> Candidate:
        words = "closed form"
        if self._rotations:
            aligner, words = self._rotations[pair.key], f"one rotation for {len(self._rotations)} layer pairs"
        elif self._shared is not None:
            aligner, words = self._on_shared(pair), "one ridge map for all layer pairs, and a projection of low rank"
        else:
            aligner = self._closed[pair.key][""]
        figures, _ = self._judge.scores(pair, self._direction.pairs, VALIDATION, {"map": aligner})["map"]
        r2 = (figures or {}).get("r2")
        loss = 1 - float(r2 if r2 is not None else "nan")
        self._reporting.epoch(pair, Epoch(0, None, loss, figures or {}, 0.0, 0.0))
        return Candidate(aligner, words, self._closed_form())

    def _on_shared(self, pair: LayerPair) -> Aligner:
        if self._shared is None:
            raise ValueError("no map is shared")
        return fit_low_rank_on(
            self._shared.of(pair.key), pair, self._moments[pair.key], self._settings.loop.rank, solver=self._solver
        )

    def _optimum(self, pair: LayerPair) -> tuple[Fit, Aligner, str]:
        """What a trained map is judged by: a fit like it, its closed-form optimum and that one's name."""
        settings, loop, moments = self._settings, self._settings.loop, self._moments[pair.key]
        if self._shared is not None:
            name = f"reduced-rank {loop.rank} on a shared {loop.skip}"
            return Fit("reduced-rank", rank=loop.rank, skip=loop.skip), self._on_shared(pair), name
        if settings.type == "lora":
            fit, name = Fit("reduced-rank", rank=loop.rank, skip=loop.skip), f"reduced-rank {loop.rank} on {loop.skip}"
        else:
            # No closed form knows what a hidden layer can do; it has to beat the best affine map to be worth having.
            kind = "affine" if settings.type == "mlp" else settings.type
            fit, name = Fit(kind), f"{kind} ridge"
        return fit, self._solver.fit(fit, pair, moments), name

    def _trained(self, pair: LayerPair) -> Candidate:
        # Only here: torch takes two seconds to import, and a closed form needs none of it.
        from align.training.loop import train_map

        job, settings, loop = self._job, self._settings, self._settings.loop
        told, pairs = self._reporting, self._direction.pairs
        sides = (pairs.where(pairs.split == split) for split in (TRAIN, VALIDATION))
        train, val = (batches_of(job.store, pair, side, settings.memory) for side in sides)
        maps: list[Aligner] = []

        def on_epoch(epoch: Epoch) -> None:
            told.epoch(pair, epoch, maps.pop() if maps else None)

        with progress(f"train {pair.key}", len(train) * loop.epochs, "pairs", quiet=told.quiet) as tick:
            done = train_map(
                settings.type,
                pair,
                self._moments[pair.key],
                train,
                val,
                loop,
                skip=None if self._shared is None else self._shared.of(pair.key),
                on_map=maps.append,
                on_epoch=on_epoch,
                on_step=lambda event: told.step(pair, event),
                tick=tick,
                checkpoint=told.files.checkpoint(pair),
                resume=told.resume,
                store=job.store.fingerprint,
            )
        told.stop(pair, epoch=done.last_epoch, best_epoch=done.best_epoch, reason=done.reason)
        like, optimum, name = self._optimum(pair)
        training = Training(done.best_epoch, done.last_epoch, loop.epochs)
        # Of several processes the others are told of no epoch, and judge nothing.
        parts = told.files.last_epoch(pair)["train_parts"] if told.files.writes else {}
        return Candidate(done.aligner, done.reason, like, (optimum, name), training, parts)
