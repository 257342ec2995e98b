"""What a model remembers of the tokens it has read, whatever it calls it.

A cache is found by type, not by name: transformers' families pass it as ``past_key_values``, ``layer_past``,
``cache_params`` or ``state``, and some keep plain lists of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import torch

#: Where an output may have its cache, and under which name it goes back in.
NAMES = ("past_key_values", "cache_params", "state", "past_buckets_states")


def cache_of(values: Iterable[Any] | Mapping[str, Any]) -> Any:
    """The first cache among the arguments of a module, or None.

    Args:
        values: Arguments, by name or not.
    """
    from transformers.cache_utils import Cache

    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Cache) or hasattr(value, "get_seq_length"):
            return value
    return None


def returned_cache(output: Any) -> tuple[str, Any]:
    """The cache that a model gives back and the name under which it takes it; ``("", None)`` where there is none.

    Args:
        output: A model's output.
    """
    for name in NAMES:
        value = getattr(output, name, None)
        if value is not None:
            return name, value
    return "", None


def seen(past: Any) -> int | None:
    """Tokens that a cache has seen; None where it holds some and does not count them.

    Args:
        past: A cache, another memory that :func:`memory_of` finds, or None.
    """
    if past is None:
        return 0
    if hasattr(past, "get_seq_length"):
        if getattr(past, "layers", ()) and len(recurrent_blocks(past, alone=True)) == len(past.layers):
            return None if past.has_previous_state() else 0
        return int(past.get_seq_length())
    counted = getattr(past, "seqlen_offset", None)
    return None if counted is None else int(counted)


def memory_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the arguments of a module hold of earlier tokens: a cache, or a state that is no cache; else None.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    past = cache_of([*args, *kwargs.values()])
    return past if past is not None else next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


class Tokens:
    """Counts the tokens before every pass over a sequence, whether or not the model's cache does."""

    def __init__(self) -> None:
        """Begin with nothing read."""
        self._read = 0

    def before(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Tokens that a pass goes on from; 0 for one that begins a sequence.

        A state that does not count its tokens is taken to be that of the last pass; one from elsewhere holds 1 at
        least.

        Args:
            args: Positional arguments of the decoder.
            kwargs: Its keyword arguments.
        """
        begun = seen(memory_of(args, kwargs))
        if begun is None:
            begun = max(self._read, 1)
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if ids is None else ids
        self._read = begun + (int(given.shape[1]) if given is not None else 0)
        return begun


def recurrent_blocks(past: Any, *, alone: bool = False) -> list[int]:
    """Numbers of a cache's layers that keep a recurrent or convolution state, which no attention mask can hide.

    Args:
        past: A cache of any kind.
        alone: Only those that keep no keys and values beside it.
    """
    from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

    found = {
        number
        for number, layer in enumerate(getattr(past, "layers", ()))
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not (alone and isinstance(layer, CacheLayerMixin))
    }
    if not alone:
        # MiniMax keeps the states of its linear attention in a list beside its layers.
        beside = enumerate(getattr(past, "linear_cache", ()))
        found |= {number for number, state in beside if isinstance(state, torch.Tensor)}
    return sorted(found)


def stored(past: Any, block: int) -> int:
    """Keys of earlier passes that a block's cache holds; a sliding window's holds fewer than it has seen.

    Args:
        past: A cache or None.
        block: Number of the block.
    """
    layers = getattr(past, "layers", ())
    keys = getattr(layers[block], "keys", None) if block < len(layers) else None
    return int(keys.shape[-2]) if keys is not None and keys.numel() else 0


def shared(past: Any) -> Any:
    """A cache that can grow on its own while its tensors are those of another.

    Only for caches that make new tensors when they grow.

    Args:
        past: A cache with layers.
    """
    other = copy(past)
    other.layers = [copy(layer) for layer in past.layers]
    return other


def grows(past: Any) -> bool:
    """Whether a cache makes new tensors when it grows, so that two may go on from what it holds.

    Args:
        past: A cache.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return bool(getattr(past, "layers", ())) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in past.layers
    )


def copied(past: Any) -> Any:
    """A copy of a cache and of all its tensors.

    Args:
        past: A cache of any kind.
    """
    return deepcopy(past)


def selected(past: Any, rows: torch.Tensor) -> Any:
    """A cache with chosen rows of its batch, changed in place where it is transformers' own kind.

    Args:
        past: A cache of any kind, which nobody else uses.
        rows: int64 numbers of the rows, each as often as is wished.
    """
    if hasattr(past, "reorder_cache"):
        past.reorder_cache(rows)
        return past
    return _selected(past, rows)


def _selected(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor):
        return value.index_select(0, rows.to(value.device)) if value.ndim else value
    if isinstance(value, list | tuple):
        return type(value)([_selected(each, rows) for each in value])
    if isinstance(value, dict):
        return {key: _selected(each, rows) for key, each in value.items()}
    if hasattr(value, "__dict__"):
        for name, each in list(vars(value).items()):
            setattr(value, name, _selected(each, rows))
    return value
