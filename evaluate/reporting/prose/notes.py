"""What limits the figures: warnings, one line for each cause however many maps it holds for, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from align.statistics import FEW_DOCUMENTS
from evaluate.reporting.reading.inputs import Node, Pair, Run
from evaluate.reporting.reading.numbers import count, nats, say, show
from evaluate.reporting.sections import cka, communicate

#: Self-injection must leave the loss as it is; rounding in an average over tokens stays below this.
NEUTRAL_NATS = 1e-3

#: What says that a result is none comes before what makes it smaller.
_FIRST = (
    *("self-injection", "side-channel", "different stores", "sinks-kept", "sinks kept", "after-final-norm"),
    *(
        "token-explains",
        "no-better-than-controls",
        "no-better-than-control",
        "retrieval-at-chance",
        "infonce-at-chance",
    ),
    *("text-near-chance", "text-no-better-than-silent", "failed cell", "unfinished run", "torn log"),
)
#: Layer pairs and runs named in a line; the others stand in its details.
_NAMED = 4
#: Texts of one warning, and places of one text, that its details list.
_LISTED = 50
_NUMBER = re.compile(r"(?<![\w.:])[-\u2212]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")


@dataclass(frozen=True)
class Found:
    """One warning in one place.

    Attributes:
        code: Its kind.
        text: What it says.
        run: Label of the run; empty for all.
        pair: The layer pair's key; empty for none.
        where: Anything else that tells its place, such as a task.
        level: ``note`` for what is no more than worth knowing.
    """

    code: str
    text: Markup
    run: str
    pair: str = ""
    where: str = ""
    level: str = "warning"

    @property
    def place(self) -> str:
        """Run, layer pair and the rest in one string."""
        pair = self.pair and str(Pair.parse(self.pair))
        return ", ".join(part for part in (self.run or "all runs", self.where, pair) if part)


@dataclass(frozen=True)
class Note:
    """A warning or a gap, and the runs and layer pairs it holds for.

    Attributes:
        text: What it says; where it says so of several maps, with the range of each figure.
        where: Run and layer pair of each, or of the first of very many.
        code: The kind of warning; empty for a gap.
        places: The same in few words.
        details: Every text in full with its places; empty where ``text`` is the only one.
        level: ``note`` for what is no more than worth knowing.
        times: In how many places it holds.
    """

    text: Markup
    where: tuple[str, ...]
    code: str = ""
    places: str = ""
    details: tuple[tuple[Markup, str], ...] = ()
    level: str = "warning"
    times: int = 1


def warnings(runs: Sequence[Run]) -> list[Note]:
    """What limits the figures: the runs' own warnings and what shows only across files, the gravest first.

    Warnings of one code whose texts differ in numbers alone are one note.

    Args:
        runs: What was read.
    """
    groups: dict[tuple[str, str, str], list[Found]] = {}
    for found in _all(runs):
        # No text holds this character: control characters became their pictures when it was read.
        cause = _NUMBER.sub("\0", found.text.striptags())
        groups.setdefault((found.level, found.code, cause), []).append(found)
    notes = [_note(group) for group in groups.values()]
    order = {code: place for place, code in enumerate(dict.fromkeys((*_FIRST, *(note.code for note in notes))))}
    return sorted(notes, key=lambda note: (note.level == "note", order[note.code]))


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


def is_neutral(stitched: Node) -> bool:
    """Whether putting the target's own states back changed nothing, as far as the file says.

    Args:
        stitched: A layer pair's part of ``stitch.json``.
    """
    clean, own = (stitched.get("conditions", name, "nats_per_token").number for name in ("clean", "self"))
    moved = clean is not None and own is not None and abs(own - clean) > NEUTRAL_NATS
    identical = stitched.get("self_bit_identical").value
    # Where the prompt is hidden, a model loses by its own states as well; they were put in bit by bit all the same.
    return not (identical is False or (identical is None and moved))


def _all(runs: Sequence[Run]) -> Iterator[Found]:
    yield from _differing_stores(runs)
    for run in runs:
        yield from (Found(code, text, run.label) for code, text in cka.warnings(run))
        for key, metrics in run.file("metrics.json").get("pairs").items():
            for warning in metrics.get("warnings"):
                text = say("{}", warning.get("message").text or warning.text)
                level = "note" if warning.get("level").text == "note" else "warning"
                yield Found(warning.get("code").text or "warning", text, run.label, key, level=level)
        for key, stitched in run.file("stitch.json").get("pairs").items():
            for code, text in _stitch_warnings(stitched):
                yield Found(code, text, run.label, key)
            yield from (_own(warning, run, [key]) for warning in stitched.get("warnings"))
        texts = run.file("generations.json")
        yield from (_own(w, run, [key for key, _ in texts.get("leaks").items()]) for w in texts.get("warnings"))
        for code, told, where, key in communicate.warnings(run):
            yield Found(code, say("{}", told), run.label, key, where)
        for code, said in run.notes:
            yield Found(code, say("{}", said), run.label)
        if run.torn_log:
            yield Found("torn log", say("log.jsonl ends in half a line: training was cut short or runs."), run.label)


def _own(warning: Node, run: Run, keys: Sequence[str]) -> Found:
    """A finding of a file, with the layer pair that its text opens with."""
    text = warning.get("message").text or warning.text
    key = next((key for key in keys if text.startswith(f"{key}: ")), "")
    level = "note" if warning.get("level").text == "note" else "warning"
    return Found(
        warning.get("code").text or "warning", say("{}", text.removeprefix(f"{key}: ")), run.label, key, level=level
    )


def _note(group: Sequence[Found]) -> Note:
    first = group[0]
    texts: dict[str, tuple[Markup, list[str]]] = {}
    for found in group:
        texts.setdefault(found.text.striptags(), (found.text, []))[1].append(found.place)
    details = tuple((text, "; ".join(_first(where))) for text, where in list(texts.values())[:_LISTED])
    if len(texts) > _LISTED:
        details += ((say("{} more like these", len(texts) - _LISTED), ""),)
    where = tuple(_first([found.place for found in group]))
    if len(texts) == 1:
        many = len(group) > 1
        return Note(first.text, where, first.code, _places(group) if many else where[0], (), first.level, len(group))
    return Note(_ranges(list(texts)), where, first.code, _places(group), details, first.level, len(group))


def _ranges(texts: Sequence[str]) -> Markup:
    """One sentence for several that differ in numbers: each number as it is, or from its lowest to its highest."""
    between = _NUMBER.split(texts[0])
    slots = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    sentence = between[0]
    for values, after in zip(slots, between[1:], strict=True):
        low, high = (pick(values, key=_value) for pick in (min, max))
        sentence += (low if _value(low) == _value(high) else f"{low} to {high}") + after
    return say("{}", sentence)


def _value(text: str) -> float:
    return float(text.replace(",", "").replace("\u2212", "-"))


def _first(names: Sequence[str]) -> list[str]:
    rest = len(names) - _LISTED
    return list(names) if rest <= 0 else [*names[:_LISTED], f"{rest} more"]


def _places(group: Sequence[Found]) -> str:
    keys = [found.pair for found in group if found.pair]
    shown = _both_ways([Pair.parse(key) for key in dict.fromkeys(keys)])
    runs = list(dict.fromkeys(found.run for found in group))
    parts = [f"{len(group)} times"]
    if shown:
        parts.append(f"{_some(shown)}")
    parts.append(f"in {_some(runs)}")
    return "; ".join(parts)


def _both_ways(pairs: Sequence[Pair]) -> list[str]:
    # Both directions between two layers are one place.
    ends = [((p.source, p.source_layer), (p.target, p.target_layer)) for p in pairs]
    known = set(ends)
    found: dict[object, str] = {}
    for pair, (a, b) in zip(pairs, ends, strict=True):
        name = f"{pair.source}:{pair.source_layer} ↔ {pair.target}:{pair.target_layer}"
        both = pair.source and a != b and (b, a) in known
        found.setdefault(tuple(sorted((a, b))) if both else pair.key, name if both else str(pair))
    return list(found.values())


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    # One name instead of "and 1 more".
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:_NAMED])} and {rest} more"


def _stitch_warnings(stitched: Node) -> list[tuple[str, Markup]]:
    found = []
    if not is_neutral(stitched):
        clean, own = (stitched.get("conditions", name, "nats_per_token") for name in ("clean", "self"))
        text = (
            "Injecting the target’s own states is not neutral (clean {}, self {} nats/token): do not trust the other "
            "conditions either."
        )
        found.append(("self-injection", say(text, show(clean, nats), show(own, nats))))
    documents = stitched.get("n_documents")
    codes = {warning.get("code").text for warning in stitched.get("warnings")}
    # Files of earlier versions do not say so themselves.
    if documents.number is not None and documents.number < FEW_DOCUMENTS and "few-documents" not in codes:
        text = "The stitched intervals come from {} documents; take them as a hint."
        found.append(("few-documents", say(text, show(documents, count))))
    return found


def _differing_stores(runs: Sequence[Run]) -> Iterator[Found]:
    prints = {run.file("adapter.json").get("store", "fingerprint").text for run in runs} - {""}
    if len(prints) > 1:
        text = say(
            "These runs were fitted and scored on different stores; figures of one do not compare with figures of "
            "another."
        )
        yield Found("different stores", text, "")
