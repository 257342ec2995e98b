"""A prompt, with or without injected states, and what the model makes of it: continuations and their likelihood.

The prompt is one pass, which fills the key-value cache; what follows reads the cache. Prompts of several lengths are
padded at the left and get the positions they would have alone, so a row's text does not depend on its neighbours
(beyond rounding). States to be injected are captured the same way (:func:`prompt_states`): then a model's own states
put back change no bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from featstore.errors import SpecError
from featstore.models import residual as sites
from featstore.models.answering import continued
from featstore.models.configuration import context_length
from featstore.models.devices import input_device
from featstore.models.injection import Injection, check_padding, inject
from featstore.models.passes import Passes
from featstore.models.sampling import Sampling


def check_speaker(injection: Injection) -> None:
    """Refuse a prompt whose last token, out of which the text goes on, gives away what is hidden.

    Args:
        injection: What is put into the prompt.

    Raises:
        SpecError: With ``keep="hide"``, a row's last token took no state.
    """
    ends = (injection.replaced | injection.start)[:, -1]
    if injection.keep == "hide" and not bool(ends.all()):
        raise SpecError(
            f"row {int(ends.int().argmin())}: the prompt's last token took no state, and its own has read what "
            "keep='hide' is to hide; use keep='own' or a prompt whose last token takes one"
        )


@torch.inference_mode()
def prompt_states(
    model: Any,
    stream: sites.ResidualStream,
    ids: torch.Tensor,
    layers: Sequence[int],
    *,
    padding: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """A model's own stream over prompts, from the very pass that a continuation begins with.

    Args:
        model: The causal language model.
        stream: Its residual stream.
        ids: int64 ``(batch, tokens)``.
        layers: Distinct layers in 0..L.
        padding: bool ``(batch, tokens)``, True at the left of a row where there is no token; None for none.

    Returns:
        ``{layer: (batch, tokens, width)}`` in the model's dtype; rows of padding are meaningless.

    Raises:
        LayerRangeError: No such layer.
        SpecError: As :func:`continue_from`.
    """
    prompt = _prompt(model, stream, ids, None, padding, 0)
    with sites.watching(stream, layers) as states:
        Passes(stream).read(prompt.ids, prompt.padding)
    return states


@torch.inference_mode()
def continue_from(
    model: Any,
    ids: torch.Tensor,
    *,
    injection: Injection | None = None,
    stream: sites.ResidualStream,
    length: int,
    stops: Collection[int],
    sample: Sampling | None = None,
    padding: torch.Tensor | None = None,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue prompts, greedily or by sampling.

    Args:
        model: The causal language model.
        ids: int64 ``(batch, tokens)``.
        injection: States to put in.
        stream: The model's residual stream.
        length: New tokens at most, 1 or more.
        stops: Tokens that end a text.
        sample: How to draw; None for the likeliest token each time.
        padding: bool ``(batch, tokens)``, True at the left of a row where there is no token; None for the injection's.
        rows: Numbers of the rows, which fix their draws; None for 0, 1, ... A batch cut in two gives the same texts if
            the second half keeps its numbers.

    Returns:
        Per row its new tokens, the stop included.

    Raises:
        LayerRangeError: The injection's layer.
        SpecError: The prompt with its continuation exceeds the context, ids, padding and injection do not fit each
            other, or, with ``keep="hide"``, a prompt's last token took no state: it has read what is to be hidden.
        UnsupportedArchitectureError: As :func:`featstore.models.injection.inject`.
    """
    if length < 1:
        raise SpecError(f"length {length}: must be 1 or more")
    prompt = _prompt(model, stream, ids, injection, padding, length)
    numbers = list(range(len(prompt.ids))) if rows is None else list(rows)
    if len(numbers) != len(prompt.ids) or min(numbers) < 0:
        raise SpecError(f"row numbers {numbers[:8]} for {len(prompt.ids)} rows; give each one, 0 or more")
    with _injected(stream, injection):
        texts: list[list[int]] = continued(
            stream, prompt.ids, prompt.padding, length=length, stops=stops, sample=sample, numbers=numbers
        )
    return texts


