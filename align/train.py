"""One run directory from a store: fit or train every layer pair, score it beside its baselines, say what it means."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from align.aligners import Aligner, save_adapter
from align.fit import MINIMUM_PAIRS, Fit, Scan, baselines, check_low_rank, fit_closed, limit_rows, scan
from align.layers import LayerPair, choose_models, layer_pairs
from align.loop import Epoch, LoopSettings, train_map
from align.losses import parse_loss
from align.plots import plot_curves
from align.scoring import TRAIN_ROWS, batches_of, findings, score_all
from featstore.console import err, jsonable, progress
from featstore.corpus import TEST, TRAIN, VALIDATION
from featstore.errors import SpecError
from featstore.pairs import Pairs
from featstore.provenance import versions, write_atomic, write_json
from featstore.store import Store, open_store

CLOSED_TYPES = ("procrustes", "linear", "affine", "reduced-rank")
TYPES = (*CLOSED_TYPES, "lora")


@dataclass(frozen=True)
class Settings:
    """Everything `align train` can be told. Written to ``run.yaml``, from which the same run can be made again.

    Attributes:
        store: Path of the store.
        type: One of :data:`TYPES`.
        source: Source model; None for the store's first.
        target: Target model; None for the store's second.
        both: Also the other direction.
        layers: Source layers, None for all.
        layer_map: ``K:K,...``, None for equal layers.
        solver: ``closed`` or ``adamw``; None for the type's own.
        scale: Optimal scale (Procrustes).
        keep_sinks: Lift the sink mask.
        policy: Pair policy.
        max_rows: Pairs of the train split at most.
        loop: Rank, skip, loss, epochs and the rest of the gradient loop.
    """

    store: str
    type: str = "procrustes"
    source: str | None = None
    target: str | None = None
    both: bool = False
    layers: str | None = None
    layer_map: str | None = None
    solver: str | None = None
    scale: bool = False
    keep_sinks: bool = False
    policy: str = "end"
    max_rows: int | None = None
    loop: LoopSettings = field(default_factory=LoopSettings)

    @property
    def by_gradient(self) -> bool:
        """Whether the map is trained rather than solved for."""
        return self.type == "lora" or self.solver == "adamw"


def load_settings(path: Path) -> Settings:
    """Read a ``run.yaml``.

    Args:
        path: The file.

    Raises:
        SpecError: It is not one.
    """
    try:
        value = yaml.safe_load(path.read_text())
        loop = _typed(LoopSettings(**value["loop"]))
        return _typed(Settings(**{**value, "loop": loop}))
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise SpecError(f"{path} is not a run.yaml of this program ({error}); `align train` writes one") from error


_S = TypeVar("_S", Settings, LoopSettings)


def _typed(settings: _S) -> _S:
    """Numbers as what they are: YAML reads ``1e-2`` as text and ``1`` as an integer."""
    changed: dict[str, Any] = {}
    for entry in fields(settings):
        kinds = str(entry.type).split(" | ")
        value = getattr(settings, entry.name)
        if "float" in kinds and isinstance(value, (str, int)) and not isinstance(value, bool):
            changed[entry.name] = float(value)
        elif type(value).__name__ not in kinds and not (value is None and "None" in kinds):
            raise TypeError(f"{entry.name} is {value!r}, expected {entry.type}")
    return replace(settings, **changed)


def check(settings: Settings) -> None:
    """Refuse what cannot be meant.

    Args:
        settings: As given.

    Raises:
        SpecError: Unknown type or solver, a combination that does not exist, or a number out of range.
    """
    if settings.type not in TYPES:
        raise SpecError(f"type {settings.type!r}: choose one of {', '.join(TYPES)}")
    if settings.solver not in (None, "closed", "adamw"):
        raise SpecError(f"solver {settings.solver!r}: choose closed or adamw")
    if settings.solver == "closed" and settings.type == "lora":
        raise SpecError("type 'lora' is trained by gradient; its closed form is --type reduced-rank")
    if settings.solver == "adamw" and settings.type in ("procrustes", "reduced-rank"):
        raise SpecError(f"type {settings.type!r} has a closed form only; leave out --solver adamw")
    loop = settings.loop
    for name in ("epochs", "patience", "batch_size", "rank"):
        if getattr(loop, name) < 1:
            raise SpecError(f"--{name.replace('_', '-')} {getattr(loop, name)}: must be at least 1")
    if settings.max_rows is not None and settings.max_rows < MINIMUM_PAIRS:
        raise SpecError(f"--max-rows {settings.max_rows}: a fit needs at least {MINIMUM_PAIRS} pairs")
    for name in ("lr", "temperature"):
        if not 0 < getattr(loop, name) < math.inf:
            raise SpecError(f"--{name} {getattr(loop, name)}: must be a positive number")
    if not 0 <= loop.min_delta < math.inf:
        raise SpecError(f"--min-delta {loop.min_delta}: must not be negative")
    if loop.seed < 0:
        raise SpecError(f"--seed {loop.seed}: must not be negative")
    if settings.by_gradient:
        parse_loss(loop.loss)


def default_directory(settings: Settings, source: str, target: str) -> Path:
    """The first free ``runs/<type>-<source>-<target>[-n]``.

    Args:
        settings: Of the run.
        source: Model name.
        target: Model name.
    """
    base = Path("runs") / f"{settings.type}-{source}-{target}"
    number = 2
    path = base
    while path.exists():
        path = base.with_name(f"{base.name}-{number}")
        number += 1
    return path


def train(settings: Settings, out: Path | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Carry out a run.

    Args:
        settings: What to do.
        out: Run directory; must not hold another run. None for the default.
        quiet: No progress.

    Returns:
        ``{"run": path, "type": ..., "pairs": {key: entry}}`` as written to ``metrics.json``.

    Raises:
        FeatstoreError: Anything wrong with the store, the models, the layers or the fit.
    """
    check(settings)
    store = open_store(settings.store)
    source, target = choose_models(store, settings.source, settings.target)
    directions = [(source, target)] + ([(target, source)] if settings.both and source != target else [])
    wanted: dict[tuple[str, str], list[LayerPair]] = {}
    forward = layer_pairs(store, source, target, layers=settings.layers, layer_map=settings.layer_map)
    for a, b in directions:
        wanted[a, b] = forward if (a, b) == (source, target) else [pair.reversed for pair in forward]
    out = out or default_directory(settings, source, target)
    if (out / "adapter.json").exists() or (out / "metrics.json").exists():
        raise SpecError(f"--out {out} already holds a run; choose another directory or remove it")
    if out.exists() and not out.is_dir():
        raise SpecError(f"--out {out} is a file; choose a directory")
    if settings.type in ("lora", "reduced-rank"):
        check_low_rank(settings.loop.rank, settings.loop.skip, store.model(source).width, store.model(target).width)
    # Refuses an unknown or missing pair index, too, before anything is written.
    store.pairs(source, target, settings.policy)
    run = _Run(store, settings, out, quiet=quiet)
    for (a, b), pairs in wanted.items():
        run.direction(a, b, pairs)
    return run.finish()


