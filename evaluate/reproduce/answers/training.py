"""Are ten epochs too many? What an epoch changes, in the store and in the model."""

from __future__ import annotations

from statistics import median

from align.settings import LoopSettings
from align.training.stopping import stopping_epoch
from evaluate.reproduce.answers.base import ANSWERED, Answer, Table, arrow, figure
from evaluate.reproduce.evidence import Evidence, Value
from evaluate.reproduce.pooled import r2_difference
from evaluate.results import StitchedPair

#: Of trained maps: those whose curves are whole.
CURVES = ("lora", "affine-adamw")
_SHOWN = 46
#: R2 that training may lose and still have reached the closed form.
_MARGIN = 0.01


def epochs(evidence: Evidence) -> Answer:
    """Where early stopping would have ended each training, and what the epochs after it brought."""
    own = LoopSettings()
    answer = Answer(
        "Are ten epochs too many?",
        "Ten epochs were trained, without a validation loss.",
    )
    rows: list[tuple[str, ...]] = []
    early, brought = 0, []
    for run in CURVES:
        for key in evidence.pairs(run):
            losses = evidence.curve(run, key, lambda epoch: epoch.val_loss)
            if len(losses) < 2:
                continue
            stop = stopping_epoch(losses, patience=own.patience, min_delta=own.min_delta)
            last = len(losses) - 1
            at = last if stop is None else stop
            best = min(range(len(losses)), key=losses.__getitem__)
            gain = min(losses[: at + 1]) - losses[best]
            early += at < last
            brought.append(gain)
            rows.append(
                (
                    run,
                    arrow(key),
                    *(f"{losses[epoch]:.4f}" for epoch in (0, 1, min(2, last), last)),
                    str(best),
                    str(at) if stop is not None else f"not within {last}",
                    f"{gain:.4f}",
                )
            )
        if evidence.pairs(run):
            answer.sources.append(f"runs/{run}/eval_epoch_*.json")
    if rows:
        # Epochs have no sums by document, so nothing can be judged; a stop is what it is.
        answer.verdict = ANSWERED
        answer.found = (
            f"For {early} of {len(rows)} trainings: with a patience of {own.patience} and a least improvement of "
            f"{own.min_delta:g} of the mean state's error they stop earlier, and the epochs after that bring "
            f"{median(brought):.4f} in the median, {max(brought):.4f} at most."
        )
        header = ("run", "layers", "epoch 0", "1", "2", "last", "best epoch", "stops after", "later epochs bring")
        answer.tables.append(Table("Validation loss (MSE over that of the mean state) by epoch", header, rows))
        answer.words.append(
            "Epoch 0 is before training: LoRA begins at the Procrustes map, the affine map at the mean state."
        )
    return answer


def in_the_model(evidence: Evidence) -> Answer:
    """Every epoch of one run put into the model: does the loss that is trained say anything about the text?"""
    run = "lora-epochs"
    answer = Answer(
        "Does the training loss follow what the model makes of the states?",
        "Text was generated after each epoch, and compared with nothing.",
    )
    keys = list(evidence.pairs(run))
    if not keys:
        return answer
    key = keys[0]
    losses = evidence.curve(run, key, lambda epoch: epoch.val_loss)
    rows: list[tuple[str, ...]] = []
    injected: list[float] = []
    for epoch in range(len(losses)):
        record = evidence.epoch(run, epoch)
        said = record.pairs[key].stitched if record else None
        if record is None or said is None:
            continue
        block, stitched = record.pairs[key], StitchedPair.parse(said)
        mapped = stitched.conditions.get("mapped")
        if mapped is None or mapped.nats_per_token is None:
            continue
        injected.append(mapped.nats_per_token)
        recovered = Value.of(stitched.recovered)
        text = next((entry.text for entry in record.generations), None) or ""
        rows.append(
            (
                str(epoch),
                f"{losses[epoch]:.4f}",
                _number(block.cka),
                _number(block.cosine_sim),
                f"{injected[-1]:.3f}",
                "-" if recovered is None else recovered.show(".1%"),
                _short(text),
            )
        )
    if rows:
        best, kindest = min(range(len(losses)), key=losses.__getitem__), min(range(len(rows)), key=injected.__getitem__)
        close = injected[min(best, len(injected) - 1)] - injected[kindest]
        answer.verdict = ANSWERED
        answer.found = (
            f"The validation loss is least after epoch {best}, the stitched loss after epoch {kindest}; stopping by "
            f"the first costs {close:.3f} nats per token of the second."
        )
        answer.sources.append(f"runs/{run}/eval_epoch_*.json")
        header = ("epoch", "validation loss", "CKA", "cosine", "stitched nats", "recovered", "first generation")
        answer.tables.append(Table(f"LoRA, {arrow(key)}, on validation documents", header, rows))
    return answer


def gradient(evidence: Evidence) -> Answer:
    """The same map by closed form and by gradient."""
    answer = Answer(
        "Does training by gradient reach what the closed form gives?",
        f"Not asked; here, that its R2 is no more than {_MARGIN} below.",
    )
    rows: list[tuple[str, ...]] = []
    keys: list[str] = []
    for key in evidence.pairs("affine-adamw"):
        difference = evidence.difference(("affine-adamw", key), ("affine", key))
        values = [evidence.test(run, key) for run in ("affine-adamw", "affine")]
        if difference is None or None in values:
            continue
        keys.append(key)
        rows.append((arrow(key), *(v.show() for v in values if v), difference.show("+.4f")))
    pooled = r2_difference(evidence, *([(run, key) for key in keys] for run in ("affine-adamw", "affine")))
    if rows and pooled is not None:
        answer.claim(pooled, low=-_MARGIN)
        answer.found = (
            f"Its R2 differs from that of the closed form by {figure(Value.estimated(pooled), '+.4f')}, mean over "
            f"{len(rows)} layer pairs."
        )
        answer.tables.append(Table("Test R2", ("layers", "AdamW", "closed form", "difference"), rows))
        answer.sources += ["runs/affine-adamw/metrics.json", "runs/affine/metrics.json"]
    return answer


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _short(text: str) -> str:
    words = " ".join(text.split()).replace("|", "/")
    return words if len(words) <= _SHOWN else words[: _SHOWN - 1] + "…"
