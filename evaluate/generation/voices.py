"""A model about to go on with some prompts, and what it has read and said by itself.

What a model has said outlives it: the other one needs its states and, to be compared with, its own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from align.maps.fitted import Aligner
from evaluate.injection.continuing import continue_from, score_continuation
from evaluate.injection.loading import Loaded
from evaluate.injection.reading import Read, read
from evaluate.injection.wire import Crossing, Rows
from featstore.models.injection import Injection, aligned
from featstore.models.sampling import Sampling
from featstore.runtime.console import Tick
from featstore.text.tokens import TokenizedWindow

#: Prompts that go through a model together.
_BATCH = 8
#: A prompt's tokens under both tokenizers, and what each condition puts at its places, or why it has nothing to put.
Put = tuple[Crossing, dict[str, Rows | str | None]]


@dataclass(frozen=True, eq=False)
class Heard:
    """What a model has read and said by itself; it may be gone.

    Attributes:
        name: The model's.
        batches: Numbers of the prompts that go together.
        reads: The prompts of every batch as it read them.
        said: Tokens of its own continuation, by prompt.
        texts: The same as text.
        nats: Its likelihood, by prompt.
    """

    name: str
    batches: list[range]
    reads: list[Read]
    said: list[list[int]]
    texts: list[str]
    nats: list[float]


def heard(
    model: Loaded,
    windows: Sequence[TokenizedWindow],
    chosen: Sequence[Aligner],
    length: int,
    sample: Sampling | None,
    tick: Tick,
) -> Heard:
    """Let a model read prompts and go on with them by itself.

    Args:
        model: The model.
        windows: The prompts' tokens.
        chosen: Maps, whose layers of this model are kept.
        length: New tokens at most.
        sample: How to draw them.
        tick: Called with the number of texts written.
    """
    # Prompts share a batch where that changes nothing about any of them.
    size = _BATCH if _batchable(model, windows) else 1
    batches = [range(start, min(start + size, len(windows))) for start in range(0, len(windows), size)]
    reads = [_read(model, [windows[i] for i in batch], chosen) for batch in batches]
    found = Heard(model.name, batches, reads, [], [], [])
    for batch, seen in zip(batches, reads, strict=True):
        voice = Voice(model, seen, batch, length, sample)
        said = voice.say(None)
        found.said.extend(said)
        found.texts.extend(voice.text(said))
        found.nats.extend(voice.score(None, said))
        tick(len(batch))
    return found


def _batchable(loaded: Loaded, windows: Sequence[TokenizedWindow]) -> bool:
    """Whether prompts may be padded beside each other."""
    lengths = [len(window.ids) for window in windows]
    switch = loaded.stream.batching.switch
    apart = switch is not None and min(lengths) <= switch < max(lengths)
    return (loaded.stream.continuing.padding or len(set(lengths)) == 1) and not apart


def _read(loaded: Loaded, windows: list[TokenizedWindow], aligners: Sequence[Aligner]) -> Read:
    layers = {layer for a in aligners if a.pair.source == loaded.name for layer in a.pair.source_layers}
    layers |= {a.pair.target_layer for a in aligners if a.pair.target == loaded.name}
    return read(loaded, windows, layers)


@dataclass(frozen=True, eq=False)
class Voice:
    """A model about to go on with some prompts.

    Attributes:
        loaded: The model.
        read: The prompts.
        numbers: Theirs, which fix their draws.
        length: New tokens at most.
        sample: How to draw them.
    """

    loaded: Loaded
    read: Read
    numbers: range
    length: int
    sample: Sampling | None

    def injection(self, layer: int, condition: str, states: Sequence[Put]) -> Injection:
        """What a condition puts into the prompts.

        Args:
            layer: Of this model.
            condition: Its name.
            states: By prompt.
        """
        own, places, values = self.read.states[layer], [], []
        for row, (text, put) in enumerate(states):
            places.append(self.read.first(row) + text.places)
            value = put[condition]
            # Where a prompt lacks the condition, its row goes along with its own states and is not reported.
            new = own[row, torch.as_tensor(places[-1], device=own.device)]
            values.append(torch.as_tensor(value) if isinstance(value, np.ndarray) else new)
        return aligned(own, values, places, layer=layer, padding=self.read.padding)

    def say(self, injection: Injection | None) -> list[list[int]]:
        """The tokens that follow the prompts, under what is put in."""
        said: list[list[int]] = continue_from(
            self.loaded.model,
            self.read.ids,
            injection=injection,
            stream=self.loaded.stream,
            length=self.length,
            stops=self._stops,
            sample=self.sample,
            padding=self.read.padding,
            rows=self.numbers,
        )
        return said

    def score(self, injection: Injection | None, said: Sequence[Sequence[int]]) -> list[float]:
        """Nats per token of given continuations, under what is put in."""
        model, stream, padding = self.loaded.model, self.loaded.stream, self.read.padding
        nats: list[float] = score_continuation(
            model, self.read.ids, said, injection=injection, stream=stream, padding=padding
        )
        return nats

    def text(self, said: Sequence[Sequence[int]]) -> list[str]:
        """Continuations as text."""
        return [str(self.loaded.info.tokenizer.decode(row, skip_special_tokens=True)) for row in said]

    @property
    def _stops(self) -> list[int]:
        stop = self.loaded.model.generation_config.eos_token_id
        return [stop] if isinstance(stop, int) else list(stop or [])
