"""Which map, from which layers: what the store alone says, and what the stitched loss says to it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from align.layers import LayerPair, joint_pairs
from evaluate.reproduce.answers.base import (
    ANSWERED,
    HELD,
    NOT,
    PARTLY,
    Answer,
    Table,
    arrow,
    figure,
    judge,
    share,
)
from evaluate.reproduce.evidence import Evidence, Value
from evaluate.reproduce.places import Places

#: Where a share of something is asked for, and there is nothing.
NOTHING_TO_KEEP = "Nowhere does the {} explain anything (no R2 is above 0), so there is no share of it."


def both(places: Places) -> list[LayerPair]:
    """All single layer pairs, one direction after the other."""
    return [*places.pairs, *(pair.reversed for pair in places.pairs)]


def which_layers(evidence: Evidence) -> Answer:
    """R2, CKA and stitched loss by depth."""
    answer = Answer(
        "Which layers work?",
        "Layers 0, 8, 16, 24 and 32 were used, 12 and 20 asked for, and layer 32 was seen to fail.",
        plots=["layers.png"],
    )
    rows: list[tuple[str, ...]] = []
    scores: dict[str, Value] = {}
    for pair in both(evidence.places):
        r2, against = evidence.test("affine", pair.key), evidence.beyond_token("affine", pair.key)
        if r2 is None:
            continue
        if against is not None:
            scores[pair.key] = against
        depth = evidence.places.depth_of(pair.source, pair.source_layer)
        stitched = evidence.stitched("affine", pair.key)
        rows.append(
            (
                arrow(pair.key),
                f"{depth:.0%}",
                figure(evidence.test("procrustes", pair.key)),
                figure(r2),
                figure(evidence.test("affine", pair.key, "cka_debiased")),
                share(evidence.recovered("affine", pair.key)),
                share(evidence.recovered("affine", pair.key, token=True)),
                figure(against, "+.3f"),
                (None if stitched is None else stitched.closest_control) or "-",
            )
        )
    if not rows:
        return answer
    header = (
        *("layers", "depth", "Procrustes R2", "affine R2", "CKA", "recovered"),
        *("of what the token leaves", "nats beyond the token", "closest control"),
    )
    answer.tables.append(Table("Test documents, by layer", header, rows))
    answer.sources += [f"runs/{run}/metrics.json" for run in ("procrustes", "affine")] + ["runs/affine/stitch.json"]
    answer.found = "No stitched loss says what mapped states add to the source's token alone."
    if scores:
        works = [key for key, value in scores.items() if value.above_zero]
        best = max(scores, key=lambda key: scores[key].value)
        last = [pair.key for pair in (evidence.places.pairs[-1], evidence.places.pairs[-1].reversed)]
        known = [key for key in last if key in scores]
        failed = [key for key in known if not scores[key].above_zero]
        # What was expected is that the last layer fails; without its figure nothing can be said of that.
        if known:
            answer.verdict = HELD if failed == known else PARTLY if failed or len(works) < len(scores) else NOT
        answer.found = (
            f"At {len(works)} of {len(scores)} layer pairs mapped states lower the loss from where the source's token "
            f"alone brings it, with their whole interval; most at {arrow(best)} ({figure(scores[best], '.3f')} nats). "
            + ("Of the last layer there is no figure." if not known else _last_layer(failed, known))
        )
    return answer


def _last_layer(failed: list[str], known: list[str]) -> str:
    how = "fails" if failed == known else "fails in one direction" if failed else "works as well"
    return f"The last layer {how}."


def multi_layer(evidence: Evidence) -> Answer:
    """One map from several source layers together against one from a single layer."""
    answer = Answer(
        "Does multi-layer alignment beat single-layer?",
        "10 to 15 % more CKA.",
    )
    rows: list[tuple[str, ...]] = []
    gains: list[Value] = []
    rooms: list[float] = []
    better = 0
    for pair, joint in _joint(evidence.places):
        single = [evidence.test("affine", pair.key, name) for name in ("cka_debiased", "r2")]
        several = [evidence.test("joint", joint.key, name) for name in ("cka_debiased", "r2")]
        if single[0] is None or several[0] is None:
            continue
        gains.append(Value(several[0].value / single[0].value - 1))
        rooms.append(1 / single[0].value - 1)
        difference = evidence.difference(("joint", joint.key), ("affine", pair.key))
        better += difference is not None and difference.above_zero
        rows.append(
            (
                arrow(joint.key),
                figure(single[0]),
                figure(several[0]),
                f"{gains[-1].value:+.1%}",
                f"{rooms[-1]:.1%}",
                figure(single[1]),
                figure(several[1]),
                figure(difference, "+.3f"),
                share(evidence.recovered("affine", pair.key)),
                share(evidence.recovered("joint", joint.key)),
            )
        )
    if rows:
        found = judge(gains, 0.10, 0.15)
        answer.verdict = found.verdict
        answer.found = (
            f"CKA between mapped and true states changes by {median(g.value for g in gains):+.1%} in the median; R2 is "
            f"higher with its whole interval for {better} of {len(rows)} targets."
        )
        answer.words.append(found.words("target layers"))
        if max(rooms) < 0.10:
            answer.words.append(
                f"CKA is at most 1: from one layer it is so high already that {max(rooms):.1%} at most could be gained."
            )
        header = ("layers", "CKA one", "CKA several", "gain", "room", "R2 one", "R2 several", "difference")
        answer.tables.append(Table("Affine maps, test documents", (*header, "recovered one", "several"), rows))
        answer.sources += ["runs/joint/metrics.json", "runs/affine/metrics.json"]
    return answer


def _joint(places: Places) -> Iterator[tuple[LayerPair, LayerPair]]:
    """Single layer pairs of the inner depths, each with the joint one to the same target."""
    inner = list(places.inner)
    for singles, backwards in ((inner, False), ([pair.reversed for pair in inner], True)):
        joint = {pair.target_layer: pair for pair in joint_pairs(inner, backwards=backwards)}
        for pair in singles:
            yield pair, joint[pair.target_layer]


def lora_keeps(evidence: Evidence) -> Answer:
    """LoRA over the full linear map."""
    answer = Answer("Does LoRA keep 90 to 95 % of the linear map?", "90 to 95 %.")
    rows: list[tuple[str, ...]] = []
    ratios: list[Value] = []
    for pair in both(evidence.places):
        ratio = evidence.ratio(("lora", pair.key), ("linear", pair.key))
        if ratio is None:
            continue
        ratios.append(ratio)
        cka = [evidence.test(run, pair.key, "cka_debiased") for run in ("lora", "linear")]
        kept = f"{cka[0].value / cka[1].value:.1%}" if cka[0] and cka[1] else "-"
        values = [figure(evidence.test(run, pair.key)) for run in ("lora", "linear")]
        rows.append((arrow(pair.key), *values, ratio.show(".1%"), kept, share(evidence.recovered("lora", pair.key))))
    if evidence.pairs("lora") and evidence.pairs("linear"):
        answer.found = NOTHING_TO_KEEP.format("linear map")
    if rows:
        found = judge(ratios, 0.90, 0.95)
        answer.verdict = found.verdict
        answer.found = f"It keeps {median(r.value for r in ratios):.1%} of the linear map's R2 in the median."
        answer.words.append(found.words("layer pairs"))
        answer.words.append(
            "LoRA here is a low-rank correction of the Procrustes map, which is of full rank; what rank alone gives "
            "stands below, under bias and rank."
        )
        header = ("layers", "LoRA R2", "linear R2", "kept of R2", "kept of CKA", "LoRA recovered")
        answer.tables.append(Table("Test documents", header, rows))
        answer.sources += ["runs/lora/metrics.json", "runs/linear/metrics.json"]
    return answer


def affine_beats_procrustes(evidence: Evidence) -> Answer:
    """An unconstrained map over a rotation."""
    answer = Answer("Does affine beat Procrustes by 5 to 8 %?", "5 to 8 %.")
    rows: list[tuple[str, ...]] = []
    gains: list[Value] = []
    for pair in both(evidence.places):
        ratio = evidence.ratio(("affine", pair.key), ("procrustes", pair.key))
        difference = evidence.difference(("affine", pair.key), ("procrustes", pair.key))
        if ratio is None:
            continue
        ends = (None if end is None else end - 1 for end in (ratio.low, ratio.high))
        gains.append(Value(ratio.value - 1, *ends))
        rows.append(
            (
                arrow(pair.key),
                *(figure(evidence.test(run, pair.key)) for run in ("procrustes", "affine")),
                figure(difference, "+.4f"),
                gains[-1].show("+.1%"),
                *(share(evidence.recovered(run, pair.key)) for run in ("procrustes", "affine")),
            )
        )
    if evidence.pairs("affine") and evidence.pairs("procrustes"):
        answer.found = NOTHING_TO_KEEP.format("Procrustes map")
    if rows:
        found = judge(gains, 0.05, 0.08)
        answer.verdict = found.verdict
        answer.found = f"Its R2 differs by {median(g.value for g in gains):+.1%} in the median."
        answer.words.append(found.words("layer pairs"))
        header = ("layers", "Procrustes R2", "affine R2", "difference", "gain")
        titles = (*header, "Procrustes recovered", "affine recovered")
        answer.tables.append(Table("Test documents", titles, rows))
        answer.sources += ["runs/affine/documents.json", "runs/procrustes/documents.json"]
    return answer


def bias_and_rank(evidence: Evidence) -> Answer:
    """The bias, and a low-rank correction with and without a rotation below it."""
    answer = Answer("What do bias and rank buy?", "Left open.", plots=["ranks.png"])
    rows: list[tuple[str, ...]] = []
    bought: list[Value] = []
    for pair in both(evidence.places):
        difference = evidence.difference(("affine", pair.key), ("linear", pair.key))
        if difference is None:
            continue
        bought.append(difference)
        values = (figure(evidence.test(run, pair.key)) for run in ("linear", "affine"))
        recovered = (share(evidence.recovered(run, pair.key)) for run in ("linear", "affine"))
        rows.append((arrow(pair.key), *values, difference.show("+.4f"), *recovered))
    if rows:
        most = max(bought, key=lambda value: abs(value.value))
        answer.verdict = ANSWERED
        usual = median(value.value for value in bought)
        answer.found = f"The bias changes R2 by {usual:+.4f} in the median and {most.value:+.4f} at most."
        header = ("layers", "linear R2", "affine R2", "bias buys", "linear recovered", "affine recovered")
        answer.tables.append(Table("With and without a bias", header, rows))
        answer.sources += ["runs/linear/metrics.json", "runs/affine/metrics.json"]
    ladder, ranks = _ladder(evidence)
    if ladder:
        key = evidence.places.middle.key
        top = evidence.test("affine", key)
        steps = [(rank, evidence.test(f"rank-{rank}", key)) for rank in ranks]
        enough = next((rank for rank, value in steps if value and top and value.value >= 0.95 * top.value), None)
        answer.words.append(
            f"At {arrow(key)} a map of rank {enough} gives 95 % of the affine map's R2."
            if enough
            else f"At {arrow(key)} no rank tried gives 95 % of the affine map's R2."
        )
        heads = (
            "layers",
            *(f"rank {rank}" for rank in ranks),
            "Procrustes",
            *(f"+ {rank}" for rank in ranks),
            "affine",
        )
        answer.tables.append(Table("Test R2 of rank-limited maps, and of Procrustes with a correction", heads, ladder))
        answer.sources += [f"runs/rank-{rank}/metrics.json" for rank in ranks]
    return answer


def ranks_of(evidence: Evidence) -> list[int]:
    """Ranks for which there is a run."""
    names = [run.removeprefix("rank-") for run in evidence.runs if run.startswith("rank-")]
    return sorted(int(name) for name in names if name.isdecimal())


def _ladder(evidence: Evidence) -> tuple[list[tuple[str, ...]], list[int]]:
    ranks = ranks_of(evidence)
    rows: list[tuple[str, ...]] = []
    for pair in [*evidence.places.inner, *(pair.reversed for pair in evidence.places.inner)]:
        alone = [evidence.test(f"rank-{rank}", pair.key) for rank in ranks]
        corrected = [evidence.test(f"rank-{rank}-on-procrustes", pair.key) for rank in ranks]
        if not any(alone):
            continue
        whole = [evidence.test(run, pair.key) for run in ("procrustes", "affine")]
        columns = [*alone, whole[0], *corrected, whole[1]]
        rows.append((arrow(pair.key), *("-" if value is None else f"{value.value:.3f}" for value in columns)))
    return rows, ranks
