"""What is true of a model's residual stream, found without the hooks, the probe or the detection of `featstore`.

Two statements are made of the stream, apart from each other: a plain hook on the module that is written down
(:mod:`tests.support.places`), and transformers' own ``output_hidden_states``. Where the same question is answered by
`featstore`, the answers must agree.

Rows are ``(batch, tokens, streams x width)``: where a model carries several streams, those of a token stand end to end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.support.places import Place, place_of


class NoRowsError(Exception):
    """A model has no row for each token and layer; the message is the reason."""


@torch.inference_mode()
def expected_rows(model: nn.Module, name: str, ids: torch.Tensor, **inputs: Any) -> dict[int, torch.Tensor]:
    """The rows of every layer, 0..L, in one plain pass.

    Args:
        model: A tiny model, or any of its type.
        name: Its type, or ``type@variant``.
        ids: ``(batch, tokens)``.
        inputs: Further inputs of the pass.

    Returns:
        ``{layer: (batch, tokens, streams x width)}``.

    Raises:
        NoRowsError: There are none, and why.
    """
    place = place_of(name)
    return {layer: _as_rows(stream, place.axes) for layer, stream in _streams(model, place, ids, **inputs).items()}


@torch.inference_mode()
def transformers_rows(model: nn.Module, name: str, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """The rows of layers 1..L-1, and 0 where it is shown, as ``output_hidden_states`` gives them.

    Layer L is not among them: transformers shows it after the final norm.
    """
    place = place_of(name)
    if place.none:
        raise NoRowsError(place.none)
    shown = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    depth = len(model.get_submodule(place.blocks))
    layers = range(place.ahead, depth)
    return {layer: _as_rows(shown[layer - place.ahead], place.shown or place.axes) for layer in layers}


@torch.inference_mode()
def last_arrival(model: nn.Module, name: str, ids: torch.Tensor) -> torch.Tensor | None:
    """The rows of layer L, as the module after the last block takes them in; None where no module does."""
    place = place_of(name)
    if place.arrives is None:
        return None
    seen: list[torch.Tensor] = []
    with _entering(model.get_submodule(place.arrives), lambda stream: seen.append(stream.clone())):
        model(input_ids=ids, use_cache=False)
    return _as_rows(seen[-1], place.axes)


@torch.inference_mode()
def refuted(model: nn.Module, name: str, ids: torch.Tensor) -> str:
    """What a pass shows of a type whose rows there are none of: that reading its list of blocks gives none.

    Returns:
        What was measured; empty if a plain reading of the list gives a row for each token and layer, after all.
    """
    place = replace(place_of(name), none="")
    try:
        streams = _streams(model, place, ids)
    except NoRowsError as error:
        return str(error)
    except (AttributeError, TypeError) as error:
        return f"its blocks cannot be read: {error}"
    leaks = _leaks(model, place, streams, ids, ids.flip(1))
    first = next((layer for layer, leak in leaks.items() if leak), None)
    return "" if first is None else f"swapping its stream at layer {first} leaks {leaks[first]:.2g}"


@torch.inference_mode()
def swap_leaks(model: nn.Module, name: str, ids_a: torch.Tensor, ids_b: torch.Tensor) -> dict[int, float]:
    """What later blocks know of a text beside its stream: for every layer, 0..L.

    Text B is run while the whole stream of text A is put in at the layer.

    Args:
        model: A tiny model.
        name: Its type.
        ids_a: ``(batch, tokens)``.
        ids_b: The same shape.

    Returns:
        ``{layer: max|logits - logits_A| / max|logits_B - logits_A|}``: 0 where the stream is everything.

    Raises:
        NoRowsError: There is no stream.
    """
    place = place_of(name)
    return _leaks(model, place, _streams(model, place, ids_a), ids_a, ids_b)


@torch.inference_mode()
def _leaks(
    model: nn.Module, place: Place, streams: dict[int, torch.Tensor], ids_a: torch.Tensor, ids_b: torch.Tensor
) -> dict[int, float]:
    logits_a = model(input_ids=ids_a, use_cache=False).logits
    apart = float((model(input_ids=ids_b, use_cache=False).logits - logits_a).abs().max())
    leaks = {}
    for layer, stream in streams.items():
        with _at(model, place, layer, lambda _, stream=stream: stream.clone()):
            swapped = model(input_ids=ids_b, use_cache=False).logits
        leaks[layer] = float((swapped - logits_a).abs().max()) / apart
    return leaks


@torch.inference_mode()
def logits_of(model: nn.Module, name: str, ids: torch.Tensor, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """What a model says to a text whose whole stream at a layer is another.

    Args:
        model: A tiny model.
        name: Its type.
        ids: ``(batch, tokens)``.
        layer: 0..L.
        rows: ``(batch, tokens, streams x width)``.

    Raises:
        NoRowsError: There is no stream.
    """
    place = place_of(name)
    with _at(model, place, layer, lambda stream: _as_stream(rows, place.axes, stream)):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def looks_ahead(model: nn.Module, name: str, ids: torch.Tensor, kept: int) -> dict[int, float]:
    """How far rows move when what follows them is another text, for every layer.

    Args:
        model: A tiny model.
        name: Its type.
        ids: ``(batch, tokens)``.
        kept: Tokens that stay; the others are replaced by other ids.

    Returns:
        ``{layer: relative difference of the kept rows}``: of the order of rounding where the model is causal.
    """
    other = torch.cat([ids[:, :kept], ids[:, kept:].flip(1).roll(1, 0) % 286 + 3], dim=1)
    before, after = expected_rows(model, name, ids), expected_rows(model, name, other)
    return {layer: _apart(before[layer][:, :kept], after[layer][:, :kept]) for layer in before}


def counts_length(model: nn.Module, name: str, ids: torch.Tensor, kept: int) -> dict[int, float]:
    """How far rows move when what follows them is not there: right padding, for a model that is told of none."""
    long, short = expected_rows(model, name, ids), expected_rows(model, name, ids[:, :kept])
    return {layer: _apart(short[layer], long[layer][:, :kept]) for layer in short}


def counts_neighbours(model: nn.Module, name: str, ids: torch.Tensor) -> dict[int, float]:
    """How far rows of the first text of a batch move when it is alone."""
    together, alone = expected_rows(model, name, ids), expected_rows(model, name, ids[:1])
    return {layer: _apart(alone[layer], together[layer][:1]) for layer in alone}


def counts_left_padding(model: nn.Module, name: str, ids: torch.Tensor, padding: int) -> dict[int, float]:
    """How far rows move when padding stands before them, and mask and position ids say so."""
    batch, tokens = ids.shape
    padded = torch.cat([torch.full((batch, padding), 3), ids], dim=1)
    mask = torch.cat([torch.zeros((batch, padding), dtype=torch.long), torch.ones_like(ids)], dim=1)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    known = inspect.signature(model.forward).parameters
    given = {key: value for key, value in inputs.items() if key in known}
    plain, after = expected_rows(model, name, ids), expected_rows(model, name, padded, **given)
    return {layer: _apart(plain[layer], after[layer][:, -tokens:]) for layer in plain}


def depends_on_position(model: nn.Module, name: str, token: int = 7, tokens: int = 12) -> float:
    """How far the rows of one id differ before block 0 by where it stands: 0 where layer 0 is a table of ids."""
    first = expected_rows(model, name, torch.full((1, tokens), token))[0][0]
    return _apart(first[:1].expand_as(first), first)


@torch.inference_mode()
def decoding_error(model: nn.Module, ids: torch.Tensor, new: int = 6) -> float:
    """How far ``generate``'s logits, step by step through the model's own cache, are from those of plain passes.

    Args:
        model: A tiny model.
        ids: The prompts ``(batch, tokens)``, all of the same length.
        new: Steps.

    Returns:
        The largest relative difference over all steps.

    Raises:
        Exception: Whatever ``generate`` raises.
    """
    made, start, worst = _generated(model, ids, torch.ones_like(ids), new), ids.shape[1], 0.0
    for step, logits in enumerate(made.logits):
        plain = model(input_ids=made.sequences[:, : start + step], use_cache=False).logits[:, -1]
        worst = max(worst, _apart(plain, logits))
    return worst


@torch.inference_mode()
def padded_decoding_error(model: nn.Module, ids: torch.Tensor, padding: int, new: int = 4) -> float:
    """How far ``generate``'s logits move when padding stands before the prompts, and the mask says so.

    Args:
        model: A tiny model.
        ids: The prompts ``(batch, tokens)``, all of the same length.
        padding: How much.
        new: Steps.

    Returns:
        The largest relative difference over all steps.

    Raises:
        Exception: Whatever ``generate`` raises.
    """
    padded = torch.cat([torch.full((len(ids), padding), 3), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    plain, after = _generated(model, ids, torch.ones_like(ids), new), _generated(model, padded, mask, new)
    return max(_apart(one, other) for one, other in zip(plain.logits, after.logits, strict=True))


def _generated(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, new: int) -> Any:
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        output_logits=True, return_dict_in_generate=True, use_cache=True, pad_token_id=0,
    )  # fmt: skip


def _streams(model: nn.Module, place: Place, ids: torch.Tensor, **inputs: Any) -> dict[int, torch.Tensor]:
    """The stream at every layer as the model has it; also proves that the written place holds for this pass."""
    if place.none:
        raise NoRowsError(place.none)
    depth = len(model.get_submodule(place.blocks))
    seen: dict[int, torch.Tensor] = {}
    calls: list[int] = []

    def keep(layer: int) -> Callable[[torch.Tensor], None]:
        def function(stream: torch.Tensor) -> None:
            calls.append(layer)
            seen[layer] = stream.clone()

        return function

    with ExitStack() as stack:
        for layer in range(depth + 1):
            stack.enter_context(_at(model, place, layer, keep(layer)))
        model(input_ids=ids, use_cache=False, **inputs)
    if calls != list(range(depth + 1)):
        raise NoRowsError(f"its blocks run in the order {calls}")
    for layer, stream in seen.items():
        sizes = dict(zip(place.axes, stream.shape, strict=True))
        if (sizes["b"], sizes["t"]) != tuple(ids.shape):
            raise NoRowsError(f"its stream at layer {layer} is {tuple(stream.shape)} for ids {tuple(ids.shape)}")
    return seen


def _as_rows(stream: torch.Tensor, axes: str) -> torch.Tensor:
    """A stream with its axes in the order batch, token, stream, width and the last two folded."""
    order = [axes.index(axis) for axis in "btsw" if axis in axes]
    return stream.permute(order).flatten(2)


def _as_stream(rows: torch.Tensor, axes: str, like: torch.Tensor) -> torch.Tensor:
    """Rows as a model carries them: `_as_rows` the other way round."""
    ordered = "".join(axis for axis in "btsw" if axis in axes)
    sizes = [like.shape[axes.index(axis)] for axis in ordered[2:]]
    return rows.unflatten(2, sizes).permute([ordered.index(axis) for axis in axes]).contiguous()


def _apart(reference: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of the reference."""
    return float((other - reference).abs().max() / reference.abs().max())


@contextmanager
def _at(model: nn.Module, place: Place, layer: int, function: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Call a function on the stream at a layer; what it returns takes the stream's place."""
    blocks = model.get_submodule(place.blocks)
    with _entering(blocks[layer], function) if layer < len(blocks) else _leaving(blocks[-1], function):
        yield


@contextmanager
def _entering(module: nn.Module, function: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        new = function(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _leaving(module: nn.Module, function: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return function(output)
        new = function(output[0])
        if new is None:
            return None
        return (
            output._replace(**{output._fields[0]: new})
            if hasattr(output, "_fields")
            else type(output)([new, *output[1:]])
        )

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
