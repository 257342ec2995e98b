"""What each map was shown to do, in words from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from evaluate.reporting.reading.findings import codes_of
from evaluate.reporting.reading.inputs import Node, Pair, Run
from evaluate.reporting.reading.names import control_name, gain, leak_of, share, type_name
from evaluate.reporting.reading.numbers import interval, nats, percent, say, score, show

#: The baseline token in words.
ALONE = "the source’s token alone"
_BASELINES = {
    "token": ALONE,
    "mean": "the mean state",
    "identity": "the states as they are (identity)",
    "random_rotation": "a random rotation",
    "shuffled": "a map fitted to states of other text",
}

Kind = Literal["good", "poor", "open", "none"]


@dataclass(frozen=True)
class Verdict:
    """What the evidence says about one map: sentences on injection and on held-out states.

    Attributes:
        choice: Whether it was injected, and its R2 on validation rows: by these maps are ordered and one is picked to
            be quoted. What is quoted is measured on test rows, and the largest of several test figures would be too
            large.
    """

    kind: Kind
    tag: str
    run: Run
    pair: Pair
    stitched: tuple[Markup, ...]
    held_out: tuple[Markup, ...]
    choice: tuple[bool, float]

    @property
    def title(self) -> str:
        """The map's name: its type and layer pair."""
        return f"{type_name(self.run)} at {self.pair}"


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Judge every map of every run, in the order in which validation ranks them; a model's map to itself comes last.

    Args:
        runs: What was read.
    """
    found: list[Verdict] = []
    for run in runs:
        starts = _starts(run) if run.trained else ()
        found += [_judge(run, pair, start=pair.key in starts) for pair in run.pairs]
    return sorted(found, key=lambda verdict: (not verdict.pair.is_ceiling, verdict.choice), reverse=True)


def between_models(judged: Sequence[Verdict]) -> list[Verdict]:
    """The maps from one model to another; all of them where there are none.

    Args:
        judged: The verdicts.
    """
    return [verdict for verdict in judged if not verdict.pair.is_ceiling] or list(judged)


def _starts(run: Run) -> set[str]:
    """Layer pairs whose training found nothing better than its start: a resumed run's last word counts."""
    stops = {e.get("pair").text: e.get("best_epoch").number for e in run.log if e.get("event").value == "stop"}
    return {key for key, best in stops.items() if best == 0}


def _judge(run: Run, pair: Pair, *, start: bool) -> Verdict:
    metrics = run.file("metrics.json").get("pairs", pair.key)
    stitched = run.file("stitch.json").get("pairs", pair.key)
    figures = (stitched.get("recovered", "value"), stitched.get("beyond_token", "nats"))
    held_out = tuple(_held_out(metrics, start_is_kept=start))
    validated = _number(metrics.get("val", "r2"))
    if all(figure.number is None for figure in figures):
        why = stitched.get("reasons", "recovered").text
        unknown = (say("The recovered share is not known: {}.", why),) if why else ()
        tag = "stitched, no figure" if stitched.value is not None else "not injected yet"
        return Verdict("none", tag, run, pair, unknown, held_out, (False, validated))
    kind, tag, sentences = _stitched(stitched)
    return Verdict(kind, tag, run, pair, tuple(sentences), held_out, (True, validated))


def _stitched(stitched: Node) -> tuple[Kind, str, list[Markup]]:
    leak = leak_of(stitched)
    kind, tag, controls = _against_controls(stitched)
    sentences = [_beyond_token(stitched), _from_the_mean(stitched), controls]
    if kind == "good" and "self-injection" in codes_of(stitched):
        sentences.append(
            say("But putting the target’s own states back is not neutral, so none of this can be trusted.")
        )
        kind, tag = "open", "self-injection fails"
    elif leak.words:
        sentences.append(say("At this layer a side channel is open ({}).", leak.words))
        if kind == "good":
            kind, tag = "open", "with a side channel"
    return kind, tag, sentences


def _beyond_token(stitched: Node) -> Markup:
    beyond, leak = stitched.get("beyond_token"), leak_of(stitched).tag
    token, clean = (stitched.get("conditions", name, "nats_per_token") for name in ("token", "clean"))
    if beyond.get("nats").number is None:
        why = stitched.get("reasons", "beyond_token").text
        return say("What it adds to the source’s token alone is not known{}.", why and f": {why}")
    if _number(beyond.get("nats")) <= 0:
        text = "Adds nothing to the source’s token alone ({} nats/token): the difference is {}."
        return say(text, show(token, nats), gain(beyond, leak))
    if beyond.get("beaten").value is not True:
        text = "Not told from the source’s token alone ({} nats/token): the difference is {}."
        return say(text, show(token, nats), gain(beyond, leak))
    text = (
        "Lowers the loss by {} from where the source’s token alone brings it ({}), {} of the way to the clean run ({})."
    )
    why = stitched.get("reasons", "recovered_token").text
    part = share(stitched.get("recovered_token"), leak, why)
    return say(text, gain(beyond, leak), show(token, nats), part, show(clean, nats))


