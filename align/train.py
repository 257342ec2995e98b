"""One run directory from a store: fit or train every layer pair, score it beside its baselines, say what it means."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from align.aligners import Aligner, save_adapter
from align.fit import (
    Fit,
    Scan,
    baselines,
    check_low_rank,
    fit_closed,
    limit_rows,
    need_rows,
    read_split,
    scan,
    sites_of,
    stored_scan,
    usable_moments,
)
from align.layers import LayerPair, choose_models, layer_pairs
from align.metrics import Figures, Reasons
from align.moment_scores import NEEDS_ROWS, score_moments
from align.plots import plot_curves
from align.scoring import TRAIN_ROWS, Epoch, batches_of, findings, score_all
from align.settings import Settings, check
from featstore.console import check_directory, err, jsonable, progress
from featstore.corpus import TEST, TRAIN, VALIDATION
from featstore.errors import SpecError
from featstore.provenance import versions, write_atomic, write_json
from featstore.store import Store, open_store
from featstore.store.moments import StoredMoments, has_rows
from featstore.store.pairs import Pairs


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
    if out is not None:
        check_directory(out)
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
    if settings.type in ("lora", "reduced-rank"):
        check_low_rank(settings.loop.rank, settings.loop.skip, store.model(source).width, store.model(target).width)
    # Refuses an unknown or missing pair index, too, before anything is written.
    store.pairs(source, target, settings.policy)
    if settings.by_gradient:
        need_rows(store, [sites_of(pair) for pair in forward], f"training {settings.type} by gradient")
    kept = {models: _stored(store, settings, models, pairs) for models, pairs in wanted.items()}
    run = _Run(store, settings, out, quiet=quiet)
    for (a, b), pairs in wanted.items():
        run.direction(a, b, pairs, kept[a, b])
    return run.finish()


def _stored(store: Store, settings: Settings, models: tuple[str, str], wanted: list[LayerPair]) -> StoredMoments | None:
    """The store's own moments, where they sum over the pairs that the settings choose."""
    return usable_moments(
        store,
        models,
        [sites_of(pair) for pair in wanted],
        policy=settings.policy,
        keep_sinks=settings.keep_sinks,
        max_rows=settings.max_rows,
    )


class _Run:
    """Collects what a run writes."""

    def __init__(self, store: Store, settings: Settings, out: Path, *, quiet: bool) -> None:
        self.store, self.settings, self.out, self.quiet = store, settings, out, quiet
        self.aligners: list[Aligner] = []
        self.entries: dict[str, Any] = {}
        self.epochs: dict[int, dict[str, Any]] = {}
        self.coverage: dict[str, float] = {}
        self.stored: StoredMoments | None = None
        out.mkdir(parents=True, exist_ok=True)
        # What an interrupted run left here is not of this one.
        for left in (out / "log.jsonl", *out.glob("eval_epoch_*.json")):
            left.unlink(missing_ok=True)
        write_atomic(out / "run.yaml", yaml.safe_dump(asdict(settings), sort_keys=False))

    def direction(self, source: str, target: str, wanted: list[LayerPair], stored: StoredMoments | None) -> None:
        settings, self.stored = self.settings, stored
        everything = pairs = self.store.pairs(source, target, settings.policy)
        self.coverage |= dict(zip((source, target), pairs.coverage, strict=True))
        coverage = pairs.coverage
        pairs = pairs.select(keep_sinks=settings.keep_sinks)
        if settings.max_rows is not None:
            train = limit_rows(pairs.where(pairs.split == TRAIN), settings.max_rows, settings.loop.seed)
            keep = (pairs.split != TRAIN) | _members(pairs, train)
            pairs = pairs.where(keep)
        if stored is not None:
            moments = stored_scan(stored, wanted, seed=settings.loop.seed)
        else:
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
            entry["by_mask"] = self._by_mask(pair, everything, aligner, entry["reasons"])
            self.entries[pair.key] = entry

    def _fit(self, pair: LayerPair, moments: Scan, pairs: Pairs) -> tuple[Aligner, str]:
        settings, loop = self.settings, self.settings.loop
        if not settings.by_gradient:
            fit = self._closed_form()
            aligner = fit_closed(fit, pair, moments)
            figures, _ = self._scores(pair, pairs, VALIDATION, {"map": aligner})["map"]
            r2 = (figures or {}).get("r2")
            self._record(pair, Epoch(0, None, 1 - float(r2 if r2 is not None else "nan"), figures or {}, 0.0, 0.0))
            return aligner, "closed form"
        # Only here: torch takes two seconds to import, and a closed form needs none of it.
        from align.loop import train_map

        sides = (pairs.where(pairs.split == split) for split in (TRAIN, VALIDATION))
        train, val = (batches_of(self.store, pair, side, settings.memory) for side in sides)
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
            limit = TRAIN_ROWS if self._has_rows(pair) else None
            some = limit_rows(pairs.where(pairs.split == split), limit, seed)
            entry[name], reasons = self._scores(pair, some, split, {"map": aligner})["map"]
            entry["reasons"] |= {f"{name}.{key}": reason for key, reason in reasons.items()}
        tested = self._scores(pair, pairs, TEST, maps)
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

    def _by_mask(self, pair: LayerPair, everything: Pairs, aligner: Aligner, reasons: Reasons) -> dict[str, Any]:
        """Test figures with the attention sinks masked and with them left in, whichever the run was asked for."""
        blocks: dict[str, Any] = {}
        for name, keep in (("masked", False), ("kept", True)):
            if keep and not self._has_rows(pair):
                blocks[name], reasons["by_mask.kept"] = None, NEEDS_ROWS
                continue
            part = everything.select(keep_sinks=keep)
            blocks[name], _ = self._scores(pair, part, TEST, {"map": aligner})["map"]
        return blocks

    def _has_rows(self, pair: LayerPair) -> bool:
        return all(has_rows(self.store, *site) for site in sites_of(pair))

    def _scores(
        self, pair: LayerPair, pairs: Pairs, split: int, maps: dict[str, Aligner] | dict[str, Aligner | str]
    ) -> dict[str, tuple[Figures | None, Reasons]]:
        """Scores on a split: from its rows, or, in a store without any, what its moments can say."""
        if self.stored is not None and not self._has_rows(pair):
            return score_moments(read_split(self.stored, pair, split), maps)
        rows = batches_of(self.store, pair, pairs.where(pairs.split == split), self.settings.memory)
        return score_all(rows, maps, seed=self.settings.loop.seed)

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
