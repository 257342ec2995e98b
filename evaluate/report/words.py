"""The summary in words, from the numbers: what each map was shown to do, and what limits that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from evaluate.report import cka, communicate
from evaluate.report.inputs import Node, Pair, Run
from evaluate.report.names import control_name, share, type_name
from evaluate.report.numbers import count, nats, percent, say, show

#: Below this, two R2 are called equal in words; the table shows both.
_TIE = 0.005
#: Self-injection must leave the loss as it is; rounding in an average over tokens stays below this.
_NEUTRAL_NATS = 1e-3
#: A bootstrap over fewer documents gives an interval that is only a hint.
_FEW_DOCUMENTS = 10

_BASELINES = {
    "mean": "the mean state",
    "identity": "the states as they are (identity)",
    "random_rotation": "a random rotation",
    "shuffled": "a map fitted to shuffled pairs",
}

_SPAN = "of the loss between the mean state and the clean run"

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


@dataclass(frozen=True)
class Note:
    """A warning or a gap, and the runs and layer pairs it holds for."""

    text: Markup
    where: tuple[str, ...]


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Judge every map of every run, best first.

    Args:
        runs: What was read.
    """
    found = [_judge(run, pair) for run in runs for pair in run.pairs]
    return sorted(found, key=lambda verdict: verdict.rank, reverse=True)


def headline(runs: Sequence[Run], judged: Sequence[Verdict]) -> Markup:
    """The answer in one or two sentences.

    Args:
        runs: What was read.
        judged: The verdicts, best first.
    """
    tested = [v for v in judged if v.kind != "none"]
    good = [v for v in tested if v.kind == "good"]
    if not judged:
        return _only_cka(runs)
    if not tested:
        subject = "The map has" if len(judged) == 1 else f"None of the {len(judged)} maps has"
        negation = " not" if len(judged) == 1 else ""
        return say(
            "{}{} been injected into its target yet. The figures below say how well states are "
            "predicted, not whether one model can use the other’s.",
            subject,
            negation,
        )
    unclear = sum(v.kind == "open" for v in tested)
    best = tested[0]
    figure = share(_recovered(best))
    if not good:
        lead = "The map does not beat" if len(tested) == 1 else f"None of {len(tested)} maps beats"
        if unclear:
            lead = lead.replace("does not beat", "does not clearly beat")
            lead = lead.replace("beats", "clearly beats")
        return say("{} its controls. The best, {}, recovers {} {}.", lead, best.title, figure, _SPAN)
    if len(tested) == 1:
        text = "{} beats every control: it recovers {} {}."
        return say(text, best.title, figure, _SPAN)
    rest = len(judged) - len(tested)
    verb = "beats" if len(good) == 1 else "beat"
    lead = f"{len(good)} of {len(tested)} injected maps {verb} every control"
    lead += f"; {rest} more were fitted, not injected." if rest else "."
    return say("{} The best, {}, recovers {} {}.", lead, good[0].title, share(_recovered(good[0])), _SPAN)


def warnings(runs: Sequence[Run]) -> list[Note]:
    """What limits the figures: the runs' own warnings and what shows only across files.

    Args:
        runs: What was read.
    """
    found = [("all runs", text) for text in _differing_stores(runs)]
    for run in runs:
        found += [(run.label, text) for text in cka.warnings(run)]
        for key, metrics in run.file("metrics.json").get("pairs").items():
            for warning in metrics.get("warnings"):
                code = warning.get("code").text or "warning"
                text = say("<b>{}</b> {}", code, warning.get("message").text or warning.text)
                found.append((f"{run.label}, {Pair.parse(key)}", text))
        for key, stitched in run.file("stitch.json").get("pairs").items():
            where = f"{run.label}, {Pair.parse(key)}"
            found += [(where, text) for text in _stitch_warnings(stitched)]
        found += communicate.warnings(run)
        found += [(run.label, say("<b>{}</b> {}", code, text)) for code, text in run.notes]
        if run.torn_log:
            words = "<b>torn log</b> log.jsonl ends in half a line: training was cut short or runs."
            found.append((run.label, say(words)))
    return sorted(_grouped(found), key=_by_code(found))


def gaps(runs: Sequence[Run]) -> list[Note]:
    """Evidence that is not there, with the command that would produce it.

    Args:
        runs: What was read.
    """
    found = []
    for name in ("adapter.json", "metrics.json", "stitch.json", "generations.json"):
        lacking = [run for run in runs if run.holds_a_map and name not in run.files]
        if lacking:
            # Where one run lacks it, the command can be pasted as it stands.
            how = command(name, lacking[0] if len(lacking) == 1 else None)
            text = say("No {}: <code>{}</code> writes it.", name, how)
            found.append(Note(text, tuple(run.label for run in lacking)))
    if not any("cka.json" in run.files for run in runs):
        how = command("cka.json", None)
        found.append(Note(say("No cka.json: <code>{}</code> writes it.", how), ()))
    return found


def _by_code(found: Sequence[tuple[str, Markup]]) -> Callable[[Note], int]:
    # Warnings of one kind stand together, the kinds in the order in which they first come up.
    order: dict[str, int] = {}
    for _, text in found:
        order.setdefault(_code(text), len(order))
    return lambda note: order[_code(note.text)]


def _code(text: Markup) -> str:
    return text.partition("</b>")[0]


