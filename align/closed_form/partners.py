"""Which target layer suits a source layer best (``--layer-map auto``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from align.closed_form.fit import Fit
from align.closed_form.fit_all import fit_all
from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.moments.scan import Scan, scans, stored_scan
from align.moments.scatter import Moments, about
from align.solvers import mse_of
from featstore.errors import FitError
from featstore.store import Store
from featstore.store.moments.stored import MEMORY, StoredMoments
from featstore.store.read.pairs import Pairs


def best_partners(
    store: Store,
    pairs: Pairs,
    source: str,
    target: str,
    source_layers: Sequence[int],
    target_layers: Sequence[int],
    fit: Fit,
    *,
    stored: StoredMoments | None = None,
    seed: int = 0,
    memory: int = MEMORY,
    device: str = "cpu",
    tick: Callable[[float], None] = lambda _: None,
) -> tuple[list[LayerPair], dict[str, Any]]:
    """Fit every source layer to every target layer, and choose each source layer's best by validation R2.

    No test row is looked at. Several source layers may choose the same target layer.

    Args:
        store: Complete store.
        pairs: Of the two models, all splits, mask applied.
        source: Source model.
        target: Target model.
        source_layers: Which of its layers.
        target_layers: Which of the target's layers.
        fit: What to fit; for a type trained by gradient ``Fit("affine")``.
        stored: From :func:`align.moments.scan.usable_moments`, of all these layers; None to scan the rows.
        seed: As for the scan.
        memory: Bytes that the sums of a pass over the rows may take.
        device: Where products are made and systems solved.
        tick: Called with the number of pairs done since the last call.

    Returns:
        ``(chosen, table)``: a layer pair for every source layer, in order, and for ``metrics.json`` ``{"fit",
        "source_layers", "target_layers", "val_r2", "chosen"}``, where ``val_r2[i][j]`` is that of source layer i and
        target layer j (None where undefined) and ``chosen[i]`` the target layer. Equal R2: the first target layer wins.

    Raises:
        FitError: No layers, a fit that was refused, or a source layer without any defined R2.
        PairingError: Too few train or no validation pairs.
        LayerRangeError: A layer that the store does not hold.
    """
    wanted = [LayerPair(source, (k,), target, j) for k in source_layers for j in target_layers]
    groups: Iterable[dict[str, Scan]]
    if stored is None:
        groups = scans(store, pairs, wanted, seed=seed, memory=memory, device=device, tick=tick)
    else:
        # A source layer at a time: nothing is read twice but the target layers' Grams.
        rows = [wanted[i : i + len(target_layers)] for i in range(0, len(wanted), max(len(target_layers), 1))]
        groups = (stored_scan(stored, row, seed=seed) for row in rows or [[]])
    r2: dict[str, float] = {}
    for group in groups:
        maps = fit_all({"": fit}, [pair for pair in wanted if pair.key in group], group, device=device)
        r2 |= {key: validation_r2(fitted[""], group[key].val) for key, fitted in maps.items()}
        group.clear()
    chosen, table = [], []
    for k in source_layers:
        row = [pair for pair in wanted if pair.source_layers == (k,)]
        defined = [pair for pair in row if not math.isnan(r2[pair.key])]
        if not defined:
            raise FitError(
                f"layer {k} of {source} has no best partner: no target layer varies over the validation pairs; "
                "name the layers with --layer-map"
            )
        chosen.append(max(defined, key=lambda pair: r2[pair.key]))
        table.append([None if math.isnan(r2[pair.key]) else r2[pair.key] for pair in row])
    return chosen, {
        "fit": fit.type,
        "source_layers": list(source_layers),
        "target_layers": list(target_layers),
        "val_r2": table,
        "chosen": [pair.target_layer for pair in chosen],
    }


def validation_r2(aligner: Aligner, rows: Moments) -> float:
    """R2 of a linear map about the train mean, from moments alone: ``1 - sum |y - y_hat|^2 / sum |y - mean|^2``.

    Args:
        aligner: A map that is a matrix.
        rows: Moments of the rows to score.

    Returns:
        R2, NaN where the rows do not vary about the train mean.

    Raises:
        FitError: No rows, or other widths.
    """
    tensors = {name: value.astype("float64") for name, value in aligner.tensors.items()}
    own = about(rows, tensors["mean_source"], tensors["mean_target"])
    mse = mse_of(tensors["weight"], own)
    away = tensors["control_mean"] - rows.origin_y
    spread = rows.b - 2 * float(away @ rows.sy) + rows.n * float(away @ away)
    # A sum of squares, below zero by rounding alone.
    return 1 - mse * rows.n * len(away) / spread if spread > 1e-12 * rows.b else math.nan
