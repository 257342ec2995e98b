"""Put states into the forward passes of a loop that is not ours.

An :class:`~featstore.models.injection.Injection` belongs to one prompt whose stream is known beforehand. Here the pass
itself brings its stream: a hook at the layer takes what arrives, replaces the chosen positions, and passes the rest on.
The logits are those of :func:`~featstore.models.injection.inject` to the bit, because both put the same tensor at the
same place. With ``keep="hide"`` that holds of every position that took a state and of all that comes after the prompt:
what an injection prepared beforehand holds at the others had read the prompt's own first word, and nobody reads it.

Every pass that begins a sequence takes the states; a pass that continues from a cache takes none, so that text can be
generated. The hooks let gradients through: to the blocks below the layer at positions that keep their own state, and to
the injected tensors if these require them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from evaluate.injection.verified import leak_mark
from featstore.errors import LayerRangeError, SpecError
from featstore.models import residual as sites
from featstore.models.caches import Tokens
from featstore.models.hiding import Progress, check_attention, hiding, with_neutral_start, with_start_state
from featstore.models.injection import KEEP, Injection, aligned


@dataclass(frozen=True, eq=False)
class Placed:
    """States for positions of a batch of prompts, before any of its passes.

    Attributes:
        layer: 0..L of the target.
        states: Per prompt ``(n_i, width)``.
        positions: Per prompt int64 ``(n_i,)``, distinct; padding counts, and negative ones count from the end.
        keep: One of :data:`~featstore.models.injection.KEEP`.

    Raises:
        SpecError: States and positions do not fit each other, or ``keep`` is unknown.
    """

    layer: int
    states: tuple[torch.Tensor, ...]
    positions: tuple[NDArray[np.int64], ...]
    keep: str = "own"

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise SpecError(f"keep {self.keep!r}: choose one of {', '.join(KEEP)}")
        if len(self.states) != len(self.positions):
            raise SpecError(
                f"states for {len(self.states)} prompts and positions for {len(self.positions)}; give both for each"
            )
        for row, (new, at) in enumerate(zip(self.states, self.positions, strict=True)):
            if new.ndim != 2 or len(new) != len(at):
                raise SpecError(
                    f"prompt {row}: states of shape {tuple(new.shape)} for {len(at)} positions; give (n, width) states "
                    "for n positions"
                )

    def resolved(self, shape: tuple[int, int], absent: torch.Tensor | None) -> list[NDArray[np.int64]]:
        """The positions in a batch of a given shape, counted from its first column.

        Args:
            shape: ``(batch, tokens)`` of the pass.
            absent: bool of that shape, True where there is no token; None for none.

        Raises:
            SpecError: Another batch, or a position outside of it, named twice, or where there is no token.
        """
        batch, tokens = shape
        if batch != len(self.positions):
            raise SpecError(
                f"the pass has {batch} prompts, states were given for {len(self.positions)}; give states and positions "
                "for each prompt of the batch"
            )
        result = []
        for row, at in enumerate(self.positions):
            outside = at[(at < -tokens) | (at >= tokens)]
            if len(outside):
                raise SpecError(
                    f"prompt {row}: position {outside[0]} is outside its {tokens} tokens; give 0..{tokens - 1}, or "
                    f"-{tokens}..-1 from the end"
                )
            places = np.where(at < 0, at + tokens, at)
            if len(np.unique(places)) != len(places):
                raise SpecError(f"prompt {row}: a position is named twice; give each one state")
            if absent is not None and bool(absent[row, torch.as_tensor(places, device=absent.device)].any()):
                raise SpecError(f"prompt {row}: a state is placed on padding; positions count the padding, too")
            result.append(places)
        return result


class LiveInjection:
    """A context in which every pass that begins a sequence takes the states.

    Attributes:
        key: The layer pair, such as ``llama:16->mistral:16``.
        layer: Layer of the target that takes the states.
        states: Per prompt ``(n_i, width)``, as they are put in.
        positions: Per prompt int64 ``(n_i,)``.
        keep: ``own`` or ``hide``.
        inputs: What to call the model with, where the injection was made for a text; else empty.
        passes: Passes that took the states so far.
        leak: What the swap test found at the layer; 0 where the stream is all that later blocks know of the text.
    """

    def __init__(
        self,
        stream: sites.ResidualStream,
        placed: Placed,
        *,
        key: str = "",
        inputs: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Check that the model can take the states; its hooks are set when the context is entered.

        Args:
            stream: The target's residual stream.
            placed: What goes where.
            key: The layer pair.
            inputs: What to call the model with.

        Raises:
            LayerRangeError: The model has no such layer.
            SpecError: The states have another width than the model, or with ``hide`` its attention takes no mask.
        """
        if not 0 <= placed.layer <= stream.depth:
            raise LayerRangeError(
                f"{key or 'the injection'} goes to layer {placed.layer}, outside 0..{stream.depth} of this model; "
                "inject into the model that the map was fitted to"
            )
        width = stream.width
        for row, new in enumerate(placed.states):
            if new.shape[1] != width:
                raise SpecError(
                    f"prompt {row}: states of width {new.shape[1]} for a model of width {width}; inject into the model "
                    "that the map was fitted to"
                )
        if placed.keep == "hide":
            check_attention(stream)
        self.key, self.layer, self.keep = key, placed.layer, placed.keep
        self.states, self.positions = placed.states, placed.positions
        self.inputs = inputs or {}
        self.passes = 0
        self.leak: float | None = 0.0
        self._stream, self._placed = stream, placed
        self._hooks: ExitStack | None = None
        self._pass = _Pass()
        self._neutral: torch.Tensor | None = None
        self._called = False

    def __repr__(self) -> str:
        """One line: where the states go and how many passes took them."""
        counts = ", ".join(str(len(at)) for at in self.positions[:4]) + (", ..." if len(self.positions) > 4 else "")
        mark = leak_mark(self.leak)
        return (
            f"LiveInjection({self.key or 'layer'} at layer {self.layer}, {counts} positions, keep={self.keep!r}, "
            f"passes={self.passes}{f', {mark}' if mark else ''})"
        )

    def __enter__(self) -> Self:
        """Set the hooks.

        Raises:
            SpecError: The context is entered already.
        """
        if self._hooks is not None:
            raise SpecError("this injection is entered already; make another one for a nested context")
        self.passes, self._pass, self._called = 0, _Pass(), False
        self._neutral = self._stream.start_state(self.layer) if self.keep == "hide" else None
        with ExitStack() as stack:
            stack.enter_context(sites.at_site(self._stream, self.layer, self._put))
            stack.enter_context(sites.at_beginning(self._stream, self._begin))
            stack.callback(self._pass.hidden.close)
            self._hooks = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks, whatever happened; warn if the model was not called."""
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.close()
        if kind is None and not self._called:
            warnings.warn(
                "no pass took the states: inside the context, call the very model that was given to inject()",
                stacklevel=2,
            )

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Look at a pass before its blocks run: whether it begins a sequence, its shape and its padding."""
        self._called = True
        now = self._pass
        begun = now.read.before(args, kwargs)
        now.progress.begun = begun
        if begun:
            if begun < now.tokens or not now.tokens:
                raise SpecError(
                    f"the pass goes on from {begun} cached tokens, of a sequence that took no states; begin with the "
                    "whole prompt inside the context"
                )
            now.places = None
            return None
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None:
            raise SpecError("the pass has neither input_ids nor inputs_embeds; call the model with one of them")
        shape = (int(given.shape[0]), int(given.shape[1]))
        mask = kwargs.get("attention_mask")
        absent = ~mask.bool() if isinstance(mask, torch.Tensor) and tuple(mask.shape) == shape else None
        now.places = self._placed.resolved(shape, absent)
        now.tokens = shape[1]
        if self.keep == "hide":
            now.hidden.close()
            real = torch.ones(shape, dtype=torch.bool) if absent is None else ~absent.cpu()
            start = real & (real.cumsum(dim=1) == 1)
            readable = start.clone()
            for row, at in enumerate(now.places):
                readable[row, torch.as_tensor(at)] = True
            now.hidden.enter_context(hiding(self._stream, self.layer, readable, start, now.progress))
            args, kwargs, now.foreign = with_neutral_start(self._stream, args, kwargs, start)
        return args, kwargs

    def _put(self, current: torch.Tensor) -> torch.Tensor | None:
        now = self._pass
        if now.places is None:
            return None
        # Where padding lies has been looked at before the pass.
        new: Injection = aligned(current, self.states, now.places, layer=self.layer, keep=self.keep)
        self.passes += 1
        if now.foreign is None or self._neutral is None:
            return new.hidden
        return with_start_state(new.hidden, now.foreign & ~new.replaced.to(now.foreign.device), self._neutral)


class _Pass:
    """What is known of the sequence that is being passed."""

    def __init__(self) -> None:
        self.places: Sequence[NDArray[np.int64]] | None = None
        self.tokens = 0
        self.read = Tokens()
        self.progress = Progress()
        self.hidden = ExitStack()
        self.foreign: torch.Tensor | None = None
