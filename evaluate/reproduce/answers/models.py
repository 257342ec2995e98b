"""What the models make of mapped states: the ceiling, the controls, the tasks, and the rate."""

from __future__ import annotations

from align.results import Metrics
from align.statistics import CONTRADICTED, SUPPORTED, Verdict, judge
from evaluate.reproduce.answers.base import ANSWERED, Answer, Table, arrow, figure, share
from evaluate.reproduce.evidence import Evidence, Value
from evaluate.reproduce.pooled import Place, controls_of, nats_below, r2_mean, recovered_share
from evaluate.results import Communication, Stitched, StitchedPair


def ceiling(evidence: Evidence) -> Answer:
    """A model with itself: what the instrument says where nothing can be lost."""
    answer = Answer(
        "Is the instrument right? (same-model pairs, the ceiling)",
        f"A model's own states come back whole: R2 above {_WHOLE_R2}, more than {_WHOLE_SHARE:.0%} of the loss, and "
        "the bits.",
    )
    places = evidence.places
    rows: list[tuple[str, ...]] = []
    own: list[Place] = []
    identical: list[bool] = []
    for model in (places.source, places.target):
        run = f"self-{model}"
        for key in evidence.pairs(run):
            entry, r2 = evidence.stitched(run, key), evidence.test(run, key)
            said = "-" if entry is None else "yes" if entry.self_bit_identical else "no"
            rows.append((arrow(key), figure(r2, ".5f"), share(evidence.recovered(run, key)), said))
            own.append((run, key))
            identical += [] if entry is None else [bool(entry.self_bit_identical)]
            answer.sources += [f"runs/{run}/metrics.json", f"runs/{run}/stitch.json"]
    r2_of_all = r2_mean(evidence, own)
    if r2_of_all is not None:
        # Where the mean state does no harm, nothing can be recovered, and nothing is claimed of it.
        shares = recovered_share(evidence, own)
        told = [] if shares is None else [judge(shares, low=_WHOLE_SHARE)]
        bits = Verdict(SUPPORTED if all(identical) else CONTRADICTED, None)
        answer.judge(judge(r2_of_all, low=_WHOLE_R2), *told, bits)
        answer.found = (
            f"R2 {figure(Value.estimated(r2_of_all), '.5f')}, {share(Value.estimated(shares))} of the stitched loss "
            f"recovered, mean over {len(rows)} layer pairs; own states put back are "
            f"{'' if all(identical) else 'not '}bit-identical."
        )
        if answer.verdict == CONTRADICTED:
            answer.words.append("Figures of two models below cannot be read as a loss between models.")
        header = ("layers", "R2", "recovered", "own states bit-identical")
        answer.tables.append(Table("Procrustes from a model to itself, test documents", header, rows))
    return answer


#: What counts as whole: rounding and a rotation in float32 leave more than this.
_WHOLE_R2, _WHOLE_SHARE = 0.999, 0.98
#: Runs whose stitched loss is compared with its controls.
_STITCHED = ("procrustes", "linear", "affine", "lora", "joint")


def controls(evidence: Evidence) -> Answer:
    """Stitched loss against every control, and tasks against theirs."""
    answer = Answer(
        "Does anything beat the controls?",
        "There were none; here, that affine maps do better than each of them, the source's token alone among them.",
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
        answer.found = "The affine map's stitched losses have no sums by document."
        # All layer pairs together, and named beforehand: the affine map is the programme's main one.
        places = [("affine", key) for key in evidence.pairs("affine")]
        below = {name: found for name in controls_of(evidence, places) if (found := nats_below(evidence, places, name))}
        if below:
            answer.judge(*(judge(found, low=0.0) for found in below.values()))
            closest = min(below, key=lambda name: below[name].value)
            answer.found = (
                f"Affine maps are {figure(Value.estimated(below[closest]), '+.3f')} nats per token below the closest "
                f"of {len(below)} controls ({closest}), mean over all layer pairs."
            )
            if reason := below[closest].reason:
                answer.words.append(f"There is no interval: {reason}.")
        answer.found += (
            f" Of the {len(beaten)} stitched losses in the table {sum(beaten)} are below that of every control, each "
            "difference with its whole interval."
        )
    answer.sources = list(dict.fromkeys(answer.sources))
    return answer


def _against_controls(run: str, key: str, entry: StitchedPair) -> tuple[str, ...]:
    names = ("clean", "mapped", "token", "mean", "random_norm", "shuffled")
    conditions = [entry.conditions.get(name) for name in names]
    nats = [None if losses is None else losses.nats_per_token for losses in conditions]
    shown = ("-" if value is None else f"{value:.2f}" for value in nats)
    shares = (share(Value.of(found)) for found in (entry.recovered, entry.recovered_token))
    return (run, arrow(key), *shown, *shares, entry.closest_control or "-")


def rates(evidence: Evidence) -> Answer:
    """Compressed runs: R2, stitched loss and accuracy against bytes."""
    answer = Answer(
        "What do compressed states cost, and what do they keep?",
        "Planned; no figure was expected.",
        plots=["rates.png"],
    )
    rows: list[tuple[float, tuple[str, ...]]] = []
    halves: list[str] = []
    for run in compressed_runs(evidence):
        for key, entry in evidence.pairs(run).items():
            rate = entry.rate_distortion
            if rate is None or rate.bytes_per_text_byte is None:
                continue
            r2, recovered = evidence.test(run, key), evidence.recovered(run, key)
            per_byte = rate.bytes_per_text_byte
            if per_byte < 1 and recovered is not None:
                # Half of the stitched loss for less than a byte a byte: what the whole interval says of it.
                known = recovered.low is not None and recovered.high is not None
                more, less = known and (recovered.low or 0) > 0.5, known and (recovered.high or 0) < 0.5
                halves.append("more than half" if more else "less than half" if less else "perhaps half")
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
                "of the stitched loss, the rates below that of the text itself recover "
                + ", ".join(f"{word} ({halves.count(word)})" for word in dict.fromkeys(halves))
                if halves
                else "there is no stitched loss at a rate below that of the text itself"
            )
            + "."
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
