"""Stitched losses: tables and a chart of every condition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from evaluate.injection.controls import CONTROLS
from evaluate.injection.verified import leak_mark, leak_words
from evaluate.notebook.shown import ShownResult, height_of, interval, ordered
from evaluate.results import Losses, Stitched
from featstore.runtime.sheets import NONE, Sheet, counted, number
from featstore.text.roles import of_roles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONDITIONS = ("clean", "self", "mapped", *CONTROLS)


class StitchResult(ShownResult, Stitched):
    """What :func:`evaluate.stitch` measured: ``result.pairs[key].conditions["mapped"].nats_per_token`` and so on."""

    def sheets(self) -> list[Sheet]:
        """One table for each layer pair: loss, divergence and agreement under every condition."""
        result = []
        for key, pair in self.pairs.items():
            mark = leak_mark(pair.leak, known=pair.has("leak"))
            rows = [
                (
                    name,
                    number(losses.nats_per_token, ".3f"),
                    interval(losses.ci95, ".3f"),
                    number(losses.bits_per_byte, ".3f"),
                    number(losses.kl, ".3f"),
                    number(losses.top1, ".0%"),
                    *([NONE if name == "clean" else mark] if mark else []),
                )
                for name, losses in _measured(pair.conditions)
            ]
            best = pair.recovered_best_control
            shares = ((pair.recovered, "mean"), (best, best.control or "the best control"))
            recovered = [
                f"{number(x.value, '.1%')} {interval(x.ci95, '.1%')} against {control}" for x, control in shares
            ]
            notes = [f"recovered {', '.join(recovered)}{f' ({mark})' if mark else ''}"]
            notes += [f"{name}: not run, {reason}" for name, reason in pair.reasons.items()]
            if told := leak_words(pair.leak, known=pair.has("leak")):
                notes.append(told)
            if pair.self_bit_identical is False:
                notes.append("warning: self-injection changed the logits; do not trust these figures")
            title = f"{key}: {pair.n_tokens} tokens{of_roles(self.roles)} of {pair.n_documents} documents"
            columns = ("condition", "nats/token", "95 %", "bits/byte", "KL", "top-1", *(["leak"] if mark else []))
            result.append(Sheet(title, columns, tuple(rows), tuple(notes)))
        return result

    def plot(self) -> Figure:
        """Draw the stitched loss under every condition with its 95 % interval, one panel for each layer pair."""
        from featstore.runtime.drawing import draw_points, panels

        marks = {key: leak_mark(pair.leak, known=pair.has("leak")) for key, pair in self.pairs.items()}
        figure, axes_of = panels(
            [f"{key}, {mark}" if mark else key for key, mark in marks.items()],
            height=height_of(len(pair.conditions) for pair in self.pairs.values()),
        )
        for axes, pair in zip(axes_of, self.pairs.values(), strict=True):
            points = [(name, losses.nats_per_token, losses.ci95) for name, losses in _measured(pair.conditions)]
            draw_points(axes, points, controls=CONTROLS)
            clean = pair.conditions.get("clean")
            if clean is not None and clean.nats_per_token is not None:
                axes.axvline(clean.nats_per_token, color="grey", linewidth=1, linestyle=":")
            axes.set_xlabel("stitched loss (nats/token), dotted: clean")
        return figure

    def _summary(self) -> str:
        return f"{counted(len(self.pairs), 'layer pair')}, {self.split} split, keep={self.keep!r}"


def _measured(conditions: Mapping[str, Losses | None]) -> Iterator[tuple[str, Losses]]:
    for name in ordered(conditions, _CONDITIONS):
        losses = conditions[name]
        if losses is not None:
            yield name, losses
