"""Find a model's blocks and the layout of its stream by running it once.

Names and configurations say little about the 150 architectures in use: wrappers keep the text model at several
places, depth has several names, several streams are carried in axes of their own. What holds for all of them is
behaviour: the blocks are the members of a list that one pass over ordinary tokens calls **once each, in order**, with a
tensor that has an axis of sequences and an axis of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from featstore.errors import ModelLoadError, UnsupportedArchitectureError
from featstore.models.devices import input_device
from featstore.models.layout import Axes
from featstore.models.residual import ResidualStream, forward

#: Sequences and tokens of the pass that looks for the blocks: unlike each other and unlike common sizes.
BATCH, TOKENS = 3, 13
#: Those of the second look, where an axis has one of the first sizes by chance.
_AGAIN = (2, 11)


def ordinary_ids(model: nn.Module, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids that stand for text: none that a configuration names for another purpose.

    Args:
        model: A causal language model.
        shape: Of the result.
        seed: Of the draw.

    Returns:
        int64 of the shape, on the device of the model's inputs.

    Raises:
        UnsupportedArchitectureError: The model has fewer than two ordinary ids.
    """
    special = special_ids(getattr(model, "config", None))
    free = [number for number in range(min(embedding_rows(model), 4096)) if number not in special]
    if len(free) < 2:
        raise UnsupportedArchitectureError(
            f"model {type(model).__name__} has no two token ids for ordinary text"
            "; choose a model with a larger vocabulary"
        )
    drawn = torch.randint(len(free), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(free)[drawn].to(input_device(model))


def special_ids(config: Any) -> set[int]:
    """Token ids that a configuration, or one inside it, names: start, end, padding, images, sound.

    Args:
        config: A transformers configuration or None.
    """
    return set(_named_ids(config.to_dict() if hasattr(config, "to_dict") else {}))


def _named_ids(values: dict[Any, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _named_ids(value)
        elif str(name).endswith(("token_id", "token_index", "token_ids")):
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int))


def embedding_rows(model: nn.Module) -> int:
    """Token ids that a model has a vector for.

    Args:
        model: A causal language model.

    Raises:
        UnsupportedArchitectureError: It has no input embedding.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if weight is None:
        raise UnsupportedArchitectureError(
            f"model {type(model).__name__} has no input embedding of token ids"
            "; choose a causal language model that reads text"
        )
    return int(getattr(embedding, "num_embeddings", weight.shape[0]))


def start_id(model: nn.Module) -> int:
    """The id that begins a text and says nothing of it: the start token, or what a model without one has.

    Args:
        model: A causal language model.
    """
    config = getattr(model, "config", None)
    text: Any = config
    if config is not None and hasattr(config, "get_text_config"):
        text = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(text, name, None)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and 0 <= value < embedding_rows(model):
            return value
    return 0


@dataclass
class _List:
    """What one pass did with a list of modules."""

    path: str
    members: nn.ModuleList
    called: list[int] = field(default_factory=list)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    given: Any = None
    passes_on: bool = True

    @property
    def in_order(self) -> bool:
        return self.called == list(range(len(self.members)))


@dataclass(frozen=True)
class _Layout:
    """Where a model's stream is, without holding the model."""

    decoder: str
    blocks: str
    depth: int
    axes: Axes
    dtype: torch.dtype
    entry: int | str
    exit: int | None
    weights: torch.dtype

    def of(self, model: nn.Module) -> ResidualStream:
        blocks = model.get_submodule(self.blocks)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) != self.depth:
            raise AttributeError(f"{self.blocks} is no longer the list of blocks that it was")
        return ResidualStream(
            model=model,
            decoder=model.get_submodule(self.decoder),
            blocks=blocks,
            path=self.blocks,
            axes=self.axes,
            dtype=self.dtype,
            entry=self.entry,
            exit=self.exit,
            start=start_id(model),
        )


#: What was found, as long as the model lives: looking again would run into the hooks of whoever is using it.
_FOUND: WeakKeyDictionary[nn.Module, _Layout] = WeakKeyDictionary()


def forget(model: nn.Module) -> None:
    """Look for a model's blocks again when its stream is next asked for.

    Args:
        model: A model whose blocks or weights were exchanged.
    """
    _FOUND.pop(model, None)


