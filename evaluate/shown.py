"""Results as a notebook meets them: the records of :mod:`evaluate.results`, with a plot and a readable form.

Every result is a record (its members are attributes), gives a table with ``to_pandas()``, a figure with ``plot()``, and
prints as tables in a terminal (``rich.print``) and in a notebook. :meth:`ShownResult.read` reads one from a directory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import PrivateAttr

from evaluate.communication.verdicts import CONTROLS as ANSWER_CONTROLS
from evaluate.communication.verdicts import METHODS, condition_name
from evaluate.injection.controls import CONTROLS
from evaluate.results import Answers, Communication, Generations, Losses, Stitched, TaskAnswers
from featstore.runtime import records
from featstore.runtime.console import human_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

#: The order in which people read conditions; a file has them in the order of their names.
_CONDITIONS = ("alone", "clean", "self", "mapped", *CONTROLS)
_ANSWERS = (
    "silent",
    "text",
    "summary",
    *(condition_name(method, control) for method in METHODS for control in (None, *ANSWER_CONTROLS)),
)
#: What a table shows in place of a figure that is undefined or was not measured.
_NONE = "–"


@dataclass(frozen=True)
class Sheet:
    """A table for people, in a terminal or a notebook.

    Attributes:
        title: Above it.
        columns: Names.
        rows: One text for each column.
        notes: Lines below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __rich__(self) -> RenderableType:
        """The table for a terminal; what models have written is no markup."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), title_justify="left", title_style="bold")
        for name in self.columns:
            # A figure or a name that is cut in two is hard to read; a text may be.
            table.add_column(name, no_wrap=name not in ("text", "value"))
        for row in self.rows:
            table.add_row(*map(Text, row))
        return Group(table, *map(Text, self.notes))

    def html(self) -> str:
        """The table for a notebook."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        left = "text-align:left"
        lines = ("".join(f"<td style='{left}'>{escape(cell)}</td>" for cell in row) for row in self.rows)
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        caption = f"<caption style='{left};font-weight:bold'>{escape(self.title)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


class ShownResult(records.Record):
    """A record that prints as tables."""

    _path: Path | None = PrivateAttr(default=None)

    @classmethod
    def read(cls, where: Path) -> Self:
        """Read the result that an earlier call has written.

        Args:
            where: Its directory, or the file.

        Raises:
            AdapterError: There is none; the message names the command that writes it.
            CorruptDataError: It is damaged.
        """
        place = Path(where)
        return records.read(cls, place).at(place / cls.file if place.is_dir() else place)

    def at(self, path: Path) -> Self:
        """Remember the file that holds this result.

        Args:
            path: The file.
        """
        self._path = path
        return self

    @property
    def path(self) -> Path | None:
        """The file it was written to or read from; None where it was neither."""
        return self._path

    def sheets(self) -> list[Sheet]:
        """Its tables for people."""
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        """The tables for a terminal."""
        from rich.console import Group

        return Group(*(sheet.__rich__() for sheet in self.sheets()))

    def _repr_html_(self) -> str:
        return "".join(sheet.html() for sheet in self.sheets())

    def __repr__(self) -> str:
        """One line: the kind of result, what it is of, and its file."""
        place = f", {str(self.path)!r}" if self.path else ""
        return f"{type(self).__name__}({self._summary()}{place})"

    __str__ = __repr__

    def _summary(self) -> str:
        raise NotImplementedError


class StitchResult(ShownResult, Stitched):
    """What :func:`evaluate.stitch` measured: ``result.pairs[key].conditions["mapped"].nats_per_token`` and so on."""

    def sheets(self) -> list[Sheet]:
        """One table for each layer pair: loss, divergence and agreement under every condition."""
        result = []
        for key, pair in self.pairs.items():
            rows = [
                (
                    name,
                    _number(losses.nats_per_token, ".3f"),
                    _interval(losses.ci95, ".3f"),
                    _number(losses.bits_per_byte, ".3f"),
                    _number(losses.kl, ".3f"),
                    _number(losses.top1, ".0%"),
                )
                for name, losses in _measured(pair.conditions)
            ]
            best = pair.recovered_best_control
            shares = ((pair.recovered, "mean"), (best, best.control or "the best control"))
            recovered = [
                f"{_number(x.value, '.1%')} {_interval(x.ci95, '.1%')} against {control}" for x, control in shares
            ]
            notes = [f"recovered {', '.join(recovered)}"]
            notes += [f"{name}: not run, {reason}" for name, reason in pair.reasons.items()]
            if pair.self_bit_identical is False:
                notes.append("warning: self-injection changed the logits; do not trust these figures")
            title = f"{key}: {pair.n_tokens} tokens of {pair.n_documents} documents"
            columns = ("condition", "nats/token", "95 %", "bits/byte", "KL", "top-1")
            result.append(Sheet(title, columns, tuple(rows), tuple(notes)))
        return result

    def plot(self) -> Figure:
        """Draw the stitched loss under every condition with its 95 % interval, one panel for each layer pair."""
        figure, panels = _panels(
            list(self.pairs), max((len(pair.conditions) for pair in self.pairs.values()), default=0)
        )
        for axes, pair in zip(panels, self.pairs.values(), strict=True):
            points = [(name, losses.nats_per_token, losses.ci95) for name, losses in _measured(pair.conditions)]
            _points(axes, points, controls=CONTROLS)
            clean = pair.conditions.get("clean")
            if clean is not None and clean.nats_per_token is not None:
                axes.axvline(clean.nats_per_token, color="grey", linewidth=1, linestyle=":")
            axes.set_xlabel("stitched loss (nats/token), dotted: clean")
        return figure

    def _summary(self) -> str:
        return f"{_counted(len(self.pairs), 'layer pair')}, {self.split} split, keep={self.keep!r}"


