"""The residual stream at layer k: where states are captured, and where they are injected.

**Layer k is the residual stream after k blocks**, k = 0..L: k = 0 is what enters the first block, k = L what leaves the
last one, *before* the final norm. In most of transformers that is ``hidden_states[k]`` for k < L; ``hidden_states[L]``
there is taken after the final norm and is not a residual stream.

Capture and injection are one hook at one place: a function that sees the stream entering block k (leaving the last
block for k = L) and may return a replacement. Re-injecting what was captured therefore leaves the logits bit-identical.
That shows that the hook is in place; that the stream is *all* that later blocks know is another test
(:mod:`featstore.models.probe.injecting`).

Rows are ``(batch, tokens, width)`` whatever the model's own axes are. A model that carries several streams side by side
(hyper-connections, AltUp) has them folded into one row, width = streams x hidden size, and unfolded at injection.

Where the blocks are and what their stream looks like is found by running the model once
(:func:`featstore.models.stack.residual_stream`), never from names.

Inputs are right-padded and no attention mask is passed: attention is causal, so a real token never sees the padding
after it, and the unmasked path is faster and independent of the padding. States of pad positions are meaningless. For a
model where this does not hold, the probe says so (:class:`~featstore.models.layout.Batching`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from featstore.errors import LayerRangeError, UnsupportedArchitectureError
from featstore.models.aside import aside
from featstore.models.devices import input_device
from featstore.models.layout import Axes, Batching, Continuing

#: Sees hidden states ``(batch, tokens, width)``; returns a replacement of the same shape, or None to leave them.
SiteFunction = Callable[[torch.Tensor], torch.Tensor | None]
#: Sees the arguments of a pass; returns others, or None to leave them.
ArgumentsFunction = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]


class ForwardDone(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside the forward pass once the last wanted layer is reached."""


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """A decoder stack whose stream can be read and written between blocks.

    Attributes:
        model: The causal language model.
        decoder: The module inside it that runs the blocks.
        blocks: Its L blocks in order.
        path: Where the blocks are, such as ``model.layers``.
        axes: How the stream is laid out.
        dtype: The stream's number type, which may differ from the weights'.
        entry: Argument of a block that is the stream: a position or a keyword.
        exit: Place of the stream in what a block returns; None where it returns nothing else.
        start: The token that stands in for a prompt's first one where the prompt is to be hidden.
        batching: Which windows may share a pass.
        continuing: How the model goes on from what it has read.
        skips: Layers below which the blocks need not run when the whole stream is replaced there; None where that has
            not been tested, and every block runs.
    """

    model: nn.Module
    decoder: nn.Module
    blocks: nn.ModuleList
    path: str
    axes: Axes
    dtype: torch.dtype
    entry: int | str = 0
    exit: int | None = None
    start: int = 0
    batching: Batching = field(default_factory=Batching)
    continuing: Continuing = field(default_factory=Continuing)
    skips: frozenset[int] = frozenset()
    _starts: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def depth(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.axes.width

    def check(self, layer: int) -> None:
        """Check that there is such a layer.

        Raises:
            LayerRangeError: There is not.
        """
        if not 0 <= layer <= self.depth:
            raise LayerRangeError(f"layer {layer} is outside 0..{self.depth} of this model; choose one of these")

    @torch.inference_mode()
    def start_state(self, layer: int) -> torch.Tensor:
        """The stream of the start token, which has read nothing but itself.

        Args:
            layer: 0..L.

        Returns:
            ``(width,)`` in the stream's dtype.

        Raises:
            LayerRangeError: No such layer.
        """
        key = (self.start, layer)
        if key not in self._starts:
            ids = torch.tensor([[self.start]], device=input_device(self.model))
            # The model's own, whoever injects into it at the time.
            with aside(self.model):
                self._starts[key] = capture(self, ids, [layer])[layer][0, 0]
        return self._starts[key]


def forward(model: nn.Module, **inputs: Any) -> Any:
    """Call a model with those of some inputs that its forward takes, without a cache unless one is asked for.

    Args:
        model: A causal language model.
        inputs: By name; ``input_ids`` is always passed.
    """
    return model(**accepted(model, {"use_cache": False, **inputs}))


def accepted(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of some inputs that a model's forward names; the others would be ignored or refused.

    Args:
        model: A causal language model.
        inputs: By name.
    """
    # accelerate puts its own forward on the instance; the class says what the model takes.
    names = inspect.signature(type(model).forward).parameters
    # Some hand what says that they keep no cache on without naming it.
    passed = {"input_ids", "use_cache"} if any(p.kind is p.VAR_KEYWORD for p in names.values()) else {"input_ids"}
    return {name: value for name, value in inputs.items() if name in names or name in passed}


@contextmanager
def at_site(stream: ResidualStream, layer: int, function: SiteFunction) -> Iterator[None]:
    """Call a function on the residual stream at a layer during every forward pass in the context.

    Args:
        stream: From :func:`featstore.models.stack.residual_stream`.
        layer: 0..L.
        function: Sees ``(batch, tokens, width)``; a returned tensor replaces the stream.

    Raises:
        LayerRangeError: No such layer.
    """
    stream.check(layer)
    if layer < stream.depth:
        handle = stream.blocks[layer].register_forward_pre_hook(_entering(stream, function), with_kwargs=True)
    else:
        handle = stream.blocks[-1].register_forward_hook(_leaving(stream, function))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def at_beginning(stream: ResidualStream, function: ArgumentsFunction) -> Iterator[None]:
    """Call a function on the arguments of the decoder at the beginning of every forward pass in the context.

    Args:
        stream: The model's.
        function: Sees positional and keyword arguments; a returned pair of both replaces them.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(args, kwargs)

    handle = stream.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def entering(stream: ResidualStream, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """The stream among the arguments of a block, in the model's own axes.

    Args:
        stream: The model's.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        UnsupportedArchitectureError: It is not where it was when the model was looked at.
    """
    place = stream.entry
    value = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(str(place))
    if not isinstance(value, torch.Tensor):
        raise UnsupportedArchitectureError(
            f"a block of {stream.path} was called without its stream as {_argument(place)}, as it was when the model "
            "was looked at; call the model as its generate() does"
        )
    return value


def _argument(place: int | str) -> str:
    return f"argument {place}" if isinstance(place, int) else repr(place)


def _entering(stream: ResidualStream, function: SiteFunction) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = function(stream.axes.rows(entering(stream, args, kwargs)))
        if new is None:
            return None
        native, place = stream.axes.native(new), stream.entry
        if isinstance(place, int):
            return (*args[:place], native, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: native}

    return hook


def _leaving(stream: ResidualStream, function: SiteFunction) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        place = stream.exit
        new = function(stream.axes.rows(output if place is None else output[place]))
        if new is None:
            return None
        native = stream.axes.native(new)
        return native if place is None else type(output)([*output[:place], native, *output[place + 1 :]])

    return hook


@torch.inference_mode()
def capture(stream: ResidualStream, input_ids: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Run the decoder and return its residual stream at some layers.

    The pass stops after the last layer asked for and never runs the head.

    Args:
        stream: From :func:`featstore.models.stack.residual_stream`.
        input_ids: int64 ``(batch, tokens)``, right-padded.
        layers: Distinct layers in 0..L.

    Returns:
        ``{layer: (batch, tokens, width)}`` in the stream's dtype.

    Raises:
        LayerRangeError: No such layer.
    """
    states: dict[int, torch.Tensor] = {}
    last = max(layers)

    def keep(layer: int) -> SiteFunction:
        def function(hidden: torch.Tensor) -> None:
            states[layer] = hidden
            if layer == last:
                raise ForwardDone

        return function

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(at_site(stream, layer, keep(layer)))
        with suppress(ForwardDone):
            forward(stream.model, input_ids=input_ids)
    return states


@contextmanager
def watching(stream: ResidualStream, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Keep the residual stream of the passes in the context, which run to their end.

    Args:
        stream: The model's.
        layers: Distinct layers in 0..L.

    Yields:
        ``{layer: (batch, tokens, width)}``, filled by every pass anew.

    Raises:
        LayerRangeError: No such layer.
    """
    states: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> SiteFunction:
        def look(hidden: torch.Tensor) -> None:
            states[layer] = hidden

        return look

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(at_site(stream, layer, keep(layer)))
        yield states


@contextmanager
def skipping_below(stream: ResidualStream, layer: int) -> Iterator[None]:
    """Turn the blocks below a layer into the identity, for passes that replace the *whole* stream at that layer.

    The skipped work is overwritten anyway, so results are bit-identical to the full pass: where that was seen
    (``stream.skips``). Elsewhere every block runs. Only for passes without a key-value cache.

    Args:
        stream: The model's.
        layer: 0..L.

    Raises:
        LayerRangeError: No such layer.
    """
    stream.check(layer)
    if layer not in stream.skips:
        yield
        return

    def identity(*args: Any, **kwargs: Any) -> Any:
        native = entering(stream, args, kwargs)
        return native if stream.exit is None else (native,)

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
