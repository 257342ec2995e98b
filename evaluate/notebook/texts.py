"""Texts that models have written: tables of them, and a chart of how likely the receiving model's own text was."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from evaluate.injection.controls import CONTROLS
from evaluate.injection.verified import leak_mark, leak_words
from evaluate.notebook.shown import ShownResult, height_of, ordered
from evaluate.results import Generations
from featstore.runtime.extras import extras_named
from featstore.runtime.sheets import NONE, Sheet, counted, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONDITIONS = ("alone", "self", "mapped", *CONTROLS)


class GenerateResult(ShownResult, Generations):
    """What :func:`evaluate.generate` wrote: ``result.entries[0].source_to_target[key]["mapped"]`` and so on."""

    def sheets(self) -> list[Sheet]:
        """One table for each prompt: each model's own text and the texts from mapped states."""
        result = []
        for entry in self.entries:
            nats = entry.likelihood
            rows = [
                (name, NONE, repr(text), number(value, ".2f"))
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
                    (
                        "mapped",
                        key,
                        repr(conditions["mapped"]),
                        number(values.get(key, {}).get("mapped"), ".2f") + self._beside(key),
                    )
                    for key, conditions in texts.items()
                    if conditions.get("mapped") is not None
                ]
            result.append(Sheet(repr(entry.prompt), ("condition", "layer pair", "text", "nats/token"), tuple(rows)))
        if result:
            note = f"nats/token: {self.likelihood}; the controls are in to_pandas()"
            leaks = [f"{key}: {leak_words(leak)}" for key, leak in self.leaks.items() if leak != 0]
            result[-1] = replace(result[-1], notes=(note, *leaks))
        return result

    @extras_named()
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
        from featstore.runtime.drawing import draw_points, panels

        figure, axes_of = panels([key + self._beside(key) for key in found], height=height_of(map(len, found.values())))
        for axes, unordered in zip(axes_of, found.values(), strict=True):
            values = {name: unordered[name] for name in ordered(unordered, _CONDITIONS)}
            for place, dots in enumerate(values.values()):
                axes.plot(dots, [place] * len(dots), "o", color="grey", markersize=3, alpha=0.6)
            means = [(name, sum(dots) / len(dots), None) for name, dots in values.items()]
            draw_points(axes, means, controls=CONTROLS)
            axes.set_xlabel("receiving model's own text (nats/token)")
        return figure

    def _beside(self, key: str) -> str:
        mark = leak_mark(self.leaks.get(key), known=key in self.leaks)
        return f", {mark}" if mark else ""

    def _summary(self) -> str:
        return f"{counted(len(self.entries), 'prompt')}, {self.max_new_tokens} new tokens, {self.decoding}"