class GenerateResult(ShownResult, Generations):
    """What :func:`evaluate.generate` wrote: ``result.entries[0].source_to_target[key]["mapped"]`` and so on."""

    def sheets(self) -> list[Sheet]:
        """One table for each prompt: each model's own text and the texts from mapped states."""
        result = []
        for entry in self.entries:
            nats = entry.likelihood
            rows = [
                (name, _NONE, repr(text), _number(value, ".2f"))
                for name, text, value in (
                    (f"{entry.source} alone", entry.source_alone, nats.source_alone),
                    (f"{entry.target} alone", entry.target_alone, nats.target_alone),
                )
                if text is not None
            ]
            for texts, values in (
                (entry.source_to_target, nats.source_to_target),
                (entry.target_to_source, nats.target_to_source),
            ):
                rows += [
                    ("mapped", key, repr(conditions["mapped"]), _number(values.get(key, {}).get("mapped"), ".2f"))
                    for key, conditions in texts.items()
                    if conditions.get("mapped") is not None
                ]
            result.append(Sheet(repr(entry.prompt), ("condition", "layer pair", "text", "nats/token"), tuple(rows)))
        if result:
            note = f"nats/token: {self.likelihood}; the controls are in to_pandas()"
            result[-1] = Sheet(result[-1].title, result[-1].columns, result[-1].rows, (note,))
        return result

    def plot(self) -> Figure:
        """Draw the likelihood of the receiving model's own text under every condition: a dot a prompt, and the mean."""
        found: dict[str, dict[str, list[float]]] = {}
        for entry in self.entries:
            nats = entry.likelihood
            for alone, pairs in (
                (nats.target_alone, nats.source_to_target),
                (nats.source_alone, nats.target_to_source),
            ):
                for key, conditions in pairs.items():
                    for name, value in {"alone": alone, **conditions}.items():
                        if value is not None:
                            found.setdefault(key, {}).setdefault(name, []).append(value)
        figure, panels = _panels(list(found), max(map(len, found.values()), default=0))
        for axes, unordered in zip(panels, found.values(), strict=True):
            values = {name: unordered[name] for name in _ordered(unordered, _CONDITIONS)}
            for place, dots in enumerate(values.values()):
                axes.plot(dots, [place] * len(dots), "o", color="grey", markersize=3, alpha=0.6)
            means = [(name, sum(dots) / len(dots), None) for name, dots in values.items()]
            _points(axes, means, controls=CONTROLS)
            axes.set_xlabel("receiving model's own text (nats/token)")
        return figure

    def _summary(self) -> str:
        return f"{_counted(len(self.entries), 'prompt')}, {self.max_new_tokens} new tokens, {self.decoding}"


class CommunicateResult(ShownResult, Communication):
    """What :func:`evaluate.communicate` found: ``result.tasks[name].conditions["text"].accuracy`` and so on."""

    def sheets(self) -> list[Sheet]:
        """One table for each task: accuracy and bytes under every condition."""
        result = []
        for name, task in self.tasks.items():
            rows = [
                (
                    answers.condition or _NONE,
                    answers.pair or _NONE,
                    _number(answers.accuracy, ".1%"),
                    _interval(answers.ci95, ".1%"),
                    _NONE if answers.bytes is None else human_bytes(answers.bytes),
                )
                for _, answers in _answers(task)
            ]
            notes = [f"chance {_number(task.chance, '.1%')}: {task.chance_is}"]
            notes += [f"{condition}: not run, {reason}" for condition, reason in task.reasons.items()]
            notes += [f"warning: {warning.message}" for warning in task.warnings]
            title = f"{name}: {task.source} reads, {task.target} answers; {task.n} examples"
            columns = ("condition", "layer pair", "accuracy", "95 %", "bytes")
            result.append(Sheet(title, columns, tuple(rows), tuple(notes)))
        return result

    def plot(self) -> Figure:
        """Draw the accuracy under every condition with its 95 % interval, one panel for each task."""
        figure, panels = _panels(
            list(self.tasks), max((len(task.conditions) for task in self.tasks.values()), default=0)
        )
        for axes, task in zip(panels, self.tasks.values(), strict=True):
            points, controls = [], []
            for key, answers in _answers(task):
                name = key if len(task.pairs) > 1 else answers.condition or key
                points.append((name, answers.accuracy, answers.ci95))
                if (answers.condition or "").endswith(ANSWER_CONTROLS):
                    controls.append(name)
            _points(axes, points, controls=controls)
            if task.chance is not None:
                axes.axvline(task.chance, color="grey", linewidth=1, linestyle=":")
            axes.set_xlim(-0.02, 1.02)
            axes.set_xlabel("accuracy, dotted: chance")
        return figure

    def _summary(self) -> str:
        return f"{', '.join(self.tasks)}, states as {self.format}"


