"""Answers from another model's states: tables and a chart of every condition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.judging.sentences import described
from evaluate.communication.verdicts import CONTROLS, METHODS, condition_name
from evaluate.injection.verified import leak_mark
from evaluate.notebook.shown import ShownResult, height_of, interval
from evaluate.results import Answers, Communication, TaskAnswers
from featstore.runtime.console import human_bytes
from featstore.runtime.extras import extras_named
from featstore.runtime.sheets import NONE, Sheet, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METHODS = tuple(condition_name(method, control) for method in METHODS for control in (None, *CONTROLS))
_CONDITIONS = ("silent", "text", "summary", *_METHODS)


class CommunicateResult(ShownResult, Communication):
    """What :func:`evaluate.communicate` found: ``result.tasks[name].conditions["text"].accuracy`` and so on."""

    def sheets(self) -> list[Sheet]:
        """One table for each task: accuracy and bytes under every condition."""
        result = []
        for name, task in self.tasks.items():
            marks = _marks(task)
            rows = [
                (
                    answers.condition or NONE,
                    answers.pair or NONE,
                    number(answers.accuracy, ".1%"),
                    interval(answers.ci95, ".1%"),
                    NONE if answers.bytes is None else human_bytes(answers.bytes),
                    *([marks.get(answers.pair or "") or NONE] if any(marks.values()) else []),
                )
                for _, answers in _answers(task)
            ]
            notes = [f"chance {number(task.chance, '.1%')}: {task.chance_is}"]
            notes += [f"{condition}: not run, {reason}" for condition, reason in task.reasons.items()]
            notes += [described(warning.content()) for warning in task.warnings]
            title = f"{name}: {task.source} reads, {task.target} answers; {task.n} examples"
            columns = (
                "condition",
                "layer pair",
                "accuracy",
                "95 %",
                "bytes",
                *(["leak"] if any(marks.values()) else []),
            )
            result.append(Sheet(title, columns, tuple(rows), tuple(notes)))
        return result

    @extras_named()
    def plot(self) -> Figure:
        """Draw the accuracy under every condition with its 95 % interval, one panel for each task."""
        from featstore.runtime.drawing import draw_points, panels

        figure, axes_of = panels(
            list(self.tasks), height=height_of(len(task.conditions) for task in self.tasks.values())
        )
        for axes, task in zip(axes_of, self.tasks.values(), strict=True):
            points, controls = [], []
            marks = _marks(task)
            for key, answers in _answers(task):
                name = key if len(task.pairs) > 1 else answers.condition or key
                mark = marks.get(answers.pair or "")
                name += f", {mark}" if mark else ""
                points.append((name, answers.accuracy, answers.ci95))
                if (answers.condition or "").endswith(CONTROLS):
                    controls.append(name)
            draw_points(axes, points, controls=controls)
            if task.chance is not None:
                axes.axvline(task.chance, color="grey", linewidth=1, linestyle=":")
            axes.set_xlim(-0.02, 1.02)
            axes.set_xlabel("accuracy, dotted: chance")
        return figure

    def _summary(self) -> str:
        return f"{', '.join(self.tasks)}, states as {self.format}"


def _marks(task: TaskAnswers) -> dict[str, str]:
    """What stands beside the figures of each layer pair."""
    return {key: leak_mark(pair.leak, known=pair.has("leak")) for key, pair in task.pairs.items()}


def _answers(task: TaskAnswers) -> list[tuple[str, Answers]]:
    """Conditions of a task, those without states first, then pair by pair."""
    pairs = list(task.pairs)
    places = {name: place for place, name in enumerate(_CONDITIONS)}

    def place(item: tuple[str, Answers]) -> tuple[int, int]:
        answers = item[1]
        pair = pairs.index(answers.pair) if answers.pair in pairs else -1
        return pair, places.get(answers.condition or "", len(places))

    return sorted(task.conditions.items(), key=place)
