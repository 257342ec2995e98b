"""Every finding there is: its code, how grave it is, its thresholds, what it means and what to do about it.

This is the only place where a finding has a threshold. What measures compares with :func:`limit` and writes values and
limits into its result (:func:`align.judging.findings.finding`); pages, tables and notebooks render what they read
(:func:`align.judging.sentences.sentence`). ``scripts/findings`` makes the table in docs/reading-results.md from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Version of this table, written into every file that was judged by it as ``judged``.
JUDGED = 1

#: Worth knowing; limits what a figure says; the figure is not what it is called.
NOTE, WARNING, INVALID = "note", "warning", "invalid"
LEVELS = (INVALID, WARNING, NOTE)


@dataclass(frozen=True)
class Code:
    """One kind of finding.

    Attributes:
        level: ``note``, ``warning`` or ``invalid``.
        meaning: For the documentation, with the limits in braces.
        says: Templates of its sentence, with values and limits in braces; the first for which all are known is used.
            ``{n:#row}`` is a number of rows in words.
        remedy: What to do about it, the end of the sentence; empty where the sentence says all.
        limits: Thresholds by name.
    """

    level: str
    meaning: str
    says: tuple[str, ...]
    remedy: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def means(self) -> str:
        """The meaning with the limits in place."""
        return self.meaning.format(**self.limits)


CODES: Mapping[str, Code] = {
    # What makes a figure something else than it is called comes first; within a level pages keep this order.
    "different-stores": Code(
        INVALID,
        "the runs of a report were fitted and scored on different stores",
        ("these runs were fitted and scored on {stores} different stores",),
        "do not compare figures of one with figures of another",
    ),
    "self-injection": Code(
        INVALID,
        "putting the target's own states back changes its logits (in files that do not say so: its loss, by more than "
        "{nats} nats per token)",
        (
            "injecting the target's own states is not neutral (clean {clean:.3f}, self {own:.3f} nats/token)",
            "injecting the target's own states changes the logits",
        ),
        "do not trust the other conditions either",
        {"nats": 1e-3},
    ),
    "side-channel": Code(
        INVALID,
        "later blocks learn of the text past the stream at the target's layer: figures are not of the states alone",
        (
            ("the swap test leaks {leak:.2g} at the target's layer: later blocks also learn of the text past the "
            "stream, so the figures are not about the injected states alone"),
            ("the swap test leaks without bound at the target's layer: later blocks also learn of the text past the "
            "stream, so the figures are not about the injected states alone"),
        ),
    ),
    "after-final-norm": Code(
        INVALID,
        "the last layer of a foreign store may lie after the final norm, where nothing can be injected",
        (
            ("layer {layer} is the last of {model}, and the store says {convention!r}: these states may lie after the "
            "final norm, which is no residual stream and cannot be injected"),
            ("layer {layer} is the last of {model}, and the store does not say how it counts layers: these states may "
            "lie after the final norm, which is no residual stream and cannot be injected"),
        ),
        "use layers below it, or extract again with `featstore extract`",
    ),
    "text-near-chance": Code(
        INVALID,
        "the interval of accuracy with the text itself reaches down to chance: the target cannot do the task",
        (
            ("the text itself gives only {text:.0%} where chance is {chance:.0%}: this model cannot do the task, so "
            "states cannot be seen to carry anything"),
        ),
        "use an easier task or a larger model",
    ),
    "text-no-better-than-silent": Code(
        INVALID,
        "with the text no more questions are answered right than without it",
        (
            ("with the text {text:.0%} are right, without it {silent:.0%}: the context makes no clear difference "
            "({first_alone} to {second_alone} questions, p {p:.2g})"),
        ),
    ),
    "sinks-kept": Code(
        WARNING,
        "attention sinks are in; they can dominate R2 and CKA",
        ("attention sinks are included; a few huge rows can dominate R2 and CKA",),
        "compare the masked figures, or leave out --keep-sinks",
    ),
    "sink-dominated": Code(
        WARNING,
        "debiased CKA differs by more than {shift} with and without attention sinks",
        (
            ("CKA is {masked:.3f} with attention sinks masked and {kept:.3f} with them in: the sinks make the "
            "difference"),
        ),
        "report the masked figure, and both where sinks matter",
        {"shift": 0.1},
    ),
    "token-explains": Code(
        WARNING,
        "the source's current token alone predicts as well: the interval of partial R2, or of the gain in nats, is not "
        "above 0, or partial R2 is at most {margin}",
        (
            ("mapped states lower the loss by {nats:.3f} nats per token [{low:.3f}, {high:.3f}] from where the source "
            "token alone brings it, an interval that is not above 0: what is recovered may be the token's, and nothing "
            "is shown about its context"),
            ("test R2 {r2:.3f}, and {token:.3f} for a prediction from the source's current token alone; of what that "
            "leaves the map explains {partial:.3f} [{low:.3f}, {high:.3f}] (partial R2): the two models may share no "
            "more than the token that both have just read"),
            ("test R2 {r2:.3f}, and {token:.3f} for a prediction from the source's current token alone; of what that "
            "leaves the map explains {partial:.3f} (partial R2): the two models may share no more than the token that "
            "both have just read"),
            ("test R2 {r2:.3f}, and {token:.3f} for a prediction from the source's current token alone: nothing is "
            "left to explain"),
        ),
        "do not speak of context; try other layers, more text or another type of map",
        {"margin": 0.01, "rounding": 1e-6},
    ),
    "no-better-than-controls": Code(
        WARNING,
        "the best control is as good: test R2 is above it by at most {margin}",
        (
            ("test R2 {r2:.3f} does not beat the best control ({control}, {best:.3f}): these layers may have nothing "
            "in common that such a map can express"),
        ),
        "try other layers, more text or --type affine",
        {"margin": 0.01},
    ),
    "no-better-than-control": Code(
        WARNING,
        "a way of sending states is not clearly better than its random vectors, or than the states of another example",
        (
            (
                "{mapped:.0%} right with mapped states, {reached:.0%} with this control: not clearly better "
                "({first_alone} to {second_alone} questions, p {p:.2g})"
            ),
        ),
    ),
    "retrieval-at-chance": Code(
        WARNING,
        "top-1 is below {times} times chance",
        (
            ("retrieval top-1 {top1:.3f} is near chance ({chance:.3f}): a mapped state does not tell which token it "
            "came from, whatever R2 says"),
        ),
        "look at r2_without_top_dims",
        {"times": 3},
    ),
    "infonce-at-chance": Code(
        WARNING,
        "the contrastive loss gained less than {gain:.0%} on the logarithm of the batch size",
        (
            "InfoNCE {loss:.2f} is near {chance:.2f}, the logarithm of the batch size: nothing was learned from it",
        ),
        "lower --temperature, raise its weight, or leave it out of --loss",
        {"gain": 0.1},
    ),
    "few-documents": Code(
        WARNING,
        "under {wanted} test documents (of stitched losses: effective ones), so that intervals are wide, or so few "
        "that there is no interval",
        (
            ("{documents:#document} ({effective:.1f} effective), and an interval takes {needed}: no figure can be told "
            "from chance"),
            "{documents:#document}, and an interval takes {needed}: no figure can be told from chance",
            ("intervals come from {documents:#document} ({effective:.1f} effective): they are wide, and what holds of "
            "these documents need not hold of others"),
            "{documents:#document}: intervals are wide, and what holds of these documents need not hold of others",
        ),
        "extract more documents",
        {"wanted": 10},
    ),
    "few-rows": Code(
        WARNING,
        "fewer than {per_dimension} pairs of rows (of a map: train pairs) for each dimension: held-out figures suffer",
        (
            ("{rows:,} pairs for width {width}: under {per_dimension} per dimension, where {wanted:,} are wanted; "
            "figures are noisy, and held-out ones suffer"),
        ),
        "extract more text, or fit fewer parameters",
        {"per_dimension": 10},
    ),
    "near-singular": Code(
        WARNING,
        "the train rows say nothing about some source directions: there are no more rows than dimensions, or more than "
        "{share:.0%} of the directions vary less than rounding does",
        (
            ("{rows} train pairs span at most {spanned} of {width} source dimensions: what the map does elsewhere is "
            "left to the solver, not to the data"),
            ("{below:.1%} of the {width} source directions vary less than rounding does: what the map does there is "
            "left to the solver, not to the data"),
        ),
        "extract more text, or fit fewer dimensions (reduced-rank, or procrustes within principal components)",
        {"share": 0.01},
    ),
    "coverage": Code(
        WARNING,
        "under {least:.0%} of one side's tokens have a partner",
        (
            ("only {covered:.0%} of one side's tokens have a partner; figures speak for these alone, and tokens "
            "without one are mapped unseen"),
        ),
        "read the stitched loss beside R2",
        {"least": 0.8},
    ),
    "overfit": Code(
        WARNING,
        "train R2 exceeds validation or test R2 by more than {gap}",
        (
            "R2 falls from {train:.3f} on train to {validation:.3f} on validation and {test:.3f} on test",
            "R2 falls from {train:.3f} on train to {validation:.3f} on validation",
            "R2 falls from {train:.3f} on train to {test:.3f} on test",
        ),
        "extract more text, or fit fewer parameters (--type procrustes, a smaller --rank)",
        {"gap": 0.1},
    ),
    "loses-to-closed-form": Code(
        WARNING,
        "a trained map is more than {margin} below the optimum of what it can express",
        ("test R2 {r2:.3f} is below the {optimum} optimum {best:.3f}",),
        "train longer or with another learning rate",
        {"margin": 0.01},
    ),
    "lambda-at-grid-end": Code(
        WARNING,
        "validation chose the strongest ridge there was",
        (
            ("validation chose the strongest ridge of the grid (lambda {lam:g}): the map is shrunk towards the mean as "
            "far as it goes, and there is little to learn from these rows"),
        ),
        "extract more text, or use --type procrustes",
    ),
    "still-improving": Code(
        WARNING,
        "the last epoch was the best: training stopped before it was done",
        ("epoch {epoch}, the last, was the best: training stopped before it was done; --epochs {twice} goes on",),
    ),
    "no-scale": Code(
        WARNING,
        "a rotation without a factor (`--no-scale`), alone or as skip, where its factor would be below {low} or above "
        "{high}, or raise validation R2 of the rotation by more than {margin}",
        (
            ("the rotation has no factor, where least squares gives it {factor:.3g}, and validation R2 of the rotation "
            "alone would go from {before:.3f} to {after:.3f}: the two sides differ in norm, which no rotation and no "
            "map of low rank can mend"),
            ("the rotation has no factor, where least squares gives it {factor:.3g}: the two sides differ in norm, "
            "which no rotation and no map of low rank can mend"),
        ),
        "leave out --no-scale",
        {"low": 0.8, "high": 1.25, "margin": 0.01},
    ),
    "no-intercept": Code(
        WARNING,
        "a `linear` map's validation R2 is more than {margin} below that of the best affine map: states lie far from "
        "zero",
        (
            ("validation R2 is {without:.3f} and {with_one:.3f} with an intercept: states lie far from zero, and a map "
            "without an intercept has to spend directions on their means"),
        ),
        "use --type affine",
        {"margin": 0.01},
    ),
    "few-examples": Code(
        WARNING,
        "fewer than {wanted} examples of a task",
        ("{examples} examples: an interval is up to {wide:.2f} wide",),
        "use more, with --examples",
        {"wanted": 30},
    ),
    "undelivered": Code(
        WARNING,
        "summaries hold characters that the receiver's tokenizer cannot spell",
        (
            ("{summaries} of {of} summaries hold characters that the tokenizer of {target!r} cannot spell; they were "
            "delivered without these ({characters} in all)"),
        ),
    ),
    "biased-estimator": Code(
        WARNING,
        "CKA was asked for with `--estimator biased`",
        (
            ("the biased estimator is near 1 for any two layers where rows are few; only its distance from that of "
            "shuffled rows tells anything"),
        ),
    ),
    "high-null": Code(
        WARNING,
        "CKA of shuffled rows is above {null}",
        ("CKA of shuffled rows reaches {reached:.3f}: the estimator is biased upwards",),
        "use --estimator debiased",
        {"null": 0.05},
    ),
    "few-exchanges": Code(
        WARNING,
        "fewer than {exchanges} exchanges behind a floor: no p value can be small enough",
        ("{draws:#exchange} of partners cannot decide anything: no p value is below {smallest:.2f}",),
        "use --permutations 39",
        {"exchanges": 19},
    ),
    "undefined": Code(
        WARNING,
        "a measure is undefined for some pairs of layers",
        (
            "{undefined} of {cells} values are undefined: {reason}, and {others:#other reason}",
            "{undefined} of {cells} values are undefined: {reason}",
        ),
    ),
    "above-one": Code(
        WARNING,
        "values of a similarity that cannot be above 1 are",
        ("{above} of {cells} values are above 1, which only noise over few rows can do",),
        limits={"rounding": 1e-6},
    ),
    "failed-cell": Code(WARNING, "a cell of a sweep failed", ("{cell}: {why}",)),
    "unfinished-cell": Code(WARNING, "a cell of a sweep has no figures yet", ("{cell} has no figures yet",)),
    "unfinished-run": Code(
        WARNING,
        "a run has no map yet",
        ("there is no map yet; go on with: align train --resume --out {run}",),
    ),
    "torn-log": Code(
        WARNING,
        "`log.jsonl` ends in half a line",
        ("log.jsonl ends in half a line: training was cut short or runs",),
    ),
    "damaged-file": Code(
        WARNING, "members of a file are not of their types", ("left out of {lost}",)
    ),
    "lambda-at-grid-start": Code(
        NOTE,
        "validation chose the weakest ridge there was; harmless unless near-singular or overfit is reported, too",
        (
            ("validation chose the weakest ridge of the grid (lambda {lam:g}): the rows need none; harmless unless "
            "near-singular or overfit is reported, too"),
        ),
    ),
}  # fmt: skip


def limit(code: str, name: str) -> float:
    """A threshold.

    Args:
        code: Of the finding.
        name: Of the threshold.
    """
    return CODES[code].limits[name]
