"""An aligner's figures on a split, baselines beside it, and what a careful reader would object to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.aligners import Aligner
from align.layers import LayerPair
from align.metrics import Figures, Reasons, Scorer
from featstore.store import Store
from featstore.store.loader import MEMORY, PairBatches
from featstore.store.pairs import Pairs

#: Rows of the train split that are scored; the split that matters is test, and it is scored whole.
TRAIN_ROWS = 65_536


@dataclass
class Epoch:
    """What one epoch measured; epoch 0 is the map before training.

    Attributes:
        epoch: Number.
        train_loss: Mean over the epoch's steps, None for epoch 0.
        parts: Mean of each loss component over the epoch's steps, unweighted, and ``infonce_chance``, what InfoNCE is
            for a map that has learned nothing.
        val_loss: Validation MSE over that of predicting the train mean (1 - R2); its weights never change.
        val: Validation figures.
        lr: Learning rate at the epoch's end.
        seconds: Of training and validation.
    """

    epoch: int
    train_loss: float | None
    val_loss: float
    val: Figures
    lr: float
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)


def batches_of(store: Store, pair: LayerPair, pairs: Pairs, memory: int = MEMORY) -> PairBatches:
    """The paired rows of two layers.

    Args:
        store: Complete store.
        pair: Which layers.
        pairs: Selection of the same models and direction.
        memory: Bytes that rows may take up at a time.
    """
    source, target = store.rows(pair.source, pair.source_layer), store.rows(pair.target, pair.target_layer)
    return PairBatches(source, target, pairs, memory)


def score_all(
    rows: PairBatches, aligners: Mapping[str, Aligner | str], *, seed: int = 0
) -> dict[str, tuple[Figures | None, Reasons]]:
    """Score several maps on the same rows in one pass.

    Args:
        rows: The rows.
        aligners: Maps by name, or the reason why there is none.
        seed: Of the retrieval gallery and the CKA subset, the same for all maps.

    Returns:
        By name the figures and the reasons of those that are null; no figures where there is no map.
    """
    scorers = {
        name: Scorer(aligner.tensors["control_mean"].astype(np.float64), len(rows), seed=seed)
        for name, aligner in aligners.items()
        if isinstance(aligner, Aligner)
    }
    for block in rows.blocks():
        for name, scorer in scorers.items():
            aligner = aligners[name]
            if isinstance(aligner, Aligner):
                scorer.update(block.y, aligner.apply(block.x))
    result: dict[str, tuple[Figures | None, Reasons]] = {}
    for name, aligner in aligners.items():
        result[name] = (None, {name: aligner}) if isinstance(aligner, str) else scorers[name].result()
    return result


def findings(
    *,
    entry: dict[str, Any],
    parts: Mapping[str, float],
    n_train: int,
    width: int,
    coverage: tuple[float, float],
    keep_sinks: bool,
) -> list[dict[str, str]]:
    """What a careful reader would object to, as warnings with a code and a sentence.

    Args:
        entry: The pair's blocks ``train``, ``test`` and ``baselines``.
        parts: Components of the last epoch's train loss; empty for a closed form.
        n_train: Train pairs.
        width: Source width.
        coverage: Share of source and target tokens that have a partner.
        keep_sinks: Whether attention sinks were kept.
    """
    found = []

    def warn(code: str, message: str) -> None:
        found.append({"code": code, "message": message})

    if n_train < 10 * width:
        warn("few-rows", f"{n_train} train pairs for width {width}: under 10 per dimension, held-out figures suffer")
    if min(coverage) < 0.8:
        warn("coverage", f"only {min(coverage):.0%} of one side's tokens have a partner")
    if keep_sinks:
        warn("sinks-kept", "attention sinks are included; they can dominate R2 and CKA")
    if "infonce" in parts and parts["infonce_chance"] - parts["infonce"] < 0.1 * parts["infonce_chance"]:
        warn(
            "infonce-at-chance",
            f"InfoNCE {parts['infonce']:.2f} is near {parts['infonce_chance']:.2f}, the logarithm of the batch size: "
            "nothing was learned from it",
        )
    train, test, base = entry["train"], entry["test"], entry["baselines"]
    r2 = test.get("r2")
    if r2 is not None:
        if train.get("r2") is not None and train["r2"] - r2 > 0.1:
            warn("overfit", f"R2 falls from {train['r2']:.3f} on train to {r2:.3f} on test")
        closed = (base.get("closed_form") or {}).get("r2")
        if closed is not None and r2 < closed - 0.01:
            warn(
                "loses-to-closed-form",
                f"test R2 {r2:.3f} is below the {base['closed_form']['name']} optimum {closed:.3f}: "
                "train longer or with another learning rate",
            )
        controls = {
            name: (base.get(name) or {}).get("r2") for name in ("mean", "identity", "random_rotation", "shuffled")
        }
        best = max((value for value in controls.values() if value is not None), default=None)
        if best is not None and r2 <= best + 0.01:
            warn("no-better-than-controls", f"test R2 {r2:.3f} does not beat the best control ({best:.3f})")
    chance, top1 = test.get("retrieval_chance"), test.get("retrieval_top1")
    if chance and top1 is not None and top1 < 3 * chance:
        warn("retrieval-at-chance", f"retrieval top-1 {top1:.3f} is near chance ({chance:.3f})")
    return found