class _Run:
    """Collects what a run writes."""

    def __init__(self, store: Store, settings: Settings, out: Path, *, quiet: bool) -> None:
        self.store, self.settings, self.out, self.quiet = store, settings, out, quiet
        self.aligners: list[Aligner] = []
        self.entries: dict[str, Any] = {}
        self.epochs: dict[int, dict[str, Any]] = {}
        self.coverage: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)
        # What an interrupted run left here is not of this one.
        for left in (out / "log.jsonl", *out.glob("eval_epoch_*.json")):
            left.unlink(missing_ok=True)
        write_atomic(out / "run.yaml", yaml.safe_dump(asdict(settings), sort_keys=False))

    def direction(self, source: str, target: str, wanted: list[LayerPair]) -> None:
        settings = self.settings
        everything = pairs = self.store.pairs(source, target, settings.policy)
        self.coverage |= dict(zip((source, target), pairs.coverage, strict=True))
        coverage = pairs.coverage
        pairs = pairs.select(keep_sinks=settings.keep_sinks)
        if settings.max_rows is not None:
            train = limit_rows(pairs.where(pairs.split == TRAIN), settings.max_rows, settings.loop.seed)
            keep = (pairs.split != TRAIN) | _members(pairs, train)
            pairs = pairs.where(keep)
        used = int((pairs.split != TEST).sum())
        with progress(f"scan {source}->{target}", used, "pairs", quiet=self.quiet) as tick:
            moments = scan(self.store, pairs, wanted, seed=settings.loop.seed, tick=tick)
        pairs.where(pairs.split == TEST).need(1, "testing")
        for pair in wanted:
            if not self.quiet:
                err.print(f"{settings.type} {pair.key}")
            aligner, best = self._fit(pair, moments[pair.key], pairs)
            self.aligners.append(aligner)
            entry = self._score(pair, moments[pair.key], pairs, aligner, coverage, best)
            entry["by_mask"] = self._by_mask(pair, everything, aligner)
            self.entries[pair.key] = entry

    def _fit(self, pair: LayerPair, moments: Scan, pairs: Pairs) -> tuple[Aligner, str]:
        settings, loop = self.settings, self.settings.loop
        val = batches_of(self.store, pair, pairs.where(pairs.split == VALIDATION))
        if not settings.by_gradient:
            fit = self._closed_form()
            aligner = fit_closed(fit, pair, moments)
            figures, _ = score_all(val, {"map": aligner}, seed=loop.seed)["map"]
            r2 = (figures or {}).get("r2")
            self._record(pair, Epoch(0, None, 1 - float(r2 if r2 is not None else "nan"), figures or {}, 0.0, 0.0))
            return aligner, "closed form"
        train = batches_of(self.store, pair, pairs.where(pairs.split == TRAIN))
        total = len(train) * loop.epochs
        with progress(f"train {pair.key}", total, "pairs", quiet=self.quiet) as tick:
            trained = train_map(
                settings.type, pair, moments, train, val, loop, on_epoch=lambda e: self._record(pair, e), tick=tick
            )
        ending = {"epoch": trained.last_epoch, "best_epoch": trained.best_epoch, "reason": trained.reason}
        self._log({"event": "stop", "pair": pair.key, **ending})
        if not self.quiet:
            err.print(f"  {trained.reason}")
        return trained.aligner, trained.reason

    def _closed_form(self) -> Fit:
        settings = self.settings
        return Fit(settings.type, scale=settings.scale, rank=settings.loop.rank, skip=_skip(settings))

    def _opponent(self) -> tuple[Fit, str] | None:
        """The closed-form optimum of what a trained map can express."""
        settings, loop = self.settings, self.settings.loop
        if not settings.by_gradient:
            return None
        if settings.type == "lora":
            return Fit("reduced-rank", rank=loop.rank, skip=loop.skip), f"reduced-rank {loop.rank} on {loop.skip}"
        return Fit(settings.type), f"{settings.type} ridge"

    def _score(
        self, pair: LayerPair, moments: Scan, pairs: Pairs, aligner: Aligner, coverage: tuple[float, float], words: str
    ) -> dict[str, Any]:
        seed = self.settings.loop.seed
        opponent = self._opponent()
        fit = opponent[0] if opponent else self._closed_form()
        maps: dict[str, Aligner | str] = {"map": aligner, **baselines(fit, pair, moments, seed)}
        maps["closed_form"] = fit_closed(fit, pair, moments) if opponent else "this is a closed form"
        entry: dict[str, Any] = {"fit": words, "reasons": {}, "baselines": {}}
        for name, split in (("train", TRAIN), ("val", VALIDATION)):
            rows = batches_of(self.store, pair, limit_rows(pairs.where(pairs.split == split), TRAIN_ROWS, seed))
            entry[name], reasons = score_all(rows, {"map": aligner}, seed=seed)["map"]
            entry["reasons"] |= {f"{name}.{key}": reason for key, reason in reasons.items()}
        tested = score_all(batches_of(self.store, pair, pairs.where(pairs.split == TEST)), maps, seed=seed)
        for name, (figures, reasons) in tested.items():
            place = "test" if name == "map" else f"baselines.{name}"
            entry["reasons"] |= {
                place if figures is None else f"{place}.{key}": reason for key, reason in reasons.items()
            }
            if name == "map":
                entry["test"] = figures
            else:
                entry["baselines"][name] = figures
        if opponent and entry["baselines"]["closed_form"] is not None:
            entry["baselines"]["closed_form"]["name"] = opponent[1]
        entry["warnings"] = findings(
            entry=entry,
            parts=self._last_epoch(pair)["train_parts"],
            n_train=moments.train.n,
            width=len(moments.means[0]),
            coverage=coverage,
            keep_sinks=self.settings.keep_sinks,
        )
        return entry

    def _by_mask(self, pair: LayerPair, everything: Pairs, aligner: Aligner) -> dict[str, Any]:
        """Test figures with the attention sinks masked and with them left in, whichever the run was asked for."""
        blocks = {}
        for name, keep in (("masked", False), ("kept", True)):
            rows = batches_of(self.store, pair, everything.select(TEST, keep_sinks=keep))
            blocks[name], _ = score_all(rows, {"map": aligner}, seed=self.settings.loop.seed)["map"]
        return blocks

    def _last_epoch(self, pair: LayerPair) -> dict[str, Any]:
        own = [record["pairs"][pair.key] for _, record in sorted(self.epochs.items()) if pair.key in record["pairs"]]
        return dict(own[-1])

    def _record(self, pair: LayerPair, epoch: Epoch) -> None:
        figures = {
            "val_loss": epoch.val_loss,
            "train_loss": epoch.train_loss,
            "train_parts": epoch.parts,
            "cka": epoch.val.get("cka_debiased"),
            "cosine_sim": epoch.val.get("cosine"),
            "val": epoch.val,
        }
        self._log(
            {
                "event": "epoch",
                "pair": pair.key,
                "epoch": epoch.epoch,
                "lr": epoch.lr,
                "seconds": epoch.seconds,
                **figures,
            }
        )
        record = self.epochs.setdefault(epoch.epoch, {"epoch": epoch.epoch, "generations": [], "pairs": {}})
        record["pairs"][pair.key] = figures
        for key in ("val_loss", "train_loss", "cka", "cosine_sim"):
            values = [entry[key] for entry in record["pairs"].values() if entry[key] is not None]
            record[key] = sum(values) / len(values) if values else None
        write_json(self.out / f"eval_epoch_{epoch.epoch}.json", jsonable(record))

    def _log(self, event: dict[str, Any]) -> None:
        with (self.out / "log.jsonl").open("a") as handle:
            handle.write(json.dumps(jsonable(event), allow_nan=False) + "\n")

    def finish(self) -> dict[str, Any]:
        """Write metrics, plots, the adapter and, last, its card."""
        store, settings = self.store, self.settings
        result = {"type": settings.type, "pairs": self.entries}
        write_json(self.out / "metrics.json", jsonable(result))
        plot_curves(self.epochs, self.entries, self.out)
        names = {name for a in self.aligners for name in (a.pair.source, a.pair.target)}
        card = {
            "type": settings.type,
            "models": {
                name: {**store.model(name).attributes, "median_norm": store.median_norms(name)}
                for name in store.models
                if name in names
            },
            "store": {"path": settings.store, "fingerprint": store.fingerprint},
            "corpus": store.attributes["corpus"],
            "pair_policy": settings.policy,
            "coverage": self.coverage,
            "mask": {**store.attributes["mask"], "keep_sinks": settings.keep_sinks},
            "normalisation": "none" if settings.type == "linear" else "train means subtracted",
            "provenance": {"versions": versions(), "seed": settings.loop.seed},
        }
        save_adapter(self.out, self.aligners, card)
        return {"run": str(self.out), **result}


