"""Prompts as one model reads them: tokens, padding, residual stream and attention sinks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluate.injection.continuing import prompt_states
from evaluate.injection.loading import Loaded
from evaluate.injection.wire import Rows
from featstore.errors import OffsetError, SpecError
from featstore.models.answering import left_padded
from featstore.models.loading import ModelInfo, refuse_unknown_ids
from featstore.store.read.first import first_of_window
from featstore.text import tokens


@dataclass(frozen=True, eq=False)
class Read:
    """Some prompts as one model read them, padded at the left to one length.

    Attributes:
        windows: Their tokens.
        ids: int64 ``(prompts, tokens)``.
        padding: bool ``(prompts, tokens)``, True where there is no token; None for none.
        states: ``{layer: (prompts, tokens, width)}``.
        sinks: Per prompt bool over its own tokens.
    """

    windows: list[tokens.TokenizedWindow]
    ids: torch.Tensor
    padding: torch.Tensor | None
    states: dict[int, torch.Tensor]
    sinks: list[NDArray[np.bool_]]

    def first(self, row: int) -> int:
        """Where a prompt's tokens begin in its padded row."""
        return int(self.ids.shape[1]) - len(self.windows[row].ids)

    def rows(self, row: int, layers: Sequence[int]) -> Rows:
        """A prompt's states at some layers, end to end: float32 ``(its tokens, widths)``."""
        parts = [self.states[layer][row, self.first(row) :].float().cpu() for layer in layers]
        values: Rows = torch.cat(parts, dim=-1).numpy()
        return values


def spelt(tokenizer: Any, texts: Sequence[str], what: str) -> list[tokens.TokenizedWindow]:
    """Tokenise texts of a user's; one that the tokenizer cannot spell is named by its number.

    Args:
        tokenizer: A fast transformers tokenizer.
        texts: Any number.
        what: What one of them is called, for the message.

    Raises:
        OffsetError: A text cannot be spelt.
    """
    try:
        return tokens.tokenize(tokenizer, list(texts))
    except OffsetError:
        for number, text in enumerate(texts, start=1):
            try:
                tokens.tokenize(tokenizer, [text])
            except OffsetError as error:
                raise OffsetError(f"{what} {number}: {error}") from error
        raise


def tokenized(
    name: str, info: ModelInfo, prompts: Sequence[str], extra: int, *, remedy: str
) -> list[tokens.TokenizedWindow]:
    """Tokenise prompts and check that they fit into a model.

    Args:
        name: The model's name, for the messages.
        info: Its tokenizer and context.
        prompts: Texts.
        extra: New tokens that follow each prompt.
        remedy: What to do about a prompt that is too long.

    Raises:
        OffsetError: A prompt has a character that the tokenizer cannot spell; the message gives the prompt's number.
        SpecError: A prompt has no tokens, is no valid Unicode or, with what follows, exceeds the model's context.
        VocabularyError: The model's embedding has no row for a token.
    """
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise SpecError(f"prompt {prompt[:40]!r} holds half of a surrogate pair; give valid Unicode")
    windows = spelt(info.tokenizer, prompts, f"model {name!r}: prompt")
    for window in windows:
        refuse_unknown_ids(info, window.ids)
    for prompt, window in zip(prompts, windows, strict=True):
        if not len(window.ids):
            raise SpecError(f"prompt {prompt!r} has no tokens under the tokenizer of {name!r}; give it a word at least")
        if len(window.ids) + extra > info.context:
            more = f"; with {extra} new ones it exceeds" if extra else ", more than"
            raise SpecError(
                f"prompt {prompt[:40]!r}... has {len(window.ids)} tokens{more} the context of {name!r} "
                f"({info.context}); {remedy}"
            )
    return windows


def read(loaded: Loaded, windows: list[tokens.TokenizedWindow], layers: Collection[int]) -> Read:
    """Pass prompts through a model and keep its residual stream.

    Args:
        loaded: The model.
        windows: The prompts' tokens.
        layers: Layers to keep.
    """
    ids, padding = left_padded([window.ids.tolist() for window in windows])
    # Sinks show at any stored layer; all of them are captured to judge by the store's own rule.
    wanted = sorted({*layers, *loaded.median_norm})
    states = prompt_states(loaded.model, loaded.stream, ids, wanted, padding=padding)
    sinks = loaded.is_sink(states).cpu().numpy()
    own = [sinks[row, ids.shape[1] - len(window.ids) :] | first_of_window(window) for row, window in enumerate(windows)]
    return Read(windows, ids, padding, {layer: states[layer] for layer in layers}, own)