def _from_the_mean(stitched: Node) -> Markup:
    recovered, leak = stitched.get("recovered"), leak_of(stitched).tag
    mean, clean = (stitched.get("conditions", name, "nats_per_token") for name in ("mean", "clean"))
    value = recovered.get("value").number
    if value is None:
        why = stitched.get("reasons", "recovered").text
        return say("The share recovered from the mean state is not known{}.", why and f": {why}")
    text = (
        "Recovers {} of the loss between the mean state ({} nats/token) and the clean run ({})."
        if value > 0
        else "No better than the mean state: recovers {} of the loss between it ({} nats/token) and the clean run ({})."
    )
    return say(text, share(recovered, leak), show(mean, nats), show(clean, nats))


def _against_controls(stitched: Node) -> tuple[Kind, str, Markup]:
    """Whether every control is beaten, in nats per token on the same documents."""
    leak = leak_of(stitched).tag
    blocks = {name: block for name, block in stitched.get("controls").items() if block.get("nats").number is not None}
    if not blocks:
        return "open", "controls not compared", say("The controls were not compared with it document by document.")

    def named(names: Sequence[str]) -> Markup:
        return Markup(", ").join(say("{} ({})", control_name(name), gain(blocks[name], leak)) for name in names)

    beats = stitched.get("beats_every_control").value
    ahead = [name for name, block in blocks.items() if _number(block.get("nats")) <= 0]
    level = [name for name, block in blocks.items() if block.get("beaten").value is False and name not in ahead]
    if ahead:
        text = "Does not beat {}: the loss with mapped states is no lower."
        return "poor", "does not beat its controls", say(text, named(ahead))
    if beats is True:
        closest = stitched.get("closest_control").text
        words = named([closest]) if closest in blocks else control_name(closest)
        return "good", "beats every control", say("Every control is beaten; the closest is {}.", words)
    if level:
        text = "Not told from {}: the interval includes zero, so no gain is shown."
        return "open", "not clearly above its controls", say(text, named(level))
    why = stitched.get("reasons", "beats_every_control").text
    text = "It was not compared with every control{}."
    return "open", "controls not compared", say(text, why and f": {why}")


def baselines(metrics: Node) -> tuple[dict[str, Node], list[str]]:
    """Held-out R2 of every simple baseline, by its name in words, and the names of those that are not beaten.

    Args:
        metrics: A layer pair's part of ``metrics.json``.
    """
    rivals = {name: metrics.get("baselines", key, "r2") for key, name in _BASELINES.items()}
    known = {name: r2 for name, r2 in rivals.items() if r2.number is not None}
    codes, unbeaten = codes_of(metrics), [ALONE] if ALONE in known else []
    unbeaten = unbeaten if "token-explains" in codes else []
    controls = {name: r2 for name, r2 in known.items() if name != ALONE}
    if "no-better-than-controls" in codes and controls:
        unbeaten = [max(controls, key=lambda name: _number(controls[name])), *unbeaten]
    return known, unbeaten


def _held_out(metrics: Node, *, start_is_kept: bool) -> list[Markup]:
    r2 = metrics.get("test", "r2")
    if r2.number is None:
        return []
    rivals, unbeaten = baselines(metrics)
    sentences = []
    beaten = [name for name in rivals if name not in unbeaten]
    text = "Held-out R² {}, above {}." if beaten else "Held-out R² {}."
    sentences.append(say(text, show(r2), _listed(rivals, beaten)) if beaten else say(text, show(r2)))
    if unbeaten:
        sentences.append(say("It does not beat {}.", _listed(rivals, unbeaten)))
    partial = metrics.get("test", "partial_r2")
    if partial.number is not None:
        text = "Of the error that the source’s token alone leaves it explains {} {} (partial R²)."
        sentences.append(say(text, show(partial, score), interval(metrics.get("test", "partial_r2_ci95"), score)))
    if start_is_kept:
        sentences.append(say("Training found nothing better than its start: epoch 0 is kept."))
    closed = metrics.get("baselines", "closed_form")
    if closed.get("r2").number is not None:
        sentences.append(_against_closed_form(metrics, closed))
    top, chance = metrics.get("test", "retrieval_top1"), metrics.get("test", "retrieval_chance")
    if top.number is not None and chance.number is not None:
        near = ", hardly above that" if "retrieval-at-chance" in codes_of(metrics) else ""
        text = "The nearest target state is the true partner in {} of cases (chance {}){}."
        sentences.append(say(text, show(top, percent), show(chance, percent), near))
    return sentences


def _listed(rivals: dict[str, Node], names: Sequence[str]) -> Markup:
    return Markup(", ").join(say("{} ({})", name, show(rivals[name])) for name in names)


def _against_closed_form(metrics: Node, closed: Node) -> Markup:
    name = closed.get("name").text
    rival = say("{}R² {}", name and f"{name}, ", show(closed.get("r2")))
    if "loses-to-closed-form" in codes_of(metrics):
        return say("It falls short of the closed form ({}): suspect the learning rate or an early stop.", rival)
    return say("Beside it stands the closed form ({}).", rival)


def _number(node: Node) -> float:
    return node.number if node.number is not None else float("-inf")
