"""A compress map: trained, scored at the rows of the other maps, its rate beside."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.closed_form.fit import Solver, baselines
from align.compress.fit import Compressed, fit_windows, steps_of
from align.compress.plan import WindowsPlan
from align.compress.report import evaluate
from align.compress.score import ByToken, Trained, score_windows
from align.compress.windows import Windows
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.metrics import TOKEN, DocumentSums, add_intervals, add_partial
from align.moments.scan import Scan
from align.runs.candidates import Reporting
from align.runs.facts import Training, gram_facts
from align.runs.job import Data, Direction
from align.runs.judge import Judge
from align.runs.plan import MapPlan
from featstore.runtime.console import progress
from featstore.text.splits import TEST, TRAIN, VALIDATION


def compress(
    plan: MapPlan,
    windows: WindowsPlan,
    data: Data,
    direction: Direction,
    pair: LayerPair,
    moments: Scan,
    judge: Judge,
    reporting: Reporting,
) -> tuple[Aligner, dict[str, Any], dict[str, Any]]:
    """Train one map, and score it beside the codecs of the same rate, the controls and a map that sends everything.

    Args:
        plan: What the map is compared with.
        windows: How it is trained.
        data: Where rows come from.
        direction: Which models and pairs.
        pair: Which layers.
        moments: Of this pair.
        judge: Of the direction.
        reporting: Where to report.

    Returns:
        The map, and its parts of ``metrics.json`` and ``documents.json``.

    Raises:
        FitError: Latents that do not fit, a split without windows, or training failed.
    """
    memory = max(data.memory // 3, 1)
    train, val, test = (
        Windows(data.store, pair, direction.pairs, split, keep_sinks=data.keep_sinks, roles=data.roles, memory=memory)
        for split in (TRAIN, VALIDATION, TEST)
    )
    batches = steps_of(len(train), windows.batch_size) * windows.epochs
    with progress(f"train {pair.key}", batches, "batches", quiet=reporting.quiet) as tick:
        done = fit_windows(
            train,
            val,
            moments.means,
            windows,
            on_epoch=lambda epoch: reporting.epoch(pair, epoch),
            tick=lambda _: tick(1),
            checkpoint=reporting.files.checkpoint(pair),
            resume=reporting.resume,
        )
    reporting.stop(pair, epoch=done.last_epoch, best_epoch=done.best_epoch, reason=done.reason)
    aligner = _aligner(done, pair, plan.type.formula.kind)
    entry, sums = _entry(plan, done, (train, val, test), direction, pair, moments, judge, windows.seed)
    training = Training(done.best_epoch, done.last_epoch, windows.epochs)
    gram = gram_facts(Solver().gram_values(pair, moments), moments.train.n)
    entry["warnings"] = judge.warnings(pair, entry, moments.train.n, {}, gram, training=training)
    return aligner, entry, sums.renamed({"compress": "map"}).block()


def _aligner(done: Compressed, pair: LayerPair, kind: str) -> Aligner:
    means = {"control_mean_source": done.mean_source, "control_mean": done.mean_target}
    tensors = {**done.module.export(), **{name: np.asarray(mean, np.float32) for name, mean in means.items()}}
    return Aligner(pair, tensors, {"solver": "adamw", **done.module.options}, done.trainable, kind)


def _entry(
    plan: MapPlan,
    done: Compressed,
    windows: tuple[Windows, Windows, Windows],
    direction: Direction,
    pair: LayerPair,
    moments: Scan,
    judge: Judge,
    seed: int,
) -> tuple[dict[str, Any], DocumentSums]:
    train, val, test = windows
    table, facts = judge.token(pair)
    entry: dict[str, Any] = {"fit": done.reason, "reasons": {}, "baselines": {}, TOKEN: facts}
    for name, part in (("train", train), ("val", val)):
        entry[name], reasons = score_windows(part, {"map": Trained(done.module)}, done.mean_target, seed=seed)["map"]
        entry["reasons"] |= {f"{name}.{key}": reason for key, reason in reasons.items()}
    sums = DocumentSums()
    more = {} if isinstance(table, str) else {TOKEN: ByToken(table)}
    found = evaluate(done, train, val, test, seed=seed, documents=sums, more=more)
    solver = Solver()
    controls = baselines(plan.fit, pair, moments, seed, solver=solver)
    maps = {**controls, "closed_form": solver.fit(plan.fit, pair, moments)}
    scored = judge.scores(pair, direction.pairs, TEST, maps)
    blocks = {name: (found["figures"][name], found["reasons"][name]) for name in found["figures"]} | scored
    if isinstance(table, str):
        blocks[TOKEN] = None, {TOKEN: table}
    for name, (figures, reasons) in blocks.items():
        place = "test" if name == "compress" else f"baselines.{name}"
        entry["reasons"] |= {place if figures is None else f"{place}.{key}": why for key, why in reasons.items()}
        if name == "compress":
            entry["test"] = figures
        else:
            entry["baselines"][name] = figures
    entry["baselines"]["closed_form"]["name"] = f"{plan.optimum} on whole states"
    add_intervals(entry, sums.renamed({"compress": "map"}))
    add_partial(entry, sums.renamed({"compress": "map"}))
    entry |= {"rate": found["rate"], "rate_distortion": found["rate_distortion"]}
    entry["by_role"] = direction.by_role
    entry["by_mask"] = {"masked": None, "kept": None}
    why = "a compress map reads windows, with the mask it was trained under"
    entry["reasons"] |= {f"by_mask.{name}": why for name in entry["by_mask"]}
    return entry, sums
