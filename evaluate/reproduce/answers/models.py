"""What the models make of mapped states: the ceiling, the controls, the tasks, and the rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from align.results import Finding, Metrics
from evaluate.reproduce.answers.base import (
    ANSWERED,
    HELD,
    NOT,
    PARTLY,
    Answer,
    Table,
    arrow,
    figure,
    share,
)
from evaluate.reproduce.evidence import Evidence, Value
from evaluate.results import Answers, Communication, Stitched, StitchedPair
from featstore.runtime.console import human_bytes
from featstore.runtime.records import EMPTY


def ceiling(evidence: Evidence) -> Answer:
    """A model with itself: what the instrument says where nothing can be lost."""
    answer = Answer(
        "Is the instrument right? (same-model pairs, the ceiling)",
        "A model's own states must come back whole.",
    )
    places = evidence.places
    rows: list[tuple[str, ...]] = []
    right: list[bool] = []
    for model in (places.source, places.target):
        run = f"self-{model}"
        for key in evidence.pairs(run):
            entry, r2 = evidence.stitched(run, key), evidence.test(run, key)
            recovered = evidence.recovered(run, key)
            identical = "-" if entry is None else "yes" if entry.self_bit_identical else "no"
            rows.append((arrow(key), figure(r2, ".5f"), share(recovered), identical))
            right.append(r2 is not None and r2.value > 0.999 and (entry is None or bool(entry.self_bit_identical)))
            right.append(recovered is None or recovered.value > 0.98)
            answer.sources += [f"runs/{run}/metrics.json", f"runs/{run}/stitch.json"]
    if rows:
        answer.verdict = HELD if all(right) else NOT
        answer.found = (
            "Yes: a model's map to itself is the identity, and its loss comes back."
            if all(right)
            else "No: figures of two models below cannot be read as a loss between models."
        )
        header = ("layers", "R2", "recovered", "own states bit-identical")
        answer.tables.append(Table("Procrustes from a model to itself, test documents", header, rows))
    return answer


#: Runs whose stitched loss is compared with its controls.
_STITCHED = ("procrustes", "linear", "affine", "lora", "joint")


def controls(evidence: Evidence) -> Answer:
    """Stitched loss against every control, and tasks against theirs."""
    answer = Answer(
        "Does anything beat the controls?",
        "There were none.",
    )
    rows: list[tuple[str, ...]] = []
    beaten: list[bool] = []
    middle = {evidence.places.middle.key, evidence.places.middle.reversed.key}
    for run in _STITCHED:
        for key in evidence.pairs(run):
            entry = evidence.stitched(run, key)
            if entry is None or (run == "affine" and key not in middle):
                continue
            rows.append(_against_controls(run, key, entry))
            beaten.append(entry.beats_every_control is True)
            answer.sources.append(f"runs/{run}/stitch.json")
    hidden = [(key, evidence.stitched("affine", key, "hidden")) for key in sorted(middle)]
    rows += [_against_controls("affine, rest hidden", key, entry) for key, entry in hidden if entry is not None]
    if rows:
        header = (
            "run",
            "layers",
            "clean",
            "mapped",
            "token",
            "mean",
            "random",
            "shuffled",
            "recovered",
            "of what the token leaves",
            "closest control",
        )
        answer.tables.append(Table("Stitched loss (nats per token), test documents", header, rows))
        answer.verdict = HELD if all(beaten) else PARTLY if any(beaten) else NOT
        answer.found = (
            f"{sum(beaten)} of {len(beaten)} stitched losses are below that of every control, the token alone among "
            "them, each difference with its whole interval."
        )
    told = [
        (f"{task}: {name}", gains)
        for task, entry in evidence.tasks("affine").items()
        for name, gains in entry.gains.items()
        if entry.source != entry.target
    ]
    if told:
        won = [name for name, gains in told if all((Value.of(g) or Value(0)).above_zero for g in gains.values())]
        answer.found += (
            f" Of {len(told)} ways to put the other model's states into a question, {len(won)} beat every control and "
            "silence beyond their intervals."
        )
        answer.words.append(f"These are {'; '.join(map(arrow, won))}." if won else "No task shows communication.")
        answer.sources.append("runs/affine/communicate.json")
    answer.sources = list(dict.fromkeys(answer.sources))
    return answer


def _against_controls(run: str, key: str, entry: StitchedPair) -> tuple[str, ...]:
    names = ("clean", "mapped", "token", "mean", "random_norm", "shuffled")
    conditions = [entry.conditions.get(name) for name in names]
    nats = [None if losses is None else losses.nats_per_token for losses in conditions]
    shown = ("-" if value is None else f"{value:.2f}" for value in nats)
    shares = (share(Value.of(found)) for found in (entry.recovered, entry.recovered_token))
    return (run, arrow(key), *shown, *shares, entry.closest_control or "-")


#: Conditions of a task in the order of the question: nothing, states, text.
_ORDER = ("silent", "replace", "sum", "mean", "aligned", "random", "shuffled", "aligned_random", "aligned_shuffled")


def communication(evidence: Evidence) -> Answer:
    """Accuracy of every condition, and what it sends."""
    answer = Answer(
        "Can the target answer what only the source has read?",
        "States were injected at layer 0, without the prompt and without controls; texts were called a validation.",
    )
    counted: list[bool] = []
    best: tuple[float, str, str] | None = None
    for task, entry in evidence.tasks("affine").items():
        rows = []
        for name, answers in _ordered(entry.conditions):
            accuracy = Value.between(answers.accuracy, answers.ci95)
            pair = "" if answers.pair is None else arrow(answers.pair)
            told = {c: Value.of(gain) for c, gain in entry.gains.get(name, EMPTY).items()}
            sent = "-" if answers.bytes is None else human_bytes(answers.bytes)
            gains = (_gain(told.get(c)) for c in _AGAINST)
            rows.append((answers.condition or name, pair, share(accuracy), sent, *gains))
            if name in entry.gains and entry.source != entry.target:
                counted.append(all(value is not None and value.above_zero for value in told.values()))
                if best is None or _accuracy(answers) > best[0]:
                    best = (_accuracy(answers), name, task)
        who = f"{entry.source} reads, {entry.target} answers"
        chance = "unknown" if entry.chance is None else f"{entry.chance:.1%}"
        title = f"{task}: {entry.n} questions, chance {chance}; {who}"
        answer.tables.append(
            Table(title, ("condition", "layers", "right", "sent", *(f"more than {c}" for c in _AGAINST)), rows)
        )
        if entry.source == entry.target and entry.gains:
            right = {name: _accuracy(entry.conditions[name]) for name in entry.gains}
            own = max(right, key=right.__getitem__)
            answer.words.append(f"The ceiling, {entry.source} with itself: {arrow(own)}, {right[own]:.0%} right.")
        answer.words += [f"{task}: {warning.message}." for warning in _general(entry.warnings)]
    if counted and best is not None:
        answer.verdict = HELD if all(counted) else PARTLY if any(counted) else NOT
        entry = evidence.tasks("affine")[best[2]]
        silent, text = (_accuracy(entry.conditions[name]) for name in ("silent", "text"))
        others = f"told nothing {silent:.0%} are, with the text {text:.0%}"
        answer.found = f"Best is {arrow(best[1])} with {best[0]:.0%} right; {others}."
        answer.sources.append("runs/affine/communicate.json")
    return answer


_AGAINST = ("silent", "random", "shuffled")


def _ordered(conditions: Mapping[str, Answers]) -> list[tuple[str, Answers]]:
    place = {name: i for i, name in enumerate((*_ORDER, "summary", "text"))}
    return sorted(conditions.items(), key=lambda item: (item[1].pair or "", place.get(item[1].condition or "", 99)))


def _accuracy(answers: Answers) -> float:
    return 0.0 if answers.accuracy is None else answers.accuracy


def _gain(value: Value | None) -> str:
    return "" if value is None else value.show("+.0%")


def _general(warnings: Iterable[Finding]) -> list[Finding]:
    """Those of the task as a whole: what holds of single conditions stands in their row."""
    return [warning for warning in warnings if warning.code != "no-better-than-control"]


def rates(evidence: Evidence) -> Answer:
    """Compressed runs: R2, stitched loss and accuracy against bytes."""
    answer = Answer(
        "What do compressed states cost, and what do they keep?",
        "Planned; no figure was expected.",
        plots=["rates.png"],
    )
    rows: list[tuple[float, tuple[str, ...]]] = []
    beats_text = False
    for run in compressed_runs(evidence):
        for key, entry in evidence.pairs(run).items():
            rate = entry.rate_distortion
            if rate is None or rate.bytes_per_text_byte is None:
                continue
            r2, recovered = evidence.test(run, key), evidence.recovered(run, key)
            per_byte = rate.bytes_per_text_byte
            beats_text = beats_text or (per_byte < 1 and recovered is not None and recovered.value > 0.5)
            codecs = (figure(Value.between(rate.r2.get(name), None)) for name in ("pca", "strided"))
            shape = f"{rate.latents} × {rate.latent_dim}"
            accuracies = (share(accuracy_of(evidence, run, key, name)) for name in ("aligned", "silent", "text"))
            told = task_rate(evidence, run, key)
            there = "-" if told is None else f"{told:.1f}"
            cells = (shape, f"{per_byte:.2f}", figure(r2), *codecs, share(recovered), there, *accuracies)
            rows.append((per_byte, cells))
            others = (
                name for name in (Stitched.file, Communication.file) if (evidence.out / "runs" / run / name).exists()
            )
            answer.sources += [f"runs/{run}/{name}" for name in (Metrics.file, *others)]
    if rows:
        rows.sort()
        answer.verdict = ANSWERED
        most = rows[-1][1]
        answer.found = (
            f"The largest format ({most[0]}) sends {most[1]} bytes for a byte of text and keeps R2 {most[2]}; "
            + (
                "below one byte for a byte of text more than half of the stitched loss is recovered."
                if beats_text
                else "at no rate below that of the text itself is half of the stitched loss recovered."
            )
        )
        header = ("latents", "bytes per text byte", "R2", "PCA R2", "strided R2", "recovered")
        task = ("bytes per text byte of the task", "aligned right", "silent", "text")
        answer.tables.append(Table("Test windows, and the first task", (*header, *task), [cells for _, cells in rows]))
        answer.words.append(
            "A window costs the same however short its text: the contexts of a task are short, so their rate is higher."
        )
    return answer


def compressed_runs(evidence: Evidence) -> list[str]:
    """Finished runs of type ``compress``."""
    return [run for run in evidence.runs if run.startswith("compress-")]


def task_rate(evidence: Evidence, run: str, key: str) -> float | None:
    """Bytes of latents for a byte of text on a compressed run's first task, None where there is none.

    Args:
        evidence: Of the programme.
        run: Which.
        key: Layer pair.
    """
    for entry in evidence.tasks(run).values():
        rate = entry.pairs[key].rate
        return None if rate is None else rate.latent_bytes_per_text_byte
    return None


def accuracy_of(evidence: Evidence, run: str, key: str, condition: str) -> Value | None:
    """Accuracy of a condition on a run's first task, None where it was not measured.

    Args:
        evidence: Of the programme.
        run: Which.
        key: Layer pair.
        condition: With or without a pair.
    """
    for entry in evidence.tasks(run).values():
        answers = entry.conditions.get(f"{condition} {key}") or entry.conditions.get(condition)
        if answers is not None:
            return Value.between(answers.accuracy, answers.ci95)
    return None
