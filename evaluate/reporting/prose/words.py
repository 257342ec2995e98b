"""What each map was shown to do, in words from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from evaluate.reporting.prose.notes import is_neutral
from evaluate.reporting.reading.inputs import Node, Pair, Run
from evaluate.reporting.reading.names import control_name, leak_of, share, type_name
from evaluate.reporting.reading.numbers import nats, percent, say, show

#: Below this, two R2 are called equal in words; the table shows both.
_TIE = 0.005
_BASELINES = {
    "mean": "the mean state",
    "identity": "the states as they are (identity)",
    "random_rotation": "a random rotation",
    "shuffled": "a map fitted to shuffled pairs",
}

Kind = Literal["good", "poor", "open", "none"]


@dataclass(frozen=True)
class Verdict:
    """What the evidence says about one map: sentences on injection and on held-out states."""

    kind: Kind
    tag: str
    run: Run
    pair: Pair
    stitched: tuple[Markup, ...]
    held_out: tuple[Markup, ...]
    rank: tuple[bool, float]

    @property
    def title(self) -> str:
        """The map's name: its type and layer pair."""
        return f"{type_name(self.run)} at {self.pair}"


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Judge every map of every run, best first; those of a model to itself, the ceiling, come last.

    Args:
        runs: What was read.
    """
    found = [_judge(run, pair) for run in runs for pair in run.pairs]
    return sorted(found, key=lambda verdict: (not verdict.pair.is_ceiling, verdict.rank), reverse=True)


def between_models(judged: Sequence[Verdict]) -> list[Verdict]:
    """The maps from one model to another; all of them where there are none.

    Args:
        judged: The verdicts.
    """
    return [verdict for verdict in judged if not verdict.pair.is_ceiling] or list(judged)


def _judge(run: Run, pair: Pair) -> Verdict:
    metrics = run.file("metrics.json").get("pairs", pair.key)
    stitched = run.file("stitch.json").get("pairs", pair.key)
    recovered = stitched.get("recovered", "value")
    stops = [event for event in run.log if event.get("event").value == "stop" and event.get("pair").text == pair.key]
    start = run.trained and bool(stops) and stops[-1].get("best_epoch").number == 0
    held_out = tuple(_held_out(metrics, trained=run.trained, start_is_kept=start))
    if recovered.number is None:
        why = stitched.get("reasons", "recovered").text
        if stitched.value is not None and not why:
            why = _nothing_to_recover(stitched)
        unknown = (say("The recovered share is not known: {}.", why),) if why else ()
        tag = "stitched, no figure" if stitched.value is not None else "not injected yet"
        rank = (False, _number(metrics.get("test", "r2")))
        return Verdict("none", tag, run, pair, unknown, held_out, rank)
    kind, tag, sentences = _stitched(stitched)
    rank = (True, recovered.number)
    return Verdict(kind, tag, run, pair, tuple(sentences), held_out, rank)


def _stitched(stitched: Node) -> tuple[Kind, str, list[Markup]]:
    loss = {c: stitched.get("conditions", c, "nats_per_token") for c in ("clean", "mapped", "mean")}
    recovered, best = stitched.get("recovered"), stitched.get("recovered_best_control")
    leak = leak_of(stitched)
    value = recovered.get("value").number or 0.0
    text = (
        "Recovers {} of the loss between the mean state ({} nats/token) and the clean run ({})."
        if value > 0
        else "No better than the mean state: recovers {} of the loss between it ({} nats/token) and the clean run ({})."
    )
    sentences = [say(text, share(recovered, leak.tag), show(loss["mean"], nats), show(loss["clean"], nats))]
    gain, low = best.get("value"), best.get("ci95", 0).number
    control = best.get("control").text
    reached = stitched.get("conditions", control, "nats_per_token")
    against = say("({}, {} nats/token)", control_name(control) or "unnamed", show(reached, nats))
    if gain.number is None:
        why = stitched.get("reasons", "recovered_best_control").text
        sentences.append(say("No comparison with the best control{}.", why and f": {why}"))
        kind, tag = _against_conditions(stitched)
    elif gain.number <= 0 or value <= 0:
        text = "Does not beat its best control {}: it reaches {} nats/token, {} of the way from there."
        sentences.append(say(text, against, show(loss["mapped"], nats), share(best, leak.tag)))
        kind, tag = "poor", "does not beat its controls"
    elif low is None:
        text = "Counted from its best control {}, {}, without an interval: that may be chance."
        sentences.append(say(text, against, share(best, leak.tag)))
        kind, tag = "open", "not clearly above its controls"
    elif low <= 0:
        text = "Counted from its best control {}, {}: that interval includes zero, so no gain is shown."
        sentences.append(say(text, against, share(best, leak.tag)))
        kind, tag = "open", "not clearly above its controls"
    else:
        sentences.append(say("Counted from its best control {}, {}.", against, share(best, leak.tag)))
        kind, tag = "good", "beats every control"
    if 0 < value < 0.5:
        sentences.append(say("Most of that loss remains."))
    if kind == "good" and not is_neutral(stitched):
        sentences.append(
            say("But putting the target’s own states back is not neutral, so none of this can be trusted.")
        )
        kind, tag = "open", "self-injection fails"
    elif leak.words:
        sentences.append(say("At this layer a side channel is open ({}).", leak.words))
        if kind == "good":
            kind, tag = "open", "with a side channel"
    return kind, tag, sentences


def _nothing_to_recover(stitched: Node) -> str:
    mean, clean = (stitched.get("conditions", name, "nats_per_token").number for name in ("mean", "clean"))
    if mean is None or clean is None or mean > clean:
        return ""
    return "the mean state costs the target nothing at this layer, so there is nothing to recover"


def _against_conditions(stitched: Node) -> tuple[Kind, str]:
    # Without the interval against the best control, losses alone can refute a map but not prove it.
    controls = ("mean", "zero", "random_norm", "random_rotation", "shuffled", "raw")
    mapped = stitched.get("conditions", "mapped", "nats_per_token").number
    losses = [stitched.get("conditions", c, "nats_per_token").number for c in controls]
    known = [loss for loss in losses if loss is not None]
    if mapped is not None and known and mapped >= min(known):
        return "poor", "does not beat its controls"
    return "open", "controls not compared"


def best_control(metrics: Node) -> tuple[str, Node]:
    """The simple baseline with the highest held-out R2, in words, and that R2; an empty name for none.

    Args:
        metrics: A layer pair's part of ``metrics.json``.
    """
    rivals = {name: metrics.get("baselines", key, "r2") for key, name in _BASELINES.items()}
    known = {name: r2 for name, r2 in rivals.items() if r2.number is not None}
    best = max(known, key=lambda name: _number(known[name]), default="")
    return best, known.get(best, Node())


def _held_out(metrics: Node, *, trained: bool, start_is_kept: bool) -> list[Markup]:
    r2 = metrics.get("test", "r2")
    if r2.number is None:
        return []
    sentences = []
    name, rival = best_control(metrics)
    if not name:
        sentences.append(say("Held-out R² {}.", show(r2)))
    elif _number(r2) > _number(rival):
        text = "Held-out R² {}; the best simple baseline, {}, reaches {}."
        sentences.append(say(text, show(r2), name, show(rival)))
    else:
        text = "Held-out R² {} does not beat {} ({})."
        sentences.append(say(text, show(r2), name, show(rival)))
    if start_is_kept:
        sentences.append(say("Training found nothing better than its start: epoch 0 is kept."))
    closed = metrics.get("baselines", "closed_form")
    if closed.get("r2").number is not None:
        sentences.append(_against_closed_form(r2, closed, trained=trained))
    top, chance = metrics.get("test", "retrieval_top1"), metrics.get("test", "retrieval_chance")
    if top.number is not None and chance.number is not None:
        near = ", hardly above that" if top.number <= 3 * chance.number else ""
        text = "The nearest target state is the true partner in {} of cases (chance {}){}."
        sentences.append(say(text, show(top, percent), show(chance, percent), near))
    return sentences


def _against_closed_form(r2: Node, closed: Node, *, trained: bool) -> Markup:
    gap = _number(r2) - _number(closed.get("r2"))
    name = closed.get("name").text
    rival = say("{}R² {}", name and f"{name}, ", show(closed.get("r2")))
    if gap > _TIE:
        return say("It is above the closed form ({}).", rival)
    if gap >= -_TIE:
        return say("The closed form ({}) is as good.", rival)
    if trained:
        text = "It falls short of the closed form ({}): suspect the learning rate or an early stop."
        return say(text, rival)
    return say("The closed form reaches more ({}).", rival)


def _number(node: Node) -> float:
    return node.number if node.number is not None else float("-inf")
