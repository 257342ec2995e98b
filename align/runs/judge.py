"""Evaluation of a fitted map: its figures on every split, its baselines, intervals and warnings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.closed_form.fit import Fit, Solver, unfitted_baselines
from align.closed_form.partners import validation_r2
from align.closed_form.scaling import Unscaled, unscaled
from align.judging.findings import Finding
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.metrics import TOKEN, DocumentSums, Figures, Reasons, add_intervals, add_partial
from align.metrics.scorer import Truth
from align.moments.scan import Scan, limit_rows, read_split, sites_of
from align.moments.scatter import Array
from align.runs.facts import Gram, Intercept, Site, Training, gram_facts
from align.runs.findings import findings
from align.runs.job import Data, Direction
from align.scoring.moments import NEEDS_ROWS, score_moments
from align.scoring.rows import CKA_ROWS, TRAIN_CKA_ROWS, TRAIN_ROWS, batches_of, score_all
from align.tokens.table import TokenTable, TokenTables
from featstore.store.moments.stored import has_rows
from featstore.store.read.pairs import Pairs
from featstore.text.splits import TEST, TRAIN, VALIDATION

#: Controls that are the same whatever is fitted.
UNCHANGED = ("mean", "identity", "random_rotation", TOKEN)


@dataclass(frozen=True)
class Candidate:
    """A map to be judged.

    Attributes:
        aligner: The map.
        words: How it came about.
        like: What the shuffled control is fitted as.
        optimum: The best that maps of its kind can do, and its name; None for a map that is that optimum.
        training: How training ended; None for a closed form.
        parts: Components of the last epoch's train loss; empty for a closed form.
        rotation: float64, the rotation without a factor that the map is, or is added to; None where there is none.
        val: Its figures on the validation rows, where they are known already.
    """

    aligner: Aligner
    words: str
    like: Fit
    optimum: tuple[Aligner, str] | None = None
    training: Training | None = None
    parts: Mapping[str, float] | None = None
    rotation: Array | None = None
    val: tuple[Figures | None, Reasons] | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """All that judging a map needs of its layer pair's moments, which can then go.

    Attributes:
        controls: Maps that the result is shown beside, by name, or the reason why there is none.
        n_train: Train pairs.
        control: How partners were taken away for the shuffled control.
        gram: Facts of the source's Gram matrix.
        unscaled: What a factor would do to the map's rotation, where that has none.
        intercept: What one would do to the map, where it has none.
    """

    controls: dict[str, Aligner | str]
    n_train: int
    control: str
    gram: Gram
    unscaled: Unscaled | None
    intercept: Intercept | None


class Controls:
    """Scores of the maps that every result is shown beside and that no type of map changes.

    Runs over the same rows, with the same seed, share them (:func:`align.runs.together.train_together`).

    Args:
        several: Whether there are other runs than one: then what true rows alone give is kept for them, too.
    """

    def __init__(self, *, several: bool = False) -> None:
        self._several = several
        self._truths: dict[tuple[str, int, int], Truth] = {}
        self._maps: dict[str, dict[str, Aligner | str]] = {}
        self._found: dict[str, tuple[dict[str, tuple[Figures | None, Reasons]], DocumentSums | None]] = {}

    def maps(self, pair: LayerPair, make: Callable[[], dict[str, Aligner | str]]) -> dict[str, Aligner | str]:
        """The maps themselves, made for the first run.

        Args:
            pair: Which layers.
            make: Makes them.
        """
        if pair.key not in self._maps:
            # Those of other pairs have been scored.
            self._maps = {pair.key: make()}
        return self._maps[pair.key]

    def truth(self, pair: LayerPair, split: int, rows: int) -> Truth | None:
        """What the true rows of one layer pair's selection give; None for a run that is alone.

        Args:
            pair: Which layers.
            split: Which split the rows are of.
            rows: How many; of equally many, selections of a run are the same.
        """
        if not self._several:
            return None
        if any(key != pair.key for key, _, _ in self._truths):
            # Those of other pairs have been scored, and are as large as the rows.
            self._truths = {}
        return self._truths.setdefault((pair.key, split, rows), Truth())

    def solved(self) -> None:
        """All maps of a layer pair have been made: nobody asks for its validation rows any more."""
        self._truths = {key: truth for key, truth in self._truths.items() if key[1] != VALIDATION}

    def known(self, pair: LayerPair) -> tuple[dict[str, tuple[Figures | None, Reasons]], DocumentSums | None]:
        """By name the figures on the test rows and the reasons of those that are null; and sums over documents.

        Args:
            pair: Which layers.
        """
        scores, sums = self._found.get(pair.key, ({}, None))
        return {
            name: (None if figures is None else dict(figures), dict(why)) for name, (figures, why) in scores.items()
        }, sums

    def keep(
        self, pair: LayerPair, scores: Mapping[str, tuple[Figures | None, Reasons]], sums: DocumentSums | None
    ) -> None:
        """Keep the scores of one run's controls for the others.

        Args:
            pair: Which layers.
            scores: Of any maps; those that a type of map changes are left out.
            sums: Over documents.
        """
        own = {name: scores[name] for name in UNCHANGED if name in scores}
        copies = {name: (None if figures is None else dict(figures), dict(why)) for name, (figures, why) in own.items()}
        self._found[pair.key] = copies, sums


class Judge:
    """Scores the maps of one direction.

    Args:
        data: Where rows come from.
        direction: Which models, pairs and moments.
        solver: For the controls; it knows the sources that were fitted.
        seed: Of samples, controls and intervals.
        isometric: Whether no map of the run can change debiased CKA.
        centred: Whether the run's maps subtract the train means.
        tables: Baselines from the source's token alone, one for each target layer.
        controls: What other runs over the same rows have scored already, and will.
    """

    def __init__(
        self,
        data: Data,
        direction: Direction,
        solver: Solver,
        *,
        seed: int,
        isometric: bool,
        centred: bool,
        tables: TokenTables,
        controls: Controls | None = None,
    ) -> None:
        self._controls = controls or Controls()
        self._data, self._direction, self._solver, self._tables = data, direction, solver, tables
        self._seed, self._isometric, self._centred = seed, isometric, centred

    def prepare(self, pair: LayerPair, moments: Scan, candidate: Candidate) -> Prepared:
        """Fit the controls, and find out what the moments say about a map.

        Args:
            pair: Which layers.
            moments: Of this pair.
            candidate: Its map.
        """
        solver = self._solver
        unfitted = self._controls.maps(pair, lambda: unfitted_baselines(pair, moments, self._seed, solver))
        shuffled = solver.fit(candidate.like, pair, moments.without_partners)
        return Prepared(
            controls={**unfitted, "shuffled": shuffled},
            n_train=moments.train.n,
            control=moments.control,
            gram=gram_facts(solver.gram_values(pair, moments), moments.train.n),
            unscaled=None if candidate.rotation is None else unscaled(candidate.rotation, moments),
            intercept=self._intercept(pair, candidate.aligner, moments),
        )

    def entry(self, pair: LayerPair, candidate: Candidate, known: Prepared) -> tuple[dict[str, Any], dict[str, Any]]:
        """A layer pair's part of ``metrics.json`` and of ``documents.json``.

        Args:
            pair: Which layers.
            candidate: Its map.
            known: From :meth:`prepare`.
        """
        pairs, controls = self._direction.pairs, known.controls
        maps: dict[str, Aligner | TokenTable | str] = {"map": candidate.aligner, **controls}
        maps[TOKEN], facts = self.token(pair)
        maps["closed_form"] = candidate.optimum[0] if candidate.optimum else "this is a closed form"
        entry: dict[str, Any] = {"fit": candidate.words, "reasons": {}, "baselines": {}, TOKEN: facts}
        limit = TRAIN_ROWS if self._has_rows(pair) else None
        for name, split in (("train", TRAIN), ("val", VALIDATION)):
            part = pairs.where(pairs.split == split)
            some = limit_rows(part, limit, self._seed)
            if name == "val" and some is part and candidate.val is not None:
                figures, reasons = candidate.val
                entry[name] = None if figures is None else dict(figures)
            else:
                entry[name], reasons = self.scores(pair, some, split, {"map": candidate.aligner})["map"]
            entry["reasons"] |= {f"{name}.{key}": reason for key, reason in reasons.items()}
        scored, sums = self._test_scores(pair, maps)
        masked = scored["map"]
        masked = None if masked[0] is None else dict(masked[0]), masked[1]
        for name, (figures, reasons) in scored.items():
            place = "test" if name == "map" else f"baselines.{name}"
            entry["reasons"] |= {
                place if figures is None else f"{place}.{key}": reason for key, reason in reasons.items()
            }
            if name == "map":
                entry["test"] = figures
            else:
                entry["baselines"][name] = figures
        if candidate.optimum is not None:
            entry["baselines"]["closed_form"]["name"] = candidate.optimum[1]
        if (control := entry["baselines"].get("shuffled")) is not None:
            control["name"] = known.control
        add_intervals(entry, NEEDS_ROWS if sums is None else sums)
        add_partial(entry, NEEDS_ROWS if sums is None else sums)
        entry["by_role"] = self._direction.by_role
        entry["by_mask"] = self._by_mask(pair, candidate.aligner, entry["reasons"], masked[0])
        entry["cka"] = self._cka(pair, entry, controls)
        entry["warnings"] = self.warnings(
            pair,
            entry,
            known.n_train,
            candidate.parts or {},
            known.gram,
            lam=candidate.aligner.options.get("lambda"),
            training=candidate.training,
            unscaled=known.unscaled,
            intercept=known.intercept,
        )
        return entry, {} if sums is None else sums.block()

    def token(self, pair: LayerPair) -> tuple[TokenTable | str, dict[str, Any] | None]:
        """The baseline from the source's token alone, or why there is none; and how it was fitted.

        Args:
            pair: Which layers.
        """
        # Where the source has no rows there is no document sum to compare it by.
        table = self._tables.of(self._direction.pairs, pair.target_layer) if self._has_rows(pair) else NEEDS_ROWS
        return table, table.facts if isinstance(table, TokenTable) else None

    def scores(
        self,
        pair: LayerPair,
        pairs: Pairs,
        split: int,
        maps: Mapping[str, Aligner | TokenTable | str],
        *,
        documents: DocumentSums | None = None,
    ) -> dict[str, tuple[Figures | None, Reasons]]:
        """Scores on a split: from its rows, or, in a store without any, what its moments can say.

        Args:
            pair: Which layers.
            pairs: Any selection; those of the split are scored.
            split: 0 train, 1 validation, 2 test.
            maps: By name, or the reason why there is none.
            documents: Takes squared errors by document as well.
        """
        if self._direction.stored is not None and not self._has_rows(pair):
            rowless = {name: NEEDS_ROWS if isinstance(one, TokenTable) else one for name, one in maps.items()}
            return score_moments(read_split(self._direction.stored, pair, split), rowless)
        some = pairs.where(pairs.split == split)
        rows = batches_of(self._data.store, pair, some, self._data.memory)
        cka_rows = TRAIN_CKA_ROWS if split == TRAIN else CKA_ROWS
        truth = self._controls.truth(pair, split, len(some))
        return score_all(rows, maps, seed=self._seed, documents=documents, cka_rows=cka_rows, truth=truth)

    def warnings(
        self,
        pair: LayerPair,
        entry: Mapping[str, Any],
        n_train: int,
        parts: Mapping[str, float],
        gram: Gram | None,
        *,
        lam: float | None = None,
        training: Training | None = None,
        unscaled: Unscaled | None = None,
        intercept: Intercept | None = None,
    ) -> list[Finding]:
        """Warnings about a layer pair.

        Args:
            pair: Which layers.
            entry: Its part of ``metrics.json`` so far.
            n_train: Train pairs.
            parts: Components of the last epoch's train loss.
            gram: Facts of the source's Gram matrix.
            lam: Relative ridge strength, where one was chosen.
            training: How training ended, where there was any.
            unscaled: What a factor would do to the map's rotation, where that has none.
            intercept: What one would do to the map, where it has none.
        """
        store = self._data.store
        sites = [
            Site(model, layer, store.model(model).depth, store.attributes.get("site_convention"))
            for model, layer in sites_of(pair)
        ]
        return findings(
            entry=entry,
            parts=parts,
            n_train=n_train,
            width=sum(store.model(pair.source).width for _ in pair.source_layers),
            coverage=self._direction.everything.coverage,
            keep_sinks=self._data.keep_sinks,
            gram=gram,
            sites=sites,
            lam=lam,
            training=training,
            unscaled=unscaled,
            intercept=intercept,
            documents=self._test_documents(),
            pair=pair.key,
        )

    def _intercept(self, pair: LayerPair, aligner: Aligner, moments: Scan) -> Intercept | None:
        """What an intercept would do to a map that has none, on the validation rows."""
        if self._centred:
            return None
        best = self._solver.fit(Fit("affine"), pair, moments)
        return Intercept(*(validation_r2(each, moments.val) for each in (aligner, best)))

    def _test_documents(self) -> int:
        pairs = self._direction.pairs
        return len(np.unique(pairs.document[pairs.split == TEST]))

    def _cka(self, pair: LayerPair, entry: Mapping[str, Any], controls: Mapping[str, Aligner | str]) -> dict[str, Any]:
        """Debiased CKA of the test rows before the map and after it; no rotation changes it."""
        after = entry["test"].get("cka_debiased")
        # CKA does not know a rotation: the random one shows the states as they are, whatever their widths.
        wider = len(pair.source_layers) == 1 and not self._shrinks(controls["random_rotation"])
        before = (entry["baselines"]["random_rotation"] or {}).get("cka_debiased") if wider else None
        return {"before": before, "after": after, "invariant": self._isometric and wider}

    @staticmethod
    def _shrinks(rotation: Aligner | str) -> bool:
        return isinstance(rotation, Aligner) and rotation.widths[0] > rotation.widths[1]

    def _test_scores(
        self, pair: LayerPair, maps: Mapping[str, Aligner | TokenTable | str]
    ) -> tuple[dict[str, tuple[Figures | None, Reasons]], DocumentSums | None]:
        """Scores of all maps on the test rows, those of controls made only once; and sums over documents."""
        known, known_sums = self._controls.known(pair)
        sums = DocumentSums() if self._has_rows(pair) else None
        wanted = {name: one for name, one in maps.items() if name not in known}
        scored = {**known, **self.scores(pair, self._direction.pairs, TEST, wanted, documents=sums)}
        if sums is not None and known_sums is not None:
            sums = sums.with_maps_of(known_sums, list(maps))
        elif not known:
            self._controls.keep(pair, scored, sums)
        return {name: scored[name] for name in maps}, sums

    def _by_mask(self, pair: LayerPair, aligner: Aligner, reasons: Reasons, scored: Figures | None) -> dict[str, Any]:
        """Test figures with the attention sinks masked and with them left in, whichever the run was asked for.

        ``scored`` are those of the run's own test rows, which are one of the two, or both where there is no sink.
        """
        blocks: dict[str, Any] = {}
        tested = self._direction.pairs.where(self._direction.pairs.split == TEST)
        for name, keep in (("masked", False), ("kept", True)):
            if keep and not self._has_rows(pair):
                blocks[name], reasons["by_mask.kept"] = None, NEEDS_ROWS
                continue
            part = self._direction.everything.select(keep_sinks=keep)
            part = part.where(part.split == TEST)
            # Of equally many rows, where one selection holds the other, both are the same.
            if len(part) == len(tested):
                blocks[name] = None if scored is None else dict(scored)
            else:
                blocks[name], _ = self.scores(pair, part, TEST, {"map": aligner})["map"]
        return blocks

    def _has_rows(self, pair: LayerPair) -> bool:
        return all(has_rows(self._data.store, *site) for site in sites_of(pair))
