"""Attention that cannot see the prompt but for the injected states.

Even with every state replaced at a layer, the tokens after the prompt still read the target's own prompt: through the
keys and values of the blocks below the layer, and of positions that took no state. Here both are masked:

==================  =============================  ================================================
block               prompt tokens may attend       later tokens may attend
==================  =============================  ================================================
below the layer     as ever: it is overwritten     the start token, later tokens
from the layer on   the start token, injected      the start token, injected positions, later tokens
                    positions, themselves
==================  =============================  ================================================

Nothing is removed and no position changes, so rotary angles stay those of the whole text. The start token stays
because models rest attention on it; it sees itself alone, so it carries nothing of the prompt but its own identity.
Where there is nothing to hide, the model's own mask is left as it is, and its results to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from featstore.errors import SpecError, UnsupportedArchitectureError
from featstore.models import residual as sites

_IMPLEMENTATIONS = ("sdpa", "eager")


def check_attention(stream: sites.ResidualStream) -> None:
    """Check that a model's attention takes a mask of positions.

    Args:
        stream: The target's residual stream.

    Raises:
        SpecError: It does not.
    """
    name = getattr(stream.decoder.config, "_attn_implementation", None)
    if name not in _IMPLEMENTATIONS:
        raise SpecError(
            f"attention {name!r} takes no mask of positions, which keep='hide' needs; load the model with "
            f"{' or '.join(_IMPLEMENTATIONS)}"
        )


@contextmanager
def hiding(stream: sites.ResidualStream, layer: int, readable: torch.Tensor, start: torch.Tensor) -> Iterator[None]:
    """Hide a prompt from what comes after it, during all passes in the context.

    Args:
        stream: The target's residual stream.
        layer: 0..L; the blocks from there on read ``readable``, those below ``start``.
        readable: bool ``(batch, tokens)``, prompt positions whose states at the layer may be read.
        start: bool ``(batch, tokens)``, the start tokens.

    Raises:
        SpecError: The attention implementation takes no mask of positions; or, during a pass, the batch is another.
        UnsupportedArchitectureError: During a pass: the blocks get no ``attention_mask`` as a keyword, it has no four
            axes, or the cache keeps its keys in another order than that of the text.
    """
    check_attention(stream)
    with ExitStack() as stack:
        for number, block in enumerate(stream.blocks):
            below = number < layer
            hook = _Hook(number, start if below else readable, below=below)
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


class _Hook:
    """Narrows the attention mask that one block gets."""

    def __init__(self, number: int, seen: torch.Tensor, *, below: bool) -> None:
        self.number = number
        self.seen = seen
        self.below = below
        self.complete = bool(seen.all())

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.complete:
            return None
        if "attention_mask" not in kwargs:
            raise UnsupportedArchitectureError(
                f"{type(block).__name__} gets no attention_mask by name, so nothing can be hidden from it; "
                "use keep='own'"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[0] != self.seen.shape[0]:
            raise SpecError(f"a pass of {hidden.shape[0]} rows with an injection of {self.seen.shape[0]}")
        past, mask, queries = kwargs.get("past_key_values"), kwargs["attention_mask"], hidden.shape[1]
        begun = 0 if past is None else int(past.get_seq_length(self.number))
        keys = _stored(past, self.number) + queries
        fixed = getattr(past, "is_compileable", False)
        if fixed or (mask is not None and (mask.ndim != 4 or mask.shape[-1] != keys)):
            shape = None if mask is None else tuple(mask.shape)
            raise UnsupportedArchitectureError(
                f"{type(block).__name__} gets an attention mask of shape {shape} for {keys} keys of a "
                f"{type(past).__name__}; hiding needs four axes and a cache that grows, such as DynamicCache"
            )
        allowed = self._allowed(begun, queries, keys, hidden.device)
        return None if allowed is None else (args, {**kwargs, "attention_mask": _narrowed(mask, allowed)})

    def _allowed(self, begun: int, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """Give bool ``(batch, 1, queries, keys)``, causal; None where the pass may see all it ever does."""
        tokens = self.seen.shape[1]
        asking = torch.arange(begun, begun + queries, device=device)[:, None]
        # A sliding window's cache has dropped its oldest keys: the last key is always that of the last query.
        asked = torch.arange(begun + queries - keys, begun + queries, device=device)[None]
        if self.below and begun + queries <= tokens:
            # What the prompt's own tokens make of each other is overwritten at the layer.
            return None
        seen = self.seen.to(device)[:, asked[0].clamp(max=tokens - 1)][:, None, :]
        allowed = seen | (asked >= tokens) | (asking == asked)
        return (allowed & (asked <= asking))[:, None]


def _narrowed(mask: torch.Tensor | None, allowed: torch.Tensor) -> torch.Tensor:
    """The model's mask and ours. None means causal attention over all keys; otherwise bool, or numbers to be added."""
    if mask is None:
        return allowed
    allowed = allowed.to(mask.device)
    if mask.dtype == torch.bool:
        return mask & allowed
    return torch.where(allowed, mask, torch.finfo(mask.dtype).min)


def _stored(past: Any, number: int) -> int:
    """How many keys of earlier passes a block's cache holds; a sliding window's holds fewer than it has seen."""
    if past is None or number >= len(past.layers) or past.layers[number].keys is None:
        return 0
    keys = past.layers[number].keys
    return int(keys.shape[-2]) if keys.numel() else 0
