"""All layers of two models against each other and within each: what `align cka` finds, floors and sinks beside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from align.execution.executor import Executor
from align.metrics import debiased_cka
from align.moments.scan import need_rows, roles_selected, usable_moments
from align.moments.scatter import centered, merge
from align.scoring.moments import NEEDS_ROWS, layer_similarity
from align.similarity.by_document import main_figure
from align.similarity.findings import judged
from align.similarity.floors.exchange import PERMUTATIONS, affordable, floors
from align.similarity.measures.base import Measure, resampling
from align.similarity.measures.kernel_cka import Cka, RbfCka
from align.similarity.sample import MAX_ROWS, Layers, Sample, affordable_rows, draw, read_rows
from align.similarity.scan.checkpoint import discard
from align.similarity.scan.planning import MEMORY, Selection, Site, plan
from align.similarity.scan.streaming import BATCH, stream
from align.similarity.scan.terms import check_estimator, effective_rank, similarity
from align.similarity.tables import Twice, compare
from align.solvers.row_effects import in_order
from featstore.errors import PairingError, SpecError
from featstore.models.fingerprint import Weights
from featstore.runtime.console import err, progress
from featstore.store import open_store
from featstore.store.moments.stored import SPLITS, StoredMoments, has_rows
from featstore.store.read.pairs import Pairs
from featstore.text.roles import role_names

Kernel = Literal["linear", "rbf"]
KERNELS = ("linear", "rbf")
#: Resamples of documents behind an interval.
DRAWS = 1000
#: Where the state of a scan lies, by whether sinks are in.
_PARTS = {False: "masked", True: "with-sinks"}
#: Rows of the floor of linear CKA: of unrelated rows more say the same.
_NULL_ROWS = 4096
#: What is said where documents are asked of a store that cannot tell them apart.
MOMENTS_KNOW_NO_DOCUMENTS = (
    "the store holds moments alone, sums in which documents cannot be told apart: the figures are of --estimator "
    "debiased-rows, which few documents raise; extract rows for debiased"
)


class Comparison:
    """A comparison of the layers of two models, or of one with itself.

    Args:
        path: The store.
        models: Two model names; equal for one model alone.
        layers: Layers by model.
        estimator: ``debiased`` (over pairs of rows of different documents), ``debiased-rows`` (of different rows),
            ``biased`` or ``minibatch``. A store that holds moments alone, which know no documents, answers ``debiased``
            with ``debiased-rows`` and says so.
        correct_features: Take the dimensions for a sample of a larger population of features
            (:func:`align.metrics.debiased_cka`); of ``debiased`` with the linear kernel, over rows. Floors and measures
            do without.
        kernel: ``linear``, over all rows; or ``rbf``, over a sample.
        policy: Pair policy.
        keep_sinks: Whether the main figures include attention sinks.
        roles: Roles of the rows, as :func:`featstore.text.roles.parse_roles` takes them; None for all.
        measures: Others, over a sample of rows.
        max_rows: Rows of the sample at most.
        draws: Resamples of documents behind each interval.
        permutations: Exchanges of partners behind each floor; 0 for no floors.
        memory: Bytes for the scan, and for the sample.
        checkpoint: Directory of the scan's state; None to keep none.
        device: Where RBF kernels are made, a torch device.
        seed: Of the sample, the floors and the draws.
        quiet: No progress.

    Raises:
        SpecError: Unknown estimator or kernel, or fewer than no permutations.
        StoreStateError: The store holds no rows, and its moments do not answer.
    """

    def __init__(
        self,
        path: Path,
        *,
        models: tuple[str, str],
        layers: Mapping[str, Sequence[int]],
        estimator: str = "debiased",
        correct_features: bool = False,
        kernel: str = "linear",
        policy: str = "end",
        keep_sinks: bool = False,
        roles: str | Iterable[str] | None = None,
        measures: Sequence[Measure] = (),
        max_rows: int = MAX_ROWS,
        draws: int = DRAWS,
        permutations: int = PERMUTATIONS,
        memory: int = MEMORY,
        checkpoint: Path | None = None,
        device: str = "cpu",
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        self.estimator = check_estimator(estimator)
        if kernel not in KERNELS:
            raise SpecError(f"--kernel {kernel!r}: choose one of {', '.join(KERNELS)}")
        if kernel == "rbf" and estimator == "minibatch":
            raise SpecError("--estimator minibatch is of the linear kernel; leave out --kernel rbf")
        if correct_features and (estimator != "debiased" or kernel != "linear"):
            raise SpecError("--correct-features is of --estimator debiased with --kernel linear; leave the others out")
        self.correct_features = correct_features
        self.path, self.models, self.layers = path, models, {name: tuple(layers[name]) for name in models}
        self.kernel, self.policy, self.keep_sinks = kernel, policy, keep_sinks
        self.roles = role_names(roles)
        self.measures, self.max_rows, self.draws, self.memory = list(measures), max_rows, draws, memory
        self.checkpoint, self.device, self.seed, self.quiet = checkpoint, device, seed, quiet
        if permutations < 0:
            raise SpecError(f"--permutations {permutations} must not be negative; 0 turns the floors off")
        self.permutations = permutations
        self.store = open_store(path)
        first, second = models
        self.everything = self.store.pairs(first, second, policy).select(keep_sinks=True, roles=self.roles)
        self.sites = [Site(first, k, source=True) for k in self.layers[first]]
        if first != second:
            self.sites += [Site(second, k, source=False) for k in self.layers[second]]
        named = [(site.model, site.layer) for site in self.sites]
        wanted = list(combinations_with_replacement(named, 2))
        self.rows = all(has_rows(self.store, *site) for site in named)
        self.stored = None
        if correct_features and not self.rows:
            need_rows(self.store, wanted, "--correct-features")
        # Moments know no documents: rows are asked wherever there are any.
        from_moments = estimator in ("debiased-rows", "biased") or (estimator == "debiased" and not self.rows)
        if from_moments and kernel == "linear":
            self.stored = usable_moments(
                self.store, models, wanted, policy=policy, keep_sinks=keep_sinks, roles=self.roles
            )
        elif not self.rows:
            need_rows(self.store, wanted, f"--estimator {estimator} with --kernel {kernel}")
        if self.measures and not self.rows:
            need_rows(self.store, wanted, f"--measures {self.measures[0].name}")
        # Wrong combinations are refused before anything is started.
        if self.stored is not None and estimator == "debiased":
            self.estimator = "debiased-rows"
            if not quiet:
                err.print(MOMENTS_KNOW_NO_DOCUMENTS)
        widths = [self.store.model(site.model).width for site in self.sites]
        if self.rows and kernel == "linear":
            documents = in_order(self.everything.document)[1] if estimator == "debiased" else None
            batch = BATCH if estimator == "minibatch" else None
            plan(widths, len(self.everything), memory=memory, batch=batch, documents=documents)
        if self.measures or kernel == "rbf":
            affordable_rows(widths, max_rows, memory)
        #: Contents of ``cka_documents.json`` after :meth:`run`; None without measures and without floors.
        self.by_document: dict[str, Any] | None = None
        self._samples: dict[tuple[bool, int], Sample] = {}

    def run(self, executor: Executor) -> dict[str, Any]:
        """Compare.

        Args:
            executor: What runs the scan.

        Returns:
            The contents of ``cka.json``, with arrays and NaN.

        Raises:
            PairingError: Fewer than four pairs.
            FeatstoreError: A row that is not finite, layers of unequal length, a scheduler or memory that gave out.
        """
        first, second = self.models
        masked = self.everything.select(keep_sinks=False)
        if self.roles is not None and not self.quiet:
            err.print(roles_selected(self.store, self.models, self.roles, len(self.everything)))
        main, ranks = self._tables(executor, keep_sinks=self.keep_sinks)
        beside, _ = self._tables(executor, keep_sinks=not self.keep_sinks)
        result = {
            "models": [first, second],
            "layers": {name: list(ks) for name, ks in self.layers.items()},
            "widths": {name: self.store.model(name).width for name in self.layers},
            "estimator": self.estimator,
            "correct_features": self.correct_features,
            "kernel": self.kernel,
            **main,
            "null": self._shuffled(),
            "permutations": self._exchanged(),
            "ci95": self._intervals(main),
            "masked_rows": len(self.everything) - len(masked),
            "keep_sinks": self.keep_sinks,
            "roles": None if self.roles is None else list(self.roles),
            "masked" if self.keep_sinks else "unmasked": beside,
            "effective_rank": ranks,
            "store": {"path": str(self.path), "fingerprint": self.store.fingerprint},
        }
        return judged({**result, **self._measured()} if self.measures else result)

    def discard(self) -> None:
        """Remove the state of the scans, when the result is written."""
        if self.checkpoint is None:
            return
        for part in _PARTS.values():
            discard(self.checkpoint / part)
        if self.checkpoint.is_dir() and not any(self.checkpoint.iterdir()):
            self.checkpoint.rmdir()

    def _pairs(self, *, keep_sinks: bool) -> Pairs:
        pairs = self.everything.select(keep_sinks=keep_sinks)
        if len(pairs) < 4:
            first, second = self.models
            raise PairingError(f"{len(pairs)} pairs of {first} and {second}: CKA needs at least 4; extract more text")
        return pairs

    def _sample(self, *, keep_sinks: bool, most: int | None = None) -> Sample:
        pairs = self._pairs(keep_sinks=keep_sinks)
        rows = min(self.max_rows if most is None else most, len(pairs))
        if (keep_sinks, rows) not in self._samples:
            # One at a time: a sample may take all the memory allowed.
            self._samples.clear()
            first, second = self.models
            ks = self.layers[first], self.layers[second]
            with progress("sample", None, "rows", quiet=self.quiet) as tick:
                self._samples[keep_sinks, rows] = draw(
                    self.store, pairs, ks, max_rows=rows, memory=self.memory, seed=self.seed, tick=tick
                )
        return self._samples[keep_sinks, rows]

    def _tables(self, executor: Executor, *, keep_sinks: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """The main matrices with sinks or without, and effective ranks."""
        pairs = self._pairs(keep_sinks=keep_sinks)
        n = len(pairs)
        ranks: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        if self.kernel == "rbf":
            values, reasons, facts = self._rbf(keep_sinks=keep_sinks)
            n = facts.pop("n")
        elif self.stored is not None and not keep_sinks:
            values, reasons = layer_similarity(self.stored, [(s.model, s.layer) for s in self.sites], self.estimator)
            ranks = _ranks(self.sites, *_ranks_of_moments(self.stored, self.sites))
        elif self.rows:
            # Workers of another process have another working directory.
            path = str(self.path.resolve()) if "://" not in str(self.path) else str(self.path)
            selection = Selection(path, self.store.fingerprint, *self.models, self.policy, keep_sinks, self.roles)
            terms = stream(
                selection,
                self.sites,
                executor=executor,
                checkpoint=None if self.checkpoint is None else self.checkpoint / _PARTS[keep_sinks],
                estimator=self.estimator,
                correct_features=self.correct_features,
                memory=self.memory,
                seed=self.seed,
                ranks=keep_sinks == self.keep_sinks,
                quiet=self.quiet,
                label="cka with sinks" if keep_sinks else "cka",
            )
            values, reasons = similarity(terms, self.estimator, correct_features=self.correct_features)
            ranks = _ranks(self.sites, terms.effective_rank, terms.participation_ratio)
            if self.estimator == "minibatch":
                facts = {"batches": terms.batches, "batch_rows": terms.batch_rows}
        else:
            values = np.full((len(self.sites), len(self.sites)), math.nan)
            reasons = dict.fromkeys(combinations_with_replacement(range(len(self.sites)), 2), NEEDS_ROWS)
        first, second = self.models
        count = len(self.layers[first])
        cross = values[:count, count:] if first != second else values
        within = {first: values[:count, :count]}
        if first != second:
            within[second] = values[count:, count:]
        names = [f"{site.model}:{site.layer}" for site in self.sites]
        undefined = {f"{names[r]} {names[c]}": why for (r, c), why in reasons.items()}
        if "documents" not in facts:
            facts |= _documents(pairs.document)
        facts["estimator"] = self.estimator
        return {"n": n, **facts, "cross": cross, "within": within, "reasons": undefined}, ranks

    def _rbf(
        self, *, keep_sinks: bool, shuffled: bool = False
    ) -> tuple[NDArray[np.float64], dict[tuple[int, int], str], dict[str, Any]]:
        """RBF CKA over the sample, on the device."""
        # Torch takes two seconds to import, and nothing else here needs it.
        import torch

        from align.kernels.api import compare_layers
        from align.kernels.reference import Estimator

        sample = self._sample(keep_sinks=keep_sinks)
        ys = [] if sample.xs is sample.ys and not shuffled else sample.ys
        if shuffled:
            order = np.random.default_rng(self.seed).permutation(sample.n)
            ys = [y[order] for y in ys]
        layers = [torch.from_numpy(rows).to(self.device) for rows in (*sample.xs, *ys)]
        biased: Estimator = "biased" if self.estimator == "biased" else "debiased"
        # Of shuffled rows nobody can say which document they are of.
        documents = sample.document if self.estimator == "debiased" and not shuffled else None
        found = compare_layers(layers, kernel="rbf", estimator=biased, documents=documents)
        reasons = {
            (r, c): found.reasons[k]
            for r, c in combinations_with_replacement(range(len(layers)), 2)
            for k in (r, c)
            if k in found.reasons
        }
        sigmas = dict(zip([f"{s.model}:{s.layer}" for s in self.sites], found.sigmas or [], strict=False))
        return found.cka(), reasons, {"n": sample.n, "sigmas": sigmas, **_documents(sample.document)}

    def _exchanged(self) -> dict[str, Any]:
        """The floors of the main figure, over a sample of rows; none in a store without rows."""
        if not self.permutations:
            return {}
        if not self.rows:
            nothing = {"rows": 0, "draws": 0, "reason": NEEDS_ROWS}
            return {"documents": nothing, "token": nothing}
        most = affordable(self.memory)
        sample = self._sample(keep_sinks=self.keep_sinks, most=most)
        measure = RbfCka() if self.kernel == "rbf" else Cka()
        with progress("floors", 100, "%", quiet=self.quiet) as tick:
            found = floors(
                measure,
                sample.xs,
                sample.ys,
                sample.rows,
                draws=self.permutations,
                most=most,
                seed=self.seed,
                alone=sample.xs is sample.ys,
                tick=lambda share: tick(100 * share),
            )
        return {name: {**floor, "of": sample.of, "estimator": "debiased"} for name, floor in found.items()}

    def _intervals(self, main: Mapping[str, Any]) -> dict[str, Any]:
        """Intervals of the main figure over the documents of the floors' sample."""
        if not self.permutations:
            return {"reason": "--permutations 0 asks for neither floors nor intervals"}
        if not self.rows:
            return {"reason": NEEDS_ROWS}
        if self.estimator != "debiased" or self.correct_features:
            which = "--correct-features" if self.correct_features else f"--estimator {self.estimator}"
            return {"reason": f"{which} has no values without each document; --estimator debiased has"}
        sample = self._sample(keep_sinks=self.keep_sinks, most=affordable(self.memory))
        first, second = self.models
        names = ([f"{first}:{k}" for k in self.layers[first]], [f"{second}:{k}" for k in self.layers[second]])
        with progress("documents left out", 100, "%", quiet=self.quiet) as tick:
            # The bandwidth of the main figure is the median distance.
            fraction = 1.0 if self.kernel == "rbf" else None
            found, documents = main_figure(sample, names, main, fraction=fraction, tick=lambda part: tick(100 * part))
        self.by_document = {"models": [first, second], "main": {"kernel": self.kernel, **documents}}
        return found

    def _shuffled(self) -> dict[str, Any]:
        """The main figure of the same states with rows shuffled: the estimator's own bias, which is no floor."""
        count = len(self.layers[self.models[0]])
        # A row in another's place is of no document: all pairs of different rows count.
        about = {"method": "shuffled pairs", "estimator": "debiased-rows", "kernel": self.kernel}
        columns = self.sites[count:] or self.sites
        if not self.rows:
            return {"cross": np.full((count, len(columns)), math.nan), "n": 0, **about, "reason": NEEDS_ROWS}
        if self.kernel == "rbf":
            values, _, facts = self._rbf(keep_sinks=self.keep_sinks, shuffled=True)
            estimator = "biased" if self.estimator == "biased" else "debiased-rows"
            return {"cross": values[:count, count:], **about, "estimator": estimator, "n": facts["n"]}
        pairs, rng = self._pairs(keep_sinks=self.keep_sinks), np.random.default_rng(self.seed)
        chosen = np.sort(rng.choice(len(pairs), min(len(pairs), _NULL_ROWS), replace=False))
        order = rng.permutation(len(chosen))
        down = self.sites[:count]
        x = [self.store.rows(s.model, s.layer)[pairs.row_source[chosen]] for s in down]
        y = [self.store.rows(s.model, s.layer)[pairs.row_target[chosen][order]] for s in columns]
        return {"cross": [[debiased_cka(one, other)[0] for other in y] for one in x], "n": len(chosen), **about}

    def _measured(self) -> dict[str, Any]:
        """The measures over the sample."""
        first, second = self.models
        sample = self._sample(keep_sinks=self.keep_sinks)
        draws = resampling(sample.document, draws=self.draws, seed=self.seed)
        names = tuple([f"{model}:{k}" for k in self.layers[model]] for model in (first, second))
        forms = tuple(str(self.store.model(model).attributes.get("format", "float32")) for model in (first, second))
        twice = self._twice(sample)
        found = {}
        for measure in self.measures:
            with progress(measure.name, 100, "%", quiet=self.quiet) as tick:
                found[measure.name] = compare(
                    measure,
                    sample,
                    (names[0], names[1]),
                    forms=(forms[0], forms[1]),
                    draws=draws,
                    twice=twice,
                    permutations=self.permutations,
                    most=affordable(self.memory),
                    seed=self.seed,
                    tick=lambda share, tick=tick: tick(100 * share),  # type: ignore[misc]
                )
        numbers, sizes = np.unique(sample.document, return_counts=True)
        self.by_document = {
            **(self.by_document or {"models": list(self.models)}),
            "documents": numbers.tolist(),
            "rows": sizes.tolist(),
            "measures": {name: block.pop("without") for name, block in found.items()},
        }
        about = {
            "rows": sample.n,
            "of": sample.of,
            "documents": len(np.unique(sample.document)),
            "draws": len(draws.counts),
            "seed": self.seed,
        }
        return {"sample": about, "measures": found}

    def _twice(self, sample: Sample) -> Twice:
        """The sample as a second reading by the same models has it, if the store holds one of both."""
        sides: list[Layers] = []
        numbers = (sample.pairs.row_source, sample.pairs.row_target)
        for model, rows, origins in zip(self.models, numbers, sample.origins, strict=True):
            again = self._read_again(model)
            if again is None:
                return (
                    f"the store holds no second reading of {model!r}; extract it with the same model under another "
                    f"name as well, such as --model {model}=REF --model {model}-again=REF"
                )
            read = zip(self.layers[model], origins, strict=True)
            sides.append([read_rows(self.store, again, k, rows, origin) for k, origin in read])
        return sides[0], sides[1]

    def _read_again(self, model: str) -> str | None:
        """Another name in the store for the same weights, which read the same tokens."""
        own = self.store.model(model)
        weights = Weights.recorded(own.attributes)
        for name in self.store.models:
            other = self.store.model(name)
            if name == model or not weights.same(Weights.recorded(other.attributes)):
                continue
            tokens = self.store.tokens(model).id, self.store.tokens(name).id
            held = set(self.layers[model]) <= set(other.layers)
            if held and np.array_equal(*tokens) and all(has_rows(self.store, name, k) for k in self.layers[model]):
                return name
        return None


def _documents(document: NDArray[np.integer]) -> dict[str, Any]:
    """How many documents some pairs are of, and how many of equal length would weigh as much."""
    sizes = in_order(document)[1]
    return {"documents": len(sizes.sizes), "effective_documents": sizes.effective}


def _ranks(
    sites: Sequence[Site], entropy: NDArray[np.float64], participation: NDArray[np.float64]
) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for site, one, other in zip(sites, entropy, participation, strict=True):
        found.setdefault(site.model, {})[str(site.layer)] = {"entropy": float(one), "participation": float(other)}
    return found


def _ranks_of_moments(stored: StoredMoments, sites: Sequence[Site]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    entropy, participation = np.full(len(sites), math.nan), np.full(len(sites), math.nan)
    for place, site in enumerate(sites):
        own = (site.model, site.layer)
        parts = [part for split in range(len(SPLITS)) if (part := stored.read(own, own, split)) is not None]
        scatter = centered(merge(*parts)).gx
        entropy[place] = effective_rank(scatter)
        size = float(np.sum(scatter * scatter))
        participation[place] = float(np.trace(scatter)) ** 2 / size if size > 0 else math.nan
    return entropy, participation
