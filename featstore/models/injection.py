"""Forward passes with states put in.

An :class:`Injection` is a prompt's stream at one layer with some positions replaced: every position that has a source
state (:func:`aligned`), or the last one alone (:func:`last`). With ``keep="own"`` what comes after the prompt still
reads the target's own view of it, below the layer and at the positions that were not replaced; with ``keep="hide"`` it
reads the injected states and a start token only (:mod:`featstore.models.hiding`), and a good answer can have come from
nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featstore.errors import NonFiniteStateError, SpecError
from featstore.models import residual as sites
from featstore.models.caches import Tokens
from featstore.models.hiding import hiding, with_neutral_start, with_start_state

#: What later tokens may read of the prompt besides the injected states.
KEEP = ("own", "hide")
#: How the last position's own state and the injected one become one.
COMBINE = ("replace", "sum", "mean")


@dataclass(frozen=True, eq=False)
class Injection:
    """A prompt's residual stream at one layer, with states put in.

    Attributes:
        layer: 0..L of the target.
        hidden: ``(batch, tokens, width)``, the stream at the layer, replaced where ``replaced`` says so.
        replaced: bool ``(batch, tokens)``.
        keep: One of :data:`KEEP`.
        padding: bool ``(batch, tokens)``, True at the left of a row where there is no token; None for none.

    Raises:
        SpecError: The shapes do not fit each other, a row has no token, its padding is not at its left or takes a
            state, or ``keep`` is unknown.
        NonFiniteStateError: An injected state holds NaN or infinity.
    """

    layer: int
    hidden: torch.Tensor
    replaced: torch.Tensor
    keep: str = "own"
    padding: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise SpecError(f"keep {self.keep!r}: choose one of {', '.join(KEEP)}")
        shape = tuple(self.hidden.shape)
        if len(shape) != 3 or 0 in shape:
            raise SpecError(f"injected stream of shape {shape}: give (batch, tokens, width), none of them 0")
        check_flags("replaced", self.replaced, shape[:2])
        if self.padding is not None:
            check_padding(self.padding, shape[:2])
            if bool((self.replaced & self.padding).any()):
                raise SpecError("a state is injected where a row is padded; give places among its tokens")
        if not bool(torch.isfinite(self.hidden[self.replaced]).all()):
            raise NonFiniteStateError(
                f"a state to be injected at layer {self.layer} holds NaN or infinity; check the map and what it was "
                "given"
            )

    @property
    def start(self) -> torch.Tensor:
        """Bool ``(batch, tokens)``: every row's first token, special or not; models rest their attention on it."""
        real = torch.ones_like(self.replaced) if self.padding is None else ~self.padding
        return real & (real.cumsum(dim=1) == 1)


