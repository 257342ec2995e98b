"""Maps' figures on a split, all from one pass over its rows; a table of tokens is scored as one more map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.metrics import DocumentSums, Figures, Reasons, Scorer
from align.metrics.rows import true_rows
from align.metrics.scorer import Truth
from align.tokens.table import TokenTable
from featstore.errors import FitError
from featstore.store import Store
from featstore.store.read.loader import MEMORY, PairBatches
from featstore.store.read.pairs import Pairs

#: Rows of the train split that are scored: enough to see whether a map has learned its train rows by heart. The split
#: that matters is test, and it is scored whole.
TRAIN_ROWS = 8192
#: Rows scored at a time. Five arrays of their size are held at once, and products of wide rows gain nothing from more.
_BLOCK_ROWS = 2048
#: Rows for CKA, at most; of the train split fewer: a diagnostic, for which wide rows take seconds a map.
CKA_ROWS, TRAIN_CKA_ROWS = 16_384, 4096


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
        val_parts: Mean of every loss component over the validation rows, in fixed batches of the batch size, whether or
            not it is trained on; with ``infonce_top1``, ``infonce_chance`` (the mean of ln B) and ``infonce_gain`` (how
            far below it InfoNCE is). Empty for a closed form.
        recent_loss: Train loss over the epoch's last steps, 100 at most; the epoch's mean lags behind it.
        grad_norm: Mean norm of the epoch's gradients before clipping.
    """

    epoch: int
    train_loss: float | None
    val_loss: float
    val: Figures
    lr: float
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    val_parts: dict[str, float] = field(default_factory=dict)
    recent_loss: float | None = None
    grad_norm: float | None = None


def batches_of(store: Store, pair: LayerPair, pairs: Pairs, memory: int = MEMORY) -> PairBatches:
    """The paired rows of two layers.

    Args:
        store: Complete store.
        pair: Which layers.
        pairs: Selection of the same models and direction.
        memory: Bytes that rows may take up at a time.
    """
    source = [store.rows(pair.source, layer) for layer in pair.source_layers]
    return PairBatches(source, store.rows(pair.target, pair.target_layer), pairs, memory)


def score_all(
    rows: PairBatches,
    aligners: Mapping[str, Aligner | TokenTable | str],
    *,
    seed: int = 0,
    documents: DocumentSums | None = None,
    cka_rows: int = CKA_ROWS,
    truth: Truth | None = None,
) -> dict[str, tuple[Figures | None, Reasons]]:
    """Score several maps on the same rows in one pass.

    Args:
        rows: The rows.
        aligners: Maps by name, or the reason why there is none. A table of tokens has no train mean of its own to be
            scored about: it takes the maps', and its own where it is alone.
        seed: Of the retrieval galleries and the CKA subset, the same for all maps.
        documents: Takes the squared errors of every map by document as well.
        cka_rows: Rows for CKA, at most.
        truth: What other maps have left that were scored on these very rows with the same seed and ``cka_rows``; used
            and filled where the maps have the same train mean.

    Returns:
        By name the figures and the reasons of those that are null; no figures where there is no map.

    Raises:
        FitError: Sums by document are asked of maps with different train means, whose R2 have different zeros.
    """
    maps = {name: aligner for name, aligner in aligners.items() if not isinstance(aligner, str)}
    own = {name: one.tensors["control_mean"] for name, one in maps.items() if isinstance(one, Aligner)}
    tables = {name: one.mean for name, one in maps.items() if isinstance(one, TokenTable)}
    zero = next(iter((own or tables).values()), None)
    means = {name: own.get(name, zero) for name in maps}
    tokens = rows.pairs.token
    # Maps of one run have one train mean; what the true rows give about it is measured once.
    alike = zero is not None and all(mean is not None and np.array_equal(mean, zero) for mean in means.values())
    centre = None if zero is None else zero.astype(np.float64)
    if truth is None or centre is None or not alike or not truth.about(centre):
        truth = Truth() if alike else None
    scorers = {
        name: Scorer(mean.astype(np.float64), len(rows), cka_rows=cka_rows, seed=seed, tokens=tokens, truth=truth)
        for name, mean in means.items()
        if mean is not None
    }
    if documents is not None and zero is not None:
        for name, mean in means.items():
            if mean is None or not np.array_equal(mean, zero):
                raise FitError(f"map {name!r} has another train mean than {next(iter(means))!r}; score them apart")
    for block in rows.blocks(_BLOCK_ROWS):
        owner = rows.pairs.document[block.pairs]
        if documents is not None and zero is not None:
            documents.add_targets(owner, block.y, zero)
        known = true_rows(block.y, centre) if alike and centre is not None else None
        # One map at a time: the states of all of them would be many times the block.
        for name, aligner in maps.items():
            mapped = aligner.apply(block.x) if isinstance(aligner, Aligner) else aligner.predict(tokens[block.pairs])
            scorers[name].update(block.y, mapped, owner, known)
            if documents is not None:
                documents.add(name, owner, block.y, mapped)
    return {
        name: (None, {name: aligner}) if isinstance(aligner, str) else scorers[name].result()
        for name, aligner in aligners.items()
    }
