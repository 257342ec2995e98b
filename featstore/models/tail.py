"""The last part of a model, run by itself: from what its decoder gives to logits, for the rows that are asked.

A head over a large vocabulary is a large part of a pass, and whoever scores some positions needs it at these alone.
What comes after the decoder (the head, and the factor or cap that some families put on its logits) is the model's own
code: the model is called with a decoder that answers at once with given states. That this gives the logits of a whole
pass is seen on one pass of the model (:func:`tail_of`). Where it does not, a pass is taken whole, and its states are
its logits (:class:`Whole`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from featstore.models.residual import ForwardDone, ResidualStream, forward

#: How far logits of some rows may lie from those of a whole pass, as a share of the largest: products of other shapes
#: round otherwise.
_NEAR = 1e-4
#: What the code of a model may raise where its decoder gives states of other rows than it was asked for.
_REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, NotImplementedError)


@dataclass(frozen=True, eq=False)
class Tail:
    """What a model makes of the states that its decoder gives.

    Attributes:
        stream: The model's residual stream.
    """

    stream: ResidualStream
    _answer: Any

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the decoder, and nothing after it.

        Args:
            ids: int64 ``(batch, tokens)``, right-padded.

        Returns:
            ``(batch, tokens, width)``: what enters the head.
        """
        found: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            found.append(_states(output))
            raise ForwardDone

        handle = self.stream.decoder.register_forward_hook(keep)
        try:
            with suppress(ForwardDone):
                forward(self.stream.model, input_ids=ids)
        finally:
            handle.remove()
        return found[0]

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The logits of some rows.

        Args:
            rows: ``(n, width)`` of :meth:`states`.

        Returns:
            ``(n, vocabulary)``.
        """
        ids = torch.zeros((1, len(rows)), dtype=torch.long, device=rows.device)
        with _answering(self.stream, _with_states(self._answer, rows[None])):
            logits: torch.Tensor = forward(self.stream.model, input_ids=ids).logits[0]
        return logits


@dataclass(frozen=True, eq=False)
class Whole:
    """A model that is taken whole: its states are its logits.

    Attributes:
        stream: The model's residual stream.
    """

    stream: ResidualStream

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, tokens, vocabulary)``.

        Args:
            ids: int64 ``(batch, tokens)``.
        """
        logits: torch.Tensor = forward(self.stream.model, input_ids=ids).logits
        return logits

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows themselves.

        Args:
            rows: ``(n, vocabulary)``.
        """
        return rows


@torch.inference_mode()
def tail_of(stream: ResidualStream, ids: torch.Tensor) -> Tail | Whole:
    """Find out whether a model's decoder and what comes after it can be run apart.

    Args:
        stream: The model's residual stream.
        ids: int64 ``(1, tokens)``, any text.
    """
    held: list[Any] = []
    handle = stream.decoder.register_forward_hook(lambda _, __, output: held.append(output))
    try:
        logits = forward(stream.model, input_ids=ids).logits
    finally:
        handle.remove()
    # A decoder that is the model itself, or runs more than once, has no tail.
    if len(held) != 1 or stream.decoder is stream.model:
        return Whole(stream)
    # Two rows in another order than the text's, or one twice where the text has no more.
    rows = [ids.shape[1] - 1, 0]
    try:
        states = _states(held[0])
        if states.ndim != 3 or states.shape[:2] != ids.shape:
            return Whole(stream)
        tail = Tail(stream, _with_states(held[0], states[:, :0]))
        again = tail.logits(states[0, rows])
    except _REFUSALS:
        return Whole(stream)
    wanted = logits[0, rows].float()
    if again.shape != wanted.shape:
        return Whole(stream)
    near = max(_NEAR, 4 * torch.finfo(logits.dtype).eps) * wanted.abs().max()
    return tail if bool(((again.float() - wanted).abs() <= near).all()) else Whole(stream)


def _states(output: Any) -> torch.Tensor:
    """The first thing that a decoder gives."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(first, torch.Tensor):
        raise TypeError(f"the decoder gives {type(first).__name__} first, not states")
    return first


def _with_states(output: Any, states: torch.Tensor) -> Any:
    """The same output with other states; nothing else of it is kept, for it is that of other rows."""
    if isinstance(output, torch.Tensor):
        return states
    if isinstance(output, Mapping):
        return type(output)(**{next(iter(output)): states})
    return (states, *output[1:])


@contextmanager
def _answering(stream: ResidualStream, answer: Any) -> Iterator[None]:
    """Let the decoder give an answer without running its blocks."""
    decoder = stream.decoder
    # Wrappers such as accelerate's put a forward on the instance, which comes back.
    original = decoder.__dict__.get("forward")
    decoder.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        del decoder.forward
        if original is not None:
            decoder.forward = original
