"""A run from a store to a directory: every layer pair is fitted or trained and scored beside its baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.closed_form.fit import Solver
from align.closed_form.partners import best_partners
from align.judging.sentences import described
from align.judging.table import JUDGED
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.metrics import TOKEN
from align.moments.scan import Scan, groups_within, roles_selected, scan, sites_of, stored_scan
from align.runs.candidates import EpochEvaluation, Maker, Reporting
from align.runs.job import Direction, Job, resolve
from align.runs.judge import Candidate, Controls, Judge, Prepared
from align.runs.plan import Sharing
from align.runs.rundir import RunDirectory, check_free, default_directory
from align.settings import Settings
from align.tokens.table import TokenTable, TokenTables
from align.training.plan import Placement
from featstore.errors import MissingPackageError, SpecError
from featstore.runtime.console import check_directory, err, progress
from featstore.runtime.processes import Ranks
from featstore.runtime.sheets import NONE, number, with_interval
from featstore.store.moments.stored import MEMORY, has_rows
from featstore.text.splits import TEST

if TYPE_CHECKING:
    from align.training.tracking import Tracker

#: Under this name a package offers what `--eval-models` runs after every epoch.
EPOCH_EVALUATION = "align.epoch_evaluation"


def train(settings: Settings, out: Path | None = None, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Carry out a run. Of several processes all compute, and the first one writes.

    Args:
        settings: Configuration of the run.
        out: Run directory; must not hold another run. None for the default.
        resume: Whether to resume the interrupted run in that directory.
        quiet: Whether to show no progress.

    Returns:
        What ``metrics.json`` holds, and the directory as ``run``.

    Raises:
        FeatstoreError: Anything wrong with the store, the models, the layers or the fit.
    """
    if out is not None:
        check_directory(out)
        check_free(out, resume=resume)
    job = resolve(settings)
    first = Ranks.from_environment().first
    if job.map.windows is not None and Ranks.from_environment().world > 1:
        raise SpecError(f"--type {job.map.type.name} trains on one process; start it without a launcher")
    if out is None:
        out = default_directory(settings, job.directions[0].source, job.directions[0].target)
        check_directory(out)
    quiet = quiet or not first
    with _tracking(job, settings, out) as tracker:
        files = RunDirectory(out, settings, resume=resume, writes=first)
        tables = token_tables(job)
        models = _epoch_evaluation(job, tables, quiet=quiet) if settings.eval_models else None
        run = Run(job, Reporting(files, tracker, models, resume, quiet), tables)
        carry_out([run])
        if run.failure is not None:
            raise run.failure
        return {"run": str(out), **run.finish()}


@contextmanager
def _tracking(job: Job, settings: Settings, out: Path) -> Iterator[Tracker | None]:
    """External logging, for training alone: a closed form has one figure, and does without torch."""
    if job.map.training is None and job.map.windows is None:
        yield None
        return
    from align.training.tracking import tracking

    place = Placement(job.device, settings.loop.precision)
    with tracking(settings.loop.tracker, place, out, asdict(settings)) as tracker:
        yield tracker


def token_tables(job: Job) -> TokenTables:
    """The baselines from the source's token alone, one for each target layer.

    Args:
        job: Of a run.
    """
    targets = {(d.source, d.target, pair.target_layer) for d in job.directions for pair in d.wanted}
    return TokenTables(job.data.store, len(targets))


def _epoch_evaluation(job: Job, tables: TokenTables, *, quiet: bool) -> EpochEvaluation:
    """Whoever can say what a map does to the models; this room knows none."""
    found = list(entry_points(group=EPOCH_EVALUATION))
    if not found:
        raise MissingPackageError(
            f"--eval-models: nothing is installed under the entry points {EPOCH_EVALUATION}; install this project "
            "again (pip install -e .), or leave the option out and use `evaluate stitch` afterwards"
        )
    evaluation = found[0].load()
    ways = {(d.source, d.target): d.pairs for d in job.directions}

    def token(pair: LayerPair) -> TokenTable | str:
        return tables.of(ways[pair.source, pair.target], pair.target_layer)

    made: EpochEvaluation = evaluation(
        job.data.store, job.card(), token=token, device=job.device, seed=job.seed, quiet=quiet
    )
    return made


