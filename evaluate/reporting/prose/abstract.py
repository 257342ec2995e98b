"""The answer at the top of the page in a few sentences: what was shown, on what evidence, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from evaluate.reporting.prose.notes import Note
from evaluate.reporting.prose.words import Verdict, best_control, between_models
from evaluate.reporting.reading.inputs import Pair, Run
from evaluate.reporting.reading.names import control_name, leak_of, share
from evaluate.reporting.reading.numbers import count, interval, percent, percent_number, say, score, show
from evaluate.reporting.sections import cka, communicate
from evaluate.reporting.sections.gains import winning

_SPAN = "of the loss between the mean state and the clean run"
#: Kinds of warning that the answer names; all of them stand further down.
_CODES = 4
#: With so many ways tried, a single one above its controls proves little.
_MANY_WAYS = 5


def headline(runs: Sequence[Run], judged: Sequence[Verdict]) -> Markup:
    """The answer in one or two sentences.

    Args:
        runs: What was read.
        judged: The verdicts, best first.
    """
    judged = between_models(judged)
    tested = [v for v in judged if v.kind != "none"]
    good = [v for v in tested if v.kind == "good"]
    if not judged:
        return _without_maps(runs)
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
    figure = _share(best)
    if not good:
        lead = "The map does not beat" if len(tested) == 1 else f"None of {len(tested)} maps beats"
        if unclear:
            lead = lead.replace("does not beat", "does not clearly beat")
            lead = lead.replace("beats", "clearly beats")
        return say("{} its controls. The best, {}, recovers {} {}.", lead, best.title, figure, _SPAN)
    if len(tested) == 1:
        text = "{} beats every control: it recovers {} {}{}."
        return say(text, best.title, figure, _SPAN, _on(best))
    rest = len(judged) - len(tested)
    verb = "beats" if len(good) == 1 else "beat"
    lead = f"{len(good)} of {len(tested)} injected maps {verb} every control"
    lead += f"; {rest} more were fitted, not injected." if rest else "."
    return say("{} The best, {}, recovers {} {}{}.", lead, good[0].title, _share(good[0]), _SPAN, _on(good[0]))


def sentences(runs: Sequence[Run], judged: Sequence[Verdict], notes: Sequence[Note]) -> list[Markup]:
    """What stands under the headline: held-out states, answers, and what the reader should know before relying on it.

    Args:
        runs: What was read.
        judged: The verdicts.
        notes: The warnings, the gravest first.
    """
    found = [_held_out(between_models(judged)), _ceiling(judged), _answers(runs), _caution(notes)]
    return [paragraph for paragraph in found if paragraph]


def _on(verdict: Verdict) -> Markup:
    documents = verdict.run.file("stitch.json").get("pairs", verdict.pair.key, "n_documents")
    if documents.number is None:
        return say("")
    return say(", on {} test {}", show(documents, count), "document" if documents.number == 1 else "documents")


def _held_out(judged: Sequence[Verdict]) -> Markup:
    tests = [(v, v.run.file("metrics.json").get("pairs", v.pair.key)) for v in judged]
    known = [(v, metrics) for v, metrics in tests if metrics.get("test", "r2").number is not None]
    if not known:
        return say("")
    best, metrics = max(known, key=lambda entry: entry[1].get("test", "r2").number or 0.0)
    r2 = metrics.get("test", "r2")
    words = say("On held-out text ")
    words += say("{} predicts the target’s states ", best.title)
    words += say("best: " if len(known) > 1 else "with ")
    ends = interval(metrics.get("test", "r2_ci95"), score)
    words += say("R² {} {}" if ends else "R² {}{}", show(r2, score), ends)
    name, rival = best_control(metrics)
    if not name:
        return words + say(". No control stands beside it.")
    if (r2.number or 0.0) <= (rival.number or 0.0):
        return words + say(", which is no better than {} ({}).", name, show(rival, score))
    return words + say(", where the best control, {}, reaches {}.", name, show(rival, score))


def _ceiling(judged: Sequence[Verdict]) -> Markup:
    own = [v for v in judged if v.pair.is_ceiling and v.kind != "none"]
    if not own or len(own) == len(judged):
        return say("")
    worst = min(own, key=lambda verdict: verdict.rank)
    text = "The ceiling, a model mapped to itself, recovers {}{}."
    return say(text, "at least " if len(own) > 1 else "", _share(worst))


def _answers(runs: Sequence[Run]) -> Markup:
    found = communicate.chosen_answers(runs)
    if not found:
        return say("")
    best, task = found[0], found[0].task
    way, _, key = best.condition.partition(" ")
    words = say(
        "Asked what only the source has read ({}), the target answers {} {}{} of {} questions right from mapped states "
        "({}{} of {})",
        task.get("task").text or "a task",
        show(best.block.get("accuracy"), percent),
        interval(best.block.get("ci95"), percent_number),
        best.leak.tag,
        show(task.get("n"), count),
        control_name(way),
        key and f" at {Pair.parse(key)}",
        best.run,
    )
    for name, told in (("text", "from the text itself"), ("silent", "from the question alone")):
        beside = task.get("conditions", name, "accuracy")
        if beside.number is not None:
            words += say(", {} {}", show(beside, percent), told)
    ways = sum(1 for entry in found for _ in entry.task.get("gains").items())
    if not ways:
        return words + say(".")
    won = sum(winning(entry.task) for entry in found)
    counted = f"{won or 'none'} {'are' if won > 1 else 'is'}"
    if ways == 1:
        counted = "It is" if won else "It is not"
        return words + say(". {} above the question alone, random and shuffled states beyond the interval.", counted)
    text = ". Of the {} ways to send states that were tried, {} above the question alone, random and shuffled states "
    words += say(text + "by more than the interval of the difference.", ways, counted)
    # p values are adjusted within a task; a file of an earlier version has none, and several tasks are more tests.
    return words + say(" One of so many may be chance.") if won == 1 and ways >= _MANY_WAYS else words


def _caution(notes: Sequence[Note]) -> Markup:
    codes: dict[str, int] = {}
    for note in notes:
        if note.level != "note":
            codes[note.code] = codes.get(note.code, 0) + len(note.where)
    if not codes:
        return say("No file carries a warning.")
    named = [
        say("<b>{}</b>{}", code, f" ({times} times)" if times > 1 else "")
        for code, times in list(codes.items())[:_CODES]
    ]
    rest = len(codes) - len(named)
    more = say(" and {} more kinds" if rest > 1 else " and {} more kind", rest) if rest else say("")
    return say(
        'Before relying on this, read the <a href="#warnings">warnings</a>: {}{}.', Markup(", ").join(named), more
    )


def _without_maps(runs: Sequence[Run]) -> Markup:
    if communicate.chosen_answers(runs):
        return say("No map was injected here; the target was asked what only the source has read.")
    if not any("cka.json" in run.files for run in runs):
        what = "This run is" if len(runs) == 1 else "These runs are"
        return say("{} not finished: there is no map to judge yet.", what)
    found = [sentence for run in runs for sentence in cka.findings(run)[:1]]
    return say(
        "{} No map was fitted in {}, so nothing here says whether one model can use the other’s states.",
        Markup(" ").join(found),
        "this directory" if len(runs) == 1 else "these directories",
    )


def _share(verdict: Verdict) -> Markup:
    stitched = verdict.run.file("stitch.json").get("pairs", verdict.pair.key)
    return share(stitched.get("recovered"), leak_of(stitched).tag)
