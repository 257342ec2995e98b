"""Stitched losses: tables and a chart of every condition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Self

from pydantic import PrivateAttr

from align.judging.sentences import described
from evaluate.injection.controls import CONTROLS
from evaluate.injection.verified import SIDE_CHANNEL, leak_mark, leak_words
from evaluate.notebook.shown import ShownResult, height_of, interval, ordered
from evaluate.results import Beyond, Losses, Share, Stitched, StitchedDocuments, StitchedPair, read_stitch_documents
from featstore.runtime.extras import extras_named
from featstore.runtime.sheets import NONE, Sheet, counted, number
from featstore.text.roles import of_roles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONDITIONS = ("clean", "self", "mapped", *CONTROLS)


class StitchResult(ShownResult, Stitched):
    """What :func:`evaluate.stitch` measured: ``result.pairs[key].conditions["mapped"].nats_per_token`` and so on."""

    _documents: StitchedDocuments | None = PrivateAttr(default=None)

    @property
    def documents(self) -> StitchedDocuments | None:
        """The sums by document behind the figures; None where no ``stitch_documents.json`` lies beside the result."""
        if self._documents is None and self.path is not None:
            place = self.path.with_name(StitchedDocuments.file)
            self._documents = read_stitch_documents(place) if place.is_file() else None
        return self._documents

    def with_documents(self, documents: StitchedDocuments) -> Self:
        """Remember the sums by document.

        Args:
            documents: Of the same measurement.
        """
        self._documents = documents
        return self

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
                    *_margin(pair.controls.get(name)),
                    number(losses.bits_per_byte, ".3f"),
                    number(losses.kl, ".3f"),
                    number(losses.top1, ".0%"),
                    *([NONE if name == "clean" else mark] if mark else []),
                )
                for name, losses in _measured(pair.conditions)
            ]
            notes = [f"{line} ({mark})" if mark else line for line in _verdict(pair)]
            notes += [
                f"{name}: {'not run, ' if name in pair.conditions else ''}{reason}"
                for name, reason in pair.reasons.items()
            ]
            if told := leak_words(pair.leak, known=pair.has("leak")):
                notes.append(told)
            others = [found for found in pair.warnings if found.code != SIDE_CHANNEL]
            notes += [described(found.content(), "pair") for found in others]
            effective = "" if pair.effective_documents is None else f" ({pair.effective_documents:.1f} effective)"
            documents = counted(pair.n_documents or 0, "document")
            title = f"{key}: {pair.n_tokens} tokens{of_roles(self.roles)} of {documents}{effective}"
            columns = (
                *("condition", "nats/token", "95 %", "minus mapped", "95 %", "bits/byte", "KL", "top-1"),
                *(["leak"] if mark else []),
            )
            result.append(Sheet(title, columns, tuple(rows), tuple(notes)))
        return result

    @extras_named()
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


def _verdict(pair: StitchedPair) -> list[str]:
    """What is left beyond the token alone, the controls that stand, and the share counted from the mean state."""
    beyond = pair.beyond_token
    left = f"{number(beyond.nats, '+.3f')} nats/token {interval(beyond.ci95, '+.3f')}"
    lines = [f"beyond the token {left}, {_share(pair.recovered_token)} of the way from the token alone to clean"]
    stand = [name for name, block in pair.controls.items() if block.beaten is False]
    if pair.beats_every_control:
        lines.append(f"beats every control; the closest is {pair.closest_control}")
    elif pair.beats_every_control is None:
        lines.append("not known to beat every control")
    else:
        lines.append(f"does not beat {', '.join(stand)}")
    return [*lines, f"recovered {_share(pair.recovered)} from the mean state"]


def _share(share: Share) -> str:
    return f"{number(share.value, '.1%')} {interval(share.ci95, '.1%')}"


def _margin(block: Beyond | None) -> tuple[str, str]:
    return (NONE, NONE) if block is None else (number(block.nats, "+.3f"), interval(block.ci95, "+.3f"))


def _measured(conditions: Mapping[str, Losses | None]) -> Iterator[tuple[str, Losses]]:
    for name in ordered(conditions, _CONDITIONS):
        losses = conditions[name]
        if losses is not None:
            yield name, losses
