"""Whether a causal type is a decoder at all: measured on the tiny model, never read off its name."""

from __future__ import annotations

import inspect
from enum import StrEnum

import torch
from torch import nn

_TOKENS = 24
#: Width of every tiny model.
_WIDTH = 64


class Kind(StrEnum):
    """What a model turns out to be."""

    DECODER = "decoder"
    #: What follows a token changes what the model says at it: an encoder, or a decoder that looks ahead.
    NOT_CAUSAL = "not causal"
    #: States of an encoder, given to it, change its logits.
    ENCODER_DECODER = "decoder of an encoder-decoder"


@torch.inference_mode()
def kind_of(model: nn.Module) -> Kind:
    """What a model turns out to be, from at most four passes of 24 tokens.

    Args:
        model: From `build`, float32.
    """
    ids = some_ids(0)
    alone = model(input_ids=ids, use_cache=False).logits
    changed = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 290], dim=1)
    after = model(input_ids=changed, use_cache=False).logits
    # Logits of all tokens but the last. Rounding may differ: experts and matrix products are grouped by their tokens.
    moved = (after - alone)[:, : _TOKENS - 1].abs().max() / alone.abs().max()
    if float(moved) > 1e-4:
        return Kind.NOT_CAUSAL
    return Kind.ENCODER_DECODER if _reads_an_encoder(model, ids, alone) else Kind.DECODER


def _reads_an_encoder(model: nn.Module, ids: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether states of an encoder, under any name that a decoder has for them, change its logits."""
    states = torch.randn((1, 5, _WIDTH), generator=torch.Generator().manual_seed(2))
    for name in {"encoder_hidden_states", "encoder_outputs"} & set(inspect.signature(model.forward).parameters):
        given = states if name == "encoder_hidden_states" else (states,)
        try:
            told = model(input_ids=ids, use_cache=False, **{name: given}).logits
        except (AttributeError, TypeError, ValueError):
            # The argument is there for models with cross-attention; this one was built without.
            continue
        if not torch.equal(told, alone):
            return True
    return False


def some_ids(seed: int, tokens: int = _TOKENS, batch: int = 1) -> torch.Tensor:
    """Random ids ``(batch, tokens)`` below 290, without the first three: the rest of the vocabulary is special."""
    return torch.randint(3, 290, (batch, tokens), generator=torch.Generator().manual_seed(seed))