def residual_stream(model: nn.Module, name: str = "") -> ResidualStream:
    """Find the blocks of a causal language model and the layout of its stream.

    It takes one pass of :data:`BATCH` x :data:`TOKENS` random tokens, two where the sizes of a stream are ambiguous. A
    model that was looked at before is not run again.

    Args:
        model: A transformers causal language model.
        name: The model's, for messages; its class stands there in any case.

    Raises:
        UnsupportedArchitectureError: No list of blocks is called once each, in order, with a stream; the message says
            what was seen.
        ModelLoadError: The model's forward pass raises.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedArchitectureError(f"{type(model).__name__} is no torch module; give a causal language model")
    dtype = next((parameter.dtype for parameter in model.parameters()), None)
    if dtype is None:
        raise UnsupportedArchitectureError(f"model {type(model).__name__} has no weights; give a causal language model")
    held = _FOUND.get(model)
    if held is not None and held.weights == dtype:
        with suppress(AttributeError):
            return held.of(model)
    who = f"model {name!r}: {type(model).__name__}" if name else f"model {type(model).__name__}"
    lists, called = _one_pass(model, who, BATCH, TOKENS)
    found = _stack(lists)
    if found is None:
        raise UnsupportedArchitectureError(_refusal(who, lists))
    entry = _entry(found, (BATCH, TOKENS))
    if entry is None:
        raise UnsupportedArchitectureError(
            f"{who}: the blocks in {found.path} get no tensor with an axis of {BATCH} sequences and one of {TOKENS} "
            f"tokens, but {_instead(found)}; such a stream cannot be cut into token states"
        )
    native = _at(found.calls[0], entry)
    candidates = _layouts(native, (BATCH, TOKENS))
    if len(candidates) > 1:
        again, _ = _one_pass(model, who, *_AGAIN)
        other = _stack(again)
        second = _layouts(_at(other.calls[0], entry), _AGAIN) if other else set()
        candidates &= second
    if not candidates:
        raise UnsupportedArchitectureError(
            f"{who}: the stream in {found.path} has shape {tuple(native.shape)} for {BATCH} "
            f"sequences of {TOKENS} tokens and another layout for {_AGAIN[0]} of {_AGAIN[1]}; it cannot be cut into "
            "token states"
        )
    batch, tokens = min(candidates)
    sizes = tuple(size for axis, size in enumerate(native.shape) if axis not in (batch, tokens))
    layout = _Layout(
        decoder=_owner(found.path, called),
        blocks=found.path,
        depth=len(found.members),
        axes=Axes(batch, tokens, sizes),
        dtype=native.dtype,
        entry=entry,
        exit=_exit(found, native),
        weights=dtype,
    )
    _FOUND[model] = layout
    return layout.of(model)


def _one_pass(model: nn.Module, who: str, batch: int, tokens: int) -> tuple[list[_List], set[str]]:
    """Every list of modules with what a pass did with it, and the paths of modules that got the tokens."""
    lists = [_List(path, module) for path, module in model.named_modules() if _is_list(module)]
    reached: set[str] = set()

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            whole = isinstance(ids, torch.Tensor) and not ids.is_floating_point()
            if whole or isinstance(kwargs.get("inputs_embeds"), torch.Tensor):
                reached.add(path)

        return hook

    def begin(seen: _List, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if seen.called:
                seen.passes_on &= _passed_on(seen.given, [*args, *kwargs.values()])
            seen.called.append(number)
            # Two calls say all there is to know; keeping each would keep every state alive.
            if len(seen.calls) < 2:
                seen.calls.append((args, kwargs, None))

        return hook

    def end(seen: _List) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            seen.given = output
            if len(seen.calls) == 1 and seen.calls[0][2] is None:
                seen.calls[0] = (*seen.calls[0][:2], output)

        return hook

    ids = ordinary_ids(model, batch, tokens)
    with ExitStack() as stack, torch.inference_mode():
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(note(path), with_kwargs=True).remove)
        for seen in lists:
            for number, member in enumerate(seen.members):
                # First of all hooks: what others put into a block is not what the one before it gave back.
                handle = member.register_forward_pre_hook(begin(seen, number), with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
                stack.callback(member.register_forward_hook(end(seen)).remove)
        try:
            forward(model, input_ids=ids)
        except Exception as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
            raise ModelLoadError(
                f"{who} cannot be run on {tokens} ordinary tokens: {type(error).__name__}: {reason}; check that it is "
                "a causal language model that reads text alone"
            ) from error
    return lists, reached


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0


def _stack(lists: Sequence[_List]) -> _List | None:
    """The outermost list that is called once each, in order, with a stream; the longest where there are several."""
    called = [f"{seen.path}." for seen in lists if seen.called]
    outer = [
        seen
        for seen in lists
        if seen.in_order
        and _streams(seen)
        and seen.passes_on
        and not any(seen.path.startswith(path) for path in called)
    ]
    return max(outer, key=lambda seen: len(seen.members), default=None)


def _streams(seen: _List) -> bool:
    """Whether members give back what they are given: a tensor of the shape of their stream."""
    args, kwargs, output = seen.calls[0]
    shapes = {tuple(t.shape) for t in (*args, *kwargs.values()) if _floating(t) and t.ndim > 2}
    given = output if isinstance(output, tuple | list) else [output]
    return any(_floating(t) and tuple(t.shape) in shapes for t in given)


def _passed_on(given: Any, arguments: Sequence[Any]) -> bool:
    """Whether the next member is given what one gave back; parts of blocks leave the sum to others."""
    tensors = [t for t in (given if isinstance(given, tuple | list) else [given]) if _floating(t)]
    return any(
        _floating(argument)
        and argument.shape == tensor.shape
        and (argument is tensor or torch.equal(argument, tensor.to(argument.device)))
        for tensor in tensors
        for argument in arguments
    )


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _refusal(who: str, lists: Sequence[_List]) -> str:
    called = [seen for seen in lists if seen.called]
    if not called:
        return f"{who}: one pass over ordinary tokens calls no list of blocks; it has no residual stream to read"
    seen = max(called, key=lambda each: (len(each.members), len(each.called)))
    missing = sorted(set(range(len(seen.members))) - set(seen.called))
    if seen.in_order and _streams(seen):
        what = "hands each member something else than the one before gave back"
    elif seen.in_order:
        what = "gives back no tensor of the shape it gets"
    elif missing:
        what = f"does not run {'block' if len(missing) == 1 else 'blocks'} {', '.join(map(str, missing[:8]))} on text"
    elif len(seen.called) > len(seen.members):
        what = f"runs its {len(seen.members)} blocks {len(seen.called)} times in one pass"
    else:
        what = f"runs its blocks in the order {', '.join(map(str, seen.called[:8]))}"
    return f"{who}: {seen.path} {what}; layers are defined where blocks run once each, in order, and pass on one stream"


def _instead(seen: _List) -> str:
    """What blocks get and give back that is no stream of tokens: a text in pieces or slots, or two streams at once."""
    args, kwargs, output = seen.calls[0]
    shapes = {tuple(t.shape) for t in (output if isinstance(output, tuple | list) else [output]) if _floating(t)}
    got = [tuple(t.shape) for t in (*args, *kwargs.values()) if _floating(t) and tuple(t.shape) in shapes]
    what = f"{'one' if len(got) == 1 else len(got)} of shape {got[0]}"
    if len(got[0]) > 2 and got[0][0] == BATCH:
        what += f": {TOKENS} tokens became {got[0][1]} positions"
    return what


def _at(call: tuple[tuple[Any, ...], dict[str, Any], Any], place: int | str) -> torch.Tensor:
    args, kwargs, _ = call
    value: torch.Tensor = args[place] if isinstance(place, int) else kwargs[place]
    return value


def _entry(seen: _List, sizes: tuple[int, int]) -> int | str | None:
    """The argument that is the stream: positional ones first, then the usual name, then any other."""
    args, kwargs, output = seen.calls[0]
    given = output if isinstance(output, tuple | list) else [output]
    shapes = {tuple(t.shape) for t in given if _floating(t)}
    places: list[int | str] = [*range(len(args)), *sorted(kwargs, key=lambda name: name != "hidden_states")]
    for place in places:
        value = args[place] if isinstance(place, int) else kwargs[place]
        if _floating(value) and tuple(value.shape) in shapes and _layouts(value, sizes):
            return place
    return None


def _layouts(native: torch.Tensor, sizes: tuple[int, int]) -> set[tuple[int, int]]:
    """Pairs of axes that may be sequences and tokens; one axis at least is left for the state."""
    batch, tokens = ([axis for axis, size in enumerate(native.shape) if size == wanted] for wanted in sizes)
    return {(a, b) for a in batch for b in tokens if a != b and native.ndim > 2}


def _exit(seen: _List, native: torch.Tensor) -> int | None:
    output = seen.calls[0][2]
    if isinstance(output, torch.Tensor):
        return None
    return next(i for i, t in enumerate(output) if _floating(t) and t.shape == native.shape)


def _owner(path: str, called: set[str]) -> str:
    """The innermost module around the list that is given the tokens, as ids or embedded; the model is, in any case."""
    while path:
        path = path.rpartition(".")[0]
        if path in called:
            return path
    return ""