def carry_out(runs: Sequence[Run]) -> None:
    """Make and judge all maps of some runs over the same rows; a run that fails drops out and says why.

    Args:
        runs: One, or several that :func:`share` allows.
    """
    for place in range(len(runs[0].job.directions)):
        going = [run for run in runs if run.failure is None]
        for run in going:
            with run.guarded():
                run.begin(run.job.directions[place])
        going = [run for run in going if run.failure is None]
        if not going:
            return
        # All have the same layer pairs, or there is only one.
        first, wanted = going[0], going[0].wanted
        try:
            # Before there are any sums: both take memory for matrices of the layers' width.
            first.fit_tables()
            for moments in first.scans():
                _group(going, [pair for pair in wanted if pair.key in moments], moments)
                # The sums of a group can take all the memory allowed: they go before those of the next are made.
                moments.clear()
                if all(run.failure is not None for run in going):
                    break
        except Exception as error:  # noqa: BLE001 - raised again by whoever asked for the run
            for run in going:
                run.failure = run.failure or error


def _group(runs: Sequence[Run], wanted: list[LayerPair], moments: dict[str, Scan]) -> None:
    solver, controls = Solver(runs[0].device), Controls(several=len(runs) > 1)
    for run in runs:
        with run.guarded():
            run.ready(wanted, moments, solver, controls, alone=len(runs) == 1)
    for place, pair in enumerate(wanted):
        # Maps first: those of one layer pair share what is known of it, and the controls are of other moments. A
        # rotation, which has no use for the source's eigenvectors, comes last: then its eigenvalues are known.
        for run in sorted(runs, key=lambda run: run.job.map.isometric):
            with run.guarded():
                run.solve(pair)
        controls.solved()
        for run in runs:
            with run.guarded():
                run.prepare(pair, moments[pair.key])
        # Of wide layers sums are large, and scores take memory of their own.
        del moments[pair.key]
        if not any(pair.source_layers == other.source_layers for other in wanted[place + 1 :]):
            solver.forget()
        for run in runs:
            with run.guarded():
                run.judge(pair)


