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
That identity must say nothing either: many models have no start token, and the first token of their prompt is a word of
it. Under hide the first token is therefore always the model's neutral one (:func:`with_neutral_start`), in the blocks
below the layer, and from the layer on where it takes no injected state.

Where there is nothing to hide, the model's own mask is left as it is, and its results to the bit. Masks hide what goes
through attention. Recurrent states, convolutions and indexers carry the prompt past them: whether hiding holds for a
model and a layer is measured (:mod:`featstore.models.probe.hiding`), not assumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featstore.errors import SpecError, UnsupportedArchitectureError
from featstore.models import residual as sites
from featstore.models.caches import Tokens, cache_of, stored
from featstore.models.devices import input_device

_MASK = "attention_mask"
_IMPLEMENTATIONS = ("sdpa", "eager")


def check_attention(stream: sites.ResidualStream) -> None:
    """Check that a model's attention takes a mask of positions.

    Args:
        stream: The target's residual stream.

    Raises:
        SpecError: It does not.
    """
    name = attention(stream)
    if name not in _IMPLEMENTATIONS:
        raise SpecError(
            f"attention {name!r} takes no mask of positions, which keep='hide' needs; load the model with "
            f"{' or '.join(_IMPLEMENTATIONS)}"
        )


def attention(stream: sites.ResidualStream) -> str | None:
    """The implementation of attention that a model runs, as transformers names it.

    Args:
        stream: The model's residual stream.
    """
    config = getattr(stream.decoder, "config", None) or getattr(stream.model, "config", None)
    return getattr(config, "_attn_implementation", None)


