"""The residual stream at layer k: where states are captured, and where they are injected.

**Layer k is the residual stream after k blocks**, k = 0..L: k = 0 is the embedding output, k = L the stream *before*
the final norm. In transformers' terms that is ``hidden_states[k]`` for k < L; ``hidden_states[L]`` there is taken after
the final norm and is not a residual stream.

Capture and injection are one hook at one place: a function that sees the stream entering block k (leaving the last
block for k = L) and may return a replacement. Re-injecting what was captured therefore leaves the logits bit-identical,
which is the test that anchors every injection result.

Inputs are right-padded and no attention mask is passed: attention is causal, so a real token never sees the padding
after it, and the unmasked path is faster and independent of the padding. States of pad positions are meaningless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featstore.errors import LayerRangeError, UnsupportedArchitectureError

#: Sees hidden states ``(batch, tokens, width)``; returns a replacement of the same shape, or None to leave them.
SiteFunction = Callable[[torch.Tensor], torch.Tensor | None]

_BLOCK_LISTS = ("layers", "h", "blocks")


class _ForwardDone(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside the forward pass once the last wanted layer is reached."""


@dataclass(frozen=True)
class ResidualStream:
    """A decoder stack whose stream can be read and written between blocks.

    Attributes:
        decoder: The module that embeds tokens and runs the blocks, without the language model head.
        blocks: Its L blocks in order.
    """

    decoder: nn.Module
    blocks: nn.ModuleList

    @property
    def depth(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)


def residual_stream(model: nn.Module) -> ResidualStream:
    """Find the decoder blocks of a causal language model.

    Args:
        model: A transformers causal language model.

    Raises:
        UnsupportedArchitectureError: No list of ``num_hidden_layers`` blocks was found; the message says where it was
            looked for.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    wanted = getattr(config, "num_hidden_layers", None)
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if isinstance(decoder, nn.Module):
        for attribute in _BLOCK_LISTS:
            blocks = getattr(decoder, attribute, None)
            if isinstance(blocks, nn.ModuleList) and len(blocks) == wanted:
                return ResidualStream(decoder, blocks)
    found = "no decoder" if decoder is None else f"a decoder {type(decoder).__name__}"
    blocks_wanted = "decoder blocks" if wanted is None else f"{wanted} decoder blocks"
    raise UnsupportedArchitectureError(
        f"model {name}: looked for {blocks_wanted} in a ModuleList named {', '.join(_BLOCK_LISTS)} under "
        f"get_decoder() and found {found} without one; Llama and Mistral families are supported and tested"
    )


def _check_layer(stream: ResidualStream, layer: int) -> None:
    if not 0 <= layer <= stream.depth:
        raise LayerRangeError(f"layer {layer} is outside 0..{stream.depth} of this model")


@contextmanager
def at_site(stream: ResidualStream, layer: int, function: SiteFunction) -> Iterator[None]:
    """Call a function on the residual stream at a layer during every forward pass in the context.

    Args:
        stream: From :func:`residual_stream`.
        layer: 0..L.
        function: Sees ``(batch, tokens, width)``; a returned tensor replaces the stream.

    Raises:
        LayerRangeError: No such layer.
    """
    _check_layer(stream, layer)
    if layer < stream.depth:
        handle = stream.blocks[layer].register_forward_pre_hook(_entering(function), with_kwargs=True)
    else:
        handle = stream.blocks[-1].register_forward_hook(_leaving(function))
    try:
        yield
    finally:
        handle.remove()


def _entering(function: SiteFunction) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook


def _leaving(function: SiteFunction) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            new = function(output[0])
            return None if new is None else (new, *output[1:])
        return function(output)

    return hook


@torch.inference_mode()
def capture(stream: ResidualStream, input_ids: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Run the decoder and return its residual stream at some layers.

    The pass stops after the last layer asked for and never runs the head.

    Args:
        stream: From :func:`residual_stream`.
        input_ids: int64 ``(batch, tokens)``, right-padded.
        layers: Distinct layers in 0..L.

    Returns:
        ``{layer: (batch, tokens, width)}`` in the model's dtype.

    Raises:
        LayerRangeError: No such layer.
    """
    states: dict[int, torch.Tensor] = {}
    last = max(layers)

    def keep(layer: int) -> SiteFunction:
        def function(hidden: torch.Tensor) -> None:
            states[layer] = hidden
            if layer == last:
                raise _ForwardDone

        return function

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(at_site(stream, layer, keep(layer)))
        with suppress(_ForwardDone):
            stream.decoder(input_ids=input_ids, use_cache=False)
    return states


@contextmanager
def skipping_below(stream: ResidualStream, layer: int) -> Iterator[None]:
    """Turn the blocks below a layer into the identity, for passes that replace the *whole* stream at that layer.

    Results are bit-identical to the full pass (tested): the skipped work is overwritten anyway. Only for passes
    without a key-value cache.

    Args:
        stream: From :func:`residual_stream`.
        layer: 0..L.

    Raises:
        LayerRangeError: No such layer.
    """
    _check_layer(stream, layer)
    as_tuple = _returns_tuple(stream) if layer else False

    def identity(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if as_tuple else hidden_states

    # k = L injects at the output of the last block, so that block still has to be there to be hooked: as an identity.
    skipped = list(stream.blocks[:layer])
    # Wrappers such as accelerate's put a forward on the instance; those come back, plain blocks get none.
    originals = [block.__dict__.get("forward") for block in skipped]
    for block in skipped:
        block.forward = identity
    try:
        yield
    finally:
        for block, original in zip(skipped, originals, strict=True):
            del block.forward
            if original is not None:
                block.forward = original


def _returns_tuple(stream: ResidualStream) -> bool:
    """Whether blocks return a tuple (older architectures) or the stream itself; seen on one token."""
    seen: list[bool] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))
        raise _ForwardDone

    handle = stream.blocks[0].register_forward_hook(look)
    device = next(stream.decoder.parameters()).device
    try:
        with torch.inference_mode():
            stream.decoder(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
    except _ForwardDone:
        pass
    finally:
        handle.remove()
    return seen[0]