class Run:
    """Makes and evaluates the maps of a run, one direction after the other."""

    def __init__(self, job: Job, reporting: Reporting, tables: TokenTables) -> None:
        self.job, self.reporting, self.tables = job, reporting, tables
        # Of several processes each has a GPU of its own.
        self.device = Ranks.from_environment().device(job.device)
        self.failure: Exception | None = None
        self.wanted: list[LayerPair] = []
        self.aligners: list[Aligner] = []
        self.entries: dict[str, Any] = {}
        self.documents: dict[str, Any] = {}
        self.partners: list[dict[str, Any]] = []
        self._candidate: Candidate | None = None
        self._prepared: Prepared | None = None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A run that fails is out of it, and the others go on."""
        if self.failure is not None:
            # A context manager cannot leave its block out; every step of a run that failed does nothing.
            yield
            return
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again by whoever asked for the run
            self.failure = error

    def begin(self, direction: Direction) -> None:
        """Go over to a direction: choose its layer pairs."""
        self._direction = direction
        direction.pairs.where(direction.pairs.split == TEST).need(1, "testing")
        roles, models = self.job.data.roles, (direction.source, direction.target)
        if roles is not None and not self.reporting.quiet:
            err.print(roles_selected(self.job.data.store, models, roles, len(direction.pairs)))
        self.wanted = self._choose(direction) if self.job.choose else direction.wanted

    def fit_tables(self) -> None:
        """Fit the baselines from the source's token alone, as far as they will be asked for."""
        store, direction = self.job.data.store, self._direction
        for pair in self.wanted:
            if all(has_rows(store, *site) for site in sites_of(pair)):
                self.tables.of(direction.pairs, pair.target_layer)

    def ready(
        self, wanted: list[LayerPair], moments: dict[str, Scan], solver: Solver, controls: Controls, *, alone: bool
    ) -> None:
        """Get ready for some layer pairs."""
        if self.failure is not None:
            return
        plan, data, direction, reporting = self.job.map, self.job.data, self._direction, self.reporting
        self._judge = judge = Judge(
            data,
            direction,
            solver,
            seed=self.job.seed,
            isometric=plan.isometric,
            centred=plan.type.centred,
            tables=self.tables,
            controls=controls,
        )
        self._maker = None
        if plan.windows is None:
            self._maker = Maker(
                plan, data, direction, wanted, moments, solver, judge, reporting, device=self.device, alone=alone
            )

    def solve(self, pair: LayerPair) -> None:
        """Make the map of a layer pair."""
        if self.failure is not None:
            return
        self._announce(pair)
        self._candidate = None if self._maker is None else self._maker.candidate(pair)

    def prepare(self, pair: LayerPair, moments: Scan) -> None:
        """Fit its controls, and find out what its moments say; of a compress map everything, at once."""
        self._prepared = None
        if self.failure is not None or not self.reporting.files.writes:
            return
        plan = self.job.map
        if plan.windows is not None:
            from align.runs.compressed import compress

            direction, data = self._direction, self.job.data
            self._keep(pair, *compress(plan, plan.windows, data, direction, pair, moments, self._judge, self.reporting))
        elif self._candidate is not None:
            self._prepared = self._judge.prepare(pair, moments, self._candidate)

    def judge(self, pair: LayerPair) -> None:
        """Judge it, and keep both."""
        candidate, prepared = self._candidate, self._prepared
        self._candidate = self._prepared = None
        if self.failure is None and candidate is not None and prepared is not None:
            self._keep(pair, candidate.aligner, *self._judge.entry(pair, candidate, prepared))

    def finish(self) -> dict[str, Any]:
        """Write the run's files, and return what ``metrics.json`` holds."""
        roles = self.job.data.roles
        result: dict[str, Any] = {"type": self.job.map.type.name, "pairs": self.entries}
        result |= {"roles": None if roles is None else list(roles), "judged": JUDGED}
        if self.partners:
            result["layer_map"] = self.partners
        card = self.job.card()
        if self.job.map.sharing is not None:
            card["shared"] = self._shared_parameters(self.job.map.sharing)
        self.reporting.files.finish(result, {"pairs": self.documents}, self.aligners, card, self.tables.fitted)
        return result

    def _announce(self, pair: LayerPair) -> None:
        if not self.reporting.quiet:
            err.print(f"{self.job.map.type.name} {pair.key}")

    def _keep(self, pair: LayerPair, aligner: Aligner, entry: dict[str, Any], documents: dict[str, Any]) -> None:
        self.aligners.append(aligner)
        self.entries[pair.key], self.documents[pair.key] = entry, documents

    def _choose(self, direction: Direction) -> list[LayerPair]:
        """The best partner of every source layer, by validation R2 of the closed form."""
        wanted = direction.wanted
        used = int((direction.pairs.split != TEST).sum())
        with progress(
            f"partners {direction.source}->{direction.target}", used, "pairs", quiet=self.reporting.quiet
        ) as tick:
            chosen, table = best_partners(
                self.job.data.store,
                direction.pairs,
                direction.source,
                direction.target,
                list(dict.fromkeys(pair.source_layer for pair in wanted)),
                list(dict.fromkeys(pair.target_layer for pair in wanted)),
                self.job.map.partners,
                stored=direction.stored,
                seed=self.job.seed,
                device=self.device,
                tick=tick,
            )
        self.partners.append({"source": direction.source, "target": direction.target, **table})
        return chosen

    def scans(self) -> Iterator[dict[str, Scan]]:
        """The moments of all layer pairs, at once if their sums fit into memory; a shared map needs them at once."""
        direction, wanted = self._direction, self.wanted
        seed, pairs, store = self.job.seed, direction.pairs, self.job.data.store
        if direction.stored is not None:
            yield stored_scan(direction.stored, wanted, seed=seed)
            return
        # Alongside are runs that need the same (align.runs.together.share).
        target_gram = self.job.map.fit.components is not None
        used, label = int((pairs.split != TEST).sum()), f"scan {direction.source}->{direction.target}"
        memory = MEMORY if self.job.map.sharing is None else None
        for group in groups_within(store, wanted, memory, target_gram=target_gram):
            with progress(label, used, "pairs", quiet=self.reporting.quiet) as tick:
                moments = scan(store, pairs, group, seed=seed, device=self.device, target_gram=target_gram, tick=tick)
            yield moments

    def _shared_parameters(self, sharing: Sharing) -> dict[str, int]:
        """What the run's maps ship together: the map they share counts once for each direction."""
        shared = {(a.pair.source, a.pair.target): a.widths[0] * a.widths[1] for a in self.aligners}
        # Beside its means a layer has a factor, and where it adds to the shared map the two sides of a projection.
        own = sum(sum(a.widths) + (0 if sharing.whole else sharing.rank * sum(a.widths)) + 1 for a in self.aligners)
        return {"shipped": sum(shared.values()) + own}