@contextmanager
def hiding(
    stream: sites.ResidualStream,
    layer: int,
    readable: torch.Tensor,
    start: torch.Tensor,
    progress: Progress | None = None,
) -> Iterator[None]:
    """Hide a prompt from what comes after it, during all passes in the context.

    Args:
        stream: The target's residual stream.
        layer: 0..L; the blocks from there on read ``readable``, those below ``start``.
        readable: bool ``(batch, tokens)``, prompt positions whose states at the layer may be read.
        start: bool ``(batch, tokens)``, the start tokens.
        progress: Kept up to date by somebody who sees every pass before its blocks do; None to look here. Who enters
            the context while a pass begins has to give it: hooks of the decoder must not come and go then.

    Raises:
        SpecError: The attention implementation takes no mask of positions; or, during a pass, the batch is another.
        UnsupportedArchitectureError: During a pass: the blocks get no ``attention_mask`` as a keyword, it has no four
            axes, or the cache keeps its keys in another order than that of the text.
    """
    check_attention(stream)
    now, read = progress or Progress(), Tokens()

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Once a pass: blocks that fill several layers of the cache would be taken to have begun earlier.
        now.begun = read.before(args, kwargs)

    with ExitStack() as stack:
        if progress is None:
            stack.callback(stream.decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for number, block in enumerate(stream.blocks):
            below = number < layer
            hook = _Hook(stream, number, start if below else readable, now, below=below)
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@dataclass
class Progress:
    """What is known of the pass that is running.

    Attributes:
        begun: Tokens before it.
        held: Keys that each layer of the cache held when it began.
    """

    begun: int = 0
    held: tuple[int, ...] = ()


class _Hook:
    """Narrows the attention mask that one block gets."""

    def __init__(
        self, stream: sites.ResidualStream, number: int, seen: torch.Tensor, now: Progress, *, below: bool
    ) -> None:
        self.stream, self.now = stream, now
        self.number = number
        self.seen = seen
        self.below = below
        self.complete = bool(seen.all())
        # Only sdpa goes without a mask and takes one that says yes or no; all others add numbers to their weights.
        self.adds = attention(stream) != "sdpa"

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.number == 0:
            # Before any block adds its own: some read the keys that another one keeps.
            past = cache_of([*args, *kwargs.values()])
            self.now.held = tuple(stored(past, layer) for layer in range(len(getattr(past, "layers", ()))))
        if self.complete:
            return None
        place = _mask_place(block, args, kwargs)
        if place is None:
            raise UnsupportedArchitectureError(
                f"{type(block).__name__} gets no attention_mask, so nothing can be hidden from it; use keep='own'"
            )
        hidden = self.stream.axes.rows(sites.entering(self.stream, args, kwargs))
        if hidden.shape[0] != self.seen.shape[0]:
            raise SpecError(
                f"a pass of {hidden.shape[0]} rows with an injection of {self.seen.shape[0]}"
                "; inject into as many rows as the pass has"
            )
        past, mask, queries = cache_of([*args, *kwargs.values()]), _at(args, kwargs, place), hidden.shape[1]
        # A mask says how many keys there are, of every kind of cache.
        keys = self._held(block) + queries if mask is None else int(mask.shape[-1])
        if getattr(past, "is_compileable", False) or (mask is not None and (mask.ndim != 4 or keys < queries)):
            shape = None if mask is None else tuple(mask.shape)
            raise UnsupportedArchitectureError(
                f"{type(block).__name__} gets an attention mask of shape {shape} for {queries} tokens and a "
                f"{type(past).__name__}; hiding needs four axes and a cache that grows, such as DynamicCache"
            )
        allowed = self._allowed(self.now.begun, queries, keys, hidden.device)
        if allowed is None:
            return None
        narrowed = _narrowed(mask, allowed, hidden.dtype, adds=self.adds)
        if isinstance(place, int):
            return (*args[:place], narrowed, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: narrowed}

    def _held(self, block: nn.Module) -> int:
        """Keys of earlier passes that a block reads.

        Raises:
            UnsupportedArchitectureError: Layers of the cache hold several numbers of keys, and which one the block
                reads is not known.
        """
        held, depth = self.now.held, self.stream.depth
        if not held:
            return self.now.begun
        found = {held[self.number]} - {0} if len(held) == depth else set()
        if not found:
            # Its keys lie in other layers: those of a block of its kind that it shares, or several of its own.
            kinds = getattr(getattr(self.stream.decoder, "config", None), "layer_types", None) or ()
            kind = kinds[self.number] if len(held) <= depth == len(kinds) else None
            found = {keys for layer, keys in enumerate(held) if kind is None or kinds[layer] == kind} - {0}
        if len(found) > 1:
            raise UnsupportedArchitectureError(
                f"{type(block).__name__} {self.number} gets no attention mask, and the {len(held)} layers of its cache "
                f"hold {' or '.join(map(str, sorted(found)))} keys, so nothing can be hidden from it; use keep='own'"
            )
        return next(iter(found), 0)

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


def _mask_place(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where a block is given its attention mask: a keyword, or the position of the parameter of that name."""
    if _MASK in kwargs:
        return _MASK
    names = list(inspect.signature(type(block).forward).parameters)[1 : len(args) + 1]
    return names.index(_MASK) if _MASK in names else None


def _at(args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str) -> Any:
    return args[place] if isinstance(place, int) else kwargs[place]


def _narrowed(mask: torch.Tensor | None, allowed: torch.Tensor, dtype: torch.dtype, *, adds: bool) -> torch.Tensor:
    """The model's mask and ours. None means causal attention over all keys; otherwise bool, or numbers to be added."""
    if mask is None and not adds:
        return allowed
    if mask is not None:
        allowed = allowed.to(mask.device)  # under a device map, not where the stream is
        if mask.dtype == torch.bool:
            return mask | ~allowed if _hides_where_true(mask) else mask & allowed
    given = torch.zeros((), dtype=dtype, device=allowed.device) if mask is None else mask
    return torch.where(allowed, given, torch.finfo(given.dtype).min)


def _hides_where_true(mask: torch.Tensor) -> bool:
    """Whether a bool mask is True where nothing is seen (MPT's).

    Nobody sees what comes later, and a token that is read by itself is no padding and sees itself.
    """
    if mask.shape[-2] > 1:
        return bool(mask[..., 0, -1].all())
    return not bool(mask[..., -1, -1].any())


def with_neutral_start(
    stream: sites.ResidualStream, args: tuple[Any, ...], kwargs: dict[str, Any], start: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    """The arguments of a pass that begins a sequence, with the model's start token in the place of each first token.

    Args:
        stream: The target's residual stream.
        args: Positional arguments of its decoder.
        kwargs: Keyword arguments.
        start: bool ``(batch, tokens)``, every row's first token; the pass may have more tokens after these.

    Returns:
        The arguments, and bool ``(batch, tokens)``: the first tokens that were another one.

    Raises:
        SpecError: The decoder gets neither token ids nor embeddings.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
        begin = _beginning(start.to(ids.device), ids.shape[1])
        foreign = begin & (ids != stream.start)
        ids = torch.where(begin, stream.start, ids)
        changed = (args, {**kwargs, "input_ids": ids}) if "input_ids" in kwargs else ((ids, *args[1:]), kwargs)
        return *changed, foreign[:, : start.shape[1]]
    embedded = kwargs.get("inputs_embeds")
    if embedded is None:
        raise SpecError("the pass has neither input_ids nor inputs_embeds; call the model with one of them")
    device = input_device(stream.model)
    own = stream.model.get_input_embeddings()(torch.tensor([[stream.start]], device=device))
    begin = _beginning(start.to(embedded.device), embedded.shape[1])
    new = torch.where(begin[:, :, None], own.to(embedded.device, embedded.dtype), embedded)
    return args, {**kwargs, "inputs_embeds": new}, begin[:, : start.shape[1]]


def with_start_state(hidden: torch.Tensor, places: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """A stream with the start token's own state at some places.

    Args:
        hidden: ``(batch, tokens, width)``.
        places: bool ``(batch, tokens)``.
        state: ``(width,)``.
    """
    return torch.where(places[:, :, None].to(hidden.device), state.to(hidden.device, hidden.dtype), hidden)


def _beginning(start: torch.Tensor, tokens: int) -> torch.Tensor:
    """``start`` for a pass of more tokens."""
    return torch.nn.functional.pad(start, (0, tokens - start.shape[1]))
