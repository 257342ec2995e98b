"""What `align` writes: metrics.json, documents.json, eval_epoch_<n>.json and cka.json as frozen records.

Each file has one reader and one writer, here. `docs/results.md` is made from these classes by ``scripts/schema``; their
``Attributes:`` are its texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.judging.record import Findings
from featstore.errors import AdapterError
from featstore.runtime.records import (
    EMPTY,
    Amount,
    Fault,
    Flag,
    Interval,
    Matrix,
    Number,
    Part,
    Record,
    Table,
    Whole,
    flat,
    frame,
    read,
    write,
)
from featstore.runtime.schema import shown

if TYPE_CHECKING:
    import pandas as pd

_EPOCH_FILE = re.compile(r"eval_epoch_(\d+)\.json")


def unlike_lengths(lists: Mapping[tuple[str | int, ...], Sequence[Any]], wanted: int, what: str) -> Iterator[Fault]:
    """Lists that are not as long as they have to be.

    Args:
        lists: By their places.
        wanted: Their length.
        what: Of which there are so many.
    """
    for place, values in lists.items():
        if len(values) != wanted:
            yield place, f"is a list of {len(values)}, expected one of {wanted}, the number of {what}"


# metrics.json ------------------------------------------------------------------------------------------------------


class Scores(Record):
    """Figures of one map on one set of rows; null where one cannot be computed, and ``reasons`` of the pair says why.

    Attributes:
        r2: 1 - SSE / SST over all dimensions; SST is about the target's mean over the train rows.
        r2_ci95: 95 % interval of ``r2`` over documents; of the test split alone.
        partial_r2: 1 - SSE / SSE of the baseline ``token``: what is left beyond the source's current token; of the test
            split alone.
        partial_r2_ci95: Its 95 % interval over documents.
        r2_median_dim: Median over the target's dimensions of the R2 of each.
        r2_without_top_dims: R2 without the 1 % of dimensions (at least one) with the largest SST.
        mse: Squared error, mean over rows and dimensions, in squared units of the target's states.
        cosine: Mean cosine of a mapped state and the true one; a row without a direction counts as 0.
        cosine_centered: The same about the target's train mean.
        cka_debiased: Debiased linear CKA of mapped and true states, of 16,384 rows at most, over pairs of rows of
            different documents.
        cka_debiased_rows: The same over all pairs of different rows, as if rows of one document were independent: with
            few documents it is above 0 for states that share nothing else.
        retrieval_top1: Share of mapped states whose nearest state in the gallery (centred cosine) is their own partner.
        retrieval_top5: Share whose partner is among the five nearest.
        retrieval_mrr: Mean reciprocal rank of the partner.
        retrieval_median_rank: Median rank of the partner; 1 is the nearest.
        retrieval_chance: ``retrieval_top1`` of a map that knows nothing, 1 / gallery.
        retrieval_ceiling: ``retrieval_top1`` of the true states themselves, below 1 where states are equal.
        retrieval_gallery: States in the gallery.
        retrieval_same_token_top1: Share of mapped states whose nearest state among those of the same source token
            (cosine about the token's own mean on either side) is their own partner.
        retrieval_same_token_chance: The same of a map that knows the token alone: mean of 1 / states of the token.
        retrieval_same_token_ceiling: The same of the true states themselves.
        retrieval_same_token_gallery: States in these galleries together, 2048 at most, of a token 32 at most.
        retrieval_same_token_tokens: Tokens, each with a gallery of its own.
        n: Rows scored.
        all_positions: R2 over all positions of the windows, paired or not; of a compressed run.
    """

    r2: Number | None = None
    r2_ci95: Interval | None = None
    partial_r2: Number | None = None
    partial_r2_ci95: Interval | None = None
    r2_median_dim: Number | None = None
    r2_without_top_dims: Number | None = None
    mse: Amount | None = None
    cosine: Number | None = None
    cosine_centered: Number | None = None
    cka_debiased: Number | None = None
    cka_debiased_rows: Number | None = None
    retrieval_top1: Part | None = None
    retrieval_top5: Part | None = None
    retrieval_mrr: Part | None = None
    retrieval_median_rank: Number | None = None
    retrieval_chance: Part | None = None
    retrieval_ceiling: Part | None = None
    retrieval_gallery: Whole | None = None
    retrieval_same_token_top1: Part | None = None
    retrieval_same_token_chance: Part | None = None
    retrieval_same_token_ceiling: Part | None = None
    retrieval_same_token_gallery: Whole | None = None
    retrieval_same_token_tokens: Whole | None = None
    n: Whole | None = None
    all_positions: Number | None = None


class Baseline(Scores):
    """Figures of a map that is not the run's own, on the same test rows.

    Attributes:
        name: Of ``closed_form``, which closed form the optimum is; of ``shuffled``, what was exchanged: ``documents
            exchanged`` (targets from other documents at equal places) or ``rows shuffled`` (where moments are stored
            without rows, or train rows are more than 262,144 beside them).
    """

    name: str | None = None


class MaskScores(Record):
    """The test figures with attention sinks masked and with them left in, whichever the run used.

    Attributes:
        masked: Without rows whose norm exceeds the store's sink threshold times the median norm.
        kept: With all rows.
    """

    masked: Scores | None = None
    kept: Scores | None = None


class CkaChange(Record):
    """Debiased CKA of the test rows before the map and after it, over pairs of rows of different documents.

    Attributes:
        before: Of the source's states and the target's; null where the states cannot be compared as they are.
        after: Of the mapped states and the target's.
        invariant: Whether no map of this type can change it (a rotation cannot, with a factor or without).
    """

    before: Number | None = None
    after: Number | None = None
    invariant: Flag | None = None


class Rate(Record):
    """What a map of windows sends; means over windows.

    Attributes:
        windows: Windows that were sent.
        latents: Latent vectors a window; in `evaluate`'s files.
        latent_dim: Numbers in each; in `evaluate`'s files.
        latent_bytes: Bytes of a window's latents, in bfloat16.
        text_bytes: UTF-8 bytes of a window's text.
        latent_bytes_per_text_byte: The first over the second.
        raw_bytes: Bytes of the source states that go in, in bfloat16.
        token_id_bytes: Bytes of the source's token ids, each in as many whole bits as its vocabulary needs.
        side_bytes: Bytes of the target's token ends, which the receiver needs beside the latents.
        source_tokens: Source tokens that go in.
        target_tokens: Target positions that are reconstructed.
    """

    windows: Whole | None = None
    latents: Whole | None = None
    latent_dim: Whole | None = None
    latent_bytes: Number | None = None
    text_bytes: Number | None = None
    latent_bytes_per_text_byte: Number | None = None
    raw_bytes: Number | None = None
    token_id_bytes: Number | None = None
    side_bytes: Number | None = None
    source_tokens: Number | None = None
    target_tokens: Number | None = None


class RatePoint(Record):
    """One point of the rate-distortion table: a mean over test windows.

    Attributes:
        latents: Latent vectors a window.
        latent_dim: Numbers in each.
        bytes_per_window: Bytes of the latents.
        bytes_per_text_byte: The same over the bytes of the text.
        text_bytes: UTF-8 bytes of a window's text.
        token_id_bytes: Bytes of its token ids.
        raw_bytes: Bytes of its states.
        side_bytes: Bytes of positions beside the latents.
        r2: Test R2 by codec: ``compress``, ``pca``, ``strided``.
    """

    latents: Whole | None = None
    latent_dim: Whole | None = None
    bytes_per_window: Number | None = None
    bytes_per_text_byte: Number | None = None
    text_bytes: Number | None = None
    token_id_bytes: Number | None = None
    raw_bytes: Number | None = None
    side_bytes: Number | None = None
    r2: Table[Number | None] = EMPTY


class TokenFit(Record):
    """How the baseline ``token`` was fitted: the best prediction of the target's state from the source's token alone.

    Attributes:
        k: Rows at which a token's own mean state and its back-off count the same; chosen on validation rows.
        ridge: Relative strength of the back-off's ridge, chosen likewise; null where it backs off to the mean.
        backoff: What rare and unseen tokens are predicted from: ``layer 0`` (the source's state of the token before it
            meets its context, by ridge regression) or ``train mean``.
        why: Why it backs off to the mean; null where it does not.
        tokens: Tokens with a mean state of their own.
        train_tokens: Tokens of the train rows; more than ``tokens`` where their sums would not have fitted into memory.
        train_rows: Train rows.
        train_rows_in_table: Those of tokens with a mean state of their own.
        test_rows: Test rows.
        test_rows_in_table: Those of tokens with a mean state of their own.
    """

    k: Number | None = None
    ridge: Number | None = None
    backoff: str | None = None
    why: str | None = None
    tokens: Whole | None = None
    train_tokens: Whole | None = None
    train_rows: Whole | None = None
    train_rows_in_table: Whole | None = None
    test_rows: Whole | None = None
    test_rows_in_table: Whole | None = None


class PairMetrics(Record):
    """What was measured of the map of one layer pair.

    Attributes:
        fit: How the map came about, in words.
        train: Figures on train rows (a random 8,192 of them at most).
        val: Figures on validation rows.
        test: Figures on all test rows.
        baselines: Test figures of ``mean``, ``identity``, ``random_rotation``, ``shuffled``, ``token`` (the best
            prediction from the source's current token alone) and ``closed_form`` (the optimum that a trained map is
            judged by), and of a compressed run ``pca`` and ``strided``; null where there is no such map.
        token: How the baseline ``token`` was fitted; null where there is none.
        by_role: Rows of every role that the map was fitted to (``train``), chosen by (``val``) and scored on
            (``test``).
        by_mask: Test figures without and with attention sinks.
        cka: Debiased CKA before the map and after it.
        reasons: Why a figure is null, by its place, such as ``test.cka_debiased``.
        warnings: What a careful reader would object to.
        rate: What a compressed run sends.
        rate_distortion: Its point of the rate-distortion table.
    """

    always: ClassVar[tuple[str, ...]] = ("test", "baselines", "warnings")

    fit: str | None = None
    train: Scores | None = None
    val: Scores | None = None
    test: Scores = Scores()
    baselines: Table[Baseline | None] = EMPTY
    token: TokenFit | None = None
    by_role: Table[Table[Whole]] = EMPTY
    by_mask: MaskScores = MaskScores()
    cka: CkaChange = CkaChange()
    reasons: Table[str] = EMPTY
    warnings: Findings = ()
    rate: Rate | None = None
    rate_distortion: RatePoint | None = None


class LayerMap(Record):
    """How ``--layer-map auto`` chose the target layer of every source layer.

    Attributes:
        source: Model name.
        target: Model name.
        fit: Type of the closed form whose validation R2 decided.
        source_layers: The rows of ``val_r2``.
        target_layers: Its columns.
        val_r2: ``(source layers, target layers)``, validation R2 of every two layers.
        chosen: The target layer of every source layer.
    """

    source: str = ""
    target: str = ""
    fit: str = ""
    source_layers: tuple[Whole, ...] = ()
    target_layers: tuple[Whole, ...] = ()
    val_r2: Matrix = ()
    chosen: tuple[Whole, ...] = ()


class Metrics(Record):
    """Contents of ``metrics.json``: what a run measured, by layer pair.

    Attributes:
        type: The run's type of map, such as ``procrustes``.
        pairs: By layer pair, ``<source>:<layer>-><target>:<layer>``; a joint map names all its source layers,
            ``<source>:<k>+<k>-><target>:<layer>``.
        roles: The roles whose rows the maps were fitted to and scored on (``--roles``); null for all.
        layer_map: One for every direction, of a run with ``--layer-map auto``.
        judged: Version of the table of findings that the file was judged by; absent in files of earlier versions.
    """

    file: ClassVar[str] = "metrics.json"
    made_by: ClassVar[str] = "align train"
    always: ClassVar[tuple[str, ...]] = ("type", "pairs")

    type: str = ""
    pairs: Table[PairMetrics] = EMPTY
    roles: tuple[str, ...] | None = None
    layer_map: tuple[LayerMap, ...] = ()
    judged: Whole | None = None

    def to_pandas(self) -> pd.DataFrame:
        """One row for every layer pair and set of figures: ``pair``, ``split``, ``map``, and the figures.

        ``split`` is ``train``, ``val``, ``test``, ``masked`` or ``kept``; ``map`` is the run's type or a baseline's
        name. Intervals become columns ``<figure>_low`` and ``<figure>_high``.
        """
        rows = []
        for key, pair in self.pairs.items():
            blocks: list[tuple[str, str, Scores | None]] = [
                (split, self.type, block) for split, block in (("train", pair.train), ("val", pair.val))
            ]
            blocks.append(("test", self.type, pair.test))
            blocks += [("test", name, block) for name, block in pair.baselines.items()]
            blocks += [("masked", self.type, pair.by_mask.masked), ("kept", self.type, pair.by_mask.kept)]
            rows += [
                {"pair": key, "split": split, "map": name, **flat(block)} for split, name, block in blocks if block
            ]
        return frame(rows)


# documents.json ----------------------------------------------------------------------------------------------------


class PairDocuments(Record):
    """Sums over each test document of one layer pair, from which intervals, and differences of two runs, are computed.

    Empty where the store holds no rows of these layers. The lists have one element a document.

    Attributes:
        documents: Document numbers in the store, ascending.
        n: Rows of each.
        sst: Squared distance of the true states from the target's train mean, summed over rows and dimensions.
        sse: Squared errors, summed likewise, by map: ``map`` (the run's own) and each baseline; null where a
            prediction is not finite.
    """

    documents: tuple[Whole, ...] = ()
    n: tuple[Whole, ...] = ()
    sst: tuple[Amount | None, ...] = ()
    sse: Table[tuple[Amount | None, ...]] = EMPTY

    def faults(self) -> Iterator[Fault]:
        """Lists of another length than that of the documents, or documents out of order."""
        lists: dict[tuple[str | int, ...], Sequence[Any]] = {("n",): self.n, ("sst",): self.sst}
        lists |= {("sse", name): values for name, values in self.sse.items()}
        yield from unlike_lengths(lists, len(self.documents), "documents")
        if any(a >= b for a, b in pairwise(self.documents)):
            yield ("documents",), "is not ascending, expected each document once and in order"


class Documents(Record):
    """Contents of ``documents.json``: R2 = 1 - sum SSE / sum SST, before the sums over documents.

    Attributes:
        pairs: By layer pair.
    """

    file: ClassVar[str] = "documents.json"
    made_by: ClassVar[str] = "align train"
    always: ClassVar[tuple[str, ...]] = ("pairs",)

    pairs: Table[PairDocuments] = EMPTY

    def to_pandas(self) -> pd.DataFrame:
        """One row for every layer pair and document: ``pair``, ``document``, ``n``, ``sst`` and ``sse_<map>``."""
        rows = []
        for key, pair in self.pairs.items():
            sse = {f"sse_{name}": values for name, values in pair.sse.items()}
            for at, (document, n, sst) in enumerate(zip(pair.documents, pair.n, pair.sst, strict=True)):
                rows.append(
                    {"pair": key, "document": document, "n": n, "sst": sst, **{k: v[at] for k, v in sse.items()}}
                )
        return frame(rows)


# eval_epoch_<n>.json -----------------------------------------------------------------------------------------------


class EpochText(Record):
    """How the target goes on with a prompt whose states went through the epoch's map.

    Attributes:
        pair: Layer pair.
        prompt: Text.
        text: The continuation with mapped states.
        target_alone: The target's own.
    """

    pair: str = ""
    prompt: str = ""
    text: str | None = None
    target_alone: str | None = None


class PairEpoch(Record):
    """What one epoch measured of one layer pair.

    Attributes:
        val_loss: Validation MSE over that of predicting the train mean, 1 - R2; the same for every choice of losses.
        train_loss: Weighted loss, mean over the epoch's steps; null for epoch 0, the map before training.
        train_parts: Mean of each loss component over the steps, unweighted; ``infonce_chance`` is what InfoNCE is for a
            map that has learned nothing.
        val_parts: Mean of every loss component over the validation rows, trained on or not; ``infonce_top1``,
            ``infonce_chance`` and ``infonce_gain`` (nats below chance) beside. Empty for a closed form.
        recent_loss: Train loss over the epoch's last 100 steps at most.
        grad_norm: Mean norm of the gradient before clipping.
        cka: ``cka_debiased`` of ``val``.
        cosine_sim: ``cosine`` of ``val``.
        val: Figures on the validation rows.
        stitched: With ``--eval-models`` the pair's part of a `stitch.json` over validation text, see StitchedPair.
    """

    val_loss: Number | None = None
    train_loss: Number | None = None
    train_parts: Table[Number | None] = EMPTY
    val_parts: Table[Number | None] = EMPTY
    recent_loss: Number | None = None
    grad_norm: Number | None = None
    cka: Number | None = None
    cosine_sim: Number | None = None
    val: Scores = Scores()
    stitched: Table[Any] | None = None


class EpochRecord(Record):
    """Contents of ``eval_epoch_<n>.json``. The figures at the top are means over the pairs still training.

    Attributes:
        epoch: Number; 0 is the map before training.
        val_loss: Mean of the pairs'.
        train_loss: Mean of the pairs'.
        cka: Mean of the pairs'.
        cosine_sim: Mean of the pairs'.
        generations: With ``--eval-models`` a continuation of each of five prompts, by pair.
        pairs: By layer pair.
    """

    file: ClassVar[str] = "eval_epoch_0.json"
    made_by: ClassVar[str] = "align train"
    always: ClassVar[tuple[str, ...]] = ("epoch", "pairs")

    epoch: Whole = 0
    val_loss: Number | None = None
    train_loss: Number | None = None
    cka: Number | None = None
    cosine_sim: Number | None = None
    generations: tuple[EpochText, ...] = ()
    pairs: Table[PairEpoch] = EMPTY

    def to_pandas(self) -> pd.DataFrame:
        """One row for every layer pair: ``epoch``, ``pair``, the losses, their parts and the validation figures."""
        return frame(
            {
                "epoch": self.epoch,
                "pair": key,
                **flat(pair),
                **{f"train_{name}": value for name, value in pair.train_parts.items()},
                **{f"val_{name}": value for name, value in pair.val_parts.items()},
                **{f"val_{name}": value for name, value in flat(pair.val).items()},
            }
            for key, pair in self.pairs.items()
        )


# cka.json ----------------------------------------------------------------------------------------------------------


class SimilarityTables(Record):
    """CKA between all layers over one set of rows.

    Attributes:
        cross: ``(layers of the first model, layers of the second)``.
        within: By model ``(layers, layers)``.
        n: Rows.
        estimator: Of these figures.
        documents: Documents that the rows are of.
        effective_documents: How many documents of equal length would weigh as much.
        reasons: Why a cell is null, by ``<model>:<layer> <model>:<layer>``.
        sigmas: Bandwidth of the RBF kernel by ``<model>:<layer>``, in units of the states.
        batches: Minibatches, with ``--estimator minibatch``.
        batch_rows: Rows in each.
    """

    cross: Matrix = ()
    within: Table[Matrix] = EMPTY
    n: Whole | None = None
    estimator: str | None = None
    documents: Whole | None = None
    effective_documents: Amount | None = None
    reasons: Table[str] = EMPTY
    sigmas: Table[Number | None] | None = None
    batches: Whole | None = None
    batch_rows: Whole | None = None


class Floor(Record):
    """CKA of the same states with rows shuffled: what the estimator says of no relation at all, which is no floor.

    Attributes:
        cross: As the main ``cross``.
        n: Rows.
        method: How the pairing was destroyed.
        estimator: Of this figure.
        kernel: Of this figure.
        reason: Why there is none.
    """

    cross: Matrix = ()
    n: Whole | None = None
    method: str | None = None
    estimator: str | None = None
    kernel: str | None = None
    reason: str | None = None


class Exchanged(Record):
    """Values of layer pairs and what exchanged partners say of them, ``(layers of the first model, of the second)``.

    Attributes:
        value: Over the rows of this floor, with their true partners.
        mean: Mean over exchanges.
        p95: 95th percentile over exchanges; of a distance, where lower is closer, the 5th.
        p: (1 + exchanges at least as close as the value) / (1 + exchanges).
        p_max: The same with the closest of all layer pairs in each exchange, each in units of its own spread: corrected
            for the number of layer pairs.
        excess: Value less mean, of ``documents`` of a measure that is biased by how many rows there are.
        excess_ci95: Its 95 % interval over documents: of what is expected with as many rows.
    """

    value: Matrix = ()
    mean: Matrix = ()
    p95: Matrix = ()
    p: Matrix = ()
    p_max: Matrix = ()
    excess: Matrix = ()
    excess_ci95: tuple[tuple[Interval | None, ...], ...] = ()


class PermutationFloor(Exchanged):
    """A measure with partners exchanged so that the rest of what rows have in common is kept.

    Attributes:
        opposite: From the second model to the first, of a measure with a direction; same rows and columns.
        rows: Rows that can be exchanged.
        of: Of how many.
        documents: Documents that they come from.
        draws: Exchanges; 0 where there is no floor.
        seed: Of rows and exchanges.
        estimator: Of the main figure's floor.
        reason: Why there is none.
    """

    opposite: Exchanged | None = None
    rows: Whole | None = None
    of: Whole | None = None
    documents: Whole | None = None
    draws: Whole | None = None
    seed: Whole | None = None
    estimator: str | None = None
    reason: str | None = None


class EffectiveRank(Record):
    """How many directions a layer's states vary in.

    Attributes:
        entropy: exp of the entropy of the covariance's eigenvalues as shares of their sum.
        participation: (sum of eigenvalues)^2 / sum of their squares.
    """

    entropy: Number | None = None
    participation: Number | None = None


class SampleRows(Record):
    """The rows that ``--measures`` see.

    Attributes:
        rows: How many.
        of: Of how many.
        documents: Documents that they come from.
        draws: Resamples of documents behind each interval; 0 for none.
        seed: Of the choice.
    """

    rows: Whole | None = None
    of: Whole | None = None
    documents: Whole | None = None
    draws: Whole | None = None
    seed: Whole | None = None


class MeasureIntervals(Record):
    """95 % intervals of a measure, of the shapes of its values; null where there is none.

    Attributes:
        reason: Why there is none at all.
        cross: Of ``cross``.
        reverse: Of ``reverse``.
        within: Of ``within``.
    """

    cross: tuple[tuple[Interval | None, ...], ...] = ()
    reverse: tuple[tuple[Interval | None, ...], ...] = ()
    within: Table[tuple[tuple[Interval | None, ...], ...]] = EMPTY
    reason: str | None = None


class SimilarityIntervals(Record):
    """95 % intervals of the main figure over documents; null where there is none.

    The half width is that of debiased CKA without each document in turn, over a sample of the rows, by the jackknife.

    Attributes:
        cross: Of ``cross``.
        within: Of ``within``.
        rows: Rows of the sample.
        of: Of how many.
        documents: Documents that they come from.
        effective_documents: How many documents of equal length would weigh as much; the t distribution has one degree
            of freedom less.
        reason: Why there is none at all.
    """

    cross: tuple[tuple[Interval | None, ...], ...] = ()
    within: Table[tuple[tuple[Interval | None, ...], ...]] = EMPTY
    rows: Whole | None = None
    of: Whole | None = None
    documents: Whole | None = None
    effective_documents: Amount | None = None
    reason: str | None = None


class MeasureFloor(Record):
    """A measure on states that have nothing in common.

    Attributes:
        cross: As the measure's.
        reverse: As the measure's.
        reasons: Why a cell is null.
        n: Rows.
    """

    cross: Matrix = ()
    reverse: Matrix = ()
    reasons: Table[str] = EMPTY
    n: Whole | None = None


class Halves(Record):
    """A measure on two disjoint halves of the documents.

    Attributes:
        cross: Absolute difference of the two values in every cell.
        largest: The largest.
        rows: Rows of each half, ``rows_first`` and ``rows_second``.
    """

    cross: Matrix = ()
    largest: Number | None = None
    rows: Table[Number | None] = EMPTY


class Ceilings(Record):
    """What a measure says of states that are the same but for how they were stored or read.

    Attributes:
        rounding: Of every layer and itself rounded to the store's format once more, by model.
        twice: Of every layer and a second reading of the same text by the same weights, by model; null for none.
        halves: What changes between two halves of the documents.
        reasons: Why a value is null.
    """

    rounding: Table[tuple[Number | None, ...]] = EMPTY
    twice: Table[tuple[Number | None, ...]] | None = None
    halves: Halves | None = None
    reasons: Table[str] = EMPTY


class Measure(Record):
    """A measure over a sample of rows, with what it says of nothing and of the same.

    Attributes:
        title: For people.
        closer: ``higher`` or ``lower`` values mean more alike.
        symmetric: Whether both directions agree.
        bounds: Lowest and highest possible value; null for none.
        cross: ``cross[i][j]`` from layer i of the first model to layer j of the second.
        reverse: ``reverse[i][j]`` from layer j of the second model to layer i of the first, of a measure with a
            direction.
        within: By model ``(layers, layers)``.
        ci95: 95 % intervals over documents.
        facts: Numbers that a value depends on, by ``<model>:<layer> <model>:<layer>``.
        reasons: Why a cell is null.
        floors: ``shuffled`` (rows shuffled) and ``noise`` (Gaussian rows of the same covariance): controls of the
            measure, which documents and tokens in common exceed.
        permutations: ``documents`` (documents in each other's place) and ``token`` (partners of the same source token
            in another document).
        ceilings: What the same states say.
    """

    title: str = ""
    closer: str = "higher"
    symmetric: Flag = True
    bounds: Interval = (None, None)
    cross: Matrix = ()
    reverse: Matrix = ()
    within: Table[Matrix] = EMPTY
    ci95: MeasureIntervals = MeasureIntervals()
    facts: Table[Table[Number | None]] = EMPTY
    reasons: Table[str] = EMPTY
    floors: Table[MeasureFloor] = EMPTY
    permutations: Table[PermutationFloor] = EMPTY
    ceilings: Ceilings = Ceilings()


class Similarity(SimilarityTables):
    """Contents of ``cka.json``: all layers of two models against each other and within each.

    Attributes:
        models: The two names; equal for a model with itself.
        layers: Layer numbers by model; the rows and columns of the matrices.
        widths: Width of the residual stream by model.
        estimator: ``debiased`` (over pairs of rows of different documents), ``debiased-rows`` (of different rows),
            ``biased`` or ``minibatch``. A store that holds moments alone has ``debiased-rows`` where ``debiased`` was
            asked for.
        correct_features: Whether self terms leave out a dimension with itself.
        kernel: ``linear`` or ``rbf``.
        null: The main figure of shuffled rows.
        permutations: The floors of the main figure: ``documents`` (documents in each other's place) and ``token``
            (partners of the same source token in another document).
        ci95: Intervals of the main figure over documents.
        masked_rows: Rows that are attention sinks.
        keep_sinks: Whether the main figures include them.
        roles: The roles whose rows are compared (``--roles``); null for all.
        unmasked: The same with sinks, where the main figures leave them out.
        masked: The same without sinks, where the main figures include them.
        effective_rank: By model and layer number.
        store: ``path`` and ``fingerprint`` of the store.
        sample: The rows that the measures see.
        measures: By name.
        warnings: What a careful reader would object to.
        judged: Version of the table of findings that the file was judged by; absent in files of earlier versions.
    """

    file: ClassVar[str] = "cka.json"
    made_by: ClassVar[str] = "align cka"
    always: ClassVar[tuple[str, ...]] = ("models", "layers", "cross")

    models: tuple[str, ...] = ()
    layers: Table[tuple[Whole, ...]] = EMPTY
    widths: Table[Whole] = EMPTY
    estimator: str | None = None
    correct_features: Flag | None = None
    kernel: str | None = None
    null: Floor | None = None
    permutations: Table[PermutationFloor] = EMPTY
    ci95: SimilarityIntervals | None = None
    masked_rows: Whole | None = None
    keep_sinks: Flag | None = None
    roles: tuple[str, ...] | None = None
    unmasked: SimilarityTables | None = None
    masked: SimilarityTables | None = None
    effective_rank: Table[Table[EffectiveRank]] = EMPTY
    store: Table[str | None] = EMPTY
    sample: SampleRows | None = None
    measures: Table[Measure] = EMPTY
    warnings: Findings = ()
    judged: Whole | None = None

    def faults(self) -> Iterator[Fault]:
        """Models without layers, and matrices that are not of the layers' shape."""
        if not 1 <= len(self.models) <= 2:
            yield ("models",), f"is a list of {len(self.models)}, expected one of one model or two"
            return
        missing = [name for name in self.models if name not in self.layers]
        if missing:
            names = " and ".join(map(shown, self.models))
            yield ("layers",), f"has no {shown(missing[0])}, expected the layers of {names}"
            return
        first, last = self.models[0], self.models[-1]
        if not self.cross and self.layers[first] and self.layers[last]:
            yield ("cross",), "is empty, expected a row for every layer of the first model"
        for place, matrix, rows, columns in self._matrices():
            shape = (len(self.layers.get(rows, ())), len(self.layers.get(columns, ())))
            if matrix and [len(row) for row in matrix] != [shape[1]] * shape[0]:
                yield place, f"is a matrix of another shape, expected {shape[0]} x {shape[1]} by the layers"

    def _matrices(self) -> Iterator[tuple[tuple[str | int, ...], Sequence[Sequence[Any]], str, str]]:
        """Every matrix, its place, and the models of its rows and of its columns."""
        ends = self.models[0], self.models[-1]
        blocks: list[tuple[tuple[str | int, ...], Any]] = [((), self)]
        blocks += [((name,), getattr(self, name)) for name in ("null", "ci95", "unmasked", "masked")]
        blocks += [(("permutations", name), floor) for name, floor in self.permutations.items()]
        for name, measure in self.measures.items():
            at = ("measures", name)
            blocks += [(at, measure), ((*at, "ci95"), measure.ci95)]
            blocks += [((*at, "floors", floor), each) for floor, each in measure.floors.items()]
            blocks += [((*at, "permutations", floor), each) for floor, each in measure.permutations.items()]
        for place, block in blocks:
            for key in ("cross", "reverse", "value", "mean", "p95", "p", "p_max", "excess", "excess_ci95"):
                if isinstance(matrix := getattr(block, key, None), tuple):
                    yield (*place, key), matrix, *ends
            for name, matrix in getattr(block, "within", EMPTY).items():
                yield (*place, "within", name), matrix, name, name

    def to_pandas(self) -> pd.DataFrame:
        """One row for every layer of the first model and every layer of the second.

        Columns are ``first_layer``, ``second_layer``, ``cka``, ``cka_low`` and ``cka_high`` (the ends of its interval),
        ``unmasked`` or ``masked``, and one of every measure by its name; CKA over the sample of the measures is
        ``cka_sample``. Of the floors ``documents`` and ``token``
        there are ``<floor>_value`` over their rows, ``<floor>_mean``, ``<floor>_p95``, ``<floor>_p``,
        ``<floor>_p_max``.
        """
        first, second = self.models[0], self.models[-1]
        columns: dict[str, Matrix] = {"cka": self.cross}
        for end, key in enumerate(("cka_low", "cka_high")):
            intervals = () if self.ci95 is None else self.ci95.cross
            columns[key] = tuple(tuple(ends and ends[end] for ends in row) for row in intervals)
        for name, floor in self.permutations.items():
            columns |= {f"{name}_{key}": getattr(floor, key) for key in ("value", "mean", "p95", "p", "p_max")}
        columns |= {} if self.unmasked is None else {"unmasked": self.unmasked.cross}
        columns |= {} if self.masked is None else {"masked": self.masked.cross}
        columns |= {f"{name}_sample" if name == "cka" else name: m.cross for name, m in self.measures.items()}
        return frame(
            {"first_layer": a, "second_layer": b, **{name: matrix[i][j] for name, matrix in columns.items() if matrix}}
            for i, a in enumerate(self.layers[first])
            for j, b in enumerate(self.layers[second])
        )


class WithoutDocument(Record):
    """A measure without each document.

    Attributes:
        values: By ``<model>:<layer> <model>:<layer>``, in the order of ``documents``.
        reason: Why there are none.
    """

    values: Table[tuple[Number | None, ...]] = EMPTY
    reason: str | None = None


class MainDocuments(WithoutDocument):
    """Debiased CKA over the sample of the floors without each document, row effects fitted anew.

    Attributes:
        documents: Numbers of the documents in the store.
        rows: Rows of each in the sample.
        effective_documents: How many documents of equal length would weigh as much.
        kernel: ``linear``, or ``rbf`` with the bandwidth of all rows of the sample.
        reason: Why there are no intervals.
    """

    documents: tuple[Whole, ...] = ()
    rows: tuple[Whole, ...] = ()
    effective_documents: Amount | None = None
    kernel: str | None = None

    def faults(self) -> Iterator[Fault]:
        """Lists of another length than that of the documents."""
        lists: dict[tuple[str | int, ...], Sequence[Any]] = {("rows",): self.rows}
        lists |= {("values", pair): values for pair, values in self.values.items()}
        yield from unlike_lengths(lists, len(self.documents), "documents")


class SimilarityDocuments(Record):
    """Contents of ``cka_documents.json``: every figure without each document, for intervals of any kind.

    Attributes:
        models: The two names.
        main: The main figure; null where it has no intervals.
        documents: Numbers of the documents in the store that the measures see.
        rows: Rows of each in the sample of the measures.
        measures: By name.
    """

    file: ClassVar[str] = "cka_documents.json"
    made_by: ClassVar[str] = "align cka"
    always: ClassVar[tuple[str, ...]] = ("models",)

    models: tuple[str, ...] = ()
    main: MainDocuments | None = None
    documents: tuple[Whole, ...] = ()
    rows: tuple[Whole, ...] = ()
    measures: Table[WithoutDocument] = EMPTY

    def faults(self) -> Iterator[Fault]:
        """Lists of another length than that of the documents."""
        lists: dict[tuple[str | int, ...], Sequence[Any]] = {("rows",): self.rows}
        for name, measure in self.measures.items():
            lists |= {("measures", name, "values", pair): values for pair, values in measure.values.items()}
        yield from unlike_lengths(lists, len(self.documents), "documents")

    def to_pandas(self) -> pd.DataFrame:
        """One row for every measure, pair of layers and document: ``value`` is that of all other documents.

        The main figure is the measure ``main``.
        """
        blocks = [(name, block.values, self.documents, self.rows) for name, block in self.measures.items()]
        if self.main is not None:
            blocks.insert(0, ("main", self.main.values, self.main.documents, self.main.rows))
        return frame(
            {"measure": name, "pair": pair, "document": document, "rows": count, "value": value}
            for name, table, documents, rows in blocks
            for pair, values in table.items()
            for document, count, value in zip(documents, rows, values, strict=True)
        )


# Readers and writers -----------------------------------------------------------------------------------------------


def read_metrics(where: Path | str) -> Metrics:
    """Read ``metrics.json``.

    Args:
        where: Run directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(Metrics, where)


def read_documents(where: Path | str) -> Documents:
    """Read ``documents.json``.

    Args:
        where: Run directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(Documents, where)


def read_epoch(where: Path | str, number: int = 0) -> EpochRecord:
    """Read ``eval_epoch_<n>.json``.

    Args:
        where: Run directory, or the file.
        number: Which epoch, in a directory.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(EpochRecord, where, name=epoch_file(number))


def read_epochs(run: Path | str) -> tuple[EpochRecord, ...]:
    """Read all epochs of a run, in order; none where it has none.

    Args:
        run: Run directory.

    Raises:
        AdapterError: There is no such directory.
        CorruptDataError: One is damaged.
    """
    place = Path(run)
    if not place.is_dir():
        raise AdapterError(f"no run directory {str(place)!r}; make one with `align train`")
    return tuple(read_epoch(place / name) for _, name in epoch_files(place))


def read_similarity(where: Path | str) -> Similarity:
    """Read ``cka.json``.

    Args:
        where: Its directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(Similarity, where)


def write_metrics(run: Path, metrics: Metrics) -> Path:
    """Write ``metrics.json`` into a run directory and return its path."""
    return write(metrics, run)


def write_documents(run: Path, documents: Documents) -> Path:
    """Write ``documents.json`` into a run directory and return its path."""
    return write(documents, run)


def write_epoch(run: Path, epoch: EpochRecord) -> Path:
    """Write ``eval_epoch_<n>.json`` into a run directory and return its path."""
    return write(epoch, run, name=epoch_file(epoch.epoch))


def read_similarity_documents(where: Path | str) -> SimilarityDocuments:
    """Read ``cka_documents.json``.

    Args:
        where: Its directory, or the file.

    Raises:
        AdapterError: There is none.
        CorruptDataError: It is damaged.
    """
    return read(SimilarityDocuments, where)


def write_similarity_documents(directory: Path, documents: SimilarityDocuments) -> Path:
    """Write ``cka_documents.json`` into a directory and return its path."""
    return write(documents, directory)


def write_similarity(directory: Path, similarity: Similarity) -> Path:
    """Write ``cka.json`` into a directory and return its path."""
    return write(similarity, directory)


def epoch_file(number: int) -> str:
    """Name of an epoch's file.

    Args:
        number: Which epoch.
    """
    return f"eval_epoch_{number}.json"


def epoch_files(run: Path) -> list[tuple[int, str]]:
    """Number and name of the epoch files in a run directory, in order.

    Args:
        run: Run directory.
    """
    names = (entry.name for entry in run.iterdir())
    return sorted((int(found[1]), name) for name in names if (found := _EPOCH_FILE.fullmatch(name)))


def kind_of(name: str) -> type[Record] | None:
    """The record that a file of this name holds; None for a file that is no result of `align`.

    Args:
        name: File name.
    """
    if _EPOCH_FILE.fullmatch(name):
        return EpochRecord
    return {kind.file: kind for kind in (Metrics, Documents, Similarity, SimilarityDocuments)}.get(name)
