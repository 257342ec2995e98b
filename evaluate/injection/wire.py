"""What a text's source states become at the target's positions, whatever the kind of the map.

A linear map and an ``mlp`` take states one by one: a target position gets the mapped state of the source token it
follows. A ``compress`` map reads a window and answers at the target's own positions. It gets what it was trained on:
the ordinary tokens without attention sinks (unless the run kept them), with their byte ends, and no more text at once
than a window of its store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from align.compress.layout import NUMBER_BYTES
from align.compress.resampler import Resampler
from align.maps.fitted import Adapter, Aligner
from evaluate.injection.positions import source_positions
from featstore.errors import AdapterError, FitError
from featstore.text.tokens import TokenizedWindow
from featstore.text.windows import windows as cut

Rows = NDArray[np.float32]
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Crossing:
    """A text under both tokenizers.

    Attributes:
        source: Source tokens.
        target: Target tokens.
        source_sink: bool ``(source tokens,)``, which of them are attention sinks.
        target_sink: bool ``(target tokens,)``.
        taken: int64 ``(target tokens,)``, the source position whose state a target position takes, -1 for its own.
    """

    source: TokenizedWindow
    target: TokenizedWindow
    source_sink: NDArray[np.bool_]
    target_sink: NDArray[np.bool_]
    taken: NDArray[np.int64]

    @property
    def places(self) -> NDArray[np.int64]:
        """int64 ``(n,)``, the target positions that take a state."""
        return np.flatnonzero(self.taken >= 0)


def crossing(
    source: TokenizedWindow,
    target: TokenizedWindow,
    source_sink: NDArray[np.bool_],
    target_sink: NDArray[np.bool_],
) -> Crossing:
    """Decide which target positions take a source state: no sink of either side does.

    Args:
        source: Tokens of a text under the source's tokenizer.
        target: Tokens of the same text under the target's.
        source_sink: bool ``(source tokens,)``.
        target_sink: bool ``(target tokens,)``.
    """
    taken = source_positions(source, target)
    taken[target_sink | ((taken >= 0) & source_sink[np.maximum(taken, 0)])] = -1
    return Crossing(source, target, source_sink, target_sink, taken)


@dataclass(frozen=True, eq=False)
class Wire:
    """A map, ready for states of any text.

    Attributes:
        aligner: The map.
        window_bytes: Bytes of text that a map of windows reads at once; None for any number.
    """

    aligner: Aligner
    window_bytes: int | None
    _keep_sinks: bool
    _module: Resampler | None

    def states(self, x: Rows, text: Crossing, ends: Sequence[int] = ()) -> Rows:
        """Map a text's source states to the target positions that take one.

        Args:
            x: float32 ``(source tokens, d_source)``, the states at all source tokens.
            text: Its tokens.
            ends: Byte ends of the pieces (:meth:`pieces`) that a map of windows reads one after the other; one piece
                without.

        Returns:
            float32 ``(n, d_target)``, a row for each of ``text.places``.

        Raises:
            AdapterError: ``x`` has another width than the map, or not a row for every token.
        """
        wanted = (len(text.source.ids), self.aligner.widths[0])
        if x.shape != wanted:
            raise AdapterError(
                f"{self.aligner.pair.key}: source states have shape {x.shape}, the map needs {wanted}; "
                "use the store and the models named in its card"
            )
        if self._module is None:
            return self.aligner.apply(x[text.taken[text.places]])
        return self._windowed(self._module, x, text, ends)

    def pieces(self, text: str) -> list[int]:
        """Byte ends of the windows in which this map reads a text, cut as :func:`featstore.text.windows.windows` does.

        Args:
            text: The text.

        Returns:
            Ascending byte ends; empty where it reads the text at once.
        """
        if self._module is None or self.window_bytes is None:
            return []
        return [end for _, end in cut(text.encode(), self.window_bytes)]

    def rate(self, text_bytes: Sequence[int]) -> dict[str, float | int] | None:
        """What a map of windows sends, in the terms of ``rate`` in ``metrics.json``; None for a map of rows.

        Args:
            text_bytes: UTF-8 bytes of every window sent.
        """
        if self._module is None:
            return None
        layout = self._module.layout
        latent = layout.latents * layout.latent_dim * NUMBER_BYTES
        mean = float(np.mean(text_bytes))
        return {
            "windows": len(text_bytes),
            "latents": layout.latents,
            "latent_dim": layout.latent_dim,
            "latent_bytes": float(latent),
            "text_bytes": mean,
            "latent_bytes_per_text_byte": latent / mean,
        }

    def _windowed(self, module: Resampler, x: Rows, text: Crossing, ends: Sequence[int]) -> Rows:
        read, answered = (
            np.flatnonzero(~side.special & (self._keep_sinks | ~sink))
            for side, sink in ((text.source, text.source_sink), (text.target, text.target_sink))
        )
        answers = np.zeros((len(text.target.ids), self.aligner.widths[1]), np.float32)
        if not len(text.places):
            return answers[:0]
        ends_x, ends_y = text.source.byte_end[read], text.target.byte_end[answered]
        inner = np.asarray(ends[:-1], dtype=np.int64)
        piece_x = np.searchsorted(inner, ends_x)
        # Where the source has no token of its own in a piece, the piece before speaks for it.
        spoken = np.unique(piece_x)
        piece_y = spoken[np.maximum(np.searchsorted(spoken, np.searchsorted(inner, ends_y), side="right") - 1, 0)]
        starts = np.concatenate([[0], inner])
        for piece in spoken:
            here, there = piece_x == piece, piece_y == piece
            answers[answered[there]] = module.reconstruct(
                x[read[here]], ends_x[here] - starts[piece], ends_y[there] - starts[piece]
            )
        return answers[text.places]


def wire(adapter: Adapter, aligner: Aligner) -> Wire:
    """Make a map of a run ready, and check it against the run's card.

    Args:
        adapter: The maps of the run.
        aligner: One of its maps.

    Raises:
        AdapterError: The map does not have the widths of the card's models, or the card or the tensors of a map of
            windows lack what applying it needs.
    """
    pair, card = aligner.pair, adapter.card
    for name, layers, width in (
        (pair.source, len(pair.source_layers), aligner.widths[0]),
        (pair.target, 1, aligner.widths[1]),
    ):
        recorded = int(card["models"][name]["width"]) * layers
        if recorded != width:
            raise AdapterError(
                f"{pair.key}: the map has width {width} for {name!r}, the card of {adapter.directory} says {recorded}; "
                "train it again"
            )
    if aligner.takes_rows:
        return Wire(aligner, None, False, None)
    module = _checked(adapter, "options", lambda: Resampler.from_tensors(aligner.tensors, aligner.options))
    widths = (module.basis.shape[0], len(module.mean_target))
    if widths != aligner.widths:
        raise AdapterError(
            f"{pair.key}: the resampler takes and gives widths {widths}, the card of {adapter.directory} says "
            f"{aligner.widths}; train it again"
        )
    keep = _checked(adapter, "mask.keep_sinks", lambda: bool(card["mask"]["keep_sinks"]))
    size = _checked(adapter, "corpus", lambda: _window_bytes(card))
    return Wire(aligner, size, keep, module)


def _window_bytes(card: dict[str, Any]) -> int:
    """A window's bytes where the card says so, else what the windows of its corpus have in the mean."""
    recorded = card.get("window_bytes") or card["corpus"].get("window_bytes")
    return int(recorded or max(4, -(-card["corpus"]["bytes"] // card["corpus"]["windows"])))


def _checked(adapter: Adapter, what: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except (FitError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise AdapterError(
            f"the card of {adapter.directory} does not fit its compress map ({what}: {error}); train it again"
        ) from error
