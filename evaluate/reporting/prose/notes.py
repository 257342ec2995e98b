"""What limits the figures: findings, one line for each cause however many maps it holds for, and what is missing.

Findings are those of the files and of reading them; nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.judging.findings import finding
from align.judging.sentences import kind, sentence, together
from align.judging.table import CODES, LEVELS, WARNING
from evaluate.reporting.reading.findings import findings_of
from evaluate.reporting.reading.inputs import Pair, Run, clean_text
from evaluate.reporting.reading.names import control_name
from evaluate.reporting.reading.numbers import say

#: What says that a result is none comes before what makes it smaller, in the order of the table.
_ORDER = {code: place for place, code in enumerate(CODES)}
#: Layer pairs and runs named in a line; the others stand in its details.
_NAMED = 4
#: Texts of one warning, and places of one text, that its details list.
_LISTED = 50


@dataclass(frozen=True)
class Found:
    """One finding in one place.

    Attributes:
        content: The finding, as its file has it.
        run: Label of the run; empty for all.
        task: Of answers.
    """

    content: Mapping[str, Any]
    run: str
    task: str = ""

    @property
    def pair(self) -> str:
        """The layer pair's key; empty for none."""
        return str(self._where.get("pair", ""))

    @property
    def code(self) -> str:
        """Its kind."""
        return str(self.content.get("code") or "warning")

    @property
    def level(self) -> str:
        """``invalid``, ``warning`` or ``note``."""
        level = self.content.get("level")
        return level if level in LEVELS else WARNING

    @property
    def text(self) -> str:
        """What it says."""
        return clean_text(sentence(self.content))

    @property
    def place(self) -> str:
        """Run, task, layer pair and the rest in one string."""
        more = [control_name(clean_text(value)) for name, value in self._where.items() if name != "pair"]
        pair = self.pair and str(Pair.parse(self.pair))
        return ", ".join(part for part in (self.run or "all runs", self.task, *more, pair) if part)

    @property
    def _where(self) -> Mapping[str, str]:
        return self.content.get("where") or {}


@dataclass(frozen=True)
class Note:
    """A warning or a gap, and the runs and layer pairs it holds for.

    Attributes:
        text: What it says; where it says so of several maps, with the range of each figure.
        where: Run and layer pair of each, or of the first of very many.
        code: The kind of warning; empty for a gap.
        places: The same in few words.
        details: Every text in full with its places; empty where ``text`` is the only one.
        level: ``invalid``, ``warning`` or ``note``.
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
    """What limits the figures: the findings of all files, the gravest first.

    Those that differ in numbers alone are one note.

    Args:
        runs: What was read.
    """
    groups: dict[tuple[object, ...], list[Found]] = {}
    for found in _all(runs):
        groups.setdefault(kind(found.content), []).append(found)
    return sorted(
        (_note(group) for group in groups.values()),
        key=lambda note: (LEVELS.index(note.level), _ORDER.get(note.code, len(_ORDER))),
    )


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


def _all(runs: Sequence[Run]) -> Iterator[Found]:
    yield from _differing_stores(runs)
    for run in runs:
        parts = [("", run.file("cka.json")), ("", run.file("generations.json"))]
        parts += [
            ("", part) for name in ("metrics.json", "stitch.json") for _, part in run.file(name).get("pairs").items()
        ]
        parts += run.file("communicate.json").get("tasks").items()
        for task, part in parts:
            yield from (Found(content, run.label, task) for content in findings_of(part))
        yield from (Found(content, run.label) for content in run.notes)


def _note(group: Sequence[Found]) -> Note:
    first = group[0]
    texts: dict[str, list[str]] = {}
    for found in group:
        texts.setdefault(found.text, []).append(found.place)
    where = tuple(_first([found.place for found in group]))
    places = _places(group) if len(group) > 1 else where[0]
    details: tuple[tuple[Markup, str], ...] = ()
    if len(texts) > 1:
        details = tuple((say("{}", text), "; ".join(_first(at))) for text, at in list(texts.items())[:_LISTED])
        if len(texts) > _LISTED:
            details += ((say("{} more like these", len(texts) - _LISTED), ""),)
    text = say("{}", clean_text(together([found.content for found in group])))
    return Note(text, where, clean_text(first.code), places, details, first.level, len(group))


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


def _differing_stores(runs: Sequence[Run]) -> Iterator[Found]:
    prints = {run.file("adapter.json").get("store", "fingerprint").text for run in runs} - {""}
    if len(prints) > 1:
        yield Found(finding("different-stores", stores=len(prints)), "")