@torch.inference_mode()
def score_continuation(
    model: Any,
    ids: torch.Tensor,
    continuation: Sequence[Sequence[int]],
    *,
    injection: Injection | None = None,
    stream: sites.ResidualStream,
    padding: torch.Tensor | None = None,
) -> list[float]:
    """How unlikely given continuations of prompts are, teacher-forced.

    Args:
        model: The causal language model.
        ids: As of :func:`continue_from`.
        continuation: Per row the tokens to be predicted, at least one.
        injection: States to put in.
        stream: The model's residual stream.
        padding: As of :func:`continue_from`.

    Returns:
        Per row the mean of -log p in nats per token; float64 sums of float32 log-probabilities.

    Raises:
        LayerRangeError: As :func:`continue_from`.
        SpecError: As :func:`continue_from`; or a continuation is empty or missing.
        UnsupportedArchitectureError: As :func:`continue_from`.
    """
    counts = [len(row) for row in continuation]
    if not counts or min(counts) == 0:
        raise SpecError("a continuation without tokens has no likelihood; give each row at least one")
    prompt = _prompt(model, stream, ids, injection, padding, max(counts))
    if len(counts) != len(prompt.ids):
        raise SpecError(f"{len(counts)} continuations for {len(prompt.ids)} rows; give one count for every row")
    # Padded at the right: attention is causal, so what is scored never sees it.
    wanted = torch.tensor([[*map(int, row)] + [0] * (max(counts) - len(row)) for row in continuation])
    with _injected(stream, injection):
        passes = Passes(stream)
        logits = passes.read(prompt.ids, prompt.padding)
        if max(counts) > 1:
            logits = torch.cat([logits, passes.read(wanted[:, :-1], keep=max(counts) - 1)], dim=1)
    nats = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), wanted.to(logits.device), reduction="none")
    table = nats.double().cpu().numpy()
    return [float(table[row, :count].mean()) for row, count in enumerate(counts)]


@dataclass(frozen=True, eq=False)
class _Prompt:
    """Checked prompts on the model's device."""

    ids: torch.Tensor
    padding: torch.Tensor | None


def _prompt(
    model: Any,
    stream: sites.ResidualStream,
    ids: torch.Tensor,
    injection: Injection | None,
    padding: torch.Tensor | None,
    extra: int,
) -> _Prompt:
    if injection is not None:
        none = torch.zeros_like(injection.replaced)
        theirs = none if injection.padding is None else injection.padding
        if padding is not None:
            check_padding(padding, tuple(none.shape))
            if not torch.equal(theirs.cpu(), padding.cpu()):
                raise SpecError("the prompt is padded otherwise than its injection; make that with the same padding")
        padding = theirs
    if ids.ndim != 2 or 0 in ids.shape:
        raise SpecError(f"ids of shape {tuple(ids.shape)}: give (batch, tokens), at least one of each")
    if injection is not None and injection.hidden.shape[:2] != ids.shape:
        raise SpecError(
            f"ids of shape {tuple(ids.shape)} and an injection for {tuple(injection.hidden.shape[:2])}; inject "
            "into the prompt it was made for"
        )
    if padding is not None:
        check_padding(padding, tuple(ids.shape))
        padding = padding if bool(padding.any()) else None
    if padding is not None and not stream.continuing.padding:
        raise SpecError(
            "this model reads a prompt otherwise when it is padded at the left; give prompts of one length, or one at "
            "a time"
        )
    longest = ids.shape[1] if padding is None else int((~padding).sum(dim=1).max())
    context = context_length(model.config)
    if longest + extra > context:
        raise SpecError(
            f"a prompt of {longest} tokens with {extra} new ones exceeds the context of {context}; shorten it or ask "
            "for fewer"
        )
    switch = stream.batching.switch
    shortest = longest if padding is None else int((~padding).sum(dim=1).min())
    if switch is not None and shortest <= switch < longest + extra:
        raise SpecError(
            f"prompts of {shortest} tokens and more, with {extra} new ones, pass {switch} tokens, where this model "
            "changes its position encoding; shorten them, or give those beyond it in a batch of their own"
        )
    if injection is not None:
        check_speaker(injection)
    device = input_device(stream.model)
    return _Prompt(ids.to(device), None if padding is None else padding.to(device))


@contextmanager
def _injected(stream: sites.ResidualStream, injection: Injection | None) -> Iterator[None]:
    with nullcontext() if injection is None else inject(stream, injection, whole=False):
        yield