def check_flags(name: str, flags: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check that a tensor says yes or no for every position.

    Args:
        name: What it is called.
        flags: bool, of ``shape``.
        shape: ``(batch, tokens)``.

    Raises:
        SpecError: Another dtype or shape.
    """
    if flags.dtype != torch.bool or tuple(flags.shape) != tuple(shape):
        raise SpecError(f"{name} is {flags.dtype} of shape {tuple(flags.shape)}; give bool of shape {tuple(shape)}")


def check_padding(padding: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check that padding lies at the left of every row and leaves it a token.

    Args:
        padding: bool ``(batch, tokens)``, True where there is no token.
        shape: ``(batch, tokens)``.

    Raises:
        SpecError: It does not.
    """
    check_flags("padding", padding, shape)
    if bool(padding[:, -1].any()) or bool((padding[:, 1:] & ~padding[:, :-1]).any()):
        raise SpecError("padding must lie at the left of each row and leave it a token; see left_padded()")


def aligned(
    own: torch.Tensor,
    states: Sequence[torch.Tensor | NDArray[Any]],
    places: Sequence[Sequence[int] | NDArray[Any]],
    *,
    layer: int,
    keep: str = "own",
    padding: torch.Tensor | None = None,
) -> Injection:
    """Put states at chosen positions of a prompt.

    Args:
        own: ``(batch, tokens, width)``, the target's stream at the layer.
        states: Per row ``(n_i, width)``.
        places: Per row n_i distinct positions in 0..tokens-1, padding counted.
        layer: 0..L.
        keep: One of :data:`KEEP`.
        padding: As of :class:`Injection`.

    Raises:
        SpecError: Rows, places and states do not fit, or as :class:`Injection`.
        NonFiniteStateError: As :class:`Injection`.
    """
    hidden, replaced = own.clone(), torch.zeros(own.shape[:2], dtype=torch.bool, device=own.device)
    if not len(states) == len(places) == len(hidden):
        raise SpecError(
            f"{len(hidden)} rows of a prompt, states for {len(states)} and places for {len(places)} of them"
            "; give one of each for every row"
        )
    for row, (new, at) in enumerate(zip(states, places, strict=True)):
        values, index = torch.as_tensor(new), np.asarray(at, dtype=np.int64).reshape(-1)
        if tuple(values.shape) != (len(index), own.shape[2]):
            raise SpecError(
                f"row {row}: states of shape {tuple(values.shape)} for {len(index)} places of width "
                f"{own.shape[2]}; give one state for every place"
            )
        if len(np.unique(index)) != len(index) or not ((index >= 0) & (index < own.shape[1])).all():
            raise SpecError(f"row {row}: places must be distinct and lie in 0..{own.shape[1] - 1}")
        where = torch.as_tensor(index, device=own.device)
        hidden[row, where] = values.to(own.device, own.dtype)
        replaced[row, where] = True
    return Injection(layer, hidden, replaced, keep, None if padding is None else padding.to(own.device))


def last(
    own: torch.Tensor,
    state: torch.Tensor | NDArray[Any],
    *,
    layer: int,
    how: str = "replace",
    keep: str = "own",
    padding: torch.Tensor | None = None,
) -> Injection:
    """Put a state at the last position of a prompt alone ("Communicating Activations", arXiv 2501.14082, section 3).

    Args:
        own: ``(batch, tokens, width)``, the target's stream at the layer.
        state: ``(batch, width)``.
        layer: 0..L.
        how: ``replace`` (the state), ``sum`` (own + state) or ``mean`` ((own + state) / 2); computed in float32.
        keep: One of :data:`KEEP`.
        padding: As of :class:`Injection`.

    Raises:
        SpecError: Unknown ``how``, or as :func:`aligned`.
        NonFiniteStateError: As :class:`Injection`.
    """
    if how not in COMBINE:
        raise SpecError(f"how {how!r}: choose one of {', '.join(COMBINE)}")
    given = torch.as_tensor(state).to(own.device)
    if tuple(given.shape) != (own.shape[0], own.shape[2]):
        raise SpecError(f"state of shape {tuple(given.shape)}: give (batch, width) = {(own.shape[0], own.shape[2])}")
    if how != "replace":
        given = own[:, -1].float() + given.float()
    if how == "mean":
        given = given / 2
    return aligned(own, list(given[:, None]), [[own.shape[1] - 1]] * len(own), layer=layer, keep=keep, padding=padding)


@contextmanager
def inject(stream: sites.ResidualStream, injection: Injection, *, whole: bool) -> Iterator[None]:
    """Put an injection into the passes of a model.

    The pass that begins the sequence, over exactly the injection's tokens, has its stream replaced at the layer. With
    ``keep="hide"`` that pass and all later cached ones, of any number of tokens, read only what they may; leave the
    context only when the text is done. Whoever calls the model passes the attention mask and positions that padding
    needs (:class:`featstore.models.passes.Passes` does).

    Args:
        stream: The target's residual stream.
        injection: What to put in.
        whole: The one pass has no cache, so the blocks below need not run.

    Raises:
        LayerRangeError: No such layer.
        SpecError: A pass is not the injection's: another shape, or a cache that holds less than the prompt.
        UnsupportedArchitectureError: With ``hide``, the model's attention takes no mask of positions.
    """
    stream.check(injection.layer)
    hidden, hides = injection.hidden, injection.keep == "hide"
    tokens = hidden.shape[1]
    # Without a cache every pass begins anew, and the prompt is the beginning of each.
    grows = stream.continuing.kind == "recomputed" and not whole
    neutral = stream.start_state(injection.layer) if hides else None
    begun, foreign, read = 0, None, Tokens()

    def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal begun, foreign
        begun = read.before(args, kwargs)
        if begun and (whole or begun < tokens):
            raise SpecError(
                f"the pass goes on from {begun} cached tokens, the injection is for a prompt of {tokens} "
                f"{'without a cache' if whole else 'from its first token'}; begin with the prompt"
            )
        if begun or not hides:
            return None
        args, kwargs, foreign = with_neutral_start(stream, args, kwargs, injection.start)
        return args, kwargs

    def put(current: torch.Tensor) -> torch.Tensor | None:
        # A prompt of one token has the shape of a step of generation: only the cache tells them apart.
        if begun:
            return None
        prompt = current[:, :tokens] if grows else current
        if prompt.shape != hidden.shape:
            raise SpecError(
                f"the pass has a stream of shape {tuple(current.shape)}, the injection {tuple(hidden.shape)}; inject "
                "into the prompt it was made for"
            )
        new = hidden.to(current.device, current.dtype)
        if foreign is not None and neutral is not None:
            new = with_start_state(new, foreign & ~injection.replaced.to(foreign.device), neutral)
        return torch.cat([new, current[:, tokens:]], dim=1) if current.shape[1] > tokens else new

    with ExitStack() as stack:
        if whole:
            stack.enter_context(sites.skipping_below(stream, injection.layer))
        stack.enter_context(sites.at_site(stream, injection.layer, put))
        handle = stream.decoder.register_forward_pre_hook(begin, with_kwargs=True)
        stack.callback(handle.remove)
        if hides:
            readable = injection.replaced | injection.start
            stack.enter_context(hiding(stream, injection.layer, readable, injection.start))
        yield