def _skip(settings: Settings) -> str:
    # reduced-rank without a word about a skip means plain reduced-rank regression.
    return settings.loop.skip if settings.type in ("lora", "reduced-rank") else "none"


def _members(pairs: Pairs, kept: Pairs) -> Any:
    import numpy as np

    return np.isin(pairs.row_source, kept.row_source)


def describe(result: dict[str, Any]) -> str:
    """A run's test figures as a table for people.

    Args:
        result: From :func:`train`.
    """
    heads = " ".join(f"{head:>7}" for head in ("R2", "median", "cos_c", "top-1", "chance", "+sinks"))
    lines = [f"{'pair':28} {heads}   best control R2"]
    for key, entry in result["pairs"].items():
        test = entry["test"]
        controls = {
            name: figures["r2"]
            for name, figures in entry["baselines"].items()
            if name != "closed_form" and figures and figures.get("r2") is not None
        }
        best = max(controls, key=lambda name: controls[name])
        figures = [test[k] for k in ("r2", "r2_median_dim", "cosine_centered", "retrieval_top1", "retrieval_chance")]
        figures.append((entry["by_mask"]["kept"] or {}).get("r2"))
        values = " ".join(f"{v:7.3f}" if v is not None else f"{'-':>7}" for v in figures)
        lines.append(f"{key:28} {values}   {best} {controls[best]:.3f}")
        closed = entry["baselines"].get("closed_form")
        if closed:
            lines.append(f"{'':28} {closed['r2']:7.3f} is the optimum of {closed['name']}")
        lines += [f"  warning: {warning['message']}" for warning in entry["warnings"]]
    lines.append(f"run: {result['run']}")
    return "\n".join(lines)
