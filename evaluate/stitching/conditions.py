"""Some windows in the target at once: once untouched, then with states of any number of conditions put in.

The blocks below a layer give every condition of a window the same, so they run once, in the untouched pass; a condition
runs the blocks above. Conditions and windows are rows of one batch where the model lets windows share a pass. The head
runs over the scored positions alone (:mod:`featstore.models.tail`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluate.injection.loading import Loaded
from evaluate.injection.wire import Rows
from evaluate.stitching.predictions import Figures, Untouched, compared, untouched
from evaluate.stitching.scores import Scored, scored
from evaluate.stitching.windows import Window
from featstore.models import residual as sites
from featstore.models.injection import aligned, inject
from featstore.models.stack import embedding_rows
from featstore.models.tail import Tail, Whole, tail_of

#: Padded tokens of a pass at most, unless it is of a single row: on a processor, where longer ones are no faster, and
#: elsewhere.
_TOKENS, _ELSEWHERE = 2048, 16384
#: Bytes of the untouched log-probabilities that are held for windows that go together.
_HELD = 256 << 20


@dataclass(frozen=True, eq=False)
class PutIn:
    """States for one window.

    Attributes:
        window: Its place among those that go together.
        states: ``(places, width)``.
    """

    window: int
    states: Rows | torch.Tensor


def together(loaded: Loaded, windows: Sequence[Window]) -> list[list[int]]:
    """Places of windows that go through a model together.

    Args:
        loaded: The model.
        windows: In their order.

    Returns:
        Places in ``windows``, each once.
    """
    lengths = [len(window.target.ids) for window in windows]
    most = _most(loaded.device)
    # Each has several conditions in a batch already; more are put together only where a batch gains by being large.
    most = 1 if loaded.device.type == "cpu" else min(most, _HELD // (4 * max(embedding_rows(loaded.stream.model), 1)))
    groups: list[list[int]] = []
    for group in loaded.stream.batching.groups(lengths):
        groups += _filled(group, lengths, most)
    return sorted(groups)


class Group:
    """Windows that go through the target together.

    Args:
        target: The model.
        tail: Its last part, from :func:`last_part`.
        windows: Those of :func:`together`.
        layers: At which states will be put in.
    """

    def __init__(self, target: Loaded, tail: Tail | Whole, windows: Sequence[Window], layers: Sequence[int]) -> None:
        self._target, self._tail, self._windows = target, tail, windows
        ids = np.zeros((len(windows), max(len(w.target.ids) for w in windows)), np.int64)
        for row, window in enumerate(windows):
            ids[row, : len(window.target.ids)] = window.target.ids
        self._ids = torch.from_numpy(ids).to(target.device)
        with sites.watching(target.stream, sorted(layers)) as own:
            self._final = tail.states(self._ids)
        self.own: dict[int, torch.Tensor] = own
        """``{layer: (windows, tokens, width)}``, the target's own stream."""
        self.scored: list[Scored] = [scored(w.target, w.target_counts) for w in windows]
        """What is scored of every window."""
        self._places = [torch.from_numpy(part.places).to(self._final.device) for part in self.scored]
        self.untouched: list[Untouched] = [
            untouched(tail.logits, self._final[row, places], part.wanted)
            for row, (places, part) in enumerate(zip(self._places, self.scored, strict=True))
        ]
        """Every window's predictions with nothing replaced."""

    def own_states(self, row: int, layer: int) -> torch.Tensor:
        """The target's own states at the places of a window.

        Args:
            row: The window's place.
            layer: One of those given.
        """
        return self.own[layer][row, self._windows[row].places]

    def put_back(self, layer: int, keep: str) -> tuple[list[Figures], list[bool]]:
        """Put the target's own states in, in a pass of the untouched one's shape.

        Args:
            layer: One of those given.
            keep: ``own`` or ``hide``.

        Returns:
            For every window its figures, and whether what comes out is that of the untouched pass to the bit.
        """
        rows = range(len(self._windows))
        final = self._pass(layer, [PutIn(row, self.own_states(row, layer)) for row in rows], keep)
        found, exact = [], []
        for row, (window, own) in enumerate(zip(self._windows, self.untouched, strict=True)):
            count = len(window.target.ids)
            exact.append(torch.equal(final[row, :count], self._final[row, :count]))
            # What enters the head is the same, and so is what leaves it.
            zero = np.zeros(len(own.nats))
            same = (own.nats, zero, np.ones(len(own.nats), bool))
            found.append(same if exact[-1] else self._figures(row, final[row : row + 1])[0])
        return found, exact

    def put_in(self, layer: int, given: Sequence[PutIn], keep: str) -> list[Figures]:
        """Put states in.

        Args:
            layer: One of those given.
            given: States of any number of conditions, for each a window.
            keep: ``own`` or ``hide``.

        Returns:
            Figures of each.
        """
        lengths = [len(self._windows[put.window].target.ids) for put in given]
        # A whole pass holds the logits of all positions, and one row of them is many bytes.
        most = 1 if isinstance(self._tail, Whole) else _most(self._target.device)
        found: dict[int, Figures] = {}
        for group in self._target.stream.batching.groups(lengths):
            for batch in _filled(group, lengths, most):
                final = self._pass(layer, [given[at] for at in batch], keep)
                for row in dict.fromkeys(given[at].window for at in batch):
                    here = [i for i, at in enumerate(batch) if given[at].window == row]
                    figures = self._figures(row, final[here])
                    found |= {batch[i]: part for i, part in zip(here, figures, strict=True)}
        return [found[at] for at in range(len(given))]

    def _pass(self, layer: int, given: Sequence[PutIn], keep: str) -> torch.Tensor:
        """What enters the head, ``(given, tokens, width)``."""
        rows = [put.window for put in given]
        tokens = max(len(self._windows[row].target.ids) for row in rows)
        own = self.own[layer][rows, :tokens]
        places = [self._windows[row].places for row in rows]
        injection = aligned(own, [torch.as_tensor(put.states) for put in given], places, layer=layer, keep=keep)
        with inject(self._target.stream, injection, whole=True):
            return self._tail.states(self._ids[rows, :tokens])

    def _figures(self, row: int, final: torch.Tensor) -> list[Figures]:
        found = compared(self._tail.logits, final[:, self._places[row]], self.untouched[row])
        return list(zip(*found, strict=True))


def last_part(loaded: Loaded, window: Window) -> Tail | Whole:
    """The last part of the target, found out on a window.

    Args:
        loaded: The target.
        window: Any.
    """
    ids = torch.from_numpy(window.target.ids.astype(np.int64))[None].to(loaded.device)
    return tail_of(loaded.stream, ids)


def _most(device: torch.device) -> int:
    return _TOKENS if device.type == "cpu" else _ELSEWHERE


def _filled(places: Sequence[int], lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places in their order, as many together as fit when all are padded to the longest."""
    found: list[list[int]] = []
    longest = 0
    for place in places:
        longest = max(longest, lengths[place])
        if not found or (len(found[-1]) + 1) * longest > most:
            found.append([])
            longest = lengths[place]
        found[-1].append(place)
    return found