@dataclass(frozen=True)
class ReportResult:
    """A page that :func:`evaluate.report` wrote, and what went into it.

    Attributes:
        out: The page.
        bytes: Its size.
        directories: Labels of the directories that it shows.
        files: Names of the files that it was made from.
        maps: Maps that it judges.
        beat_controls: How many of them beat their controls.
        warnings: Number of warnings.
        missing: What has not been measured yet.
    """

    out: str
    bytes: int
    directories: Sequence[str]
    files: Sequence[str]
    maps: int
    beat_controls: int
    warnings: int
    missing: Sequence[str]

    @property
    def path(self) -> Path:
        """The page."""
        return Path(self.out)

    def content(self) -> dict[str, Any]:
        """The members as JSON values."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """The summary for a terminal."""
        return self._sheet().__rich__()

    def __repr__(self) -> str:
        """One line."""
        return f"ReportResult({self.out!r}, {_counted(self.maps, 'map')}, {_counted(self.warnings, 'warning')})"

    def _repr_html_(self) -> str:
        link = f'<p><a href="{escape(self.path.absolute().as_uri())}">{escape(self.out)}</a></p>'
        return link + self._sheet().html()

    def _sheet(self) -> Sheet:
        facts = (
            ("directories", ", ".join(self.directories)),
            ("maps", str(self.maps)),
            ("maps that beat their controls", str(self.beat_controls)),
            ("warnings", str(self.warnings)),
            ("not measured", "; ".join(self.missing) or _NONE),
        )
        return Sheet(f"report in {self.out}", ("what", "value"), facts)


def _measured(conditions: Mapping[str, Losses | None]) -> Iterator[tuple[str, Losses]]:
    for name in _ordered(conditions, _CONDITIONS):
        losses = conditions[name]
        if losses is not None:
            yield name, losses


def _answers(task: TaskAnswers) -> list[tuple[str, Answers]]:
    """Conditions of a task, those without states first, then pair by pair."""
    pairs = list(task.pairs)
    places = {name: place for place, name in enumerate(_ANSWERS)}

    def place(item: tuple[str, Answers]) -> tuple[int, int]:
        answers = item[1]
        pair = pairs.index(answers.pair) if answers.pair in pairs else -1
        return pair, places.get(answers.condition or "", len(places))

    return sorted(task.conditions.items(), key=place)


def _ordered(names: Iterable[str], order: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _interval(ci95: Iterable[float | None] | None, form: str) -> str:
    return _NONE if ci95 is None else f"[{', '.join(_number(end, form) for end in ci95)}]"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _panels(titles: Sequence[str], lines: int) -> tuple[Figure, list[Any]]:
    """A figure with a panel for each title, three in a row, each high enough for some lines."""
    from evaluate.drawing import Drawing

    columns = max(1, min(3, len(titles)))
    rows = max(1, -(-len(titles) // columns))
    figure = Drawing(figsize=(5 * columns, rows * (1 + 0.24 * max(lines, 5))), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(titles) :]:
        axes.remove()
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, fontsize="small")
    return figure, panels[: len(titles)]


def _points(axes: Any, found: Sequence[tuple[str, float | None, Any]], *, controls: Collection[str]) -> None:
    """Conditions from top to bottom, each a point with its interval; controls have a colour of their own."""
    for place, (name, value, ci95) in enumerate(found):
        if value is None:
            continue
        low, high = (value if end is None else end for end in ci95 or (None, None))
        # A percentile interval may leave its own estimate out by a hair; a bar cannot be negative.
        bars = [[max(0.0, value - low)], [max(0.0, high - value)]]
        colour = "C1" if name in controls else "C0"
        axes.errorbar([value], [place], xerr=bars, marker="o", markersize=5, capsize=3, linestyle="none", color=colour)
    axes.set_yticks(range(len(found)), labels=[name for name, _, _ in found])
    axes.invert_yaxis()