def _grouped(found: Sequence[tuple[str, Markup]]) -> list[Note]:
    # The same warning for many layer pairs is one thing to know, not many.
    notes: dict[str, tuple[Markup, list[str]]] = {}
    for where, text in found:
        notes.setdefault(text.striptags(), (text, []))[1].append(where)
    return [Note(text, tuple(where)) for text, where in notes.values()]


def command(name: str, run: Run | None) -> str:
    """The command that writes a file.

    Args:
        name: The file's name.
        run: The run that lacks it.
    """
    where = run.label if run else "RUN"
    return {
        "stitch.json": f"evaluate stitch --store STORE --adapter {where}",
        "generations.json": f"evaluate generate --adapter {where}",
        "communicate.json": f"evaluate communicate --adapter {where} --task countries",
        "cka.json": "align cka --store STORE --out DIR",
    }.get(name, f"align train --store STORE --type {(run and run.type) or 'TYPE'} --out {where}")


def _judge(run: Run, pair: Pair) -> Verdict:
    metrics = run.file("metrics.json").get("pairs", pair.key)
    stitched = run.file("stitch.json").get("pairs", pair.key)
    recovered = stitched.get("recovered", "value")
    held_out = tuple(_held_out(metrics, trained=run.trained))
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
    value = recovered.get("value").number or 0.0
    text = (
        "Recovers {} of the loss between the mean state ({} nats/token) and the clean run ({})."
        if value > 0
        else "No better than the mean state: recovers {} of the loss between it ({} nats/token) and the clean run ({})."
    )
    sentences = [say(text, share(recovered), show(loss["mean"], nats), show(loss["clean"], nats))]
    gain, low = best.get("value"), best.get("ci95", 0).number
    control = best.get("control").text
    reached = stitched.get("conditions", control, "nats_per_token")
    against = say("({}, {} nats/token)", control_name(control) or "unnamed", show(reached, nats))
    if gain.number is None:
        why = best.get("reason").text or stitched.get("reasons", "recovered_best_control").text
        sentences.append(say("No comparison with the best control{}.", why and f": {why}"))
        kind, tag = _against_conditions(stitched)
    elif gain.number <= 0 or value <= 0:
        text = "Does not beat its best control {}: it reaches {} nats/token, {} of the way from there."
        sentences.append(say(text, against, show(loss["mapped"], nats), share(best)))
        kind, tag = "poor", "does not beat its controls"
    elif low is not None and low <= 0:
        text = "Counted from its best control {}, {}: that interval includes zero, so no gain is shown."
        sentences.append(say(text, against, share(best)))
        kind, tag = "open", "not clearly above its controls"
    else:
        sentences.append(say("Counted from its best control {}, {}.", against, share(best)))
        kind, tag = "good", "beats every control"
    if 0 < value < 0.5:
        sentences.append(say("Most of that loss remains."))
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


def _held_out(metrics: Node, *, trained: bool) -> list[Markup]:
    r2 = metrics.get("test", "r2")
    if r2.number is None:
        return []
    sentences = []
    rivals = [metrics.get("baselines", name, "r2") for name in _BASELINES]
    rival = max((r for r in rivals if r.number is not None), key=_number, default=Node())
    name = _BASELINES.get(rival.at.split("/")[-2], "") if rival.at else ""
    if not name:
        sentences.append(say("Held-out R² {}.", show(r2)))
    elif _number(r2) > _number(rival):
        text = "Held-out R² {}; the best simple baseline, {}, reaches {}."
        sentences.append(say(text, show(r2), name, show(rival)))
    else:
        text = "Held-out R² {} does not beat {} ({})."
        sentences.append(say(text, show(r2), name, show(rival)))
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


def _stitch_warnings(stitched: Node) -> list[Markup]:
    texts = []
    clean = stitched.get("conditions", "clean", "nats_per_token")
    own = stitched.get("conditions", "self", "nats_per_token")
    known = clean.number is not None and own.number is not None
    moved = known and abs(_number(own) - _number(clean)) > _NEUTRAL_NATS
    identical = stitched.get("self_bit_identical").value
    # Where the prompt is hidden, a model loses by its own states as well; they were put in bit by bit all the same.
    if identical is False or (identical is None and moved):
        text = (
            "<b>self-injection</b> Injecting the target’s own states is not neutral (clean {}, self {} "
            "nats/token): do not trust the other conditions either."
        )
        texts.append(say(text, show(clean, nats), show(own, nats)))
    documents = stitched.get("n_documents")
    if documents.number is not None and documents.number < _FEW_DOCUMENTS:
        text = "<b>few documents</b> The stitched intervals come from {} documents; take them as a hint."
        texts.append(say(text, show(documents, count)))
    return texts


def _differing_stores(runs: Sequence[Run]) -> list[Markup]:
    prints = {run.file("adapter.json").get("store", "fingerprint").text for run in runs} - {""}
    if len(prints) < 2:
        return []
    text = (
        "<b>different stores</b> These runs were fitted and scored on different stores; figures of "
        "one do not compare with figures of another."
    )
    return [say(text)]


def _only_cka(runs: Sequence[Run]) -> Markup:
    if answered := communicate.findings(runs):
        return answered[0][0]
    found = [sentence for run in runs for sentence in cka.findings(run)[:1]]
    return say(
        "{} No map was fitted in {}, so nothing here says whether one model can use the other’s states.",
        Markup(" ").join(found),
        "this directory" if len(runs) == 1 else "these directories",
    )


def _recovered(verdict: Verdict) -> Node:
    return verdict.run.file("stitch.json").get("pairs", verdict.pair.key, "recovered")


def _number(node: Node) -> float:
    return node.number if node.number is not None else float("-inf")
