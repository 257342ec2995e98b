"""Which map, from which layers: what the store alone says, and what the stitched loss says to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.layers import LayerPair, joint_pairs
from align.statistics import SIGNIFICANT, Estimate, holm
from evaluate.reproduce.answers.base import ANSWERED, Answer, Table, arrow, figure, share
from evaluate.reproduce.evidence import Evidence, Value
from evaluate.reproduce.places import Places
from evaluate.reproduce.pooled import Place, nats_below, r2_difference, r2_quotient

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
        last = [pair.key for pair in (evidence.places.pairs[-1], evidence.places.pairs[-1].reversed)]
        pooled = nats_below(evidence, [("affine", key) for key in last], "token")
        works = _better(evidence, list(scores))
        answer.found = (
            f"At {len(works)} of {len(scores)} layer pairs mapped states clearly lower the loss from where the source's"
            f" token alone brings it (p adjusted for all of them, Holm){_validated(evidence, scores)}. "
        )
        # What is claimed is that the last layer fails; without its figure nothing can be said of that.
        if pooled is None:
            answer.found += "Of the last layer there is no figure."
        else:
            answer.claim(pooled, high=0.0)
            answer.found += (
                f"At the last layer they lower it by {figure(Value.estimated(pooled), '+.3f')} nats per token, both "
                "directions together."
            )
    return answer


def _better(evidence: Evidence, keys: Sequence[str]) -> list[str]:
    """Layer pairs at which mapped states beat the token alone, all of them judged together."""
    found = [(key, entry.beyond_token) for key in keys if (entry := evidence.stitched("affine", key)) is not None]
    adjusted = holm([beyond.p for _, beyond in found])
    return [
        key
        for (key, beyond), p in zip(found, adjusted, strict=True)
        if p is not None and p <= SIGNIFICANT and (beyond.nats or 0.0) > 0
    ]


def _validated(evidence: Evidence, scores: dict[str, Value]) -> str:
    """The layer pair that validation ranks first, and its test figure."""
    known = {key: r2 for key in scores if (r2 := evidence.validated("affine", key)) is not None}
    if not known:
        return ""
    key = max(known, key=known.__getitem__)
    return f"; validation R2 is highest at {arrow(key)}, where it is {figure(scores[key], '+.3f')} nats per token"


def multi_layer(evidence: Evidence) -> Answer:
    """One map from several source layers together against one from a single layer."""
    answer = Answer(
        "Does multi-layer alignment beat single-layer?",
        "10 to 15 % more CKA; judged by R2, which has sums by document.",
    )
    rows: list[tuple[str, ...]] = []
    rooms: list[float] = []
    several: list[Place] = []
    single: list[Place] = []
    for pair, joint in _joint(evidence.places):
        alone = [evidence.test("affine", pair.key, name) for name in ("cka_debiased", "r2")]
        together = [evidence.test("joint", joint.key, name) for name in ("cka_debiased", "r2")]
        if alone[1] is None or together[1] is None:
            continue
        several.append(("joint", joint.key))
        single.append(("affine", pair.key))
        gain = "-"
        if alone[0] is not None and together[0] is not None and alone[0].value > 0:
            gain = f"{together[0].value / alone[0].value - 1:+.1%}"
            rooms.append(1 / alone[0].value - 1)
        rows.append(
            (
                arrow(joint.key),
                figure(alone[0]),
                figure(together[0]),
                gain,
                figure(alone[1]),
                figure(together[1]),
                figure(evidence.difference(several[-1], single[-1]), "+.3f"),
                share(evidence.recovered("affine", pair.key)),
                share(evidence.recovered("joint", joint.key)),
            )
        )
    if rows:
        more = r2_quotient(evidence, several, single)
        answer.found = NOTHING_TO_KEEP.format("map of a single layer")
        if more is not None:
            answer.claim(more, 1.10, 1.15)
            answer.found = f"R2 changes by {share(Value.estimated(more, 1.0), '+.1%')}, {_over(rows, 'target layers')}"
            difference = r2_difference(evidence, several, single)
            answer.found += f" ({figure(Value.estimated(difference), '+.4f')} R2); CKA stands in the table."
        if rooms and max(rooms) < 0.10:
            answer.words.append(
                f"CKA is at most 1: from one layer it is so high already that {max(rooms):.1%} at most could be gained."
            )
        header = ("layers", "CKA one", "CKA several", "gain", "R2 one", "R2 several", "difference")
        answer.tables.append(Table("Affine maps, test documents", (*header, "recovered one", "several"), rows))
        answer.sources += ["runs/joint/metrics.json", "runs/affine/metrics.json"]
    return answer


def _over(rows: Sequence[object], what: str = "layer pairs") -> str:
    return f"mean over {len(rows)} {what}"


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
    keys: list[str] = []
    for pair in both(evidence.places):
        if evidence.test("lora", pair.key) is None or evidence.test("linear", pair.key) is None:
            continue
        ratio = evidence.ratio(("lora", pair.key), ("linear", pair.key))
        keys.append(pair.key)
        cka = [evidence.test(run, pair.key, "cka_debiased") for run in ("lora", "linear")]
        kept = f"{cka[0].value / cka[1].value:.1%}" if cka[0] and cka[1] and cka[1].value > 0 else "-"
        values = [figure(evidence.test(run, pair.key)) for run in ("lora", "linear")]
        rows.append((arrow(pair.key), *values, share(ratio), kept, share(evidence.recovered("lora", pair.key))))
    if evidence.pairs("lora") and evidence.pairs("linear"):
        answer.found = NOTHING_TO_KEEP.format("linear map")
    kept_of = _quotient(evidence, "lora", "linear", keys)
    if kept_of is not None:
        answer.claim(kept_of, 0.90, 0.95)
        answer.found = f"It keeps {share(Value.estimated(kept_of))} of the linear map's R2, {_over(keys)}."
    if rows:
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
    keys: list[str] = []
    for pair in both(evidence.places):
        if evidence.test("affine", pair.key) is None or evidence.test("procrustes", pair.key) is None:
            continue
        ratio = evidence.ratio(("affine", pair.key), ("procrustes", pair.key))
        difference = evidence.difference(("affine", pair.key), ("procrustes", pair.key))
        keys.append(pair.key)
        rows.append(
            (
                arrow(pair.key),
                *(figure(evidence.test(run, pair.key)) for run in ("procrustes", "affine")),
                figure(difference, "+.4f"),
                share(None if ratio is None else ratio.less(1.0), "+.1%"),
                *(share(evidence.recovered(run, pair.key)) for run in ("procrustes", "affine")),
            )
        )
    if evidence.pairs("affine") and evidence.pairs("procrustes"):
        answer.found = NOTHING_TO_KEEP.format("Procrustes map")
    over = _quotient(evidence, "affine", "procrustes", keys)
    if over is not None:
        answer.claim(over, 1.05, 1.08)
        answer.found = f"Its R2 differs by {share(Value.estimated(over, 1.0), '+.1%')}, {_over(keys)}."
    if rows:
        header = ("layers", "Procrustes R2", "affine R2", "difference", "gain")
        titles = (*header, "Procrustes recovered", "affine recovered")
        answer.tables.append(Table("Test documents", titles, rows))
        answer.sources += ["runs/affine/documents.json", "runs/procrustes/documents.json"]
    return answer


def _quotient(evidence: Evidence, first: str, second: str, keys: Sequence[str]) -> Estimate | None:
    return r2_quotient(evidence, [(first, key) for key in keys], [(second, key) for key in keys])


def bias_and_rank(evidence: Evidence) -> Answer:
    """The bias, and a low-rank correction with and without a rotation below it."""
    answer = Answer("What do bias and rank buy?", "Left open.", plots=["ranks.png"])
    rows: list[tuple[str, ...]] = []
    bought: dict[str, Value] = {}
    for pair in both(evidence.places):
        difference = evidence.difference(("affine", pair.key), ("linear", pair.key))
        if difference is None:
            continue
        bought[pair.key] = difference
        values = (figure(evidence.test(run, pair.key)) for run in ("linear", "affine"))
        recovered = (share(evidence.recovered(run, pair.key)) for run in ("linear", "affine"))
        rows.append((arrow(pair.key), *values, difference.show("+.4f"), *recovered))
    if rows:
        answer.verdict = ANSWERED
        pooled = r2_difference(evidence, *([(run, key) for key in bought] for run in ("affine", "linear")))
        low, high = (end(value.value for value in bought.values()) for end in (min, max))
        answer.found = (
            f"The bias changes R2 by {figure(Value.estimated(pooled), '+.4f')}, {_over(rows)}; from {low:+.4f} to "
            f"{high:+.4f} at single ones."
        )
        header = ("layers", "linear R2", "affine R2", "bias buys", "linear recovered", "affine recovered")
        answer.tables.append(Table("With and without a bias", header, rows))
        answer.sources += ["runs/linear/metrics.json", "runs/affine/metrics.json"]
    ladder, ranks = _ladder(evidence)
    if ladder:
        key = evidence.places.middle.key
        top = evidence.validated("affine", key)
        steps = [(rank, evidence.validated(f"rank-{rank}", key)) for rank in ranks]
        enough = next((rank for rank, r2 in steps if r2 is not None and top is not None and r2 >= 0.95 * top), None)
        kept = None if enough is None else evidence.ratio((f"rank-{enough}", key), ("affine", key))
        answer.words.append(
            f"At {arrow(key)} a map of rank {enough} gives 95 % of the affine map's validation R2, and {share(kept)} "
            "of its test R2."
            if enough
            else f"At {arrow(key)} no rank tried gives 95 % of the affine map's validation R2."
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