_HEADS = ("beyond [95 %]", "R2", "token", "median", "cos_c", "top-1", "chance", "same", "chance", "+sinks")
_LEGEND = (
    "beyond: partial R2, what the map explains of the error that a prediction from the source's token alone (token) "
    "leaves; same: top-1 among states of the same token"
)
#: Baselines that are no controls: what the token alone does and what can be done at best stand in their own places.
_NO_CONTROLS = (TOKEN, "closed_form")


def describe(result: dict[str, Any]) -> str:
    """A run's test figures as a table for people.

    Args:
        result: From :func:`train`.
    """
    said = [_said(entry) for entry in result["pairs"].values()]
    everywhere = [words for words in said[0] if all(words in each for each in said)] if len(said) > 1 else []
    lines = [f"{'pair':28} {_line(_HEADS)}   best control R2"]
    for key, entry in result["pairs"].items():
        lines.append(f"{key:28} {_line(_figures(entry))}   {_best_control(entry)}")
        closed = entry["baselines"].get("closed_form")
        if closed:
            lines.append(f"{'':28} {'':22} {closed['r2']:7.3f} is the optimum of {closed['name']}")
        if result.get("roles") is not None:
            rows = (f"{role} ({of['train']} train, {of['test']} test)" for role, of in entry["by_role"].items())
            lines.append(f"  only rows of the roles {', '.join(rows)}")
        lines += [f"  {said}" for said in _said(entry) if said not in everywhere]
    lines += [f"all pairs: {said}" for said in everywhere]
    return "\n".join([*lines, _LEGEND, f"run: {result['run']}"])


def _said(entry: Mapping[str, Any]) -> list[str]:
    return [described(found, "pair") for found in entry["warnings"]]


def _line(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{7 if place else 22}}" for place, cell in enumerate(cells))


def _figures(entry: dict[str, Any]) -> list[str]:
    test, token = entry["test"], entry["baselines"].get(TOKEN) or {}
    kept = entry["by_mask"]["kept"] or {}
    values = [test.get("r2"), token.get("r2")]
    values += [test.get(name) for name in ("r2_median_dim", "cosine_centered", "retrieval_top1", "retrieval_chance")]
    values += [test.get(f"retrieval_same_token_{name}") for name in ("top1", "chance")]
    values.append(kept.get("r2"))
    beyond = with_interval(test.get("partial_r2"), test.get("partial_r2_ci95"))
    return [cell.replace(NONE, "-") for cell in (beyond, *(number(value) for value in values))]


def _best_control(entry: dict[str, Any]) -> str:
    controls = {
        name: figures["r2"]
        for name, figures in entry["baselines"].items()
        if name not in _NO_CONTROLS and figures and figures.get("r2") is not None
    }
    best = max(controls, key=lambda name: controls[name])
    return f"{best} {controls[best]:.3f}"
