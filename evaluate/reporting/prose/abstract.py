"""The answer at the top of the page in a few sentences: what was shown, on what evidence, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from evaluate.reporting.prose.notes import Note
from evaluate.reporting.prose.words import Verdict, baselines, between_models
from evaluate.reporting.reading.inputs import Pair, Run
from evaluate.reporting.reading.names import control_name, gain, leak_of, share
from evaluate.reporting.reading.numbers import count, interval, percent, percent_number, say, score, show
from evaluate.reporting.sections import cka, communicate
from evaluate.reporting.sections.gains import winning

#: Kinds of warning that the answer names; all of them stand further down.
_CODES = 4


def headline(runs: Sequence[Run], judged: Sequence[Verdict]) -> Markup:
    """The answer in one or two sentences.

    Args:
        runs: What was read.
        judged: The verdicts, in the order in which validation ranks the maps.
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
    # Chosen by validation and quoted on test: the largest of several test figures would be too large.
    first = tested[0]
    if not good:
        lead = "The map does not beat" if len(tested) == 1 else f"None of {len(tested)} maps beats"
        if unclear:
            lead = lead.replace("does not beat", "does not clearly beat")
            lead = lead.replace("beats", "clearly beats")
        return say("{} its controls. {} {}{}.", lead, _named(tested), _shown(first), _on(first))
    if len(tested) == 1:
        return say("{} beats every control: it {}{}.", first.title, _shown(first), _on(first))
    rest = len(judged) - len(tested)
    verb = "beats" if len(good) == 1 else "beat"
    lead = f"{len(good)} of {len(tested)} injected maps {verb} every control"
    lead += f"; {rest} more were fitted, not injected." if rest else "."
    but = "" if first.kind == "good" else ", and is not among them"
    return say("{} {} {}{}{}.", lead, _named(tested), _shown(first), _on(first), but)


def _named(tested: Sequence[Verdict]) -> Markup:
    """The map that is quoted, and by what it was chosen."""
    first = tested[0]
    if len(tested) == 1:
        return say("{}", first.title)
    how = "The first, " if first.choice[1] == float("-inf") else "The one with the highest validation R², "
    return say("{}{},", how, first.title)


def _shown(verdict: Verdict) -> Markup:
    """What a map was shown to do: first what is left beyond the token alone."""
    stitched = verdict.run.file("stitch.json").get("pairs", verdict.pair.key)
    beyond, leak = stitched.get("beyond_token"), leak_of(stitched).tag
    if beyond.get("nats").number is None:
        text = (
            "recovers {} of the loss between the mean state and the clean run, of which the source’s token alone may "
        )
        return say(text + "explain any part", share(stitched.get("recovered"), leak))
    why = stitched.get("reasons", "recovered_token").text
    part = share(stitched.get("recovered_token"), leak, why)
    if (beyond.get("nats").number or 0.0) <= 0:
        return say("adds nothing to the source’s token alone ({})", gain(beyond, leak))
    if beyond.get("beaten").value is not True:
        return say("cannot be told from the source’s token alone ({})", gain(beyond, leak))
    text = "lowers the loss by {} from where the source’s token alone brings it, {} of the way to the clean run"
    return say(text, gain(beyond, leak), part)


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
    chosen, metrics = max(known, key=lambda entry: entry[0].choice[1])
    r2 = metrics.get("test", "r2")
    words = say("On held-out text ")
    words += say("{} predicts the target’s states ", chosen.title)
    if len(known) > 1 and chosen.choice[1] > float("-inf"):
        words += say("(validation ranks it first) ")
    ends = interval(metrics.get("test", "r2_ci95"), score)
    words += say("with R² {} {}" if ends else "with R² {}{}", show(r2, score), ends)
    partial = metrics.get("test", "partial_r2")
    if partial.number is not None:
        text = " and explains {} {} of the error that the source’s token alone leaves (partial R²)"
        words += say(text, show(partial, score), interval(metrics.get("test", "partial_r2_ci95"), score))
    rivals, unbeaten = baselines(metrics)
    if not rivals:
        return words + say(". No control stands beside it.")
    if unbeaten:
        name = unbeaten[0]
        return words + say(", which does not beat {} ({}).", name, show(rivals[name], score))
    return words + say(", above {} beside it.", "every control" if len(rivals) > 1 else "the one control")


def _ceiling(judged: Sequence[Verdict]) -> Markup:
    own = [v for v in judged if v.pair.is_ceiling and v.kind != "none"]
    if not own or len(own) == len(judged):
        return say("")
    shares = [v.run.file("stitch.json").get("pairs", v.pair.key, "recovered") for v in own]
    shares = [block for block in shares if block.get("value").number is not None]
    if not shares:
        return say("")
    if len(shares) == 1:
        return say("The ceiling, a model mapped to itself, recovers {}.", share(shares[0]))
    lowest = min(shares, key=lambda block: block.get("value").number or 0.0)
    return say("The ceiling, models mapped to themselves, recovers {} or more.", show(lowest.get("value"), percent))


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
    return words


def _caution(notes: Sequence[Note]) -> Markup:
    codes: dict[str, int] = {}
    for note in notes:
        if note.level != "note":
            codes[note.code] = codes.get(note.code, 0) + note.times
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
    found = [sentence for run in runs for sentence in cka.findings(run)[:3]]
    return say(
        "{} No map was fitted in {}, so nothing here says whether one model can use the other’s states.",
        Markup(" ").join(found),
        "this directory" if len(runs) == 1 else "these directories",
    )
