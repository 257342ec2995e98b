"""What travels from the reader to the answerer, and its size.

A message is text (UTF-8 bytes) or states: rows of the source's residual stream before the map, rounded to a storage
format as they would be on a wire. The map is the receiver's. Sizes count no headers and no compression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluate.injection.loading import Loaded
from featstore.errors import OffsetError, SpecError
from featstore.models import residual as sites
from featstore.models.loading import refuse_unknown_ids
from featstore.store.format.elements import FORMATS, Format
from featstore.store.read.first import first_of_window
from featstore.text import tokens
from featstore.text.tokens import TokenizedWindow

#: Formats a state can travel in. int8 needs column scales that sender and receiver would have to agree on first.
WIRE_FORMATS = tuple(name for name, form in FORMATS.items() if not form.column_scaled)
_BATCH = 16


@dataclass(frozen=True)
class Reading:
    """A context as the source read it.

    Attributes:
        window: Its tokens; those outside of the context count as special.
        states: float32 ``{layer: (tokens, width)}``.
        sink: bool ``(tokens,)``.
        last: The last position of the prompt that is neither special nor a sink: whose state is sent alone.
    """

    window: TokenizedWindow
    states: Mapping[int, NDArray[np.float32]]
    sink: NDArray[np.bool_]
    last: int

    def rows(self, layers: Sequence[int], places: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """States at some positions, those of several layers end to end.

        Args:
            layers: Source layers of a map.
            places: Positions.

        Returns:
            float32 ``(places, widths of the layers together)``.
        """
        return np.concatenate([self.states[layer][np.asarray(places, dtype=np.int64)] for layer in layers], axis=1)


def wire_format(name: str) -> Format:
    """Look up the format states travel in.

    Args:
        name: As typed.

    Raises:
        SpecError: None of :data:`WIRE_FORMATS`.
    """
    if name not in WIRE_FORMATS:
        raise SpecError(f"format {name!r} for states on the wire: choose one of {', '.join(WIRE_FORMATS)}")
    return FORMATS[name]


def text_bytes(text: str) -> int:
    """UTF-8 bytes of a text."""
    return len(text.encode())


def state_bytes(count: int, width: int, form: Format) -> int:
    """Bytes of some states: elements, and a float32 scale for every row where the format has one.

    Args:
        count: States.
        width: Of the source's stream, times the layers of a joint map.
        form: From :func:`wire_format`.
    """
    return count * (width * form.storage.itemsize + 4 * form.row_scaled)


def received(rows: NDArray[np.float32], form: Format) -> NDArray[np.float32]:
    """States as they arrive: rounded to the format.

    Args:
        rows: float32 ``(n, width)``.
        form: From :func:`wire_format`.

    Returns:
        float32 ``(n, width)``.
    """
    encoded = form.encode(rows)
    return form.decode(encoded.stored, encoded.row_scale)


def deliverable(tokenizer: Any, message: str, prompt: Callable[[str], str]) -> tuple[str, int]:
    """What a model's words become for a reader whose tokenizer cannot spell all of them.

    Args:
        tokenizer: The reader's.
        message: As it was written.
        prompt: Puts a message where the reader reads it.

    Returns:
        The message without the characters that cannot be spelt, nothing of it where that does not help; and how many
        characters are missing.
    """
    if _spells(tokenizer, prompt(message)):
        return message, 0
    good = {character for character in set(message) if _spells(tokenizer, f"a{character}a")}
    kept = "".join(character for character in message if character in good)
    if not _spells(tokenizer, prompt(kept)):
        kept = ""
    return kept, len(message) - len(kept)


def _spells(tokenizer: Any, text: str) -> bool:
    try:
        tokens.tokenize(tokenizer, [text])
    except OffsetError:
        return False
    return True


def within(window: TokenizedWindow, start: int, size: int) -> TokenizedWindow:
    """The same tokens with bytes counted from the start of a part of the text; those outside the part become special.

    A token that straddles the end of the part is outside: it has read more than the part. So is one at its end of which
    nobody can tell what else it has read.

    Args:
        window: Tokens of the whole text.
        start: First byte of the part.
        size: Its bytes.
    """
    ends = window.byte_end - start
    special = window.special | (ends <= 0) | (ends > size) | (~window.exact & (ends == size))
    return TokenizedWindow(window.ids, np.where(special, 0, ends).astype(np.int32), special, window.exact | special)


def check_context(loaded: Loaded, lengths: Sequence[int], extra: int, what: str) -> None:
    """Refuse prompts that do not fit into a model.

    Args:
        loaded: The model.
        lengths: Tokens of every prompt.
        extra: Tokens that come after it.
        what: What the longest prompt is, for the message.

    Raises:
        SpecError: It does not fit.
    """
    longest = max(lengths)
    if longest + extra > loaded.info.context:
        raise SpecError(
            f"{what} has {longest} tokens; with {extra} new ones it exceeds the context of {loaded.name!r} "
            f"({loaded.info.context}); use shorter examples"
        )
    switch = loaded.stream.batching.switch
    passing = [length for length in lengths if switch is not None and length <= switch < length + extra]
    if passing:
        raise SpecError(
            f"a prompt has {passing[0]} tokens; with {extra} new ones it passes {switch}, where {loaded.name!r} "
            "changes its position encoding; use shorter examples, or longer ones"
        )


def read(
    loaded: Loaded, prompts: Sequence[str], starts: Sequence[int], sizes: Sequence[int], layers: Sequence[int]
) -> list[Reading]:
    """Let the source read prompts and keep its states.

    Args:
        loaded: The source.
        prompts: What it reads.
        starts: First byte of the context in each prompt.
        sizes: Bytes of each context.
        layers: Layers to keep.

    Raises:
        SpecError: A prompt does not fit into the model, or has no position whose state could be sent.
        VocabularyError: The model's embedding has no row for a token.
    """
    windows = tokens.tokenize(loaded.info.tokenizer, prompts)
    for window in windows:
        refuse_unknown_ids(loaded.info, window.ids)
    check_context(loaded, [len(w.ids) for w in windows], 0, "the longest context")
    # Sinks show at any stored layer; all of them are captured to judge by the store's own rule.
    wanted = sorted(set(layers) | set(loaded.median_norm))
    readings: list[Reading | None] = [None] * len(windows)
    for first in range(0, len(windows), _BATCH):
        lengths = [len(window.ids) for window in windows[first : first + _BATCH]]
        for group in loaded.stream.batching.groups(lengths):
            places = [first + place for place in group]
            batch = [windows[place] for place in places]
            ids = np.zeros((len(batch), max(len(w.ids) for w in batch)), dtype=np.int64)
            for row, window in enumerate(batch):
                ids[row, : len(window.ids)] = window.ids
            states = sites.capture(loaded.stream, torch.from_numpy(ids).to(loaded.device), wanted)
            sinks = loaded.is_sink({k: states[k] for k in loaded.median_norm}).cpu().numpy()
            kept = {layer: states[layer].float().cpu().numpy() for layer in layers}
            for row, (place, window) in enumerate(zip(places, batch, strict=True)):
                count = len(window.ids)
                sink = sinks[row, :count] | first_of_window(window)
                usable = np.flatnonzero(~window.special & ~sink)
                if not usable.size:
                    raise SpecError(
                        f"context {prompts[place][:40]!r}... gives {loaded.name!r} only special tokens and attention "
                        "sinks, whose states say nothing; use longer contexts"
                    )
                part = within(window, starts[place], sizes[place])
                flat = {layer: hidden[row, :count] for layer, hidden in kept.items()}
                readings[place] = Reading(part, flat, sink, int(usable[-1]))
    return [reading for reading in readings if reading is not None]
